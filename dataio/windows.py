"""Windows of large images at their own resolution, read without decoding more than they need.

    reader = WindowReader(samples, table, "outputs/cache")       # decoded once, then read from there
    image, mask = reader.read(3, 1000, 2000, 518, 518)           # (3, 518, 518), (518, 518) uint8

TIFFs are read by windows (rasterio) where image and mask both are. Other formats can only be decoded whole:
in the folder of a cache they are kept as they are decoded, and windows of them are read from there.
"""
import errno
import hashlib
import inspect
import math
import os
import shutil
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from config import IGNORE, InputError
from dataio.rasters import DAMAGED, Raster, check_pages, is_raster, named_errors, rasterio
from dataio.readers import (class_ids_of, read_image, read_mask, read_orientation, read_pair, read_upright,
                            rotate_like)
from dataio.scan import all_in_parallel
from dataio.stratify import digest_of_masks
from dataio.transforms import PADDING_COLOR, continued, nearest, resize_image, resize_mask, window_starts
from utils import hash_code, read_kept, write_atomically

SPARE = 1 << 28  # bytes of disk that stay free
POINTS = 16  # pixels of every class in every image that windows may be drawn around
LARGE_BLOCK = 1 << 22  # pixels that a TIFF decodes at once, above which it is kept decoded
OLD = 600  # seconds after which an unfinished file is a leftover
NOTHING = (*PADDING_COLOR, IGNORE)


@lru_cache
def reading_code():
    """Return a hash of the code that reads and resizes images and masks, and whether rasterio is there."""
    resizing = "".join(map(inspect.getsource, (resize_image, resize_mask, nearest, continued, window_starts)))
    code = hash_code("dataio/readers.py", "dataio/rasters.py", "dataio/windows.py")
    return f"{code} {hashlib.sha256(resizing.encode()).hexdigest()[:16]} {rasterio is not None}"


# --- one pair ---------------------------------------------------------------------------------------------
def native_size(path):
    """Return the (H, W) of an upright image file; reads its header. Raises InputError."""
    if is_raster(path):
        with named_errors(path, DAMAGED), rasterio.open(path) as file:
            check_pages(path, file)
            return file.shape
    size, orientation = read_orientation(path)
    return size[::-1] if orientation >= 5 else size


def read_native_image(path):
    """Return an image file as windows of it are read: (3, H, W) uint8 RGB, upright. Raises InputError."""
    if not is_raster(path):
        return read_image(path)
    with Raster(path) as raster:
        image = raster.read(0, 0, *raster.size)
    return torch.zeros(3, *raster.size, dtype=torch.uint8) if image is None else image[0]


def native_mask(sample, table, stored=None):
    """Return the mask (H, W) uint8 of class ids at the size of its image, turned as it is, IGNORE where a
    TIFF has no data. stored: (size, EXIF orientation) of the image where they are known.
    """
    values = read_mask(sample.mask, table)
    if is_raster(sample.image):
        with Raster(sample.image) as raster:
            wanted, valid = raster.size, raster.valid(slice(0, raster.size[0]))
    else:
        size, orientation = stored or read_orientation(sample.image)
        values, valid = rotate_like(values, size, orientation), None
        wanted = size[::-1] if orientation >= 5 else size
    if values.shape != tuple(wanted):
        values = resize_mask(torch.from_numpy(values), wanted).numpy()
    if valid is not None:
        values = np.where(valid, values, np.uint8(IGNORE))
    return values


def native_pair(sample, table):
    """Return (H, W, 4) uint8 of a Sample: RGB and class id."""
    if is_raster(sample.image):
        image, stored = read_native_image(sample.image), None
    else:
        image, *stored, _ = read_upright(sample.image)
    pixels = np.empty((*image.shape[1:], 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = image.permute(1, 2, 0).numpy(), native_mask(sample, table, stored)
    return pixels


def read_native(sample, table):
    """Return image (3, H, W) and mask (H, W) uint8 of a Sample as read_pair does, of TIFFs as windows of them
    are read, with IGNORE where they have no data.
    """
    if not is_raster(sample.image):
        return read_pair(sample, table)
    image, mask = read_native_image(sample.image), read_mask(sample.mask, table)
    if mask.shape == tuple(image.shape[1:]):
        mask = native_mask(sample, table)
    return image, torch.from_numpy(mask)


def has_windows(sample, table):
    """Return whether both files of a Sample can be read by windows, as masks and images are read whole."""
    if len(table) > 65536 or not (is_raster(sample.image) and is_raster(sample.mask)):
        return False
    with (named_errors(sample.mask, DAMAGED), rasterio.open(sample.mask) as mask,
          named_errors(sample.image, DAMAGED), rasterio.open(sample.image) as image):
        blocks = [math.prod(shape) for file in (mask, image) for shape in file.block_shapes]
        white = mask.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"  # PIL inverts these
        return (mask.count, mask.shape, white) == (1, image.shape, False) and max(blocks) <= LARGE_BLOCK and \
            mask.dtypes[0] in ("uint8", "uint16")


def read_tiff_window(sample, table, top, left, height, width):
    """Return (height, width, 4) uint8 of a window of two TIFFs, as native_pair does of the whole."""
    window = rasterio.windows.Window(left, top, width, height)
    pixels = np.zeros((height, width, 4), np.uint8)
    with Raster(sample.image) as raster:
        image = raster.read(top, left, height, width)
        with named_errors(sample.mask, DAMAGED), rasterio.open(sample.mask) as mask:
            pixels[..., 3] = class_ids_of(mask.read(1, window=window), table, sample.mask)
        with named_errors(sample.image, DAMAGED):
            pixels[raster.source.dataset_mask(window=window) == 0, 3] = IGNORE
    if image is not None:
        pixels[..., :3] = image[0].permute(1, 2, 0).numpy()
    return pixels


# --- all of them ------------------------------------------------------------------------------------------
class WindowReader:
    """Reads windows of Samples. sizes: [(H, W)] of the images; folder: where decoded ones are kept, "" =
    nowhere: an image is then decoded for every window that does not follow another one of it.

    Raises InputError for an image that cannot be read. check_room() says whether the disk has room.
    """

    def __init__(self, samples, table, folder=""):
        self.samples, self.table, self.folder = list(samples), table, folder and Path(folder)
        found = all_in_parallel(lambda sample: (native_size(sample.image), has_windows(sample, table)),
                                self.samples, "image sizes")
        self.sizes, self.by_windows = map(list, zip(*found, strict=True))
        self.last = None, None  # the pair that this process read last

    def __getstate__(self):  # a worker process reads for itself
        return {**self.__dict__, "last": (None, None)}

    def __len__(self):
        return len(self.samples)

    def kept_path(self, index):
        """Return the file that holds a decoded pair; its name is a hash of all that it depends on."""
        sample = self.samples[index]
        facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sample]
        how = reading_code(), facts, self.sizes[index], is_raster(sample.image)
        state = hashlib.sha256(repr(how).encode() + self.table.tobytes())
        return self.folder / f"decoded-{state.hexdigest()[:16]}.npy"

    def load(self, index):
        """Return (H, W, 4) uint8 of a pair, as native_pair does, in memory or mapped from the cache."""
        sample = self.samples[index]
        if not self.folder:
            return native_pair(sample, self.table)
        path = self.kept_path(index)
        pixels = read_kept(path, mmap_mode="r")
        if pixels is None or pixels.dtype != np.uint8 or pixels.shape != (*self.sizes[index], 4):
            pixels = native_pair(sample, self.table)
            with suppress(OSError):  # another process was faster, or the disk is full: it goes on without
                write_atomically(path, lambda temporary: np.save(temporary, pixels))
        return pixels

    def read(self, index, top, left, height, width):
        """Return image (3, height, width) and mask (height, width), uint8, of a window of pair `index`; what
        lies beyond the image is PADDING_COLOR and IGNORE.
        """
        high, wide = self.sizes[index]
        above, below = max(0, top), min(high, top + height)
        before, after = max(0, left), min(wide, left + width)
        window = np.full((height, width, 4), NOTHING, np.uint8)
        if below > above and after > before:
            inside = window[above - top:below - top, before - left:after - left]
            if self.by_windows[index]:
                inside[:] = read_tiff_window(self.samples[index], self.table, above, before, below - above,
                                             after - before)
            else:
                if self.last[0] != index:
                    self.last = index, self.load(index)
                inside[:] = self.last[1][above:below, before:after]
        window = torch.from_numpy(window)
        return window[..., :3].permute(2, 0, 1), window[..., 3].contiguous()

    def points(self, num_classes, cache_dir):
        """Return (M, 4) int64, rows (index, class, y, x): up to POINTS random pixels of every class in every
        image, sorted; drawn once, then read from cache_dir.
        """
        state = digest_of_masks(self.samples, self.table)
        changes = [sample.image.stat().st_mtime_ns for sample in self.samples]
        state.update(repr((reading_code(), POINTS, num_classes, self.sizes, changes)).encode())
        kept = Path(cache_dir) / f"points-{state.hexdigest()[:16]}.npy"
        rows = read_kept(kept)
        if rows is not None and rows.ndim == 2 and rows.shape[1] == 4:
            return rows

        def draw(index):
            return draw_points(native_mask(self.samples[index], self.table), index, num_classes)

        rows = np.concatenate(all_in_parallel(draw, range(len(self)), "pixels of classes"))
        write_atomically(kept, lambda temporary: np.save(temporary, rows))
        return rows


def check_room(readers):
    """Create the folder of WindowReaders and say what is to be added there. Raises InputError where it cannot
    be written, or the disk is too full for all of it.
    """
    folder = readers[0].folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*.decoded-*.npy"):
            if time.time() - path.stat().st_mtime > OLD:
                path.unlink()
        if not os.access(folder, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"--cache-images: cannot write to {folder} ({error.strerror}); name another folder"
                         ) from None
    missing = [math.prod(reader.sizes[index]) for reader in readers for index in range(len(reader))
               if not reader.by_windows[index] and not reader.kept_path(index).exists()]
    needed, free = 4 * sum(missing), shutil.disk_usage(folder).free
    print(f"decoded images in {folder}: {len(missing)} of {sum(map(len, readers))} are to be added, "
          f"{needed / 1e9:.2f} GB; {free / 1e9:.1f} GB free", flush=True)
    if needed + SPARE > free:
        raise InputError(f"--cache-images needs {needed / 1e9:.2f} GB in {folder}, which has "
                         f"{free / 1e9:.2f} GB free: free some disk, or name another folder")


def draw_points(mask, index, num_classes):
    """Return rows (index, class, y, x), (n, 4) int64: up to POINTS random pixels of every class in `mask`."""
    generator, rows = np.random.default_rng(index), [np.empty((0, 4), np.int64)]
    for id in np.flatnonzero(np.bincount(mask.ravel(), minlength=num_classes)[:num_classes]).tolist():
        found = mask == id
        ends = found.sum(1).cumsum()  # pixels of the class up to the end of every row
        ranks = np.sort(generator.integers(0, ends[-1], min(POINTS, ends[-1])))  # the how many-th each is
        ys = np.searchsorted(ends, ranks, side="right")
        before = np.concatenate([[0], ends])[ys]
        xs = [np.flatnonzero(found[y])[rank] for y, rank in zip(ys, ranks - before, strict=True)]
        rows.append(np.stack([np.full(len(ys), index), np.full(len(ys), id), ys, xs], 1))
    return np.concatenate(rows)
