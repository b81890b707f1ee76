"""From what annotation files hold to masks: finds the images, judges every shape, draws and counts.

    content = draw_annotations(folder, "labelme", labelme.read(files, folder))      # a layout.FolderContent

All formats are judged here. What cannot be used is a problem of its image; all problems are reported
together, and with skip_bad_labels their images are left out: without a shape that cannot be read, its object
would be taught as background. Outlines that enclose nothing are only left out themselves.
"""
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import IGNORE, InputError, count_of
from dataio.annotations.shapes import BadLabel, area_of, as_points, paste, polygons_bitmap
from dataio.annotations.files import AnnotatedImage, split_in
from dataio.classes import plain
from dataio.images import read_orientation, upright, upright_size
from dataio.labels import MOST_CLASSES, Entry
from dataio.layout import FolderContent, use_lists
from dataio.readers import Sample, drawn_folder
from dataio.resizing import resize_mask
from dataio.scan import fill_folder
from utils import grouped, in_parallel, is_background, is_ignored

VERSION = 2  # of the drawing: masks drawn by another version are drawn anew
ENCLOSE_NOTHING = {"point", "points", "keypoint", "keypoints", "line", "lines", "linestrip", "polyline",
                   "skeleton"}
MARGIN = 2  # pixels by which a point may lie outside of its image
NAMED = 5  # of the entries of a problem
DEGENERATE = "shape without area (fewer than three points, or all on a line)"
OUTSIDE = "shape outside of the image"


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


def draw_annotations(folder, tool, annotations, skip_bad_labels=False):
    """Draw the masks of Annotations of a FolderFiles and return the layout.FolderContent.

    Raises InputError, a report of all that cannot be used, unless skip_bad_labels.
    """
    root, problems = folder.root, folder.problems
    if any(path.suffix == ".json" for path in annotations.files):
        problems["file not readable as JSON"] += folder.broken
    canvases = find_canvases(annotations.images, folder)
    nothing = Counter()  # {kind: shapes of it}
    for canvas in canvases:
        judge_shapes(canvas, annotations, problems, nothing)
    doubts = [*annotations.doubts, *decide_frames(canvases, annotations.shares)]
    doubts += judge_frames(canvases, annotations.shares, problems)
    good = [canvas for canvas in canvases if not canvas.is_bad]
    bad = {problem: [relative(entry, root) for entry in entries] for problem, entries in problems.items()}
    if any(bad.values()) and not skip_bad_labels:
        raise InputError(report(bad, root))
    if not any(canvas.shapes for canvas in good):
        reasons = f"; {report(bad, root)}" if any(bad.values()) else ""
        raise InputError(f"the {tool} annotations of {root} hold no shape that can be drawn: "
                         f"{annotations.files[0]}{reasons}")
    values, entries = mask_values(annotations, good)
    content = FolderContent({}, [], [], list(annotations.notes), doubts, entries, bad)
    target = masks_folder(root, annotations.files, good)

    def write_mask(canvas, folder):
        path = mask_path(canvas, root, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(canvas.draw(values)).save(path)

    fill_folder(target, write_mask, good, "drawing masks")
    for canvas, split in zip(good, splits_of(good, folder), strict=True):
        sample = Sample(canvas.path, mask_path(canvas, root, target))
        content.splits.setdefault(split or "train", []).append(sample)
    shapes = sum(len(canvas.shapes) for canvas in good)
    over = "smaller over larger" if annotations.by_area else "later over earlier"
    content.notes.insert(0, f"{tool} annotations: {count_of(shapes, 'shape')} drawn over "
                            f"{count_of(len(good), 'image')}, {over}; the rest is background; masks in "
                            f"{target}")
    spellings = grouped(entries, lambda entry: plain(entry.name)).values()
    for alike_names in (sorted({entry.name for entry in same}) for same in spellings):
        if len(alike_names) > 1:
            content.doubts.append(f"names of classes that differ in spelling alone: {', '.join(alike_names)}")
    if nothing:
        counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(nothing.items()))
        content.doubts.append(f"not drawn, because they enclose nothing: {counts}")
    unused = len(set(folder.images) - {canvas.path for canvas in canvases} - set(annotations.files))
    if unused:
        content.notes.append(f"not used: {count_of(unused, 'image')} without annotations")
    use_lists(content, root, root)
    content.splits.setdefault("train", [])
    return content


def relative(entry, root):
    """Return the text of a problem's entry without the folder that all entries have."""
    return str(entry).replace(f"{root}/", "")


def describe_bad(bad):
    """Return a line for every problem of {problem: [file or entry]}, with the first few of them."""
    lines = []
    for problem, entries in bad.items():
        noun, text = problem.split(" ", 1)
        named = ", ".join(map(str, entries[:NAMED]))
        more = f" and {len(entries) - NAMED} more" if len(entries) > NAMED else ""
        lines += [f"{count_of(len(entries), noun)} {text}: {named}{more}"] * bool(entries)
    return lines


def report(bad, root):
    """Return the text that refuses {problem: [file or entry]}."""
    lines = describe_bad(bad)
    advice = (f"correct them in {root}, leave their images out (train.py --skip-bad-labels), or copy what is "
              "good (check_data.py --fix OUT)")
    return f"{lines[0]}: {advice}" if len(lines) == 1 else \
        "\n  ".join([f"labels cannot be used: {advice}", *lines])


# --- images -----------------------------------------------------------------------------------------------
def find_canvases(images, folder):
    """Return the Canvas of every AnnotatedImage whose file is there; the others become problems."""
    problems, canvases = folder.problems, {}
    splits = file_splits(images)
    for image in images:
        paths = folder.find_images(image.name, image.path, image.split or splits.get(image.path, ""))
        name = image.name[0] if isinstance(image.name, tuple) else image.name
        if image.name is None:  # shapes of no image
            for shape in image.shapes:
                problems[f"shape {shape.problem}"].append(shape.where)
        elif not paths:
            problems["image not found"].append(f"{name} of {image.source}")
        elif len(paths) > 1:
            problems["image of several files: rename them"].append(
                f"{name} of {image.source}, as {paths[0]} and {paths[1]}")
        else:
            canvases.setdefault(paths[0], []).append(image)
    headers = in_parallel(read_orientation, canvases, "reading images")
    found = []
    for (path, entries), header in zip(canvases.items(), headers, strict=True):
        if isinstance(header, InputError):
            problems["image not readable"].append(str(header))
            continue
        canvas = Canvas(path, entries[0], *header)
        if len(entries) > 1:
            canvas.is_bad = True
            problems["image annotated twice: remove one of the entries"].append(
                f"{path} by {entries[0].source} and {entries[1].source}")
        found.append(canvas)
    return sorted(found, key=lambda canvas: canvas.path)


def file_splits(images):
    """Return {path: split} by the names of the files that are not called like their image."""
    return {image.path: split_in(image.path.stem) for image in images
            if not image.path.stem.lower().startswith(Path(str(image.name)).stem.lower())}


def splits_of(canvases, folder):
    """Return the split of every Canvas, "" = not known: what its entry says, else, where the names of files
    with many images say several, these; else its folders, else the file's name and folders.
    """
    by_file = file_splits([canvas.entry for canvas in canvases])
    files_decide = len({*by_file.values()} - {""}) > 1
    splits = []
    for canvas in canvases:
        path = canvas.entry.path
        of_file, of_image = by_file.get(path, ""), folder.split_of(canvas.path)
        ways = (canvas.entry.split, files_decide and of_file, of_image, of_file, folder.split_of(path))
        splits.append(next(filter(None, ways), ""))
    return splits


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
                add_shape(canvas, shape, label, number, annotations, problems)
        except BadLabel as error:
            problem = str(error)
        if problem:
            canvas.is_bad = True
            problems[f"shape {problem}"].append(shape.where)


def add_shape(canvas, shape, label, number, annotations, problems):
    """Give a Canvas a Shape as a Drawable, or add the problem that it encloses nothing. Raises BadLabel."""
    if shape.bitmap:
        bitmap = shape.bitmap()
        rings, holes, area, whole = [], [], int(bitmap.pixels.sum()), bitmap.whole
        corners = corners_of(bitmap)
    else:
        (rings, area), (holes, area_of_holes) = map(enclosing, (shape.rings, shape.holes))
        area, whole = area - area_of_holes, False
        points = np.concatenate(rings) if rings else np.zeros((1, 2))
        corners = np.stack([points.min(0), points.max(0)])
    if not area > 0:
        problems[DEGENERATE].append(shape.where)
        return
    order = (shape.order, -area if annotations.by_area else 0, number)
    canvas.shapes.append(Drawable(label, shape.where, order, rings, holes, shape.bitmap, corners, whole))


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
    outside, count = [], 0
    for canvas in canvases:
        if canvas.frame is None:
            canvas.is_bad = True
            height, width = canvas.entry.size or whole_size(canvas)
            tall, wide = canvas.upright_size
            problems["image of other proportions than the annotations"].append(
                f"{canvas.path}, {tall}x{wide}, by {canvas.entry.source}, {height}x{width}")
            continue
        sides = np.array(canvas.frame[::-1])
        for shape in canvas.shapes:
            if shape.whole and shape.corners[1].tolist() != sides.tolist():
                canvas.is_bad = True
                problems["shape of another size than the image"].append(shape.where)
            elif shares and shape.rings:
                shape.rings, shape.holes = ([ring * sides for ring in rings]
                                            for rings in (shape.rings, shape.holes))
                shape.corners = shape.corners * sides
            if (shape.corners[0] < -MARGIN).any() or (shape.corners[1] > sides + MARGIN).any():
                outside.append((canvas, shape))
            count += 1
    most = 2 * len(outside) > count
    away = outside if most else [(canvas, shape) for canvas, shape in outside if is_away(canvas, shape)]
    reason = " (coordinates above 1 are not shares of the sides)" if most and shares else \
        " (annotations of another size?)" if most else ""
    for canvas, shape in away:
        canvas.is_bad = True
        problems[OUTSIDE + reason].append(shape.where)
    doubts = []
    if len(outside) > len(away):
        first = next(shape for canvas, shape in outside if not is_away(canvas, shape))
        doubts.append(f"{count_of(len(outside) - len(away), 'shape')} cut off at the edges of the image, as "
                      f"{first.where}")
    if not shares and count and all_tiny(canvases):
        raise InputError(f"all coordinates in {canvases[0].entry.path} and the other annotation files are "
                         "below 2: shares of the sides, where pixels are expected; export them in pixels")
    return doubts


def is_away(canvas, shape):
    """Return whether no point of a shape can lie in its image."""
    return bool((shape.corners[1] <= 0).any() or (shape.corners[0] >= np.array(canvas.frame[::-1])).any())


def all_tiny(canvases):
    """Return whether all outlines lie in the first two pixels."""
    corners = [canvas.corners()[1].max() for canvas in canvases if canvas.corners() is not None]
    return bool(corners) and max(corners) <= 2


# --- classes and files ------------------------------------------------------------------------------------
def mask_values(annotations, canvases):
    """Return ({label: mask value}, [labels.Entry]): 0 is what has no label, 1.. are the classes.

    What is labeled as background has a value of its own: --unlabelled ignore keeps it. Raises InputError.
    """
    drawn = {shape.label for canvas in canvases for shape in canvas.shapes}
    listed = dict.fromkeys(str(name).strip() for name in annotations.classes)
    listed = [name for name in listed if name in drawn or not is_background(name)]
    classes = [*listed, *sorted(drawn - set(listed))]
    names = [name for name in classes if not is_background(name) and not is_ignored(name)]
    if not 0 < len(names) < MOST_CLASSES:
        raise InputError(f"{annotations.files[0]} and the files that belong to it name {len(names)} classes; "
                         f"1 to {MOST_CLASSES - 1} are possible, beside the background")
    values = {name: value for value, name in enumerate(names, 1)}
    entries = [Entry("background", None, 0), *(Entry(name, None, value) for name, value in values.items())]
    for name in classes:
        if is_ignored(name):
            values[name] = IGNORE
        elif is_background(name):
            values[name] = len(names) + 1
    if len(names) + 1 in values.values():
        entries.insert(1, Entry("background", None, len(names) + 1))
    return values, entries


def masks_folder(root, files, canvases):
    """Return the folder for the masks of annotation files, named by all that the masks depend on."""
    state = hashlib.sha256(f"{VERSION}".encode())
    for path in files:
        state.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for canvas in canvases:
        view = canvas.size, canvas.orientation, canvas.is_upright, canvas.frame
        state.update(f"{canvas.path.relative_to(root)} {view}\n".encode())
    return drawn_folder() / state.hexdigest()[:16]


def mask_path(canvas, root, folder):
    """Return the path of the mask of a Canvas in a folder of masks."""
    return folder / f"{canvas.path.relative_to(root)}.png"
