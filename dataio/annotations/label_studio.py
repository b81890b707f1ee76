"""Label Studio, JSON and JSON-MIN: polygons, brush strokes, rectangles and ellipses, in percent of the sides.

A rectangle turns around its upper left corner, an ellipse around its center. Of several annotations of a task
the ground truth is taken, else the last one; a task without any is no image of background, and left out.
Of a task with several images, a region is on the one whose key in `data` is its `to_name`.
"""
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from config import count_of
from dataio.annotations.files import AnnotatedImage, Annotations, given_size, read_shapes
from dataio.annotations.shapes import BadLabel, Bitmap, Shape, as_points, box, ellipse, turned
from dataio.images import IMAGE_ENDINGS

KINDS = {"rle": "brush", "points": "polygon", "radiusX": "ellipse", "height": "rectangle",
         "x": "keypoint"}  # by the first of these keys that a region has
PICTURE_NAME = re.compile(r"task-(\d+)-annotation-(\d+)-by-[^-]+-(\w+)-(.+)-\d+\.png")  # of brush labels
UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # digits before the name of a file, whose spaces became _
UNTOLD = ("task of several images that does not say on which its regions are (`to_name`, a key of `data`): "
          "export it as JSON, or give each image a task of its own")


@dataclass(eq=False)
class Task:
    """A task of an export, or of several entries of JSON-MIN, which has one for each annotation.

    number: its id, which a task of another server may have too; path: the export. names: {key in its `data`:
    names that a file may have by this text}; images: those names that may be of images, each once.
    annotations: [{"id", "ground_truth", "regions"}].
    """

    number: str
    path: Path
    names: dict
    images: list
    annotations: list

    def __str__(self):
        return f"{self.path} task {self.number}"

    @property
    def taken(self):
        """The annotation that counts: the ground truth, else the last one; without any, one of no regions."""
        truths = [annotation for annotation in self.annotations if annotation["ground_truth"]]
        return [dict(id=None, regions=[]), *self.annotations[-1:], *truths[:1]][-1]

    def by_image(self, items):
        """Return {names of an image: [item]} of [(to_name, item)], None where it cannot be told. Of several
        images those without an item are not among them.
        """
        the_only = self.images[0] if len(self.images) == 1 else None
        found = {the_only: []} if the_only and not items else {}
        for to_name, item in items:
            found.setdefault(self.names.get(to_name) or the_only, []).append(item)
        return None if None in found else found


def find_files(folder):
    """Return the JSON exports of a FolderFiles, unless the pictures of label_studio_masks are there."""
    return [] if any(PICTURE_NAME.fullmatch(path.name) for path in folder.images) else exports(folder)


def exports(folder):
    """Return the files of a FolderFiles that are lists of tasks, of JSON or JSON-MIN."""
    return [path for path, content in folder.json.items() if isinstance(content, list) and any(
        isinstance(entry, dict) and ("annotation_id" in entry or entry.keys() >= {"data", "annotations"})
        for entry in content)]


def read(files, folder):
    """Return the Annotations of JSON exports."""
    images, several, empty = [], [], []
    for path in files:
        tasks = read_tasks([path], folder)
        empty += [task for task in tasks if not task.annotations]
        several += [task for task in tasks if len(task.annotations) > 1]
        for task in filter(lambda task: task.annotations, tasks):
            found = task.by_image([(region.get("to_name"), region) for region in task.taken["regions"]])
            if found is None:
                folder.problems[UNTOLD].append(str(task))
                continue
            for names, regions in found.items():
                shapes = read_shapes(regions, read_region, f"{task} region", "Label Studio")
                sizes = [given_size(region, "original_height", "original_width") for region in regions]
                images.append(AnnotatedImage(names, str(task), path, shapes, next(filter(None, sizes), None)))
    notes = []
    if several:
        notes.append(f"{count_of(len(several), 'task')} annotated several times, as {several[0]}: taken was "
                     "the ground truth, else the last annotation")
    if empty:
        notes.append(f"not used: {count_of(len(empty), 'task')} without annotations, as {empty[0]}")
    return Annotations([], images, files, notes=notes)


# --- tasks ------------------------------------------------------------------------------------------------
def read_tasks(paths, folder):
    """Return the [Task] of exports; entries of the same number and images are one."""
    tasks = {}
    for path in paths:
        for number, entry in enumerate(folder.json[path], 1):
            with folder.reading(f"{path} task {number}", "Label Studio"):
                names, images = images_of(entry if "annotation_id" in entry else entry["data"])
                task = Task(str(entry.get("id", number)), path, names, images, [])
                task = tasks.setdefault((path.parent, task.number, *images), task)
                task.annotations += annotations_of(entry)
    return list(tasks.values())


def images_of(data):
    """Return Task.names and Task.images of the `data` of a task, {key: URL or path}.

    Where no text ends as an image does, each may be the image. Raises ValueError where there is none.
    """
    names = {key: image_names(text) for key, text in data.items() if isinstance(text, str) and text}
    if not names:
        raise ValueError("no image")
    images = [found for found in names.values() if PurePosixPath(found[0]).suffix.lower() in IMAGE_ENDINGS]
    return names, list(dict.fromkeys(images)) or [tuple(name for found in names.values() for name in found)]


def image_names(url):
    """Return the names that an image file may have, by its URL: /data/upload/3/0a1b2c3d-name.jpg,
    /data/local-files/?d=a/name.jpg, s3://bucket/name.jpg.
    """
    parts = urlsplit(url)
    local = parse_qs(parts.query).get("d", [""])[0] if "local-files" in parts.path else ""
    path = local or unquote(parts.path)
    match = UPLOADED.fullmatch(PurePosixPath(path).name)
    return (path, match[1], match[1].replace("_", " ")) if match else (path,)


def annotations_of(task):
    """Return [{"id", "ground_truth", "regions"}] of a task, without those that were cancelled."""
    if "annotation_id" in task:
        regions = [region for regions in task.values() if isinstance(regions, list) for region in regions]
        return [dict(id=str(task["annotation_id"]), ground_truth=False,
                     regions=list(filter(is_region, regions)))]
    return [dict(id=str(annotation.get("id")), ground_truth=annotation.get("ground_truth"),
                 regions=regions_of(annotation["result"]))
            for annotation in task["annotations"] if not annotation.get("was_cancelled")]


# --- regions ----------------------------------------------------------------------------------------------
def regions_of(results):
    """Return the regions of the results of an annotation; an outline and its label may be two results."""
    regions = {}
    for number, result in enumerate(results):
        if "value" in result:
            names = {key: str(result[key]) for key in ("to_name", "from_name") if key in result}
            key = result.get("id", number), names.get("to_name")
            regions.setdefault(key, {}).update({**result, **result["value"], **names})
    return [region for region in regions.values() if is_region(region)]


def is_region(entry):
    """Return whether a result is a region of an image, and not an answer to a question about it."""
    return isinstance(entry, dict) and any(key in KINDS or key.endswith("labels") for key in entry)


def kind_of(region):
    """Return what a region is: one of KINDS, else what its labels are called after, as `timeseries`."""
    keys = [key for key in KINDS if key in region]
    return KINDS[keys[0]] if keys else next(key for key in region if key.endswith("labels"))[:-len("labels")]


def read_region(region, where):
    """Return the Shape of a region. Raises BadLabel."""
    kind, label_key = kind_of(region), next((key for key in region if key.endswith("labels")), None)
    labels = region.get(label_key) or [""]
    shape = Shape(labels[0], kind, where)
    size = given_size(region, "original_height", "original_width")
    if len(labels) > 1:
        raise BadLabel("of several classes")
    if not size:
        raise BadLabel("without the size of its image (original_width, original_height)")
    if region.get("item_index"):
        raise BadLabel("of the second image of a task, or a later one")
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
