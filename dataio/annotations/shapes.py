"""Labeled shapes as annotation files hold them: outlines, run lengths, bitmaps; and how they become pixels.

    shape = Shape("car", "polygon", "a.json shape 1", rings=[[10, 10, 60, 10, 60, 40]])
    shape = Shape("car", "mask", "a.json shape 2", bitmap=partial(decode_png, text, 35, 30))

Points are x and y, flat or in pairs, in pixels from the upper left corner of the image. A reader says what a
file holds; importer.py judges and draws it. What makes a shape unusable is a BadLabel.
"""
import base64
import io
import math
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from config import InputError
from dataio.images import open_image
from dataio.readers import decode_mask

CORNERS = 64  # of the polygon that stands for a circle or an ellipse
FARTHEST = 100_000  # pixels of a coordinate: pycocotools walks every pixel of an edge


class BadLabel(InputError):
    """What is wrong with a shape, as text that goes on after `shape`: `with a bitmap that cannot be read`."""


class Bitmap(NamedTuple):
    """Pixels of a shape: (h, w) bool, the first one at (left, top); whole: they are those of the image."""

    pixels: np.ndarray
    left: int = 0
    top: int = 0
    whole: bool = False


class Shape(NamedTuple):
    """A labeled shape of an image.

    where: its file and entry; kind: what the tool calls it, as polygon. rings, holes: outlines, and holes in
    them; bitmap: f() -> Bitmap, which may raise BadLabel; with neither, it encloses nothing or is of a kind
    that is not known. order: a higher one lies over a lower one. problem: why it cannot be used.
    """

    label: str
    kind: str
    where: str
    rings: list = ()
    holes: list = ()
    bitmap: object = None
    order: float = 0
    problem: str = ""


# --- points -----------------------------------------------------------------------------------------------
def as_points(points):
    """Return points, flat or in pairs, as (n, 2) float64. Raises BadLabel where they are no such numbers."""
    try:
        points = np.asarray(points, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        raise BadLabel("with points that are not pairs of numbers") from None
    if not np.isfinite(points).all() or np.abs(points).max(initial=0) > FARTHEST:
        raise BadLabel(f"with coordinates that are not numbers up to {FARTHEST}")
    return points


def two_points(points):
    """Return the two points of a box or circle, (2, 2). Raises BadLabel."""
    points = as_points(points)
    if len(points) != 2:
        raise BadLabel("of more or fewer than two points")
    return points


def rectangle(points):
    """Return two opposite corners as a polygon (4, 2). Raises BadLabel."""
    (left, top), (right, bottom) = two_points(points)
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], np.float64)


def box(left, top, width, height):
    """Return a box as a polygon (4, 2). Raises BadLabel."""
    left, top, width, height = as_points([left, top, width, height]).ravel()
    return rectangle([left, top, left + width, top + height])


def ellipse(center, radii, degrees=0):
    """Return an ellipse as a polygon (CORNERS, 2): radii along x and y, then turned clockwise.

    Raises BadLabel.
    """
    center, radii = two_points([center, radii])
    angles = np.arange(CORNERS) * 2 * math.pi / CORNERS
    points = radii * np.stack([np.cos(angles), np.sin(angles)], 1)  # (n, 2)
    return turned(center + points, center, degrees)


def turned(points, center, degrees):
    """Return points (n, 2) turned clockwise around a center. Raises BadLabel."""
    if not isinstance(degrees, (int, float)) or not math.isfinite(degrees):
        raise BadLabel("with a rotation that is not a number of degrees")
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return center + (points - center) @ np.array([(cos, sin), (-sin, cos)])


def circle(points):
    """Return a center and a point of the circle as a polygon (CORNERS, 2). Raises BadLabel."""
    center, edge = two_points(points)
    return ellipse(center, [math.dist(center, edge)] * 2)


def area_of(points):
    """Return the area of a polygon (n, 2) in pixels."""
    x, y = (points - points[0]).T  # of coordinates in the millions, the products would lose the area
    return abs(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2  # the first point is 0: the way back to it adds nothing


def polygons(rings, holes=(), *, size):
    """Return (H, W) bool: pixels inside any of the rings, [(n, 2)], and none of the holes."""
    filled = np.zeros((2, *size), bool)
    for mask, outlines in zip(filled, (rings, holes), strict=True):
        if outlines:
            outlines = [points.ravel().tolist() for points in outlines]
            mask[:] = coco_mask.decode(coco_mask.frPyObjects(outlines, *size)).any(2)
    return filled[0] & ~filled[1]


def polygons_bitmap(rings, holes, size):
    """Return the Bitmap of what polygons() draws: the box that holds it, of an image that is often larger."""
    points, sides = np.concatenate([*rings, *holes]), size[::-1]
    left, top = np.floor(points.min(0)).clip(0, sides).astype(int).tolist()
    right, bottom = (np.ceil(points.max(0)) + 1).clip((left, top), sides).astype(int).tolist()
    if right == left or bottom == top:
        return Bitmap(np.zeros((0, 0), bool))
    rings, holes = ([ring - (left, top) for ring in outlines] for outlines in (rings, holes))
    return Bitmap(polygons(rings, holes, size=(bottom - top, right - left)), left, top)


# --- bitmaps ----------------------------------------------------------------------------------------------
def decode_runs(content):
    """Return the Bitmap of COCO's run lengths: {"size", "counts"}, counts as text or as numbers.

    Raises BadLabel where they do not cover the image exactly: pycocotools would leave the rest to chance.
    """
    try:
        height, width = map(int, content["size"])
        counts = content["counts"]
        counts = np.array(counts if isinstance(counts, list) else numbers_of(counts), np.int64).reshape(-1)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError):
        raise BadLabel("with run lengths without COCO's `size` and `counts`") from None
    return runs_bitmap(counts, height, width, by_columns=True)


def decode_rows(counts, left, top, width, height):
    """Return the Bitmap of a box whose rows are the lengths of runs, of outside first. Raises BadLabel."""
    try:
        counts = np.array([int(count) for count in counts], np.int64)
    except (TypeError, ValueError, OverflowError):
        raise BadLabel("with run lengths that are not whole numbers") from None
    left, top, width, height = as_points([left, top, width, height]).astype(int).ravel().tolist()
    return runs_bitmap(counts, height, width)._replace(left=left, top=top, whole=False)


def runs_bitmap(counts, height, width, by_columns=False):
    """Return the Bitmap of the lengths of runs, int64, of outside and inside in turns. Raises BadLabel."""
    is_used_up = counts.max(initial=0) <= height * width == counts.sum()  # a huge sum may wrap around
    if height < 1 or width < 1 or counts.min(initial=0) < 0 or not is_used_up:
        raise BadLabel("with run lengths that do not cover their image exactly")
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    pixels = values.reshape(width, height).T if by_columns else values.reshape(height, width)
    return Bitmap(pixels, whole=True)


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


def decode_png(text, left, top, compressed=False):
    """Return the Bitmap of a PNG in base64 (and zlib) where it is neither black nor transparent, its first
    pixel at (left, top). Raises BadLabel.
    """
    try:
        content = base64.b64decode(text)
        content = zlib.decompress(content) if compressed else content
        pixels = np.array(Image.open(io.BytesIO(content), formats=["PNG"]).convert("RGBA"))
        left, top = as_points([left, top]).astype(int).ravel().tolist()
    except (ValueError, TypeError, OverflowError, OSError, zlib.error, SyntaxError,
            Image.DecompressionBombError):
        raise BadLabel("with a bitmap that cannot be read") from None
    return Bitmap((pixels[..., :3].max(2) > 0) & (pixels[..., 3] > 0), left, top)


def read_picture(path, colors=()):
    """Return the Bitmap of a picture of the image's size, where it is neither black nor transparent, or where
    it has one of the colors, 24-bit numbers. Raises BadLabel.
    """
    if not colors:
        return Bitmap(picture_codes(path) > 0, whole=True)
    stored = decode_picture(path)
    if stored.colors is None:
        raise BadLabel(f"of a picture that is not painted in colors, {path}")
    return Bitmap(np.isin(stored.colors, colors), whole=True)


def picture_codes(path):
    """Return what a picture shows, (H, W): 24-bit colors, or the numbers of a deeper one; 0 where it is
    transparent. Raises BadLabel.
    """
    stored = decode_picture(path)
    codes = stored.pixels if stored.colors is None else stored.colors
    if stored.mode in ("P", "PA", "LA", "RGBA"):
        with open_image(path) as image:
            if image.has_transparency_data:
                codes = np.where(np.array(image.convert("RGBA"))[..., 3] > 0, codes, 0)
    return codes


def decode_picture(path):
    """Return the StoredMask of a picture. Raises BadLabel."""
    try:
        return decode_mask(path)
    except InputError:
        raise BadLabel(f"of a picture that cannot be read, {path}") from None


def paste(bitmap, mask, value):
    """Set the pixels of a Bitmap in a mask (H, W) to a value; what lies beyond the edges is cut off."""
    pixels = bitmap.pixels[max(0, -bitmap.top):, max(0, -bitmap.left):]
    target = mask[max(0, bitmap.top):, max(0, bitmap.left):][:pixels.shape[0], :pixels.shape[1]]
    target[pixels[:target.shape[0], :target.shape[1]]] = value
