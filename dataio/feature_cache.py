"""The feature cache: what the frozen part of a backbone makes of the images, computed once for all runs.

    python train.py --cache-features --head bn          # one pass of the backbone, then the head alone
    python train.py --cache-features --head unet        # the same blocks of the same images: no pass at all
    python train.py --cache-features --cache-views 4    # four augmented views of every image
    python train.py --cache-features --unfreeze 3       # what enters the first of the blocks that train

A cache is a memory-mapped file for every Part that the training starts from (maps and tokens of blocks in
bfloat16, images), one for every target of training images, and beside each a file of checksums, of which an
entry's is written after it: an interrupted cache is completed, a damaged entry computed again. The name of a
file is a hash of all that its content depends on. Where images were added to a data set, or masks changed,
the entries of images that another cache holds are copied from it.
"""
import hashlib
import json
import math
import os
import shutil
import zlib
from contextlib import suppress
from itertools import islice, product
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.data import Dataset
from tqdm import tqdm

from config import InputError, count_of
from dataio.contents import hash_contents, hash_file, state_of
from dataio.dataloader import Batches, collate, naming_files
from dataio.images import companions
from dataio.readers import short_hash
from models.backbones import Part, features_of_parts
from utils import acquire, barrier, is_out_of_memory, local_rank, local_world_size, write_text

VERSION = 5  # of the format
LISTS = "names", "contents", "images"  # facts about which files there are
MOVING = "contents", "images", "reading", "code"  # facts in which a cache of the same files, once, may differ
BATCH = {"cuda": 64, "mps": 16, "cpu": 8}  # images per pass of the backbone; halved while they do not fit
SPARE = 1 << 28  # bytes of disk that stay free


class EntryFile:
    """An array (N, *shape) in a memory-mapped file, and a checksum for each of its N entries."""

    def __init__(self, path, count, shape, dtype):
        self.path, self.sums_path = Path(path), Path(path).with_suffix(".sums")
        self.count, self.shape, self.dtype = count, tuple(shape), dtype
        self.values = count * math.prod(shape)
        self.bytes = self.values * dtype.itemsize
        self.arrays = None  # (values, checksums), once it is open

    def __getstate__(self):  # a worker process maps the file itself
        return {**self.__dict__, "arrays": None}

    def open(self):
        """Return the mapped (values (N, *shape), checksums (N,) int64, 0 = none). Raises InputError: gone."""
        if self.arrays is None:
            if not self.is_complete():
                raise InputError(f"--cache-features: {self.path} is gone: start again")
            shared = self.is_writable()
            values = torch.from_file(str(self.path), shared=shared, size=self.values, dtype=self.dtype)
            sums = torch.from_file(str(self.sums_path), shared=shared, size=self.count, dtype=torch.int64)
            self.arrays = values.view(self.count, *self.shape), sums
        return self.arrays

    def is_writable(self):
        """Return whether entries can be added."""
        return os.access(self.path, os.W_OK) and os.access(self.sums_path, os.W_OK)

    def is_complete(self):
        """Return whether both files have the size that they should have."""
        return all(path.is_file() and path.stat().st_size == size
                   for path, size in ((self.path, self.bytes), (self.sums_path, 8 * self.count)))

    def create(self, facts):
        """Reserve both files on disk, empty, and write `facts` beside them. Raises InputError: no room."""
        try:
            for path, size in ((self.sums_path, 8 * self.count), (self.path, self.bytes)):
                path.unlink(missing_ok=True)
                with open(path, "wb") as file:
                    os.truncate(file.fileno(), size)
                    if hasattr(os, "posix_fallocate"):  # else a full disk would end in SIGBUS later
                        os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if isinstance(error, PermissionError):
                raise InputError(f"--cache-features: {error.filename} cannot be replaced "
                                 f"({error.strerror}): it is another user's, name another folder") from None
            self.path.unlink(missing_ok=True)
            raise InputError(f"--cache-features: no room for {self.path} ({error.strerror}): free some disk, "
                             "or name another folder") from None
        write_text(self.path.with_suffix(".json"), json.dumps(facts, indent=1))

    def write(self, number, value):
        """Store an entry, then its checksum. Raises InputError for a wrong type or shape."""
        values, sums = self.open()
        if value.dtype != self.dtype or tuple(value.shape) != self.shape:
            raise InputError(f"--cache-features: {self.path} holds {self.dtype} {self.shape} and cannot hold "
                             f"{value.dtype} {tuple(value.shape)}: leave it out")
        values[number] = value
        sums[number] = checksum(values[number])

    def has(self, number):
        """Return whether entry `number` is there and undamaged."""
        values, sums = self.open()
        return sums[number] != 0 and sums[number] == checksum(values[number])


def checksum(values):
    """Return the CRC-32 of a tensor's bytes plus 2**32, so that it is never 0."""
    return zlib.crc32(values.reshape(-1).view(torch.uint8).numpy()) + (1 << 32)


class CachedDataset(Dataset):
    """Items ({Part: values}, targets, file name) in place of the (image, targets, name) of a dataset, and
    batches of Features in place of images.

    Targets as in the dataset: at its `size` for training, else as they are stored. Pass e of training over
    the images reads view e % views. parts, targets: {Part or name: EntryFile}.
    """

    def __init__(self, dataset, model, parts, targets, views):
        self.dataset, self.parts, self.targets, self.views = dataset, parts, targets, views
        self.samples, self.augments, self.seed = dataset.samples, dataset.augments, dataset.seed
        self.geometry = model.geometry(dataset.size)

    def __len__(self):
        return len(self.dataset)

    def picture(self, index):
        return self.dataset.picture(index)

    def __getitem__(self, item):
        epoch, index = divmod(item, len(self))
        number = epoch % self.views * len(self) + index
        values = {part: file.open()[0][number] for part, file in self.parts.items()}
        targets = {name: file.open()[0][number] for name, file in self.targets.items()}
        return values, targets or self.dataset.targets(index), str(self.samples[index].image)

    def collate(self, items):
        """Return (Features, targets, names) of items."""
        values, targets, names = collate(items)
        if Part("teacher") in values:
            targets["teacher"] = values.pop(Part("teacher"))
        return features_of_parts(values, self.geometry), targets, names


def cache_features(model, dataset, folder, precision, views=1, workers=0):
    """Return the CachedDataset of a SegmentationDataset, computing what `folder` does not hold yet.

    model: a Segmenter, on its device, or a student with its teacher (models/teacher.py), whose logits
    (B, K, h, w) are the target `teacher` then. Items of the passes 0..views-1 over a training dataset are the
    views. Peak memory does not grow with the number of images. Raises InputError where the disk has no room,
    and for a model whose training does not start from what a frozen part of its backbone computes.
    """
    parts, folder = model.cached_parts(), Path(folder)
    versions = versions_of(dataset.samples)
    model.eval()  # BatchNorm of a frozen backbone must not learn from the images that are cached
    files, facts = plan_files(model, parts, dataset, folder, precision, views)
    if local_rank() == 0:
        is_adopted = dataset.whole_images and not (dataset.augments or dataset.copy_paste)
        reserve(files, facts, folder, parts if is_adopted else [])
    barrier()
    missing = [number for number in range(local_rank(), len(dataset) * views, local_world_size())
               if not all(file.has(number) for file in files.values())]
    if missing and not all(file.is_writable() for file in files.values()):
        locked = next(file.path for file in files.values() if not file.is_writable())
        raise InputError(f"--cache-features: the features of {count_of(len(missing), 'view')} are missing or "
                         f"damaged, and {locked} cannot be written: name another folder")
    if missing:
        fill(model, parts, dataset, files, missing, precision, workers, versions)
    barrier()
    targets = {name: file for name, file in files.items() if name not in parts}
    return CachedDataset(dataset, model, {part: files[part] for part in parts}, targets, views)


def plan_files(model, parts, dataset, folder, precision, views, first=None):
    """Return two dicts by Part or name of a training target: EntryFile, and facts its content depends on.

    first: an image and its targets in place of those of the dataset, of which the shapes are taken.
    """
    count = len(dataset) * views
    image, targets = first or dataset[0][:2]
    with torch.inference_mode(), precision.autocast():
        first = model.compute_parts(parts, image[None].to(model.mean.device))  # {Part: (1, ...)}
    shared = dict(version=VERSION, views=views, **dataset.facts(), **file_facts(dataset.samples))
    entries, facts, model_facts = {}, {}, model.part_facts(parts)
    for part, values in first.items():
        exact = values.dtype == torch.uint8
        entries[part] = values.shape[1:], torch.uint8 if exact else torch.bfloat16
        facts[part] = dict(shared, part=str(part), shape=list(values.shape[1:]), **model_facts[part],
                           precision="" if exact else str(precision))
    for name, target in targets.items() if dataset.augments is not None else ():
        entries[name] = target.shape, target.dtype
        facts[name] = dict(shared, part=f"target {name}", table=hashlib.sha256(dataset.table).hexdigest())
    files = {}
    for key, (shape, dtype) in entries.items():
        name = f"{key}_{short_hash(json.dumps(facts[key], sort_keys=True))}.bin"
        files[key] = EntryFile(folder / name, count, shape, dtype)
    return files, facts


def file_facts(samples):
    """Return the hashes of a file list: its names, what the files hold, what each image holds. Raises
    InputError.
    """
    paths = [os.path.abspath(path) for sample in samples for path in sample.files_read()]
    names, hashes = paths, hash_contents(paths)
    with suppress(ValueError):  # Windows: data and drawn masks on two drives
        base = os.path.commonpath(list(map(os.path.dirname, paths)))
        names = [os.path.relpath(path, base) for path in paths]
    images = [short_hash([hashes[Path(os.path.abspath(path))] for path in (image, *companions(image))])
              for image in (sample.image for sample in samples)]
    return dict(names=short_hash(names), contents=short_hash([hashes[Path(path)] for path in paths]),
                images=images)


def versions_of(samples):
    """Return {Path: (state_of it, hash)} of all files on which the pixels of Samples depend. Raises
    InputError.
    """
    states = {path: state_of(path) for sample in samples for path in sample.files_read()}
    return {path: (states[path], digest) for path, digest in hash_contents(states).items()}


def check_versions(samples, versions):
    """Raise InputError where files of Samples no longer hold what they did at versions_of: what was read
    since then must not be kept as theirs, not even by a run that is stopped.
    """
    for path in (path for sample in samples for path in sample.files_read()):
        state, digest = versions.get(path, (None, None))
        if state_of(path) != state and hash_file(path) != digest:
            raise InputError(f"--cache-features: {path} was changed while features were computed: start "
                             "again")


def reserve(files, facts, folder, unchanged):
    """Create the folder and the files that are missing, while no other run does; say how large they are.
    Raises InputError where the disk is full.

    files, facts: by Part or name of a target; unchanged: the Parts that depend on an image alone, of which
    entries are copied from other caches.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--cache-features: {folder} cannot be made ({error.strerror}): name another "
                         "folder") from None
    lock = FileLock(folder / ".cache.lock", mode=0o666)  # of all who share the folder
    is_complete = all(file.is_complete() for file in files.values())
    if not is_complete:  # what is complete needs no lock, nor a writable folder
        if not os.access(folder, os.W_OK):
            raise InputError(f"--cache-features: {folder} does not hold all features of these images and "
                             "this model, and cannot be written: name another folder (--cache-features DIR)")
        acquire(lock, "--cache-features")
    try:
        missing = [key for key, file in files.items() if not file.is_complete()]
        needed, free = sum(files[key].bytes for key in missing), shutil.disk_usage(folder).free
        if missing and needed + SPARE > free:
            remove_outdated([facts[key] for key in missing], folder)
            free = shutil.disk_usage(folder).free
        first = next(iter(files))
        views = count_of(files[first].count, f"{facts[first]['split']} view")
        total = sum(file.bytes for file in files.values())
        print(f"feature cache of {views} in {folder}: {total / 1e9:.2f} GB, "
              f"{needed / 1e9:.2f} GB of it new, {free / 1e9:.1f} GB free", flush=True)
        if missing and needed + SPARE > free:
            raise InputError(f"the feature cache needs {(needed + SPARE) / 1e9:.2f} GB in {folder}, where "
                             f"{free / 1e9:.2f} GB are free: free some disk, name another folder "
                             "(--cache-features DIR), or lower --imgsz or --cache-views")
        for key in missing:
            files[key].create(facts[key])
        for part in unchanged:
            if part in missing:
                adopt(files[part], facts[part], folder)
        remove_outdated([facts[key] for key in missing], folder)
    finally:
        lock.release()


def adopt(file, facts, folder):
    """Copy entries of an EntryFile from the caches of other lists of images with the same facts."""
    own, places = json.loads(json.dumps(facts)), {}
    for place, digest in enumerate(own["images"]):
        places.setdefault(digest, []).append(place)
    for path in folder.glob("*.json"):
        with suppress(OSError, ValueError, KeyError, AttributeError):
            other, values = json.loads(path.read_text()), path.with_suffix(".bin")
            if values == file.path or but_for(LISTS, other) != but_for(LISTS, own):
                continue
            source = EntryFile(values, len(other["images"]), file.shape, file.dtype)
            for number, digest in enumerate(other["images"]) if source.is_complete() else ():
                wanted = [place for place in places.get(digest, ()) if not file.has(place)]
                if wanted and source.has(number):
                    for place in wanted:
                        file.write(place, source.open()[0][number])


def but_for(names, facts):
    """Return the facts without some of them."""
    return {key: value for key, value in facts.items() if key not in names}


def remove_outdated(all_facts, folder):
    """Remove caches of the same files as they were before they changed; name those that are of other code."""
    all_facts = json.loads(json.dumps(all_facts))
    for facts, path in product(all_facts, folder.glob("*.json")):
        with suppress(OSError, ValueError, KeyError, AttributeError):
            other, file = json.loads(path.read_text()), path.with_suffix(".bin")
            if other == facts or but_for(MOVING, other) != but_for(MOVING, facts):
                continue
            if other["contents"] == facts["contents"]:  # another branch or checkout may have a use for it
                print(f"the code has changed: {file} is of other code and can be deleted")
                continue
            for ending in (".json", ".bin", ".sums"):
                path.with_suffix(ending).unlink(missing_ok=True)
            print(f"the data set has changed: {file} is removed")


def fill(model, parts, dataset, files, missing, precision, workers, versions):
    """Compute the entries `missing` (items of the dataset) of every file; versions: versions_of its samples,
    by which the cache is named. Raises InputError for images and masks that were changed since.
    """
    device = model.mean.device
    size = BATCH.get(device.type, 8)
    loader = Batches(dataset, size, missing, workers, pin_memory=device.type == "cuda")
    numbers = iter(missing)
    model.eval()
    bar = tqdm(total=len(missing), desc="features", unit="image", leave=False, disable=None)
    with bar, naming_files(loader):
        for images, targets, _ in loader:
            batch = list(islice(numbers, len(images)))
            lacking = [index for index, number in enumerate(batch)
                       if not all(files[part].has(number) for part in parts)]
            features = {}
            if lacking:
                features, size = parts_that_fit(model, parts, images[lacking], precision, size)
            check_versions([dataset.samples[number % len(dataset)] for number in batch], versions)
            for part, values in features.items():
                for index, value in zip(lacking, values, strict=True):
                    files[part].write(batch[index], value)
            for name in targets.keys() & files.keys():
                for number, value in zip(batch, targets[name], strict=True):
                    files[name].write(number, value)
            bar.update(len(images))


@torch.inference_mode()
def parts_that_fit(model, parts, images, precision, size):
    """Return ({Part: (B, ...) on the CPU}, size): `size` images per pass, halved until they fit."""
    while True:
        try:
            batches = {part: [] for part in parts}
            for batch in images.split(size):
                with precision.autocast():
                    values = model.compute_parts(parts, batch.to(model.mean.device, non_blocking=True))
                for part, value in values.items():
                    dtype = torch.bfloat16 if value.is_floating_point() else value.dtype
                    batches[part].append(value.to(dtype).cpu())
            return {part: torch.cat(values) for part, values in batches.items()}, size
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size //= 2
            if model.mean.device.type == "cuda":
                torch.cuda.empty_cache()


class PhotoCache:
    """The cache of the photos of a dataset as they are, filled one by one in any order; later a training
    takes from it what it needs. Raises InputError as cache_features does.
    """

    def __init__(self, model, dataset, folder, precision):
        self.model, self.dataset, self.precision = model, dataset, precision
        self.parts, folder = model.cached_parts(), Path(folder)
        model.eval()
        blank = torch.zeros(dataset.rule.channels, *dataset.size, dtype=torch.uint8)
        self.versions = versions_of(dataset.samples)  # before anything is read of them
        self.files, facts = plan_files(model, self.parts, dataset, folder, precision, 1, (blank, {}))
        reserve(self.files, facts, folder, self.parts)
        self.geometry = model.geometry(dataset.size)
        self.computed = {number for number in range(len(dataset))
                         if all(file.has(number) for file in self.files.values())}

    def compute(self, number):
        """Compute the features of a photo, if they are not there."""
        if number not in self.computed:
            fill(self.model, self.parts, self.dataset, self.files, [number], self.precision, 0, self.versions)
            self.computed.add(number)

    def features(self, number):
        """Return the Features of one photo."""
        return features_of_parts({part: file.open()[0][number][None] for part, file in self.files.items()},
                                 self.geometry)
