"""Reading mask and map files, and images with them; decoding mask values to class ids.

    mask = read_mask("mask.png", index_table(21))      # (H, W) uint8 class ids, 255 = ignore
    image, targets = read_sample(Sample(Path("photo.jpg"), Path("mask.png")), index_table(21))

Masks leave this file as class ids 0..K-1 with 255 = ignore, whatever the files store; what a file marks as no
data is ignored. What is wrong with a file is an InputError that names it.
"""
import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from config import IGNORE, InputError
from dataio.contents import cache_home, hash_contents, hash_file
from dataio.image_rule import PICTURES, ImageRule
from dataio.images import (IMAGE_ENDINGS, TIFF_BITS, TIFF_COLORS, TIFF_SIGN, BandFile, check_size, companions,
                           load_array, naming_damage, no_data, open_image, stored_of, tiff_tags, upright,
                           upright_size)
from dataio.resizing import resize_mask

MASK_ENDINGS = IMAGE_ENDINGS
OUTSIDE = 254  # entry of a value table for mask values that are no class: an error, never trained on
MASK_VALUES = range(-32768, 65536)  # that a mask may hold
NODATA = MASK_VALUES[0] - 1  # stands for pixels that a mask file marks as no data
FINGERPRINT = "files:"  # what the fingerprints of data begin with, since they are of what the files hold
AUX_ENTRIES = re.compile(rb'<(?:NoDataValue|ColorInterp|ColorTable|Entry|MDI key="INTERNAL_MASK)[^>]*>[^<]*')
COLORS = 1 << 24  # entries of a value table for masks painted in colors


class PaintedMask(InputError):
    """A mask holds colors where class numbers were expected."""


class Target(NamedTuple):
    """Another target of an image, beside its mask. kind: `labels` (class ids in a file, 255 = ignore, moved
    by nearest neighbor) or `map` (numbers, float32, NaN = unknown, moved linearly).
    """

    name: str
    path: Path
    kind: str = "map"


class Sample(NamedTuple):
    """An image file, its mask file (None: the image has no labels) and its other Targets."""

    image: Path
    mask: Path | None = None
    targets: tuple = ()

    def files(self):
        """Return the paths of all files, the image first."""
        masks = [] if self.mask is None else [self.mask]
        return [self.image, *masks, *(target.path for target in self.targets)]

    def files_read(self):
        """Return the paths of all files on which its pixels depend."""
        return [*self.files(), *companions(self.image)]


@dataclass
class DataSource:
    """What a data-set function returns: classes, files per split, how to decode the masks.

    classes: [(name, (R, G, B)), ...] by class id. splits: {"train": [Sample], "val": [Sample]}.
    table: uint8 array, table[mask value] = class id, IGNORE or OUTSIDE; for index masks 65536 entries, with
    values below 0 behind them where there are such; COLORS entries for masks painted in colors (entry R *
    65536 + G * 256 + B). notes: lines the user should read.
    examples: (picture, clip) to try the model on, files that nothing trains on. extra: Samples of --extra.
    annotated: whether the masks were drawn from annotation files, which name the classes. rule: the ImageRule
    by which its images are read. shards: {name: shard} of those to train on, of which the first one's images
    are in splits (--shards-per-epoch).
    """

    name: str
    classes: list
    splits: dict
    table: np.ndarray
    notes: list = field(default_factory=list)
    examples: tuple = ()
    extra: list = field(default_factory=list)
    annotated: bool = False
    rule: ImageRule = PICTURES
    shards: dict = field(default_factory=dict)

    @property
    def counts(self):
        """{split: number of its images}, those of --extra as a split of their own where there are any, and
        shards in place of images where these are not known.
        """
        counts = {name: len(samples) for name, samples in self.splits.items()}
        if self.shards:
            counts = {"training shards": len(self.shards)} | counts
            del counts["train"]
        return {**counts, "extra": len(self.extra)} if self.extra else counts

    @property
    def training(self):
        """All Samples to train on."""
        return [*self.splits["train"], *self.extra]

    def fingerprints(self):
        """Return short hashes {name: text} that equal data share: of names and contents of all files (of the
        shards to train on but the first, names alone), how masks are decoded and what the classes are called,
        of which image is in which split, and of --extra where there is one. Raises InputError.
        """
        samples = [sample for split in self.splits.values() for sample in split]
        files = {absolute(path) for sample in samples for path in sample.files()}
        drawn = absolute(drawn_folder())
        # the data may move as a whole, and masks that were drawn lie elsewhere
        base = os.path.commonpath([path.parent for path in files if drawn not in path.parents])

        def name(path):
            path = absolute(path)
            return str(path.relative_to(drawn if drawn in path.parents else base))

        ordered = sorted(files, key=lambda path: (drawn not in path.parents, path))
        # the folder of a drawn mask is named by all that it was made of
        hashes = hash_contents([path for path in [*ordered, *(sample.image for sample in self.extra)]
                                if drawn not in path.parents])
        data = [(name(path), hashes.get(path)) for path in ordered]
        data += [hashlib.sha256(self.table).hexdigest(), [name for name, _ in self.classes]]
        marks = {name(sample.image): marks_of(sample.image) for sample in samples}
        data += [(image, said) for image, said in sorted(marks.items()) if said]
        data += [sorted(self.shards)] if self.shards else []  # what they hold is seen when their epoch comes
        if named := sorted({(target.name, target.kind) for sample in samples for target in sample.targets}):
            data.append(named)
        splits = [(split, sorted(name(sample.image) for sample in samples))
                  for split, samples in sorted(self.splits.items())]
        fingerprints = {"data_fingerprint": FINGERPRINT + short_hash(data),
                        "split_fingerprint": short_hash(splits)}
        if self.extra:
            extra = [(sample.image.name, hashes[sample.image], *map(name, sample.files()[1:]),
                      *marks_of(sample.image)) for sample in self.extra]
            fingerprints["extra_fingerprint"] = short_hash(extra)
        return fingerprints


def marks_of(image):
    """Return what the files beside an image say of its pixels, [] for nothing: the hash of .msk, and
    AUX_ENTRIES of .aux.xml, to which viewers add statistics that change nothing. Raises InputError.
    """
    marks = []
    for path in companions(image):
        try:
            marks += AUX_ENTRIES.findall(path.read_bytes()) if path.suffix == ".xml" else [hash_file(path)]
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})") from None
    return marks


def may_be_equal(fingerprint, other):
    """Return whether two fingerprints do not differ as far as they can be compared: None and "" are not
    known, and earlier versions made them of other facts.
    """
    known = fingerprint and other and fingerprint.startswith(FINGERPRINT) == other.startswith(FINGERPRINT)
    return not known or fingerprint == other


def short_hash(value):
    """Return 16 digits that equal plain values share."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def absolute(path):
    """Return the absolute Path without `..`, however it was spelled; links are not followed."""
    return Path(os.path.abspath(path))


def drawn_folder():
    """Return the folder of drawn masks: in it one folder each, named by a hash of all they were made of."""
    return cache_home() / "masks"


# --- masks ------------------------------------------------------------------------------------------------
def index_table(num_classes, ignored=(IGNORE,)):
    """Return the table of index masks: 0..K-1 are classes, `ignored` values IGNORE, all others OUTSIDE."""
    return value_table({**{id: id for id in range(num_classes)}, **dict.fromkeys(ignored, IGNORE)})


def value_table(entries, size=0):
    """Return the table that decodes {mask value: class id or IGNORE}; every other value is OUTSIDE. size:
    COLORS of painted masks, else 0; values below 0 count from the end of the table.
    """
    usual = MASK_VALUES.stop if min(entries) >= 0 else MASK_VALUES.stop - NODATA
    table = np.full(size or usual, OUTSIDE, np.uint8)
    table[list(entries)] = list(entries.values())
    return table


def values_of(table, wanted):
    """Return the sorted mask values of a value table of which `wanted`, bool of its shape, is true."""
    values = np.flatnonzero(wanted)
    if len(table) != COLORS:
        values[values >= MASK_VALUES.stop] -= len(table)
    return np.sort(values)


def pack_color(red, green, blue):
    """Return the 24-bit code of a color, of integers or of int32 arrays."""
    return red << 16 | green << 8 | blue


def unpack_color(code):
    """Return the (red, green, blue) of a 24-bit code, of an integer or of an array of integers."""
    return code >> 16, code >> 8 & 255, code & 255


class StoredMask(NamedTuple):
    """A mask file as it is stored. mode, kind: as PIL names the pixels and the file.

    pixels: (H, W) of MASK_VALUES or NODATA, or (H, W, 3) uint8; palette: (n, 3) of the colors behind the
    values, or None.
    """

    mode: str
    kind: str
    pixels: np.ndarray
    palette: np.ndarray

    @property
    def values(self):
        """(H, W) uint8 or int32; of RGB masks the one channel where all three are equal, else None."""
        if self.pixels.ndim == 2:
            return self.pixels
        return self.pixels[..., 0] if (self.pixels == self.pixels[..., :1]).all() else None

    @property
    def codes(self):
        """(H, W): the values or, of a mask painted in colors, those."""
        return self.colors if self.values is None else self.values

    @property
    def colors(self):
        """(H, W) int32 of 24-bit codes, or None as in color_of."""
        if self.pixels.ndim == 3:
            return pack_color(*np.moveaxis(self.pixels.astype(np.int32), 2, 0))
        return self.color_of(self.pixels)

    def color_of(self, values):
        """Values of a one-channel mask -> their 24-bit codes: of the palette, else gray; None where there
        are others than 0..255.
        """
        if self.palette is not None:
            padded = np.vstack([self.palette, np.zeros((256, 3), np.int32)]).astype(np.int32)
            return pack_color(*padded.T)[values]
        white = 0xFFFFFF if self.mode == "1" else 0x010101
        return values * np.int32(white) if values.min() >= 0 and values.max() < 256 else None


def decode_mask(path):
    """Return the StoredMask of a file. Raises InputError where it is damaged or does not hold integers."""
    if Path(path).suffix.lower() == ".npy":
        return StoredMask("array", "NPY", as_mask_pixels(path, read_array(path)), None)
    if has_numbers(path):
        with BandFile(path) as file:
            stored = file.stored
            if stored.pages:
                raise InputError(f"{path} holds several pages: save each of them as a file of its own")
            check_size(path, stored, 1)
            pixels = as_mask_pixels(path, file.read([1])[0], stored.nodata)
        return StoredMask(stored.dtype, "TIFF", upright(pixels, stored.orientation), None)
    with open_image(path) as mask, naming_damage(path):
        mode, palette = mask.mode, None
        if mode in ("P", "PA"):
            pixels = np.array(mask)[..., 0] if mode == "PA" else np.array(mask)
            palette = np.array(mask.getpalette("RGB")).reshape(-1, 3)
        elif mode in ("RGB", "RGBA", "CMYK", "YCbCr"):
            pixels = np.array(mask.convert("RGB"))
        else:
            pixels = np.array(mask.convert("L") if mode == "LA" else mask)
    return StoredMask(mode, mask.format, as_mask_pixels(path, pixels), palette)


def has_numbers(path):
    """Return whether a file is a TIFF of one band that is more than a picture of 8 bit: deeper, signed or of
    floats. PIL would not open some of them, and takes signed bytes for others.
    """
    bits = next(iter(tiff_tags(path, TIFF_BITS)), None)
    if not bits:  # no TIFF, whatever it is called
        return False
    sign, colors = (next(iter(tiff_tags(path, tag)), None) for tag in (TIFF_SIGN, TIFF_COLORS))
    return len(bits) == 1 and colors in (None, 1) and (bits[0] > 8 or sign not in (None, (1,)))


def read_array(path):
    """Return the array of a NumPy file; an axis of length 1 before or after two others is removed."""
    values = load_array(path)
    for axis in (0, -1):
        values = values.squeeze(axis) if values.ndim == 3 and values.shape[axis] == 1 else values
    return values


def as_mask_pixels(path, values, nodata=None):
    """Return an array as a StoredMask's pixels; nodata: as of whole_numbers. Raises InputError."""
    if not values.size or values.ndim != 2 and values.shape[2:] != (3,):
        raise InputError(f"{path} is an array of the shape {values.shape}: masks are (H, W), or (H, W, 3) "
                         "where they are painted")
    pixels = whole_numbers(path, values, nodata)
    if pixels.ndim == 3 and pixels.min() < 0:
        raise InputError(f"{path} is painted with values below 0: save colors as 0..255")
    return pixels


def whole_numbers(path, values, nodata=None):
    """Return mask values of any type as uint8 or int32, NODATA where they are not finite or equal `nodata`,
    unless that is None or 0: files are marked so whose 0 is the background. Raises InputError for fractions
    and numbers beyond MASK_VALUES.
    """
    if values.dtype.kind not in "biuf":
        raise InputError(f"{path} does not hold numbers: save masks as 8- or 16-bit PNG")
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.float16:
        values = values.astype(np.float32)  # which has all MASK_VALUES
    empty = no_data(values, nodata if nodata and np.isfinite(nodata) else None)
    numbers = values if empty is None else np.where(empty, 0, values)
    wrong = (numbers < MASK_VALUES[0]) | (numbers > MASK_VALUES[-1])
    wrong |= numbers % 1 != 0 if values.dtype.kind == "f" else False
    if wrong.any():
        first = numbers[wrong][0].item()
        number = f"{first:.7g}" if isinstance(first, float) else first
        raise InputError(f"{path} holds {number}, and masks hold whole numbers {MASK_VALUES[0]}.."
                         f"{MASK_VALUES[-1]}: save class ids; if that means no data, mark it so (a TIFF: "
                         f"gdal_edit.py -a_nodata {number}; an array: nan)")
    numbers = numbers.astype(np.int32)
    return numbers if empty is None else np.where(empty, np.int32(NODATA), numbers)


def read_mask(path, table):
    """Read a mask as class ids (H, W) uint8, 255 = ignore. Raises InputError for a value OUTSIDE `table`."""
    stored = decode_mask(path)
    if len(table) == COLORS:
        values = stored.colors
        if values is None:
            raise InputError(f"{path} holds other values than 0..255, and other masks are painted in colors")
    else:
        values = stored.values
        if values is None:
            raise PaintedMask(f"{path} is painted in colors, and the other masks hold class numbers")
    return class_ids_of(values, table, path)


def class_ids_of(values, table, path):
    """Return class ids (H, W) uint8 of values or color codes (H, W). Raises InputError for those OUTSIDE."""
    mask = cv2.LUT(values, table[:256]) if values.dtype == np.uint8 else table[values]
    if (mask == OUTSIDE).any():
        wrong, counts = np.unique(values[mask == OUTSIDE], return_counts=True)
        raise InputError(f"{outside_message(path, wrong, counts, table)}; python check_data.py says more")
    return mask


def outside_message(path, values, counts, table, classes=()):
    """Return the line that names a mask file, the first of its wrong `values`, and what is allowed.

    values, counts: (n,) the distinct wrong values and their pixels; classes: [(name, (R, G, B))].
    """
    pixels = f"({counts[0]} pixels)" + (f" and {len(values) - 1} more such values" if len(values) > 1 else "")
    if len(table) != COLORS:
        allowed = ranges(values_of(table, (table != OUTSIDE) & (table != IGNORE)))
        ignored = ranges(values_of(table, table == IGNORE)) or "none"
        lossy = " (a lossy JPEG mask? save masks as PNG)" if path.suffix.lower() in (".jpg", ".jpeg") else ""
        named = f", or add `ignore = {values[0]}` to classes.txt" if MASK_VALUES[0] <= values[0] < 0 else ""
        return (f"{path} has the value {ranges(values[:1])} {pixels}, which is not a class: classes are "
                f"{allowed}, ignored: {ignored}{lossy}; repair the mask{named}")
    color, codes = unpack_color(int(values[0])), np.flatnonzero(table != OUTSIDE)
    allowed = np.stack(unpack_color(codes), axis=1)  # (n, 3)
    nearest = np.abs(allowed - np.array(color)).sum(1).argmin()
    id = table[codes[nearest]]
    name = "ignore" if id == IGNORE else classes[id][0] if classes else f"class {id}"
    return (f"{path} has the color {color} {pixels}, which classes.txt does not list; the nearest is {name} "
            f"{tuple(allowed[nearest].tolist())}: repair it or list the color")


def ranges(values):
    """Return sorted integers as text: [0, 1, 2, 255] -> '0..2, 255'; NODATA is called so."""
    values, runs = [*map(int, values)], []
    if NODATA in values:
        return ", ".join(filter(None, ("no data", ranges(values[1:]))))
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{first}..{last}" if last > first else f"{first}" for first, last in runs)


# --- other targets ----------------------------------------------------------------------------------------
def read_labels(path):
    """Read class ids (H, W) uint8 as a file stores them, 255 = ignore. Raises InputError."""
    values = decode_mask(path).values
    if values is not None and values.min() == NODATA:
        values = np.where(values == NODATA, IGNORE, values)
    if values is None or values.min() < 0 or values.max() > 255:
        raise InputError(f"{path} does not hold class ids 0..255: save labels as 8-bit PNG of one channel")
    return values.astype(np.uint8)


def read_map(path):
    """Read numbers (H, W) as float32, as they are stored: of a .npy file of two dimensions, or of a gray PNG
    or TIFF of any depth. Raises InputError.
    """
    if Path(path).suffix.lower() == ".npy":
        values = read_array(path)
    else:
        with open_image(path) as image, naming_damage(path):
            is_gray = image.mode in ("1", "L", "F") or image.mode.startswith("I")
            values = np.array(image if is_gray else image.convert("RGB"))
    if values.ndim != 2 or not values.size or values.dtype.kind not in "biuf":
        raise InputError(f"{path} is not a map, one number for each pixel: save it as a gray PNG or TIFF, or "
                         "as (H, W) with numpy.save")
    return values.astype(np.float32)


TARGET_READERS = {"labels": read_labels, "map": read_map}  # by Target.kind


# --- samples ----------------------------------------------------------------------------------------------
def read_sample(sample, table, at_least=None, rule=PICTURES):
    """Return a Sample's image (C, H, W) uint8, by an ImageRule, and its targets {name: (H, W)} as
    read_targets does; pixels of the image without data are IGNORE in the mask.

    at_least: as in ImageRule.read; targets keep the size they are stored in. Raises InputError.
    """
    photo = rule.read(sample.image, at_least)
    targets = read_targets(sample, table, photo.size, photo.orientation)
    return photo.image, ignore_invalid(targets, photo.valid)


def read_sample_targets(sample, table, rule=PICTURES):
    """Return the targets of a Sample as read_sample does; a picture that has data everywhere stays closed."""
    stored = stored_of(sample.image)
    targets = read_targets(sample, table, stored.size, stored.orientation)
    return targets if stored.is_picture else ignore_invalid(targets, rule.read(sample.image).valid)


def ignore_invalid(targets, valid):
    """Return targets whose mask (H, W) is IGNORE where `valid`, bool of the image's size or None, is not."""
    if valid is not None:
        counts = torch.from_numpy(np.ascontiguousarray(valid)).to(torch.uint8)
        counts = resize_mask(counts, targets["mask"].shape)
        targets["mask"] = targets["mask"].masked_fill(counts == 0, IGNORE)
    return targets


def read_targets(sample, table, size, orientation):
    """Return {name: (H, W)} of a Sample: its mask of class ids, uint8 (all IGNORE where it has none), and its
    other targets, uint8 of labels and float32 of maps, each turned as its image is.

    size, orientation: of the image, as read_orientation says. Raises InputError.
    """
    if sample.mask is None:
        mask = np.full(upright_size(size, orientation), IGNORE, np.uint8)
    else:
        mask = rotate_like(read_mask(sample.mask, table), size, orientation)
    arrays = {"mask": mask}
    for target in sample.targets:
        if target.name in arrays:
            raise ValueError(f"{sample.image} has two targets called {target.name}")
        values = rotate_like(TARGET_READERS[target.kind](target.path), size, orientation)
        (height, width), (tall, wide) = values.shape, upright_size(size, orientation)
        if abs(height * wide - width * tall) > tall + wide:  # a pixel more or less on each side is rounding
            raise InputError(f"{target.path} has {height}x{width} values, which are not the proportions of "
                             f"{sample.image}, {tall}x{wide} pixels: write it in the image's shape")
        arrays[target.name] = values
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def rotate_like(values, size, orientation):
    """Turn a target (H, W) that was made on the unrotated pixels of an image, of `size`, as its image is."""
    if orientation < 5 or values.shape != size or size[0] == size[1]:
        return values  # not turned by 90 degrees, or the target is upright already
    return np.ascontiguousarray(upright(values, orientation))
