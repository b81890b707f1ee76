"""From image and mask files to batches: datasets, the order of an epoch, stacking, worker processes.

    train = SegmentationDataset(samples, table, (518, 518), ("flip",))               # resized to 518x518
    train = WindowDataset(WindowReader(samples, table), (518, 518), ("flip",))       # --train-scale native
    batches = make_loader(train, batch_size=8, workers=2)
    batches.start(epoch=0)                              # the workers begin
    for images, targets, names in batches:              # (B, C, h, w), {"mask": (B, h, w)}, file names

An item of a dataset is (image (C, h, w) uint8, targets {name: (h, w)}, file name), read by the ImageRule of
the data set. targets["mask"] are class ids, uint8, 255 = ignore; other targets of a Sample are uint8 labels
or float32 maps under their names.
"""
import atexit
import hashlib
import math
import os
import re
import signal
import sys
import weakref
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from config import IGNORE, InputError
from dataio.image_rule import PICTURES, read_image
from dataio.readers import read_sample, read_sample_targets, short_hash
from dataio.resizing import continued, resize_image, window_starts
from dataio.transforms import augment, fingerprint, needed_size
from dataio.windows import decoding_code
from utils import code_hash

SCALES = 0.5, 2.0  # of random windows: pixels that the network sees per pixel of the image
WORKER_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is )?([^.]*)")  # torch's words
CONNECTION_LOST = ConnectionResetError, ConnectionRefusedError, EOFError


# --- datasets ---------------------------------------------------------------------------------------------
class SegmentationDataset(Dataset):
    """Whole images, resized; in subclasses without whole_images, windows of them.

    Training (`augments` a tuple, maybe empty): image (C, h, w) and targets (h, w), all at `size`. Validation
    (`augments` None): image (C, h, w) at `size`, or as it is where `size` is empty; targets (H, W) at the
    size they are stored in. copy_paste: the CopyPaste of a training, or None. Raises InputError where not all
    samples have targets of the same names and kinds.
    """

    whole_images = True

    def __init__(self, samples, table, size, augments=None, seed=0, rule=PICTURES, copy_paste=None):
        self.samples, self.table, self.size, self.rule = list(samples), table, tuple(size), rule
        self.augments, self.seed, self.copy_paste = augments, seed, copy_paste
        kinds = {tuple((target.name, target.kind) for target in sample.targets) for sample in self.samples}
        if len(kinds) > 1:
            raise InputError(f"not all images have the same targets beside their masks: {sorted(kinds)}")

    def __len__(self):
        return len(self.samples)

    def targets(self, index):
        """Return the targets {name: (H, W)} of image `index`, at the size they are stored in, upright."""
        return read_sample_targets(self.samples[index], self.table, self.rule)

    def picture(self, index):
        """Return what item `index` of validation shows, at its own size, (3, H, W) uint8."""
        return self.rule.picture(read_image(self.samples[index].image, self.rule))

    def facts(self):
        """Return a dict of all that the items depend on beside the files and the table."""
        code = f"{decoding_code()} {code_hash(sys.modules[__name__])}"  # augment has its own
        facts = dict(split="val" if self.augments is None else "train", imgsz=list(self.size), reading=code,
                     image_rule=self.rule.facts())
        if self.augments or self.copy_paste:
            facts.update(augment=fingerprint(self.augments), seed=self.seed)
        if self.copy_paste:
            facts.update(copy_paste=short_hash(repr(self.copy_paste)))
        return facts

    @contextmanager
    def drawing(self, item):
        """Context in which torch's random numbers depend on seed, epoch and image alone: a resumed run sees
        what an uninterrupted one would. Yields the index of item epoch * len + index.
        """
        epoch, index = divmod(item, len(self))
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, index))
            yield index
        finally:
            torch.set_rng_state(state)

    def augmented(self, index):
        """Return image and targets of an image, augmented by torch's random numbers."""
        at_least = needed_size(self.size, self.augments)
        image, targets = read_sample(self.samples[index], self.table, at_least, self.rule)
        return augment(image, targets, self.size, self.augments)

    def __getitem__(self, item):
        sample = self.samples[item % len(self)]
        if self.augments is None:
            image, targets = read_sample(sample, self.table, rule=self.rule)
            image = resize_image(image, self.size) if self.size else image
            return image, targets, str(sample.image)
        with self.drawing(item) as index:
            image, targets = self.augmented(index)
            other = self.copy_paste.draw() if self.copy_paste else None
            if other is not None:
                image, targets = self.copy_paste(image, targets, *self.augmented(other))
        return image, targets, str(sample.image)


class WindowDataset(SegmentationDataset):
    """Training at the images' own resolution: random windows of them, times SCALES, at `size`.

    An image is there as often as windows of `size` cover it. balance: share of the windows that are drawn
    around a pixel of `points` (WindowReader.points), of a class of the image that is drawn first, each as
    likely as the others (as nnU-Net does, Isensee et al., Nature Methods 2021).
    """

    whole_images = False

    def __init__(self, reader, size, augments=(), seed=0, balance=0.0, points=None):
        self.images = []  # index of the image of every item of an epoch
        for index, image_size in enumerate(reader.sizes):
            self.images += [index] * max(1, round(math.prod(image_size) / math.prod(size)))
        super().__init__([reader.samples[index] for index in self.images], reader.table, size, augments, seed,
                         reader.rule)
        self.reader, self.balance, self.points = reader, balance, points

    def facts(self):
        points = hashlib.sha256(np.ascontiguousarray(self.points)).hexdigest() if self.balance else ""
        return dict(super().facts(), seed=self.seed, windows=[SCALES, self.balance, points])

    def __getitem__(self, item):
        with self.drawing(item) as index:
            image, mask = self.reader.read(self.images[index], *self.draw_window(self.images[index]))
            image, targets = augment(image, {"mask": mask}, self.size, self.augments)
        return image, targets, str(self.samples[index].image)

    def draw_window(self, index):
        """Return (top, left, height, width) in pixels of image `index`."""
        scale = torch.empty(1).uniform_(*SCALES).item()
        sides, corner, point = [max(1, round(side / scale)) for side in self.size], [], None
        if torch.rand(1).item() < self.balance:
            point = self.draw_point(index)
        for axis, (length, side) in enumerate(zip(self.reader.sizes[index], sides, strict=True)):
            lowest, highest = min(0, length - side), max(0, length - side)
            first, last = (lowest, highest) if point is None else (point[axis] - side + 1, point[axis])
            start = torch.randint(first, last + 1, ()).item()
            corner.append(min(max(start, lowest), highest))
        return *corner, *sides

    def draw_point(self, index):
        """Return a pixel (y, x) of image `index`, None where no pixel of it has a class."""
        first, last = np.searchsorted(self.points[:, 0], (index, index + 1))
        rows = self.points[first:last]
        if not len(rows):
            return None
        classes = np.unique(rows[:, 1])
        rows = rows[rows[:, 1] == classes[torch.randint(len(classes), ()).item()]]
        return rows[torch.randint(len(rows), ()).item(), 2:].tolist()


class TileDataset(SegmentationDataset):
    """Validation at the images' own resolution: tiles of `size` that cover each of them, a tile an item.

    No pixel counts twice: where the last tile of a row or column overlaps the tile before, its mask is
    ignored there. Images smaller than a tile are continued by their last pixels, which are not counted.
    """

    whole_images = False

    def __init__(self, reader, size):
        self.reader, self.tiles = reader, []  # (index of the image, top, left)
        for index, (height, width) in enumerate(reader.sizes):
            for top in window_starts(height, size[0], size[0]):
                self.tiles += [(index, top, left) for left in window_starts(width, size[1], size[1])]
        super().__init__([reader.samples[index] for index, _, _ in self.tiles], reader.table, size,
                         rule=reader.rule)

    def facts(self):
        return dict(super().facts(), tiles=True)

    def read(self, item):
        """Return image (C, h, w) and mask (h, w) of a tile."""
        index, *corner = self.tiles[item]
        sides = list(map(min, self.size, self.reader.sizes[index]))
        image, mask = self.reader.read(index, *corner, *sides)
        mask[:-corner[0] % self.size[0]] = IGNORE  # counted in the tile above
        mask[:, :-corner[1] % self.size[1]] = IGNORE  # counted in the tile to the left
        below, right = self.size[0] - sides[0], self.size[1] - sides[1]
        return continued(image, self.size), pad(mask, (0, right, 0, below), value=IGNORE)

    def targets(self, index):
        return {"mask": self.read(index)[1]}

    def picture(self, index):
        return self.rule.picture(self.read(index)[0])

    def __getitem__(self, item):
        image, mask = self.read(item)
        return image, {"mask": mask}, str(self.samples[item].image)


# --- order ------------------------------------------------------------------------------------------------
def mixed_seed(*numbers):
    """Return a 63-bit seed that depends on all the integers, the same in every process."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class EpochSampler(Sampler):
    """Yields items pass * length + index, pass after pass over the images; the order of a pass depends on
    (seed, pass) alone. An epoch is one pass, or so many images of them as `per_epoch` says.

    Of several processes, each takes every n-th item, so that their batches together are those of one
    process with larger batches; the order's start is repeated until all have equally many.
    """

    def __init__(self, length, seed, rank=0, world_size=1, per_epoch=0):
        self.length, self.seed, self.epoch, self.skip = length, seed, 0, 0
        self.rank, self.world_size, self.per_epoch = rank, world_size, per_epoch or length

    def __len__(self):
        return -(-self.per_epoch // self.world_size)

    def __iter__(self):
        start = self.epoch * self.per_epoch
        first, last = start // self.length, (start + self.per_epoch - 1) // self.length
        order = torch.cat([self.pass_order(number) for number in range(first, last + 1)])
        order = order[start - first * self.length:][:self.per_epoch]
        order = order.repeat(self.world_size)[:len(self) * self.world_size][self.rank::self.world_size]
        return iter(order[self.skip:].tolist())

    def pass_order(self, number):
        """Return the items (length,) of one pass over all images."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, number))
        return number * self.length + torch.randperm(self.length, generator=generator)

    def set_epoch(self, epoch, skip=0):
        """Choose the order and the augmentations of this epoch (0-based), without its first `skip` images."""
        self.epoch, self.skip = epoch, skip


# --- stacking ---------------------------------------------------------------------------------------------
def collate(items):
    """Stack items: images to (B, 3, h, w), or what a cache holds of them to {name: (B, ...)}; each target to
    (B, h, w) where all have one size, else a list.
    """
    images, targets, names = zip(*items, strict=True)
    if isinstance(images[0], dict):
        images = default_collate(images)
    else:  # the colors of a pixel lie side by side: stacked as they lie
        images = default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    batch = {}
    for name in targets[0]:
        tensors = [target[name] for target in targets]
        has_one_size = len({tensor.shape for tensor in tensors}) == 1
        batch[name] = default_collate(tensors) if has_one_size else tensors
    return images, batch, list(names)


# --- worker processes -------------------------------------------------------------------------------------
class Noted(Dataset):
    """A dataset that notes which item every worker process reads: should one die, the file is known."""

    def __init__(self, dataset, workers):
        self.dataset = dataset
        with torch.inference_mode(False):  # a first batch may be asked for by a validation
            self.reading = torch.zeros(workers, 2, dtype=torch.int64)  # process id, item
            self.closed = torch.zeros(1, dtype=torch.bool)
        if workers:
            self.reading.share_memory_()
            self.closed.share_memory_()

    def start_worker(self, _):
        """Set up a worker process: where all processes are asked to stop, the main one ends the work."""
        def stop(*_):
            if self.closed:
                os._exit(0)

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, stop)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        if worker := get_worker_info():
            self.reading[worker.id, 0], self.reading[worker.id, 1] = os.getpid(), item
        return self.dataset[item]


class Batches:
    """The batches of a dataset, loaded by worker processes; the first of them before they are asked for."""

    def __init__(self, dataset, batch_size, sampler, workers, pin_memory):
        self.dataset, self.batch_size, self.sampler = dataset, batch_size, sampler
        self.workers, self.pin_memory = workers, pin_memory
        self.noted = self.loader = self.started = None
        atexit.register(close_if_alive, weakref.ref(self))

    def start(self, epoch=0, skip=0):
        """Let the workers begin with an epoch (0-based), without its first `skip` batches."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch, skip * self.batch_size)
        self.started = self.iterate()

    def iterate(self):
        """Return an iterator over an epoch; where no worker process can be started, it loads by itself."""
        if self.loader is not None:
            return iter(self.loader)
        try:
            self.noted = Noted(self.dataset, self.workers)
            # a generator of its own, so that starting an epoch early moves no random numbers of the training
            loader = DataLoader(self.noted, self.batch_size, sampler=self.sampler, num_workers=self.workers,
                                collate_fn=getattr(self.dataset, "collate", collate),
                                generator=torch.Generator(), pin_memory=self.pin_memory,
                                persistent_workers=self.workers > 0, worker_init_fn=self.noted.start_worker)
            iterator = iter(loader)
        except (OSError, RuntimeError) as error:
            if not self.workers or WORKER_DEATH.search(str(error)):
                raise
            print(f"note: no worker processes load data (--workers 0), they cannot be started: {error}",
                  flush=True)
            self.workers = 0
            return self.iterate()
        self.loader = loader
        return iterator

    def __len__(self):
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self):
        started, self.started = self.started or self.iterate(), None
        return started

    def close(self):
        """End the worker processes, for good."""
        if self.noted is not None:
            self.noted.closed[0] = True
        self.started = self.loader = None  # its workers end with it

    def file_read_by(self, process):
        """Return the image that a worker process (its id) read last, or None where it is none of these."""
        for number, item in self.noted.reading.tolist() if self.noted is not None else []:
            if number == process:
                return self.dataset.samples[item % len(self.dataset)].image
        return None


def close_if_alive(reference):
    """Close the Batches of a weak reference at the end of the program, which would wait for the workers."""
    if batches := reference():
        batches.close()


def make_loader(dataset, batch_size, workers, pin_memory=False, rank=0, world_size=1, per_epoch=0):
    """Return the Batches of a SegmentationDataset, shuffled by EpochSampler where it is for training.

    Of several processes, each gets its share: in training of equal length, in validation every image once.
    per_epoch: training images of an epoch, 0 = all of them once.
    """
    if dataset.augments is None:
        sampler = range(rank, len(dataset), world_size)
    else:
        sampler = EpochSampler(len(dataset), dataset.seed, rank, world_size, per_epoch)
    return Batches(dataset, batch_size, sampler, workers, pin_memory)


@contextmanager
def naming_files(*loaders):
    """Context in which the death of a worker process of these Batches is an InputError with its file; at its
    end the worker processes end.
    """
    try:
        yield
    except (RuntimeError, *CONNECTION_LOST) as error:
        death = WORKER_DEATH.search(str(error))
        if not death and isinstance(error, RuntimeError):
            raise
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would say once more that one died
        processes = map(int, death[1].split(",")) if death else ()
        files = [batches.file_read_by(process) for process in processes for batches in loaders]
        names = " and ".join(str(file) for file in files if file) or "no file"
        if "Bus error" in str(error) or "shared memory" in str(error):
            raise InputError(f"the shared memory is full, while {names} was read: enlarge it (docker run "
                             "--shm-size 8g), or lower --workers or --batch-size") from None
        reason = death[2] if death else str(error) or type(error).__name__
        raise InputError(f"a process that loads data died ({reason}) while it read {names}: repair or remove "
                         "the file; where memory ran out, lower --workers") from None
    finally:
        for batches in loaders:
            batches.close()
