"""From a TIFF of any size, georeferenced or not, to a mask and polygons that lie where it lies.

    with Raster("ortho.tif") as raster, MaskFile("ortho_mask.tif", raster, classes) as mask:
        for rows, pred, _ in segment(raster, predictor):      # a predictor whose protocol is tile
            mask.write(rows, pred)

What an image holds beside its pixels stays: coordinate system, transform, where it has no data.
"""
import json
import os
import zlib
from pathlib import Path

import numpy as np
import rasterio
import rasterio.features
import rasterio.warp
import torch
from rasterio.windows import Window

from config import IGNORE, InputError
from dataio.annotations.shapes import area_of
from dataio.images import named_errors
from models.upsampling import class_ids
from utils import write_atomically
from visualize import color_table

UNWRITTEN = "could not be written completely: is the disk full?"
BLOCK = 256  # pixels of a side of the blocks in the files that are written


@torch.inference_mode()
def segment(raster, predictor):
    """Yield (rows, class ids (r, W) uint8, their probabilities (r, W) float32) of a Raster from the top; the
    ids are IGNORE where it has no data. predictor: one whose protocol is tile.
    """
    batch_size = 8 if predictor.device.type == "cuda" else 2  # a CPU gains nothing from more
    for rows, probabilities, _ in predictor.rows(raster, raster.size, batch_size):
        pred = class_ids(probabilities)[0].cpu().numpy()
        confidence = probabilities.amax(1)[0].cpu().numpy()
        pred[~raster.valid(rows)] = IGNORE
        yield rows, pred, confidence


class MaskFile:
    """A GeoTIFF of class ids that lies where a Raster lies: tiled, compressed, with the classes' colors; 255
    is no data. The file appears under its name when it is complete: it is read again, since GDAL may say
    nothing of a disk that is full. Raises InputError.
    """

    def __init__(self, path, raster, classes):
        self.path, self.temporary = Path(path), Path(path).with_name(f".{os.getpid()}.{Path(path).name}")
        self.checksum, source, colors = 0, raster.file.source, color_table(classes)
        self.file = rasterio.open(
            self.temporary, "w", driver="GTiff", dtype="uint8", count=1, height=raster.size[0],
            width=raster.size[1], crs=source.crs, transform=source.transform, nodata=IGNORE, tiled=True,
            blockxsize=BLOCK, blockysize=BLOCK, compress="deflate", bigtiff="if_safer")
        self.file.write_colormap(1, {id: (*map(int, colors[id]), 255) for id in range(len(classes))})
        self.file.update_tags(**{f"class_{id}": name for id, (name, _) in enumerate(classes)})
        self.file.update_tags(images_read_as=json.dumps(raster.rule.as_dict()))

    def write(self, rows, pred):
        """Write some rows (a slice) of class ids (r, W)."""
        self.checksum = zlib.crc32(np.ascontiguousarray(pred), self.checksum)
        with named_errors(self.path, UNWRITTEN):
            self.file.write(pred, 1, window=Window(0, rows.start, pred.shape[1], len(pred)))

    def __enter__(self):
        return self

    def __exit__(self, error_type, *_):
        try:
            with named_errors(self.path, UNWRITTEN):
                self.file.close()
                if error_type is None:
                    if self.checksum_in_file() != self.checksum:
                        raise InputError(f"{self.path} {UNWRITTEN}")
                    os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)

    def checksum_in_file(self):
        """Return the checksum of what is in the file."""
        checksum = 0
        with rasterio.open(self.temporary) as file:
            for top in range(0, file.height, BLOCK):
                window = Window(0, top, file.width, min(BLOCK, file.height - top))
                checksum = zlib.crc32(file.read(1, window=window), checksum)
        return checksum


def save_polygons(path, classes, target, keep=None):
    """Write the regions of a mask file as a GeoJSON FeatureCollection, without those of the class `keep`;
    only one of them is in memory at a time.

    Coordinates are longitude and latitude (RFC 7946) where the file has a coordinate system, else those of
    its transform. area: in the square of that system's own unit (square meters for meters), without holes.
    """
    def write(temporary):
        with rasterio.open(path) as mask, open(temporary, "w", encoding="utf-8") as file:
            file.write('{"type": "FeatureCollection", "features": [')
            separator = "\n"
            for shape, id in rasterio.features.shapes(rasterio.band(mask, 1), transform=mask.transform):
                if id in (IGNORE, keep):
                    continue
                outline, *holes = [area_of(np.array(ring[:-1])) for ring in shape["coordinates"]]
                if mask.crs:
                    shape = rasterio.warp.transform_geom(mask.crs, "EPSG:4326", shape)
                properties = {"class": classes[int(id)][0], "id": int(id), "area": outline - sum(holes)}
                feature = dict(type="Feature", geometry=shape, properties=properties)
                file.write(separator + json.dumps(feature))
                separator = ",\n"
            file.write("\n]}\n")

    write_atomically(target, write)


def read_small(path, size):
    """Return the class ids (h, w) of a mask file at a small `size` = (h, w)."""
    with rasterio.open(path) as file:
        return file.read(1, out_shape=size)
