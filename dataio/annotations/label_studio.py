"""Label Studio, JSON and JSON-MIN: polygons, brush strokes, rectangles and ellipses, in percent of the sides.

A rectangle turns around its upper left corner, an ellipse around its center. Of several annotations of a task
the ground truth is taken, else the last one; a task without any is no image of background, and left out.
"""
from functools import partial

import numpy as np

from config import count_of
from dataio.annotations import label_studio_masks
from dataio.annotations.files import AnnotatedImage, Annotations, given_size, read_shapes
from dataio.annotations.label_studio_masks import image_names
from dataio.annotations.shapes import BadLabel, Bitmap, Shape, as_points, box, ellipse, turned

KINDS = {"rle": "brush", "points": "polygon", "radiusX": "ellipse", "height": "rectangle",
         "x": "keypoint"}  # by the first of these keys that a region has


def find_files(folder):
    """Return the JSON exports of a FolderFiles, unless the pictures of label_studio_masks are there."""
    if label_studio_masks.find_files(folder):
        return []
    return [path for path, content in folder.json.items()
            if isinstance(content, list) and any(map(is_task, content))]


def is_task(entry):
    """Return whether an entry of a list is a task of JSON or JSON-MIN."""
    return isinstance(entry, dict) and ("annotation_id" in entry or "data" in entry and bool(
        entry.keys() & {"annotations", "completions"}))


def read(files, folder):
    """Return the Annotations of JSON exports."""
    images, several, empty = [], [], []
    for path in files:
        tasks = {}  # id: (names of the image, [annotation])
        for number, task in enumerate(folder.json[path], 1):
            with folder.reading(f"{path} task {number}", "Label Studio"):
                annotations = annotations_of(task)
                names, known = tasks.setdefault(task.get("id", number), (image_names(task_data(task)), []))
                known += annotations
        for id, (names, annotations) in tasks.items():
            source = f"{path} task {id}"
            if not annotations:
                empty.append(source)
                continue
            taken = next((entry for entry in annotations if entry["ground_truth"]), annotations[-1])
            if len(annotations) > 1:
                several.append(source)
            shapes = read_shapes(taken["regions"], read_region, f"{source} region", "Label Studio")
            sizes = [given_size(region, "original_height", "original_width") for region in taken["regions"]]
            images.append(AnnotatedImage(names, source, path, shapes, next(filter(None, sizes), None)))
    notes = []
    if several:
        notes.append(f"{count_of(len(several), 'task')} annotated several times, as {several[0]}: taken was "
                     "the ground truth, else the last annotation")
    if empty:
        notes.append(f"not used: {count_of(len(empty), 'task')} without annotations, as {empty[0]}")
    return Annotations([], images, files, notes=notes)


def task_data(task):
    """Return the {key: value} of a task among which its image is; in JSON-MIN they are its own."""
    return task["data"] if "annotation_id" not in task else task


def annotations_of(task):
    """Return [{"ground_truth", "regions"}] of a task, without those that were cancelled."""
    if "annotation_id" in task:
        lists = [value for value in task.values() if isinstance(value, list)]
        return [dict(ground_truth=False, regions=[
            region for regions in lists for region in regions if is_region(region)])]
    annotations = task["annotations"] if "annotations" in task else task["completions"]
    return [dict(ground_truth=annotation.get("ground_truth"), regions=regions_of(annotation["result"]))
            for annotation in annotations if not annotation.get("was_cancelled")]


def regions_of(results):
    """Return the regions of the results of an annotation; an outline and its label may be two results."""
    regions = {}
    for number, result in enumerate(results):
        if "value" in result:
            regions.setdefault(result.get("id", number), {}).update({**result, **result["value"]})
    return [region for region in regions.values() if is_region(region)]


def is_region(entry):
    """Return whether a result is a region of an image, and not an answer to a question about it."""
    return isinstance(entry, dict) and any(key in KINDS or key.endswith("labels") for key in entry)


def read_region(region, where):
    """Return the Shape of a region. Raises BadLabel."""
    key = next((key for key in region if key.endswith("labels")), None)
    labels = region.get(key) or [""]
    kind = next((KINDS[key] for key in KINDS if key in region), str(key).removesuffix("labels"))
    shape = Shape(labels[0], kind, where)
    size = given_size(region, "original_height", "original_width")
    if len(labels) > 1:
        raise BadLabel("of several classes")
    if not size:
        raise BadLabel("without the size of its image (original_width, original_height)")
    if region.get("image_rotation"):
        raise BadLabel("on an image that was turned in Label Studio")
    if kind == "brush":
        return shape._replace(bitmap=partial(decode_brush, region["rle"], *size))
    if kind == "polygon":
        return shape._replace(rings=[pixels(region["points"], size)])
    if kind == "ellipse":
        center, radii = pixels([region[key] for key in ("x", "y", "radiusX", "radiusY")], size)
        return shape._replace(rings=[ellipse(center, radii, region.get("rotation", 0))])
    if kind == "rectangle":
        corner, sides = pixels([region[key] for key in ("x", "y", "width", "height")], size)
        return shape._replace(rings=[turned(box(*corner, *sides), corner, region.get("rotation", 0))])
    return shape


def pixels(points, size):
    """Return points in percent of the sides of an image of size (H, W) in pixels, (n, 2). Raises BadLabel."""
    return as_points(points) * size[::-1] / 100


def decode_brush(numbers, height, width):
    """Return the Bitmap of the brush: bytes to which @thi.ng/rle-pack packs the RGBA values of an image.

    First come the number of values in 32 bits, the bits of a value in 5, and four bits of counts in 4 each,
    all but the first less one. Then, again and again: a bit that says whether a value repeats, two that
    choose the bits of the count, the count less one, and the value or as many values. Raises BadLabel.
    """
    values, counts, position = [], [], 0

    def read_bits(count):
        nonlocal position
        position += count
        if position > len(bits):
            raise ValueError
        return int(bits[position - count:position], 2)

    try:
        bits = "".join(f"{byte:08b}" for byte in bytes(numbers))
        total, value_bits = read_bits(32), read_bits(5) + 1
        count_bits = [read_bits(4) + 1 for _ in range(4)]
        left = total
        while left > 0:
            repeats, count = read_bits(1), read_bits(count_bits[read_bits(2)]) + 1
            values += [read_bits(value_bits) for _ in range(1 if repeats else count)]
            counts += [count] if repeats else [1] * count
            left -= count
    except (TypeError, ValueError, OverflowError):
        raise BadLabel("with a brush that cannot be read") from None
    if total != 4 * height * width or left:
        raise BadLabel("with a brush of another size than its image")
    inside = np.repeat(np.array(values) > 0, counts).reshape(height, width, 4)[..., 3]
    return Bitmap(inside, whole=True)
