"""Large images at their own resolution: TIFFs read by windows, others decoded once and kept.

    with Raster("ortho.tif") as raster:
        raster.read(1000, 2000, 518, 518)                        # (1, 3, 518, 518) uint8, None = no data
    reader = WindowReader(samples, table, "outputs/cache")       # decoded once, then read from there
    image, mask = reader.read(3, 1000, 2000, 518, 518)           # (3, 518, 518), (518, 518) uint8

TIFFs are read by windows (rasterio) where image and mask both are. Other formats can only be decoded as a
whole: in the folder of a cache they are kept as they are decoded, and windows of them are read from there.
Targets beside the mask are refused here.
"""
import hashlib
import math
import os
import shutil
import sys
import tempfile
import warnings
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch

from config import IGNORE, InputError, count_of
from dataio import readers, resizing
from dataio.readers import (EXIF_ORIENTATION, class_ids_of, image_size, read_image, read_mask,
                            read_orientation, read_sample, rotate_like, tiff_tag, upright_size)
from dataio.resizing import PADDING_COLOR, resize_mask
from dataio.scan import all_in_parallel
from dataio.stratify import digest_of_masks
from utils import code_hash, read_kept, write_atomically

os.environ.setdefault("GDAL_CACHEMAX", "256")  # MB of blocks to keep; GDAL would take 5 % of the memory
os.environ.setdefault("CPL_LOG", os.devnull)  # what it complains of comes as one line
try:
    import rasterio
    from rasterio.enums import ColorInterp
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.windows import Window
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)  # such files are usual
except ImportError:  # TIFFs are then read whole, as other images
    rasterio = None

TIFFS = (".tif", ".tiff")
PREVIEW = 2048  # pixels of the longer side of an overlay, and of what percentiles are taken of
PERCENTILES = 2, 98  # of deep bands, which become 0 and 255
ROWS = 256  # that are scaled at once
DAMAGED = "is damaged or not a TIFF: repair or remove it"
SPARE = 1 << 28  # bytes of disk that stay free
POINTS = 16  # pixels of every class in every image that windows may be drawn around
LARGE_BLOCK = 1 << 22  # pixels that a TIFF decodes at once, above which it is kept decoded
NOTHING = (*PADDING_COLOR, IGNORE)


def decoding_code():
    """Return a hash of the code that decodes images and masks, and whether rasterio is there."""
    return f"{code_hash(readers, resizing, sys.modules[__name__])} {rasterio is not None}"


# --- TIFFs of any size, georeferenced or not --------------------------------------------------------------
@contextmanager
def named_errors(path, what=DAMAGED):
    """Context in which an error of rasterio is an InputError that names the file and says what is wrong."""
    try:
        yield
    except rasterio.errors.RasterioError as error:
        raise InputError(f"{path} {what} ({' '.join(str(error).split())})") from None


def is_raster(path):
    """Return whether a file is read by windows."""
    return rasterio is not None and Path(path).suffix.lower() in TIFFS


def small_size(size):
    """Return the (h, w) of a version of an image of `size` with a longer side of at most PREVIEW."""
    scale = min(1.0, PREVIEW / max(size))
    return tuple(max(1, round(side * scale)) for side in size)


@cache
def percentile_ranges(path, bands, changed):
    """Return ((low, high), ...) of bands of a TIFF: PERCENTILES of a small version. changed: its time."""
    with rasterio.open(path) as file:
        small = file.read(bands, out_shape=(len(bands), *small_size(file.shape)), masked=True)
    ranges = []
    for band in small.astype(np.float64):
        values = band.compressed()
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, PERCENTILES) if len(finite) else (0, 1)
        ranges.append((float(low), float(max(high, low + 1e-6))))
    return tuple(ranges)


def check_pages(path, source):
    """Raise InputError for an open TIFF of several pages, or one that is stored turned."""
    if source.subdatasets:
        raise InputError(f"{path} holds several pages: save each of them as a file of its own")
    if tiff_tag(path, EXIF_ORIENTATION) not in (1, None):
        raise InputError(f"{path} is stored turned (its orientation tag), and windows of it would lie "
                         "elsewhere: save it upright")


class Raster:
    """A TIFF as Tiles takes it: read(top, left, h, w) -> (1, 3, h, w) uint8 RGB, None where it has no data.

    bands: the numbers, from 1, of those that are red, green and blue (default: as the file says, the only
    three, or a single one three times). Bands of more than 8 bit are scaled by PERCENTILES of each; `ranges`
    are these, else None. size = (H, W). Raises InputError.
    """

    def __init__(self, path, bands=()):
        self.path = Path(path)
        with named_errors(path):
            self.source = rasterio.open(path)
            check_pages(path, self.source)
            self.bands = tuple(bands) or self.usual_bands()
            if max(self.bands) > self.source.count:
                raise InputError(f"{path} has {count_of(self.source.count, 'band')}: --bands "
                                 f"{' '.join(map(str, self.bands))} asks for others")
            self.size = self.source.shape
            self.shape = 1, 3, *self.size
            self.palette, colors = None, self.source.colorinterp[self.bands[0] - 1]
            if colors == ColorInterp.palette:
                entries = self.source.colormap(self.bands[0])
                self.palette = np.array([entries[value][:3] for value in sorted(entries)], np.uint8)
            self.inverted = self.source.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
            self.ranges = None
            if self.source.dtypes[0] != "uint8":
                self.ranges = percentile_ranges(self.path, self.bands, self.path.stat().st_mtime_ns)

    def usual_bands(self):
        """Return the numbers of the bands that are red, green and blue. Raises InputError: unknown."""
        kinds, colors = self.source.colorinterp, (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
        if all(color in kinds for color in colors):
            return tuple(kinds.index(color) + 1 for color in colors)
        if self.source.count > 3:
            raise InputError(f"{self.path} has {self.source.count} bands and does not say which of them are "
                             "red, green and blue: choose by --bands of infer_image.py, or save these three")
        return (1, 2, 3) if self.source.count == 3 else (1, 1, 1)

    def to_8_bit(self, pixels):
        """Return (3, h, w) of the file's own type as uint8 RGB."""
        if self.palette is not None:
            return self.palette[pixels[0]].transpose(2, 0, 1).copy()
        if self.ranges is None:
            return 255 - pixels if self.inverted else pixels
        low, high = (np.array(column)[:, None, None] for column in zip(*self.ranges, strict=True))
        scaled = np.empty(pixels.shape, np.uint8)
        for top in range(0, pixels.shape[1], ROWS):  # no more than these in float64
            rows = pixels[:, top:top + ROWS].astype(np.float64)
            share = np.nan_to_num(255 * (rows - low) / (high - low))
            scaled[:, top:top + ROWS] = np.rint(share.clip(0, 255))
        return scaled

    def read(self, top, left, height, width):
        """Return (1, 3, height, width) uint8, or None where none of these pixels holds data."""
        window = Window(left, top, width, height)
        with named_errors(self.path):
            if not self.source.dataset_mask(window=window).any():
                return None
            pixels = self.source.read(self.bands, window=window)
        return torch.from_numpy(self.to_8_bit(pixels))[None]

    def valid(self, rows):
        """Return (r, W) bool: which pixels of some rows (a slice) hold data."""
        window = Window(0, rows.start, self.size[1], rows.stop - rows.start)
        with named_errors(self.path):
            return self.source.dataset_mask(window=window) > 0

    def preview(self):
        """Return a small version (h, w, 3) uint8."""
        with named_errors(self.path):
            small = self.source.read(self.bands, out_shape=(3, *small_size(self.size)))
        return np.ascontiguousarray(self.to_8_bit(small).transpose(1, 2, 0))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.source.close()


# --- a sample at its own resolution -------------------------------------------------------------------------
def native_size(path):
    """Return the (H, W) of an upright image file; reads its header. Raises InputError."""
    if is_raster(path):
        with named_errors(path), rasterio.open(path) as file:
            check_pages(path, file)
            return file.shape
    return image_size(path)


def read_native_image(path):
    """Return an image file as windows of it are read: (3, H, W) uint8 RGB, upright. Raises InputError."""
    if not is_raster(path):
        return read_image(path)
    with Raster(path) as raster:
        image = raster.read(0, 0, *raster.size)
    return torch.zeros(3, *raster.size, dtype=torch.uint8) if image is None else image[0]


def native_mask(sample, table, resize=True):
    """Return class ids (H, W) uint8 at the size of the upright image, IGNORE where it has no data or mask.

    resize: False = leave a mask of another size as it is.
    """
    if is_raster(sample.image):
        with Raster(sample.image) as raster:
            size, orientation, valid = raster.size, 1, raster.valid(slice(0, raster.size[0]))
    else:
        (size, orientation), valid = read_orientation(sample.image), True
    upright = upright_size(size, orientation)
    if sample.mask is None:
        return np.full(upright, IGNORE, np.uint8)
    values = rotate_like(read_mask(sample.mask, table), size, orientation)
    if values.shape != tuple(upright):
        if not resize:
            return values
        values = resize_mask(torch.from_numpy(values), upright).numpy()
    return np.where(valid, values, np.uint8(IGNORE))


def native_pair(sample, table):
    """Return (H, W, 4) uint8 of a Sample: RGB and class id."""
    pixels = read_native_image(sample.image).permute(1, 2, 0).numpy()
    return np.dstack([pixels, native_mask(sample, table)])


def read_native(sample, table):
    """Return image (3, H, W) and targets {name: (H, W)} of a Sample as read_sample does, of TIFFs as windows
    of them are read, with IGNORE where they have no data. Raises InputError.
    """
    if not is_raster(sample.image):
        return read_sample(sample, table)
    refuse_targets(sample)
    mask = torch.from_numpy(native_mask(sample, table, resize=False))
    return read_native_image(sample.image), {"mask": mask}


def refuse_targets(sample):
    """Raise InputError for a Sample with targets beside its mask."""
    if sample.targets:
        raise InputError(f"{sample.image} has the target {sample.targets[0].name} beside its mask, which is "
                         "not read by windows: leave out --train-scale native and --protocol tile")


def has_windows(sample, table):
    """Return whether image and mask of a Sample are TIFFs of which windows are what the files hold there."""
    if len(table) > 65536 or sample.mask is None or not (is_raster(sample.image) and is_raster(sample.mask)):
        return False
    with (named_errors(sample.mask), rasterio.open(sample.mask) as mask,
          named_errors(sample.image), rasterio.open(sample.image) as image):
        blocks = [math.prod(shape) for file in (mask, image) for shape in file.block_shapes]
        white = mask.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"  # PIL inverts these
        plain = mask.count == 1 and mask.dtypes[0] in ("uint8", "uint16") and not white
        return plain and mask.shape == image.shape and max(blocks) <= LARGE_BLOCK


def read_tiff_window(sample, table, top, left, height, width):
    """Return (height, width, 4) uint8 of a window of two TIFFs, as native_pair does of all of it."""
    window = Window(left, top, width, height)
    pixels = np.zeros((height, width, 4), np.uint8)
    with Raster(sample.image) as raster:
        image = raster.read(top, left, height, width)
        with named_errors(sample.mask), rasterio.open(sample.mask) as mask:
            pixels[..., 3] = class_ids_of(mask.read(1, window=window), table, sample.mask)
        with named_errors(sample.image):
            pixels[raster.source.dataset_mask(window=window) == 0, 3] = IGNORE
    if image is not None:
        pixels[..., :3] = image[0].permute(1, 2, 0).numpy()
    return pixels


# --- windows of many samples -------------------------------------------------------------------------------
class WindowReader:
    """Reads windows of Samples. sizes: [(H, W)] of the images; folder: where decoded ones are kept, "" =
    nowhere: an image is then decoded for every window that does not follow another window of it.

    Raises InputError for an image that cannot be read, or has targets beside its mask, which are not read by
    windows. check_room() says whether the disk has room.
    """

    def __init__(self, samples, table, folder=""):
        self.samples, self.table, self.folder = list(samples), table, folder and Path(folder)
        for sample in self.samples:
            refuse_targets(sample)
        facts = all_in_parallel(lambda sample: (native_size(sample.image), has_windows(sample, table)),
                                self.samples, "image sizes")
        self.sizes, self.by_windows = map(list, zip(*facts, strict=True))
        self.last = None, None  # the pair that this process read last

    def __getstate__(self):  # a worker process reads for itself
        return {**self.__dict__, "last": (None, None)}

    def __len__(self):
        return len(self.samples)

    def kept_path(self, index):
        """Return the file that holds a decoded pair; its name is a hash of all that it depends on."""
        sample = self.samples[index]
        files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
                 for path in sample.files()]
        facts = decoding_code(), files, self.sizes[index], is_raster(sample.image)
        state = hashlib.sha256(repr(facts).encode() + self.table.tobytes())
        return self.folder / f"decoded-{state.hexdigest()[:16]}.npy"

    def load(self, index):
        """Return (H, W, 4) uint8 of a pair, as native_pair does, in memory or mapped from the cache."""
        sample = self.samples[index]
        if not self.folder:
            return native_pair(sample, self.table)
        path = self.kept_path(index)
        pixels = read_kept(path, mmap_mode="r")
        if pixels is None:
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
        state.update(repr((decoding_code(), POINTS, num_classes, self.sizes, changes)).encode())
        path = Path(cache_dir) / f"points-{state.hexdigest()[:16]}.npy"
        rows = read_kept(path)
        if rows is not None:
            return rows

        def draw(index):
            return draw_points(native_mask(self.samples[index], self.table), index, num_classes)

        rows = np.concatenate(all_in_parallel(draw, range(len(self)), "pixels of classes"))
        write_atomically(path, lambda temporary: np.save(temporary, rows))
        return rows


def check_room(readers):
    """Create the folder of WindowReaders and say what is to be added there. Raises InputError where it cannot
    be written, or the disk is too full for all of it.
    """
    folder = readers[0].folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--cache-images: cannot write to {folder} ({error.strerror}); name another "
                         "folder") from None
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
        of_class = mask == id
        ends = of_class.sum(1).cumsum()  # pixels of the class up to the end of every row
        ranks = np.sort(generator.integers(0, ends[-1], min(POINTS, ends[-1])))  # the how many-th each is
        ys = np.searchsorted(ends, ranks, side="right")
        before = np.concatenate([[0], ends])[ys]
        xs = [np.flatnonzero(of_class[y])[rank] for y, rank in zip(ys, ranks - before, strict=True)]
        rows.append(np.stack([np.full(len(ys), index), np.full(len(ys), id), ys, xs], 1))
    return np.concatenate(rows)
