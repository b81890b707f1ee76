"""Labeled shapes drawn as (H, W) bool: polygons, run lengths, bitmaps, pictures.

    shape = Shape("car", "polygon", partial(polygons, [outline([10, 10, 60, 10, 60, 40], "a.json shape 1")]))
    shape.draw(size=(480, 640))        # (480, 640) bool

Points are x and y in pixels from the upper left corner; `where` is the file and entry that an error names.
"""
import base64
import io
import math
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from config import InputError, count_of
from dataio.readers import decode_mask

CIRCLE_CORNERS = 64  # of the polygon that stands for a circle
FARTHEST = 100_000  # pixels of a coordinate: pycocotools walks every pixel of an edge


class Shape(NamedTuple):
    """A labeled shape of an image.

    kind: what it is called where it is not drawn. draw: f(size=(H, W)) -> (H, W) bool, which may raise
    InputError; None where the shape encloses nothing, as a line does. area: in pixels, where the order needs
    it.
    """

    label: str
    kind: str
    draw: object
    area: float = 0


# --- regions ----------------------------------------------------------------------------------------------
def polygons(outlines, holes=(), *, size):
    """Return (H, W) bool: pixels inside any of the outlines, [(n, 2)], and none of the holes."""
    filled = np.zeros((2, *size), bool)
    for mask, rings in zip(filled, (outlines, holes), strict=True):
        if rings:
            rings = [ring.ravel().tolist() for ring in rings]
            mask[:] = coco_mask.decode(coco_mask.frPyObjects(rings, *size)).any(2)
    return filled[0] & ~filled[1]


def run_lengths(content, where, *, size):
    """Return (H, W) bool of COCO's run lengths: {"size", "counts"}, counts as text or as numbers.

    Raises InputError where they do not cover the image exactly: pycocotools would leave the rest to chance.
    """
    try:
        height, width = map(int, content["size"])
        counts = content["counts"]
        counts = np.array(counts if isinstance(counts, list) else numbers_of(counts), np.int64).reshape(-1)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError):
        raise InputError(f"{where} has run lengths without COCO's `size` and `counts`") from None
    if (height, width) != tuple(size) or counts.sum() != height * width or counts.min() < 0:
        raise InputError(f"{where} has run lengths of {height}x{width} pixels, {counts.sum()} in all; its "
                         f"image has {size[0]}x{size[1]}: export it again")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def numbers_of(text):
    """Return the numbers in the text that COCO compresses run lengths to: five bits a character, lowest
    first, signed; from the third on they are differences to the last but one. Raises ValueError.
    """
    counts, number, shift = [], 0, 0
    for character in text.encode("ascii"):
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(text)
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a number
            number -= (bits >> 4 & 1) << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    return counts


def bitmap(data, left, top, where, compressed=False, *, size):
    """Return (H, W) bool: a PNG in base64 (and zlib) that is neither black nor transparent there, its first
    pixel at (left, top), cut off at the edges. Raises InputError.
    """
    try:
        content = base64.b64decode(data)
        content = zlib.decompress(content) if compressed else content
        pixels = np.array(Image.open(io.BytesIO(content), formats=["PNG"]).convert("RGBA"))
    except (ValueError, TypeError, OSError, zlib.error, SyntaxError, Image.DecompressionBombError):
        raise InputError(f"{where} has a bitmap that cannot be read: export it again") from None
    visible = (pixels[..., :3].max(2) > 0) & (pixels[..., 3] > 0)
    visible = visible[max(0, -top):, max(0, -left):]
    mask = np.zeros(size, bool)
    target = mask[max(0, top):, max(0, left):][:visible.shape[0], :visible.shape[1]]
    target[:] = visible[:target.shape[0], :target.shape[1]]
    return mask


def picture(path, *, size):
    """Return (H, W) bool: where an image file is not 0. Raises InputError where it has another size."""
    pixels = decode_mask(path).pixels
    pixels = pixels.max(2) if pixels.ndim == 3 else pixels
    if pixels.shape != size:
        (height, width), (image_height, image_width) = pixels.shape, size
        raise InputError(f"{path} has {height}x{width} pixels, its image {image_height}x{image_width}: check "
                         "which image it belongs to")
    return pixels > 0


# --- points -----------------------------------------------------------------------------------------------
def outline(points, where, least=3):
    """Return points, flat or in pairs, as (n, 2) float64. Raises InputError where they are not finite, are
    far from any image or fewer than `least`.
    """
    try:
        corners = np.asarray(points, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where} has points that are not pairs of numbers: correct or remove it") from None
    if not np.isfinite(corners).all() or np.abs(corners).max(initial=0) > FARTHEST:
        raise InputError(f"{where} has coordinates that are not numbers up to {FARTHEST}: correct or remove "
                         "it")
    if len(corners) < least:
        raise InputError(f"{where} is a polygon of {count_of(len(corners), 'point')}, three are needed: "
                         "correct or remove it")
    return corners


def rectangle(points):
    """Return two opposite corners (2, 2) as a polygon (4, 2)."""
    (left, top), (right, bottom) = points
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], np.float64)


def circle(points):
    """Return a center and a point of the circle (2, 2) as a polygon (CIRCLE_CORNERS, 2)."""
    center, edge = np.asarray(points, np.float64)
    angles = np.arange(CIRCLE_CORNERS) * 2 * math.pi / CIRCLE_CORNERS
    return center + math.dist(center, edge) * np.stack([np.cos(angles), np.sin(angles)], 1)


def area_of(points):
    """Return the area of a polygon (n, 2) in pixels."""
    points = points - points[0]  # of coordinates in the millions, the products would lose the area
    (x, y), (next_x, next_y) = points.T, np.roll(points, -1, 0).T
    return abs((x * next_y - next_x * y).sum()) / 2
