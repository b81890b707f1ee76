"""Which shapes of an annotated image can be drawn, and where: kinds, outlines, views, sizes, edges.

    canvas = Canvas(path, entry, size, orientation)     # an image file and what an annotation file has of it
    judge_shapes(canvas, annotations, problems, nothing)
    doubts = decide_frames(canvases, shares) + judge_frames(canvases, shares, problems)
    canvas.draw(values)                                  # the (H, W) mask of the upright image

All formats are judged here. What cannot be used is a problem, {what is wrong: [file and entry]}, and makes
its image bad: without a shape that cannot be used, its object would be taught as background.
"""
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from config import InputError, count_of
from dataio.annotations.files import AnnotatedImage
from dataio.annotations.shapes import BadLabel, area_of, as_points, paste, polygons_bitmap
from dataio.images import upright, upright_size
from dataio.resizing import resize_mask

ENCLOSE_NOTHING = {"point", "points", "keypoint", "keypoints", "line", "lines", "linestrip", "polyline",
                   "skeleton"}
MARGIN = 2  # pixels by which a point may lie outside of its image
FAR = 0.1  # of the side: points of annotations of another size lie further outside


# --- what comes of an annotated image ---------------------------------------------------------------------
@dataclass
class Drawable:
    """A shape that can be drawn, in pixels of the frame. rings, holes: [(n, 2)]; bitmap: f() -> Bitmap or
    None; corners: (2, 2), the upper left and lower right of all its points; whole: as Bitmap.whole.
    """

    label: str
    where: str
    order: tuple
    rings: list
    holes: list
    bitmap: object
    corners: np.ndarray
    whole: bool = False

    def draw(self, mask, value):
        """Set its pixels in a mask (H, W) to a value."""
        bitmap = self.bitmap() if self.bitmap else polygons_bitmap(self.rings, self.holes, mask.shape)
        paste(bitmap, mask, value)


@dataclass
class Canvas:
    """An image file with its shapes. size, orientation: as stored; shapes: [Drawable]; is_upright: whether
    its shapes lie on the upright image, None = not known; frame: the (H, W) that their points refer to.
    """

    path: Path
    entry: AnnotatedImage
    size: tuple
    orientation: int
    shapes: list = field(default_factory=list)
    is_upright: bool = None
    frame: tuple = None
    is_bad: bool = False

    @property
    def upright_size(self):
        """(H, W) of the image as people see it, and of its mask."""
        return upright_size(self.size, self.orientation)

    def corners(self):
        """Return (2, 2): the upper left and lower right of all its outlines, or None without any."""
        boxes = [shape.corners for shape in self.shapes if not shape.whole]
        return np.stack([np.min(boxes, 0)[0], np.max(boxes, 0)[1]]) if boxes else None

    def draw(self, values):
        """Return the mask of the upright image, uint8; values: {label: mask value}."""
        mask = np.zeros(self.frame, np.uint8)
        for shape in sorted(self.shapes, key=lambda shape: shape.order):
            shape.draw(mask, values[shape.label])
        mask = mask if self.is_upright else np.ascontiguousarray(upright(mask, self.orientation))
        return resize_mask(torch.from_numpy(mask), self.upright_size).numpy()


# --- shapes -----------------------------------------------------------------------------------------------
def judge_shapes(canvas, annotations, problems, nothing):
    """Give a Canvas the shapes of its entry that can be drawn; the others become problems or are counted."""
    for number, shape in enumerate(canvas.entry.shapes):
        label = "" if shape.label is None else str(shape.label).strip()
        problem = shape.problem
        try:
            if not problem and not label:
                problem = "without a class"
            elif not problem and not shape.rings and not shape.bitmap:
                if shape.kind.lower() in ENCLOSE_NOTHING:
                    nothing[shape.kind] += 1
                    continue
                problem = f"of the unknown kind {shape.kind}"
            elif not problem:
                if drawn := drawable(shape, label, number, annotations.by_area):
                    canvas.shapes.append(drawn)
                else:
                    nothing[f"{shape.kind} without area"] += 1
        except BadLabel as error:
            problem = str(error)
        if problem:
            canvas.is_bad = True
            problems[f"shape {problem}"].append(shape.where)


def drawable(shape, label, number, by_area):
    """Return the Drawable of a Shape, the n-th of its image, None where its outlines have no area, as in
    COCO here and there; by_area: as in Annotations. Raises BadLabel.
    """
    if shape.bitmap:
        bitmap = shape.bitmap()
        rings, holes, area, whole = [], [], int(bitmap.pixels.sum()), bitmap.whole
        corners = corners_of(bitmap)
    else:
        (rings, area), (holes, area_of_holes) = map(enclosing, (shape.rings, shape.holes))
        area, whole = area - area_of_holes, False
        points = np.concatenate(rings) if rings else np.zeros((1, 2))
        corners = np.stack([points.min(0), points.max(0)])
    if not area > 0 and not shape.bitmap:
        if all(len(as_points(ring)) < 3 for ring in shape.rings):
            raise BadLabel("of fewer than three points")
        return None
    order = (shape.order, -area if by_area else 0, number)
    return Drawable(label, shape.where, order, rings, holes, shape.bitmap, corners, whole)


def enclosing(outlines):
    """Return those of the outlines that enclose something, [(n, 2)], and their area. Raises BadLabel."""
    rings = [ring for ring in map(as_points, outlines) if len(ring) >= 3]
    areas = list(map(area_of, rings))
    return [ring for ring, area in zip(rings, areas, strict=True) if area > 0], sum(areas)


def corners_of(bitmap):
    """Return (2, 2): where the pixels of a Bitmap begin and end; of a whole one its size."""
    height, width = bitmap.pixels.shape
    return np.array([(bitmap.left, bitmap.top), (bitmap.left + width, bitmap.top + height)], np.float64)


# --- frames: which view of an image, and of which size, the points refer to -------------------------------
def decide_frames(canvases, shares):
    """Decide for every Canvas what its points refer to: is_upright and frame; return doubts.

    A phone stores a portrait photo as landscape, with an EXIF orientation that turns it. Tools give sizes and
    points of either. What lies inside of one and not of the other decides, else what the other images of the
    data set say, else the size that the file gives, which is a guess.
    """
    turned = [canvas for canvas in canvases if canvas.orientation != 1]
    for canvas in turned:
        canvas.is_upright = view_of(canvas, shares)
    known = {canvas.is_upright for canvas in turned} - {None}
    guessed = []
    for canvas in canvases:
        sizes = frame_sizes(canvas)
        if canvas.orientation == 1:
            canvas.is_upright = True
        elif canvas.is_upright is None:
            stored_given = canvas.entry.size == canvas.size != canvas.upright_size
            canvas.is_upright = next(iter(known)) if len(known) == 1 else not stored_given
            if len(known) != 1 and canvas.shapes:
                guessed.append(canvas)
        canvas.frame = sizes[canvas.is_upright]
    if not guessed:
        return []
    views = Counter("the upright image" if canvas.is_upright else "the image as stored" for canvas in guessed)
    taken = ", ".join(f"{view} ({count})" for view, count in views.items())
    return [f"{count_of(len(guessed), 'image')} turned by EXIF, as {guessed[0].path.name}: nothing tells "
            f"whether the labels were drawn before or after turning; taken as drawn on {taken}. check.png of "
            "check_data.py shows it; write upright images where it is wrong"]


def frame_sizes(canvas):
    """Return {is_upright: (H, W) of the frame, None where no view has these proportions}.

    Files may give the size of a larger or smaller copy, or its sides in the other order.
    """
    given = canvas.entry.size or whole_size(canvas) or canvas.upright_size
    return {is_upright: next((size for size in (given, given[::-1]) if alike(size, view)), None)
            for is_upright, view in ((True, canvas.upright_size), (False, canvas.size))}


def whole_size(canvas):
    """Return the (H, W) of the bitmaps of a whole image, None without any."""
    return next((tuple(int(side) for side in shape.corners[1][::-1]) for shape in canvas.shapes
                 if shape.whole), None)


def view_of(canvas, shares):
    """Return whether the shapes of a turned image lie on its upright view, None where nothing tells."""
    size, stored, turned = canvas.entry.size, canvas.size, canvas.upright_size
    if alike(stored, turned):
        return None
    if whole := whole_size(canvas):
        return True if alike(whole, turned) else False if alike(whole, stored) else None
    corners, sizes = canvas.corners(), frame_sizes(canvas)
    if corners is not None and not shares and None not in sizes.values():
        inside = {view: bool((corners[1] <= np.array(size[::-1]) + MARGIN).all())
                  for view, size in sizes.items()}
        if inside[True] != inside[False]:
            return inside[True]
    return True if size and alike(size, turned) else None


def alike(size, other):
    """Return whether two (H, W) have the same proportions, but for rounding."""
    (height, width), (tall, wide) = size, other
    return abs(height * wide - width * tall) <= max(height + width, tall + wide) / 2


def judge_frames(canvases, shares, problems):
    """Add problems of sizes and of shapes outside of their images; return doubts."""
    for canvas in canvases:
        if canvas.frame is None:
            canvas.is_bad = True
            height, width = canvas.entry.size or whole_size(canvas)
            tall, wide = canvas.upright_size
            problems["image of other proportions than the annotations"].append(
                f"{canvas.path}, {tall}x{wide}, by {canvas.entry.source}, {height}x{width}")
    framed = [canvas for canvas in canvases if canvas.frame]
    for canvas in framed:
        for shape in canvas.shapes:
            if shape.whole and shape.corners[1].tolist() != list(canvas.frame[::-1]):
                canvas.is_bad = True
                problems["shape of another size than the image"].append(shape.where)
        fit_frame(canvas, shares)
    placed = [(canvas, shape) for canvas in framed for shape in canvas.shapes]
    cut = [(canvas, shape) for canvas, shape in placed if reaches_out(canvas, shape, MARGIN)]
    far = [(canvas, shape) for canvas, shape in cut if reaches_out(canvas, shape, FAR * max(canvas.frame))]
    most = 2 * len(far) > len(placed)
    away = far if most else [(canvas, shape) for canvas, shape in cut if is_away(canvas, shape)]
    reason = f" ({reason_of(far, shares)})" if most else ""
    for canvas, shape in away:
        canvas.is_bad = True
        problems[f"shape outside of the image{reason}"].append(shape.where)
    if not shares and placed and all_tiny(canvases):
        raise InputError(f"all coordinates in {canvases[0].entry.path} and the other annotation files are "
                         "below 2: shares of the sides, where pixels are expected; export them in pixels")
    named = {shape.where for _, shape in away}
    rest = [shape.where for _, shape in cut if shape.where not in named]
    return [f"{count_of(len(rest), 'shape')} cut off at the edges of the image, as {rest[0]}"] if rest else []


def fit_frame(canvas, shares):
    """Scale the outlines of a Canvas from shares, or from the size of a copy, to pixels of the image. With
    bitmaps the mask is drawn at their size instead.
    """
    view = canvas.upright_size if canvas.is_upright else canvas.size
    if not any(shape.bitmap for shape in canvas.shapes):
        factor = np.array(view[::-1]) / (1 if shares else canvas.frame[::-1])
        canvas.frame = view
    else:
        factor = np.array(canvas.frame[::-1] if shares else (1, 1))
    for shape in canvas.shapes:
        if shape.rings and (factor != 1).any():
            shape.rings, shape.holes = ([ring * factor for ring in rings]
                                        for rings in (shape.rings, shape.holes))
            shape.corners = shape.corners * factor


def reaches_out(canvas, shape, margin):
    """Return whether a shape has points outside of its image by more than a margin in pixels."""
    return bool((shape.corners[0] < -margin).any()
                or (shape.corners[1] > np.array(canvas.frame[::-1]) + margin).any())


def reason_of(far, shares):
    """Return why most shapes, [(Canvas, Drawable)], lie outside of their images."""
    if shares:
        return "coordinates above 1 are not shares of the sides"
    if all((shape.corners[1] <= MARGIN).any() for _, shape in far):
        return "coordinates below 0: y runs upward, or the origin is another one"
    return "annotations of another size?"


def is_away(canvas, shape):
    """Return whether no point of a shape can lie in its image."""
    return bool((shape.corners[1] <= 0).any() or (shape.corners[0] >= np.array(canvas.frame[::-1])).any())


def all_tiny(canvases):
    """Return whether all outlines lie in the first two pixels."""
    corners = [canvas.corners()[1].max() for canvas in canvases if canvas.corners() is not None]
    return bool(corners) and max(corners) <= 2
