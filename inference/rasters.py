"""TIFF files of any size, georeferenced or not, read and written by windows through rasterio.

    with Raster("ortho.tif") as raster, MaskFile("ortho_mask.tif", raster, classes) as mask:
        for rows, pred, _ in segment(raster, predictor):      # a predictor whose protocol is tile
            mask.write(rows, pred)

What an image holds beside its pixels stays: coordinate system, transform, where it has no data.
"""
import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from config import IGNORE, InputError
from dataio.annotations import area_of
from inference.predictor import blocks_of, views_of
from models.logits import class_ids
from visualize import color_table

try:
    import rasterio
    import rasterio.features
    import rasterio.warp
except ImportError:  # TIFFs are then read whole, as other images
    rasterio = None

TIFFS = (".tif", ".tiff")
PREVIEW = 2048  # pixels of the longer side of an overlay, and of what percentiles are taken of
PERCENTILES = 2, 98  # of deep bands, which become 0 and 255
DAMAGED = "is damaged or no TIFF: repair or remove it"
BLOCK = 256  # pixels of a side of the blocks in the files that are written


def is_raster(path):
    """Return whether a file is read by windows."""
    return rasterio is not None and Path(path).suffix.lower() in TIFFS


class Raster:
    """A TIFF as Tiles takes it: read(top, left, h, w) -> (1, 3, h, w) uint8 RGB, None where it has no data.

    bands: the numbers, from 1, of those that are red, green and blue (default: the first three, or a single
    one three times). Bands of more than 8 bit are scaled by PERCENTILES of each; `ranges` are these, else
    None. size = (H, W). Raises InputError.
    """

    def __init__(self, path, bands=()):
        self.path = Path(path)
        with named_errors(path, DAMAGED):
            self.source = rasterio.open(path)
            count = self.source.count
            self.bands = tuple(bands) or ((1, 2, 3) if count >= 3 else (1, 1, 1))
            if max(self.bands) > count:
                raise InputError(f"{path} has {count} bands: --bands {' '.join(map(str, self.bands))} asks "
                                 "for others")
            self.size = self.source.shape
            self.shape = 1, 3, *self.size
            self.ranges = self.measure() if self.source.dtypes[0] != "uint8" else None

    def measure(self):
        """Return [(low, high)] of the bands: PERCENTILES of a small version."""
        small = self.source.read(self.bands, out_shape=(3, *self.small_size()), masked=True)
        values = [band.compressed() for band in small.astype(np.float64)]
        ranges = [np.percentile(band[np.isfinite(band)], PERCENTILES) if np.isfinite(band).any() else (0, 1)
                  for band in values]
        return [(float(low), float(max(high, low + 1e-6))) for low, high in ranges]

    def small_size(self):
        """Return the (h, w) of a version with a longer side of at most PREVIEW."""
        scale = min(1.0, PREVIEW / max(self.size))
        return tuple(max(1, round(side * scale)) for side in self.size)

    def to_8_bit(self, pixels):
        """Scale (3, h, w) of the file's own type to uint8."""
        if self.ranges is None:
            return pixels
        low, high = (np.array(column)[:, None, None] for column in zip(*self.ranges, strict=True))
        scaled = np.nan_to_num(255 * (pixels.astype(np.float64) - low) / (high - low))
        return np.rint(scaled.clip(0, 255)).astype(np.uint8)

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
            small = self.source.read(self.bands, out_shape=(3, *self.small_size()))
        return np.ascontiguousarray(self.to_8_bit(small).transpose(1, 2, 0))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.source.close()


@contextmanager
def named_errors(path, what):
    """Context in which an error of rasterio is an InputError that names the file and says what is wrong."""
    try:
        yield
    except rasterio.errors.RasterioError as error:
        raise InputError(f"{path} {what} ({' '.join(str(error).split())})") from None


@torch.inference_mode()
def segment(raster, predictor, batch_size=8):
    """Yield (rows, class ids (r, W) uint8, their probabilities (r, W) float32) of a Raster from the top; the
    ids are IGNORE where it has no data. predictor: one whose protocol is tile.
    """
    views = views_of(predictor.model, raster, predictor.protocol, predictor.precision, batch_size)
    for rows, logits, _ in blocks_of(views, raster.size):
        pred = class_ids(logits)[0].cpu().numpy()
        confidence = logits.softmax(1).amax(1)[0].cpu().numpy()
        pred[~raster.valid(rows)] = IGNORE
        yield rows, pred, confidence


class MaskFile:
    """A GeoTIFF of class ids that lies where a Raster lies: tiled, compressed, with the classes' colors; 255
    is no data. The file appears under its name when it is whole.
    """

    def __init__(self, path, raster, classes):
        self.path, self.temporary = Path(path), Path(path).with_name(f".{os.getpid()}.{Path(path).name}")
        source = raster.source
        self.file = rasterio.open(
            self.temporary, "w", driver="GTiff", dtype="uint8", count=1, height=raster.size[0],
            width=raster.size[1], crs=source.crs, transform=source.transform, nodata=IGNORE, tiled=True,
            blockxsize=BLOCK, blockysize=BLOCK, compress="deflate", bigtiff="if_safer")
        colors = color_table(classes)
        self.file.write_colormap(1, {id: (*map(int, colors[id]), 255) for id in range(len(classes))})
        self.file.update_tags(**{f"class_{id}": name for id, (name, _) in enumerate(classes)})
        if raster.ranges:
            self.file.update_tags(scaled_from=json.dumps(raster.ranges))

    def write(self, rows, pred):
        """Write some rows (a slice) of class ids (r, W)."""
        window = rasterio.windows.Window(0, rows.start, pred.shape[1], len(pred))
        with named_errors(self.path, "cannot be written"):
            self.file.write(pred, 1, window=window)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.file.close()
        if kind is None:
            os.replace(self.temporary, self.path)
        self.temporary.unlink(missing_ok=True)


def polygons(path, classes, keep=None):
    """Return a GeoJSON FeatureCollection of the regions of a mask file, without those of the class `keep`.

    Coordinates are longitude and latitude (RFC 7946) where the file has a coordinate system, else those of
    its transform. area: in the square of that system's own unit (square meters for meters), without holes.
    """
    features = []
    with rasterio.open(path) as file:
        named = file.read(1)
        wanted = (named != IGNORE) & (named != (IGNORE if keep is None else keep))
        for shape, id in rasterio.features.shapes(named, mask=wanted, transform=file.transform):
            rings = [area_of(np.array(ring[:-1])) for ring in shape["coordinates"]]
            if file.crs:
                shape = rasterio.warp.transform_geom(file.crs, "EPSG:4326", shape)
            features.append(dict(type="Feature", geometry=shape, properties={
                "class": classes[int(id)][0], "id": int(id), "area": rings[0] - sum(rings[1:])}))
    return dict(type="FeatureCollection", features=features)


def read_small(path, size):
    """Return the class ids (h, w) of a mask file at a small `size` = (h, w)."""
    with rasterio.open(path) as file:
        return file.read(1, out_shape=size)
