"""TIFF files of any size, georeferenced or not, read by windows through rasterio.

    with Raster("ortho.tif") as raster:
        raster.read(1000, 2000, 518, 518)              # (1, 3, 518, 518) uint8, None where it has no data
"""
import os
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

from config import InputError, count_of
from dataio.readers import EXIF_ORIENTATION, TAG_ERRORS, tiff_tags

os.environ.setdefault("GDAL_CACHEMAX", "256")  # MB of blocks to keep; GDAL would take 5 % of the memory
os.environ.setdefault("CPL_LOG", os.devnull)  # what it complains of comes as one line
try:
    import rasterio
    from rasterio.enums import ColorInterp
    from rasterio.errors import NotGeoreferencedWarning
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)  # such files are usual
except ImportError:  # TIFFs are then read whole, as other images
    rasterio = None

TIFFS = (".tif", ".tiff")
PREVIEW = 2048  # pixels of the longer side of an overlay, and of what percentiles are taken of
PERCENTILES = 2, 98  # of deep bands, which become 0 and 255
ROWS = 256  # that are scaled at once
DAMAGED = "is damaged or no TIFF: repair or remove it"


@contextmanager
def named_errors(path, what):
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
    values = [band.compressed() for band in small.astype(np.float64)]
    ranges = [np.percentile(band[np.isfinite(band)], PERCENTILES) if np.isfinite(band).any() else (0, 1)
              for band in values]
    return tuple((float(low), float(max(high, low + 1e-6))) for low, high in ranges)


def check_pages(path, source):
    """Raise InputError for an open TIFF of several pages, or one that is stored turned."""
    if source.subdatasets:
        raise InputError(f"{path} holds several pages: save each of them as a file of its own")
    with open(path, "rb") as file:
        try:
            turned = tiff_tags(file).get(EXIF_ORIENTATION, 1) != 1
        except TAG_ERRORS:
            turned = False  # it says nothing
    if turned:
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
        with named_errors(path, DAMAGED):
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
        """Return the numbers of the bands that are red, green and blue. Raises InputError: not known."""
        kinds = self.source.colorinterp
        named = [kinds.index(kind) + 1 for kind in (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
                 if kind in kinds]
        if len(named) == 3:
            return tuple(named)
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
            part = pixels[:, top:top + ROWS].astype(np.float64)
            share = np.nan_to_num(255 * (part - low) / (high - low))
            scaled[:, top:top + ROWS] = np.rint(share.clip(0, 255))
        return scaled

    def window(self, top, left, height, width):
        """Return the window of rasterio."""
        return rasterio.windows.Window(left, top, width, height)

    def read(self, top, left, height, width):
        """Return (1, 3, height, width) uint8, or None where none of these pixels holds data."""
        window = self.window(top, left, height, width)
        with named_errors(self.path, DAMAGED):
            if not self.source.dataset_mask(window=window).any():
                return None
            pixels = self.source.read(self.bands, window=window)
        return torch.from_numpy(self.to_8_bit(pixels))[None]

    def valid(self, rows):
        """Return (r, W) bool: which pixels of some rows (a slice) hold data."""
        window = self.window(rows.start, 0, rows.stop - rows.start, self.size[1])
        with named_errors(self.path, DAMAGED):
            return self.source.dataset_mask(window=window) > 0

    def preview(self):
        """Return a small version (h, w, 3) uint8."""
        with named_errors(self.path, DAMAGED):
            small = self.source.read(self.bands, out_shape=(3, *small_size(self.size)))
        return np.ascontiguousarray(self.to_8_bit(small).transpose(1, 2, 0))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.source.close()
