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
    """A task of an export. number: its id, which a task of another server may have too; path: the export.

    texts: {key in its `data`: names that a file may have by this text}; images: those that may be images.
    annotations: [{"id", "ground_truth", "regions"}].
    """

    number: object
    path: Path
    texts: dict
    images: dict
    annotations: list

    def __str__(self):
        return f"{self.path} task {self.number}"

    @property
    def taken(self):
        """The annotation that counts: the ground truth, else the last one; without any, one of no regions."""
        truths = [annotation for annotation in self.annotations if annotation["ground_truth"]]
        return [dict(id=None, regions=[]), *self.annotations[-1:], *truths[:1]][-1]

    def names_of(self, to_name):
        """Return the names of the image that a region is on, None where it cannot be told."""
        names = set(self.images.values())
        return self.texts.get(to_name) or (names.pop() if len(names) == 1 else None)

    def by_image(self, to_names, items):
        """Return {names of an image: [item]} of [(to_name, item)], None where it cannot be told. Images
        without any are among them where their keys are among to_names, those of the export.
        """
        keys = [key for key in self.texts if key in to_names]
        found = {names: [] for names in map(self.names_of, keys or [None]) if names}
        for to_name, item in items:
            found.setdefault(self.names_of(to_name), []).append(item)
        return None if None in found else found


def find_files(folder):
    """Return the JSON exports of a FolderFiles, unless the pictures of label_studio_masks are there."""
    if any(PICTURE_NAME.fullmatch(path.name) for path in folder.images):
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
        tasks = read_tasks([path], folder)
        to_names = labeled_keys(tasks)
        for task in tasks:
            if not task.annotations:
                empty.append(task)
                continue
            if len(task.annotations) > 1:
                several.append(task)
            found = task.by_image(to_names, [(name_in(region, "to_name"), region)
                                             for region in task.taken["regions"]])
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
    """Return the [Task] of exports. Entries of the same number and images are one: JSON-MIN has an entry for
    each annotation. Numbers alone may be those of two servers.
    """
    tasks = {}
    entries = [(path, *item) for path in paths for item in enumerate(folder.json[path], 1)]
    for path, number, entry in entries:
        with folder.reading(f"{path} task {number}", "Label Studio"):
            texts, images = images_of(task_data(entry))
            task = Task(entry.get("id", number), path, texts, images, annotations_of(entry))
            known = tasks.setdefault((path.parent, task.number, *task.images.values()), task)
            if known is not task:
                known.annotations += task.annotations
    return list(tasks.values())


def labeled_keys(tasks):
    """Return the set of the `to_name` of all regions of tasks."""
    return {name_in(region, "to_name") for task in tasks for annotation in task.annotations
            for region in annotation["regions"]}


def name_in(region, key):
    """Return the `to_name` or `from_name` of a region, None where it has none."""
    return str(region[key]) if key in region else None


def task_data(task):
    """Return the {key: value} of a task among which its images are; in JSON-MIN they are its own."""
    return task["data"] if "annotation_id" not in task else task


def images_of(data):
    """Return Task.texts and Task.images of the `data` of a task, {key: URL or path}.

    Where no text ends as an image does, each may be the image. Raises ValueError where there is none.
    """
    texts = {key: image_names(path_of(text)) for key, text in data.items() if isinstance(text, str) and text}
    if not texts:
        raise ValueError("no image")
    images = {key: names for key, names in texts.items()
              if PurePosixPath(names[0]).suffix.lower() in IMAGE_ENDINGS}
    return texts, images or {"": tuple(name for names in texts.values() for name in names)}


def image_names(path):
    """Return the names that an image file may have, by its path on the server."""
    match = UPLOADED.fullmatch(PurePosixPath(path).name)
    return (path, match[1], match[1].replace("_", " ")) if match else (path,)


def path_of(url):
    """Return the path in a URL: of /data/upload/3/name.jpg, /data/local-files/?d=a/name.jpg, s3://..."""
    parts = urlsplit(url)
    folder = parse_qs(parts.query).get("d", [""])[0]
    return folder if folder and "local-files" in parts.path else unquote(parts.path)


def annotations_of(task):
    """Return [{"id", "ground_truth", "regions"}] of a task, without those that were cancelled."""
    if "annotation_id" in task:
        lists = [value for value in task.values() if isinstance(value, list)]
        return [dict(id=id_of(task["annotation_id"]), ground_truth=False, regions=[
            region for regions in lists for region in regions if is_region(region)])]
    annotations = task["annotations"] if "annotations" in task else task.get("completions", [])
    return [dict(id=id_of(annotation.get("id")), ground_truth=annotation.get("ground_truth"),
                 regions=regions_of(annotation["result"]))
            for annotation in annotations if not annotation.get("was_cancelled")]


def id_of(value):
    """Return the number of an annotation, None where it has none."""
    return value if type(value) is int else None


# --- regions ----------------------------------------------------------------------------------------------
def regions_of(results):
    """Return the regions of the results of an annotation; an outline and its label may be two results."""
    regions = {}
    for number, result in enumerate(results):
        if "value" in result:
            key = result.get("id", number), result.get("to_name")
            regions.setdefault(key, {}).update({**result, **result["value"]})
    return [region for region in regions.values() if is_region(region)]


def is_region(entry):
    """Return whether a result is a region of an image, and not an answer to a question about it."""
    return isinstance(entry, dict) and any(key in KINDS or key.endswith("labels") for key in entry)


def label_key(region):
    """Return the key of the labels of a region, None without."""
    return next((key for key in region if key.endswith("labels")), None)


def kind_of(region):
    """Return what a region is: one of KINDS, else what its labels are called after."""
    return next((KINDS[key] for key in KINDS if key in region), str(label_key(region)).removesuffix("labels"))


def read_region(region, where):
    """Return the Shape of a region. Raises BadLabel."""
    labels, kind = region.get(label_key(region)) or [""], kind_of(region)
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
