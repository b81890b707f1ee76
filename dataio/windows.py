"""Large images at their own resolution: TIFFs read by windows, others decoded once and kept.

    with Raster("ortho.tif", rule) as raster:
        raster.read(1000, 2000, 518, 518)                        # (1, C, 518, 518) uint8, None = no data
    reader = WindowReader(samples, table, "outputs/cache")       # decoded once, then read from there
    image, mask = reader.read(3, 1000, 2000, 518, 518)           # (C, 518, 518), (518, 518) uint8

TIFFs are read by windows where image and mask both are. Other formats can only be decoded as a whole: in the
folder of a cache they are kept as they are decoded, and windows of them are read from there. What a window
holds is what the same ImageRule makes of the whole image there. Targets beside the mask are refused here.
"""
import hashlib
import math
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import rasterio
import torch

from config import IGNORE, InputError
from dataio import image_rule, images, readers, resizing
from dataio.contents import hash_contents, state_of
from dataio.image_rule import PICTURES
from dataio.images import (EXIF_ORIENTATION, TIFFS, BandFile, image_size, named_errors, stored_of, tiff_tags,
upright_size)
from dataio.readers import COLORS, class_ids_of, read_sample, read_sample_targets, whole_numbers
from dataio.resizing import resize_mask
from dataio.stratify import digest_of_masks
from utils import all_in_parallel, code_hash, read_kept, write_atomically

PREVIEW = 2048  # pixels of the longer side of an overlay
SPARE = 1 << 28  # bytes of disk that stay free
POINTS = 16  # pixels of every class in every image that windows may be drawn around
LARGE_BLOCK = 1 << 22  # pixels that a TIFF decodes at once, above which it is kept decoded


def decoding_code():
    """Return a hash of the code that decodes images and masks."""
    return code_hash(images, image_rule, readers, resizing, sys.modules[__name__])


# --- TIFFs of any size, georeferenced or not --------------------------------------------------------------
def is_raster(path):
    """Return whether a file is read by windows."""
    return Path(path).suffix.lower() in TIFFS


def small_size(size):
    """Return the (h, w) of a version of an image of `size` with a longer side of at most PREVIEW."""
    scale = min(1.0, PREVIEW / max(size))
    return tuple(max(1, round(side * scale)) for side in size)


class Raster:
    """A TIFF as Tiles takes it: read(top, left, h, w) -> (1, C, h, w) uint8, None where it has no data.

    rule: the ImageRule of the data set, as it fits this file; doubt: why it may not. size = (H, W). stored:
    its images.Stored, where it was read before. Raises InputError.
    """

    def __init__(self, path, rule=PICTURES, stored=None):
        self.path, stored = Path(path), stored or stored_of(path)
        self.rule, self.doubt = rule.fitted(path, stored)
        self.alpha = rule.alpha_of(path, stored)
        if not (self.doubt or rule.strict):
            self.doubt = rule.far_outside(path, stored)
        self.file = BandFile(path)
        if stored.orientation != 1:
            raise InputError(f"{path} is stored turned (its orientation tag), and windows of it would lie "
                             "elsewhere: save it upright")
        self.bands = self.rule.bands
        if stored.is_picture and self.file.palette is None and self.file.source.count != 3:
            self.bands = (1,) * len(self.bands)
        if stored.is_picture and not self.file.is_plain:
            raise InputError(f"{path} is not read by windows in its colors: save it as 8-bit RGB")
        self.size = stored.size
        self.shape = 1, len(self.bands), *self.size
        self.may_be_empty = self.file.has_mask(self.alpha) or self.rule.nodata is not None or \
            np.dtype(stored.dtype).kind == "f"

    def convert(self, window, shape=None):
        """Return (bands (C, h, w) uint8, valid (h, w) bool or None) of a window ((top, bottom), (left,
        right)), or of all at a smaller `shape`.
        """
        values = self.file.read(self.bands, window, shape)
        return self.rule.convert(values, self.file.valid(self.alpha, window, shape))

    def read(self, top, left, height, width):
        """Return (1, C, height, width) uint8, or None where none of these pixels holds data."""
        pixels, valid = self.convert(((top, top + height), (left, left + width)))
        return None if valid is not None and not valid.any() else torch.from_numpy(pixels)[None]

    def valid(self, rows):
        """Return (r, W) bool: which pixels of some rows (a slice) hold data."""
        shape = rows.stop - rows.start, self.size[1]
        valid = self.convert(((rows.start, rows.stop), (0, self.size[1])))[1] if self.may_be_empty else None
        return np.ones(shape, bool) if valid is None else valid

    def preview(self):
        """Return a small version (h, w, 3) uint8."""
        pixels, _ = self.convert(None, small_size(self.size))
        return np.ascontiguousarray(self.rule.picture(pixels).transpose(1, 2, 0))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


# --- a sample at its own resolution -------------------------------------------------------------------------
def native_mask(sample, table, rule=PICTURES):
    """Return class ids (H, W) uint8 at the size of the upright image, IGNORE where it has no data or mask."""
    mask = read_sample_targets(sample, table, rule)["mask"]
    return resize_mask(mask, image_size(sample.image)).numpy()


def native_pair(sample, table, rule=PICTURES):
    """Return (H, W, C + 1) uint8 of a Sample: the bands of the image and the class id."""
    image, targets = read_sample(sample, table, rule=rule)
    mask = resize_mask(targets["mask"], image.shape[1:])
    return torch.cat([image, mask[None]]).permute(1, 2, 0).contiguous().numpy()


def refuse_targets(sample):
    """Raise InputError for a Sample with targets beside its mask."""
    if sample.targets:
        raise InputError(f"{sample.image} has the target {sample.targets[0].name} beside its mask, which is "
                         "not read by windows: leave out --train-scale native and --protocol tile")


def has_windows(sample, table):
    """Return whether image and mask of a Sample are TIFFs of which windows are what the files hold there."""
    if len(table) == COLORS or sample.mask is None or not all(map(is_raster, (sample.image, sample.mask))):
        return False
    with (named_errors(sample.mask), rasterio.open(sample.mask, driver="GTiff") as mask,
          BandFile(sample.image) as image):
        blocks = [math.prod(shape) for file in (mask, image.source) for shape in file.block_shapes]
        white = mask.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"  # PIL inverts these
        turned = tiff_tags(sample.mask, EXIF_ORIENTATION)[:1] not in ([], [None], [1])
        plain = mask.count == 1 and np.dtype(mask.dtypes[0]).kind in "iuf" and not (white or turned)
        same = plain and image.is_plain and mask.shape == image.source.shape
        return same and max(blocks) <= LARGE_BLOCK


def read_tiff_window(sample, table, raster, top, left, height, width):
    """Return (height, width, C + 1) uint8 of a window of two TIFFs, as native_pair does of all of it; raster:
    that of the image.
    """
    window = (top, top + height), (left, left + width)
    pixels, valid = raster.convert(window)
    with named_errors(sample.mask), rasterio.open(sample.mask, driver="GTiff") as file:
        values = whole_numbers(sample.mask, file.read(1, window=window), file.nodata)
        mask = class_ids_of(values, table, sample.mask)
    if valid is not None:
        mask = np.where(valid, mask, np.uint8(IGNORE))
    return np.dstack([*pixels, mask])


# --- windows of many samples -------------------------------------------------------------------------------
class WindowReader:
    """Reads windows of Samples, by an ImageRule. sizes: [(H, W)] of the images; folder: where decoded ones
    are kept, "" = nowhere: an image is then decoded for every window that does not follow another of it.

    Raises InputError for an image that cannot be read, or has targets beside its mask, which are not read by
    windows. check_room() says whether the disk has room.
    """

    def __init__(self, samples, table, folder="", rule=PICTURES):
        self.samples, self.table, self.folder = list(samples), table, folder and Path(folder)
        self.rule, self.beyond = rule, (*rule.fill, IGNORE)  # beyond: what lies outside of an image
        for sample in self.samples:
            refuse_targets(sample)
        facts = all_in_parallel(self.facts_of, self.samples, "image sizes")
        self.stored, self.by_windows = map(list, zip(*facts, strict=True))
        self.sizes = [upright_size(stored.size, stored.orientation) for stored in self.stored]
        self.last = None, None  # the pair that this process read last

    def facts_of(self, sample):
        """Return (Stored, whether windows are read alone) of a Sample. Raises InputError: it does not fit."""
        stored = stored_of(sample.image)
        self.rule.fitted(sample.image, stored)
        by_windows = stored.orientation == 1 and has_windows(sample, self.table)
        return stored, by_windows

    def __getstate__(self):  # a worker process reads for itself
        return {**self.__dict__, "last": (None, None)}

    def __len__(self):
        return len(self.samples)

    def kept_path(self, index):
        """Return the file that holds a decoded pair; its name is a hash of all that it depends on."""
        sample = self.samples[index]
        files = [(str(path.resolve()), state_of(path)) for path in sample.files_read()]
        facts = decoding_code(), files, self.sizes[index], self.rule.facts()
        state = hashlib.sha256(repr(facts).encode() + self.table.tobytes())
        return self.folder / f"decoded-{state.hexdigest()[:16]}.npy"

    def load(self, index):
        """Return (H, W, C + 1) uint8 of a pair, as native_pair does, in memory or mapped from the cache."""
        sample = self.samples[index]
        if not self.folder:
            return native_pair(sample, self.table, self.rule)
        path = self.kept_path(index)
        pixels = read_kept(path, mmap_mode="r")
        if pixels is None:
            pixels = native_pair(sample, self.table, self.rule)
            with suppress(OSError):  # another process was faster, or the disk is full: it goes on without
                write_atomically(path, lambda temporary: np.save(temporary, pixels))
        return pixels

    def read(self, index, top, left, height, width):
        """Return image (C, height, width) and mask (height, width), uint8, of a window of pair `index`; what
        lies beyond the image is the rule's `fill` and IGNORE.
        """
        high, wide = self.sizes[index]
        above, below = max(0, top), min(high, top + height)
        before, after = max(0, left), min(wide, left + width)
        window = np.full((height, width, len(self.beyond)), self.beyond, np.uint8)
        if below > above and after > before:
            inside = window[above - top:below - top, before - left:after - left]
            if self.by_windows[index]:
                with Raster(self.samples[index].image, self.rule, self.stored[index]) as raster:
                    inside[:] = read_tiff_window(self.samples[index], self.table, raster, above, before,
                                                 below - above, after - before)
            else:
                if self.last[0] != index:
                    self.last = index, self.load(index)
                inside[:] = self.last[1][above:below, before:after]
        window = torch.from_numpy(window)
        return window[..., :-1].permute(2, 0, 1), window[..., -1].contiguous()

    def points(self, num_classes, cache_dir):
        """Return (M, 4) int64, rows (index, class, y, x): up to POINTS random pixels of every class in every
        image, sorted; drawn once, then read from cache_dir.
        """
        state = digest_of_masks(self.samples, self.table)
        hashes = hash_contents(path for sample in self.samples for path in sample.files_read())
        facts = decoding_code(), self.rule.facts(), POINTS, num_classes, self.sizes, list(hashes.values())
        state.update(repr(facts).encode())
        path = Path(cache_dir) / f"points-{state.hexdigest()[:16]}.npy"
        rows = read_kept(path)
        if rows is not None:
            return rows

        def draw(index):
            return draw_points(native_mask(self.samples[index], self.table, self.rule), index, num_classes)

        rows = np.concatenate(all_in_parallel(draw, range(len(self)), "pixels of classes"))
        write_atomically(path, lambda temporary: np.save(temporary, rows))
        return rows


def check_room(readers):
    """Create the folder of WindowReaders and say what is to be added there. Raises InputError where something
    is and it cannot be written, or the disk is too full for all of it.
    """
    folder = readers[0].folder
    missing = [math.prod(reader.sizes[index]) for reader in readers for index in range(len(reader))
               if not reader.by_windows[index] and not reader.kept_path(index).exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if missing:  # a folder that holds all may be read-only
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--cache-images: cannot write to {folder} ({error.strerror}); name another "
                         "folder") from None
    needed, free = len(readers[0].beyond) * sum(missing), shutil.disk_usage(folder).free
    print(f"decoded images in {folder}: {len(missing)} of {sum(map(len, readers))} are to be added, "
          f"{needed / 1e9:.2f} GB; {free / 1e9:.1f} GB free", flush=True)
    if missing and needed + SPARE > free:
        raise InputError(f"--cache-images needs {needed / 1e9:.2f} GB in {folder}, which has "
                         f"{free / 1e9:.2f} GB free: free some disk, or name another folder")


def draw_points(mask, index, num_classes):
    """Return rows (index, class, y, x), (n, 4) int64: up to POINTS random pixels of every class in `mask`."""
    generator, rows = np.random.default_rng(index), [np.empty((0, 4), np.int64)]
    for id in np.flatnonzero(np.bincount(mask.ravel(), minlength=num_classes)[:num_classes]).tolist():
        of_class = mask == id
        ends = of_class.sum(1).cumsum()  # pixels of the class up to the end of every row
        ranks = np.sort(generator.integers(0, ends[-1], min(POINTS, ends[-1])))  # the how many-th each is
        ys = np.searchsorted(ends, ranks, side="right")
        before = np.concatenate([[0], ends])[ys]
        xs = [np.flatnonzero(of_class[y])[rank] for y, rank in zip(ys, ranks - before, strict=True)]
        rows.append(np.stack([np.full(len(ys), index), np.full(len(ys), id), ys, xs], 1))
    return np.concatenate(rows)
