"""The one rule by which all images of a data set become what a network sees.

    rule = decide_rule(paths)                  # 8-bit pictures stay as they are; other bands are scaled
    photo = rule.read("scene.tif")             # photo.image (C, H, W) uint8, photo.valid, photo.doubt
    rgb = rule.picture(photo.image)            # (3, H, W) uint8, to look at

A rule is decided from the training images, is in every checkpoint, and is used wherever an image is read: by
training, validation and every protocol, of a whole image or a window of it.
"""
import dataclasses
import math
import os
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageOps

from config import IGNORE, InputError, count_of
from dataio.images import (READERS, TIFFS, naming_damage, no_data, open_picture, read_stored, stored_of,
                           stored_size, to_rgb, upright)
from dataio.resizing import PADDING_COLOR
from utils import all_in_parallel, evenly_sampled, grouped

LOOKED_AT = 64  # images that a rule is decided from
LOOK = 256  # pixels of a side that are taken of each of them
PERCENTILES = 0.5, 99.5  # of what these hold, which become 0 and 255
LEAST_DATA = 0.01  # share of the pixels that are looked at, below which their values say nothing
ALPHA_LIKE = 0.98  # share of a band that is 0 or its largest value, from which it is transparency
MUCH_WIDER = 3  # times the range of half of the images, from which a range is said to be wide
MAY_BE_DEEP = (*TIFFS, ".png", *READERS)  # endings of files that may be no 8-bit pictures
ROWS = 256  # that are scaled at once


# --- the rule -----------------------------------------------------------------------------------------------
class Photo(NamedTuple):
    """An image that was read: image (C, H, W) uint8, upright; valid (H, W) bool, which of its pixels hold
    data, None = all; its size (H, W) as stored and its EXIF orientation 1..8; doubt: why it may not be what
    the rule was made for, "" = it is.
    """

    image: torch.Tensor
    valid: np.ndarray | None
    size: tuple
    orientation: int
    doubt: str = ""

    def ignored(self, pred):
        """Return class ids (H, W) uint8 of the image, IGNORE where it has no data."""
        return pred if self.valid is None else np.where(self.valid, pred, np.uint8(IGNORE))


@dataclass(frozen=True)
class ImageRule:
    """How the values of image files become what a network sees, (C, H, W) uint8.

    dtype: of the files' values, "" = any. bands: the numbers, from 1, of those that are read, in this order;
    () = those that each file calls red, green and blue. count, marks: where bands are given, how many a file
    has, 0 = any, and which it calls red, green and blue. ranges: the (low, high) of each band that become 0
    and 255, () = uint8 as it is; fixed: whether a user gave them. transparency: whether bands that files mark
    so are that, None = no file that was looked at has one. nodata: the value that is no data in files that do
    not say. Pixels without data become `fill`, and masks ignore them. colors: positions among the bands of
    the three that a backbone made for RGB sees; shown: of those that pictures show. mean, std: of each band,
    scaled. looked_at: (number of images it was decided from, of how many). strict: whether a file that does
    not fit is an error; else it is read as well as can be, and the doubt is said. note: what to know of it.
    """

    dtype: str = "uint8"
    bands: tuple = ()
    count: int = 0
    marks: tuple = ()
    ranges: tuple = ()
    fixed: bool = False
    transparency: bool | None = None
    nodata: float | None = None
    colors: tuple = (0, 1, 2)
    shown: tuple = (0, 1, 2)
    mean: tuple = ()
    std: tuple = ()
    looked_at: tuple = (0, 0)
    strict: bool = True
    note: str = ""

    @classmethod
    def of(cls, stored, strict=False):
        """Return the rule that a checkpoint holds, PICTURES of earlier ones that hold none."""
        if not stored:
            return cls(strict=strict)
        plain = {name: tuple(map(tuple, value)) if name == "ranges" else tuple(value)
                 if isinstance(value, (list, tuple)) else value for name, value in stored.items()}
        return cls(**plain, strict=strict)

    def as_dict(self):
        """Return the plain values that a checkpoint holds."""
        values = dataclasses.asdict(self)
        del values["strict"], values["note"]
        return {name: [list(item) if isinstance(item, tuple) else item for item in value]
                if isinstance(value, tuple) else value for name, value in values.items()}

    def facts(self):
        """Return the plain values on which the images that it makes depend."""
        values = self.as_dict()
        for name in ("shown", "mean", "std", "looked_at"):
            del values[name]
        return dict(values, fill=list(self.fill))

    @property
    def is_plain(self):
        """Whether it reads pictures as they are."""
        return (self.dtype, self.bands, self.ranges) == ("uint8", (), ())

    @property
    def channels(self):
        """How many bands the images have that it makes."""
        return len(self.bands) or 3

    @property
    def fill(self):
        """The value of each band where there is no data: about 0 after normalization."""
        values = [round(mean) for mean in self.mean] or [0] * self.channels
        for position, value in zip(self.colors, PADDING_COLOR, strict=True):
            values[position] = value
        return tuple(values)

    def __str__(self):
        numbers = f"bands {' '.join(map(str, self.bands))}{f' of {self.count}' * bool(self.count)}"
        text = f"{self.dtype or 'any type'}, {numbers if self.bands else 'red, green and blue'}"
        if self.ranges:
            ranges = dict.fromkeys(f"{low:.6g}..{high:.6g}" for low, high in self.ranges)
            text += f", values {', '.join(ranges)} become 0..255"
        else:
            text += ", values as they are"
        if self.transparency is not None:
            text += f", the band marked as transparency is {'' if self.transparency else 'not '}taken as that"
        return text + (f", {self.nodata:g} is no data" if self.nodata is not None else "")

    def showing(self, bands):
        """Return the rule with other bands for pictures, () = the same. Raises InputError: not read."""
        numbers = self.bands or (1, 2, 3)
        if bands and not set(bands) <= set(numbers):
            raise InputError(f"--show-bands {' '.join(map(str, bands))} are not three of the bands that are "
                             f"read, {' '.join(map(str, numbers))}: give three of these")
        return dataclasses.replace(self, shown=tuple(map(numbers.index, bands)) or self.shown)

    def told(self, bands=(), value_range=()):
        """Return the rule with what a user says of other files than those of the training. Raises InputError.

        bands, value_range: as the flags, () = as it is.
        """
        if not (bands or value_range):
            return self
        if bands == ("all",):
            bands = range(1, self.channels + 1)
        bands = tuple(bands) * (self.channels if len(bands) == 1 else 1)
        if bands and len(bands) != self.channels:
            raise InputError(f"--bands {' '.join(map(str, bands))}: the model sees {self.channels} bands, "
                             "as in training: give as many")
        if value_range == ("auto",):
            raise InputError("--value-range auto is decided in training: give LOW HIGH, or leave it out")
        ranges = ranges_of(value_range, self.channels) if value_range else self.ranges
        if bands:
            self = dataclasses.replace(self, bands=bands, count=0, marks=())
        if value_range:
            self = dataclasses.replace(self, ranges=ranges, dtype="", fixed=True)
        return self

    # --- files that fit or not
    def misfit(self, path, stored):
        """Return why the header of a file does not fit, "" where it does."""
        if self.dtype and stored.dtype != self.dtype:
            return f"{path} holds {stored.dtype} values, and the images of the data set {self.dtype}"
        if self.count and stored.bands != self.count:
            return f"{path} has {count_of(stored.bands, 'band')}, and the images of the data set {self.count}"
        if self.marks and stored.colors and stored.colors != self.marks:
            theirs, ours = (" ".join(map(str, colors)) for colors in (stored.colors, self.marks))
            return (f"{path} calls its bands {theirs} red, green and blue, and the images of the data set "
                    f"{ours}")
        decided = self.transparency is not None or stored.alpha in (0, *self.bands)
        if not decided and not file_alpha(path, stored):
            return (f"{path} marks band {stored.alpha} as transparency, and it does not look so (0 or the "
                    "largest value nearly everywhere): it is not read")
        return ""

    def fitted(self, path, stored):
        """Return (the rule by which a file is read, its doubt). Raises InputError: it does not fit, and the
        rule is strict, or it has not the bands that are read.
        """
        doubt = self.misfit(path, stored)
        if doubt and self.strict:
            raise InputError(f"{doubt}: convert it, or leave it out; check_data.py says more")
        bands = self.bands
        if not bands or self.count and self.channels == 3 and max(bands) > stored.bands:
            bands = usual_bands(path, stored)
        elif max(bands) > stored.bands:
            raise InputError(f"{path} has {count_of(stored.bands, 'band')}, and bands "
                             f"{' '.join(map(str, bands))} are read: give a file that has them")
        ranges = self.ranges
        if self.dtype and stored.dtype != self.dtype:
            ranges = decide_rule([path], bands).ranges
            own = ", ".join(f"{low:.6g}..{high:.6g}" for low, high in ranges)
            doubt += f": read {f'by its own {own}' if own else 'as it is'}"
        nodata = self.nodata if stored.nodata is None and not stored.is_picture else stored.nodata
        return dataclasses.replace(self, bands=bands, nodata=nodata, ranges=ranges), doubt

    def alpha_of(self, path, stored):
        """Return the number of the band of a file that is transparency, 0 = none."""
        if stored.alpha in self.bands or self.transparency is False:
            return 0
        return stored.alpha if self.transparency else file_alpha(path, stored)

    def far_outside(self, path, stored):
        """Return why the values of a file are not those that the ranges were made for, "" = they are."""
        if not self.ranges or self.fixed or self.dtype and stored.dtype != self.dtype:
            return ""
        bands = [band for (band,) in sample_values([path], {path: stored}, self)]
        least = LEAST_DATA * math.prod(look_size(stored))
        medians = [np.median(band) if band.size > least else np.nan for band in bands]
        for median, (low, high) in zip(medians, self.ranges, strict=True):
            if not (np.isnan(median) or low - (high - low) <= median <= high + (high - low)):
                return (f"{path} has a band with a median of {median:.6g}, far outside of {low:.6g}.."
                        f"{high:.6g}, the range of the data set")
        return ""

    def doubt(self, path, stored):
        """Return why a file may not be what the rule was made for, "" = it is. Raises InputError."""
        return self.misfit(path, stored) or self.far_outside(path, stored)

    # --- values
    def convert(self, values, valid=None):
        """Bands (C, h, w) of a file's type, valid (h, w) bool or None -> (C, h, w) uint8, valid or None."""
        empty = no_data(values, self.nodata)
        each = values.dtype != np.uint8  # a band may have no data alone; of 8 bit, black is often called so
        if each and empty is not None:
            values = np.where(empty, 0, values)
        if self.ranges:
            scaled = np.stack([scale(band, *ends) for band, ends in zip(values, self.ranges, strict=True)])
        elif values.dtype == np.uint8:
            scaled = values if empty is None and valid is None else np.array(values)
        else:
            raise InputError(f"values of the type {values.dtype} have no range: give --value-range LOW HIGH")
        fill = np.array(self.fill, np.uint8)[:, None]
        if empty is not None:
            if each:
                scaled[empty] = np.broadcast_to(fill[..., None], scaled.shape)[empty]
            valid = ~empty.all(0) if valid is None else valid & ~empty.all(0)
        if valid is not None:
            scaled[:, ~valid] = fill
        return scaled, valid

    def convert_array(self, values):
        """Return the Photo of an image as an array (H, W, C) of the type and the bands of the files, of bands
        () red, green and blue, or (H, W) gray; transparency is not among them. Raises InputError.
        """
        count = self.count or max(self.bands, default=3)
        if values.ndim == 2 and not self.bands:
            values = np.stack([values] * 3, 2)
        if values.ndim != 3 or values.shape[2] != count or self.dtype and str(values.dtype) != self.dtype:
            raise InputError(f"an image is an array (H, W, {count}) of {self.dtype or 'numbers'}, as in "
                             f"training, not {values.shape} of {values.dtype}")
        values = values.transpose(2, 0, 1)[[band - 1 for band in self.bands or (1, 2, 3)]]
        pixels, valid = self.convert(np.ascontiguousarray(values))
        return Photo(torch.from_numpy(pixels), valid, values.shape[1:], 1)

    def convert_frames(self, images):
        """(B, 3, H, W) uint8 RGB of a video -> (B, C, H, W) uint8, on their device. Raises InputError: the
        rule is for other bands.
        """
        if self.is_plain:
            return images
        bands = self.bands or (1, 2, 3)
        if max(bands) > 3:
            raise InputError(f"this model reads bands {' '.join(map(str, bands))}, and a video has three")
        images = images[:, [band - 1 for band in bands]]
        if not self.ranges or self.dtype not in ("", "uint8"):
            return images
        tables = [torch.from_numpy(scale_table(*ends, np.dtype(np.uint8))) for ends in self.ranges]
        return torch.stack([table.to(images.device)[images[:, position].long()]
                            for position, table in enumerate(tables)], 1)

    def read(self, path, at_least=None):
        """Read an image file as a Photo. Raises InputError.

        at_least: (h, w) that are enough; a JPEG is then decoded at 1/2, 1/4 or 1/8 of its size where that is
        no smaller, which takes a fraction of the time.
        """
        may_be_plain = self.is_plain and Path(path).suffix.lower() not in READERS
        if may_be_plain and (image := open_picture(path)) is not None:
            with image, naming_damage(path):
                size, orientation = stored_size(image)
                if at_least:
                    image.draft(None, (max(at_least),) * 2)
                rgb = to_rgb(ImageOps.exif_transpose(image) if orientation != 1 else image)
                pixels = np.array(rgb)  # (H, W, 3)
            return Photo(torch.from_numpy(pixels).permute(2, 0, 1), None, size, orientation)
        stored = stored_of(path)
        rule, doubt = self.fitted(path, stored)
        values, valid = read_stored(path, stored, rule.bands, self.alpha_of(path, stored))
        if not (doubt or self.strict):
            doubt = self.far_outside(path, stored)
        pixels, valid = rule.convert(values, valid)
        pixels = np.ascontiguousarray(upright(pixels, stored.orientation))
        valid = None if valid is None else upright(valid, stored.orientation)
        return Photo(torch.from_numpy(pixels), valid, stored.size, stored.orientation, doubt)

    def picture(self, image):
        """(..., C, H, W) uint8 -> (..., 3, H, W), the bands that pictures show."""
        if image.shape[-3] == 3 and self.shown == (0, 1, 2):
            return image
        return image[..., list(self.shown), :, :]


PICTURES = ImageRule()


def scale(values, low, high):
    """Numbers (h, w) of any type -> uint8: low becomes 0, high 255, what lies between in proportion."""
    if values.dtype.kind in "iu" and values.itemsize <= 2:
        return scale_table(low, high, values.dtype)[values.view(f"u{values.itemsize}")]
    scaled = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), ROWS):  # no more than these in float64
        scaled[top:top + ROWS] = scale_exactly(values[top:top + ROWS], low, high)
    return scaled


def scale_exactly(values, low, high):
    """As scale."""
    share = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(share.clip(0, 255)).astype(np.uint8)


@lru_cache(256)
def scale_table(low, high, dtype):
    """Return what scale makes of every value of an integer type of up to 16 bit, by its bits without sign."""
    values = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype)
    return scale_exactly(values, low, high)


# --- deciding it --------------------------------------------------------------------------------------------
def usual_bands(path, stored):
    """Return the numbers of the bands that are red, green and blue, of a file of one band that one three
    times. Raises InputError: the file does not say.
    """
    count = stored.bands - bool(stored.alpha)
    if stored.pages:
        raise InputError(f"{path} holds {stored.bands} pages of one size: where these are the bands of one "
                         "image, say which are read, --bands all, else save each as a file of its own")
    if stored.colors or count in (1, 3):
        return stored.colors or ((1, 2, 3) if count == 3 else (1, 1, 1))
    raise InputError(f"{path} has {count_of(stored.bands, 'band')} and does not say which of them are red, "
                     f"green and blue: choose, --bands {'3 2 1' if count > 2 else '1'}, or read all, "
                     "--bands all")


def file_alpha(path, stored):
    """Return the number of the band of a file that is transparency, 0 = none."""
    return alpha_of_file(path, stored, os.stat(path).st_mtime_ns) if stored.alpha else 0


@cache
def alpha_of_file(path, stored, changed):
    """As file_alpha; changed: its time."""
    return looks_like_alpha([path], {path: stored}) * stored.alpha


def looks_like_alpha(paths, stored):
    """Return whether the bands that files mark as transparency are nearly all 0 or the largest value."""
    shares = []
    for path in paths:
        values, _ = look_at(path, stored[path], (stored[path].alpha,))
        top = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else values.max()
        shares.append(((values == 0) | (values == top)).mean())
    return bool(np.mean(shares) >= ALPHA_LIKE)


def look_at(path, stored, bands, alpha=0):
    """Return a few pixels of a file as read_stored does, in LOOK rows and columns at most."""
    return read_stored(path, stored, bands, alpha, step=max(1, -(-max(stored.size) // LOOK)))


def look_size(stored):
    """Return about the (h, w) that look_at returns of a file."""
    return [min(side, LOOK) for side in stored.size]


def decide_rule(paths, bands=(), value_range=(), shown=()):
    """Return the ImageRule for a data set of these training images, of which LOOKED_AT are looked at.

    bands: numbers from 1, or ("all",), () = red, green and blue; value_range: (low, high) of all bands,
    ("auto",) = PERCENTILES of each, () = these of everything but uint8, which stays as it is; shown: three of
    the bands for pictures. Raises InputError for files of several kinds, or without the bands.
    """
    paths = list(dict.fromkeys(paths))
    sample = evenly_sampled(paths, LOOKED_AT)
    stored = dict(zip(sample, all_in_parallel(stored_of, sample, "headers"), strict=True))
    first = stored[sample[0]]
    check_alike(sample, stored, with_bands=bool(bands))
    marked = [path for path in sample if stored[path].alpha]
    nodata = {item.nodata for item in stored.values()}  # in files that do not say: where the others agree
    if first.dtype != "uint8":  # where black is often called no data
        nodata -= {None}
    rule = ImageRule(first.dtype, nodata=nodata.pop() if len(nodata) == 1 else None,
                     transparency=looks_like_alpha(marked, stored) if marked else None,
                     looked_at=(len(sample), len(paths)))
    if bands:
        alpha = first.alpha * bool(rule.transparency)
        numbers = chosen_bands(sample[0], first, bands, alpha)
        colors = color_positions(numbers, first.colors if bands == ("all",) else ())
        rule = dataclasses.replace(rule, bands=numbers, count=first.bands, marks=first.colors, colors=colors,
                                   shown=colors)
    else:
        for path in sample:
            usual_bands(path, stored[path])  # raises where a file does not say
    rule = rule.showing(shown)
    fixed = bool(value_range) and value_range != ("auto",)
    if rule.is_plain and not value_range:
        return rule
    values = sample_values(sample, stored, rule)
    if fixed:
        rule = dataclasses.replace(rule, fixed=True, ranges=ranges_of(value_range, rule.channels))
    elif value_range or first.dtype != "uint8":
        ranges = tuple(percentile_range(np.concatenate(band)) for band in values)
        rule = dataclasses.replace(rule, ranges=ranges, note=note_on(ranges, values))
    scaled = [np.concatenate(band) for band in values]
    if rule.ranges:
        scaled = [scale(band[None], *ends) for band, ends in zip(scaled, rule.ranges, strict=True)]
    return dataclasses.replace(
        rule, mean=tuple(float(band.mean()) if band.size else 0.0 for band in scaled),
        std=tuple(max(1.0, float(band.std())) if band.size else 1.0 for band in scaled))


def check_alike(paths, stored, with_bands):
    """Raise InputError where files are of several types, or numbers of bands would not mean the same."""
    def kind_of(path):
        item = stored[path]
        return (item.dtype, item.bands, item.colors) if with_bands else item.dtype

    kinds = grouped(paths, kind_of)
    if len(kinds) > 1:
        named = ", ".join(f"{count_of(len(files), 'file')} such as {files[0]} ({stored[files[0]]})"
                          for files in list(kinds.values())[:4])
        raise InputError(f"the images are of several kinds: {named}: convert them to one")


def check_fit(rule, paths):
    """Raise InputError that names the first of the files that do not fit an ImageRule, and how many."""
    if rule.is_plain:  # others are pictures, whatever they hold
        paths = [path for path in paths if Path(path).suffix.lower() in MAY_BE_DEEP]

    def doubt_of(path):
        if rule.is_plain and Path(path).suffix.lower() not in READERS and (image := open_picture(path)):
            image.close()
            return ""
        return rule.doubt(path, stored_of(path))

    doubts = list(filter(None, all_in_parallel(doubt_of, list(dict.fromkeys(paths)), "values")))
    if doubts:
        others = f" (and {count_of(len(doubts) - 1, 'more file')})" if len(doubts) > 1 else ""
        raise InputError(f"{doubts[0]}{others}: convert or leave out what check_data.py lists; where the "
                         "values are right, --value-range LOW HIGH, of all bands or of each in turn, says "
                         "which count")


def note_on(ranges, values):
    """Return what to know of ranges where a few of the images, or of their pixels, make them much wider than
    most images need, "" = nothing. values: {band: [(n,) of each image]}.
    """
    for (low, high), images in zip(ranges, values, strict=True):
        ends = np.array([percentile_range(image) for image in images if image.size])  # (N, 2)
        if len(ends) and high - low > MUCH_WIDER * np.median(ends[:, 1] - ends[:, 0]):
            usual = " ".join(f"{end:.6g}" for end in np.median(ends, 0))
            return (f"half of the images lie within {usual}: a few others make the range "
                    f"{low:.6g}..{high:.6g}, in which these are nearly one gray; --value-range {usual} "
                    "would cut them off")
    return ""


def chosen_bands(path, stored, bands, alpha):
    """Return the numbers of the bands that --bands means for a file, one of them three times. Raises
    InputError.
    """
    if bands == ("all",):
        bands = [number for number in range(1, stored.bands + 1) if number != alpha]
    if max(bands) > stored.bands:
        raise InputError(f"--bands {' '.join(map(str, bands))}: {path} has bands 1 to {stored.bands}")
    return tuple(bands) * 3 if len(bands) == 1 else tuple(bands)


def color_positions(numbers, colors):
    """Return the positions of three of the bands: of the `colors` that a file marks, else the first three."""
    if colors and set(colors) <= set(numbers):
        return tuple(map(numbers.index, colors))
    return tuple(min(position, len(numbers) - 1) for position in range(3))


def sample_values(paths, stored, rule):
    """Return the values that a few pixels of these files hold, for each band of an ImageRule a list of (n,)
    of each file.
    """
    rule = dataclasses.replace(rule, strict=False)

    def values_of(path):
        own, _ = dataclasses.replace(rule, dtype="").fitted(path, stored[path])
        values, valid = look_at(path, stored[path], own.bands, rule.alpha_of(path, stored[path]))
        return [data_of(band if valid is None else band[valid], own.nodata) for band in values]

    values = [values_of(*paths)] if len(paths) == 1 else all_in_parallel(values_of, paths, "values")
    return list(zip(*values, strict=True))


def data_of(values, nodata):
    """Return those numbers of an array that are data, (n,)."""
    empty = no_data(values, nodata)
    return values.ravel() if empty is None else values[~empty]


def ranges_of(numbers, channels):
    """Return the ((low, high), ...) of so many bands that --value-range means. Raises InputError."""
    ranges = tuple(zip(map(float, numbers[::2]), map(float, numbers[1::2]), strict=True))
    if len(ranges) not in (1, channels):
        raise InputError(f"--value-range gives LOW HIGH of {len(ranges)} bands, and {channels} are read: "
                         "give it for all at once, or for each")
    return ranges * (channels // len(ranges))


def percentile_range(values):
    """Return (low, high) of numbers (n,): their PERCENTILES."""
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values.astype(np.float64), PERCENTILES)
    least = 1.0 if values.dtype.kind in "iu" else 1e-6 * max(abs(low), abs(high)) or 1e-6
    return float(low), float(max(high, low + least, np.nextafter(low, np.inf)))


def read_image(path, rule=PICTURES):
    """Read an image file upright (EXIF) as (C, H, W) uint8, of PICTURES RGB. Raises InputError."""
    return rule.read(path).image
