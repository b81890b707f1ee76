"""Annotation files of labeling tools, drawn once as masks: COCO, labelme, YOLO, Supervisely, Label Studio.

    found = find_masks(root)           # layout.find_pairs, or the masks drawn from annotation files
    found.splits, found.entries        # {split: [Sample]}, the classes that these files name

The masks are PNG files of class numbers in the user's cache (~/.cache/dinoseg/masks), drawn anew when an
annotation file changes; the folder itself stays as it is. What is not labeled is background.
"""
import base64
import hashlib
import io
import json
import math
import re
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image
from pycocotools import mask as coco_mask

from config import IGNORE, InputError, count_of
from dataio.labels import MOST_CLASSES, Entry
from dataio.layout import (SPLIT_OF, FolderContent, NoMasks, count_shared_folders, find_pairs, list_images,
                           role_of, use_lists, words_of)
from dataio.readers import Sample, decode_mask, drawn_folder, read_orientation
from dataio.scan import fill_folder, in_parallel

CORNERS = 64  # of the polygon that stands for a circle
VERSION = 1  # of the drawing: masks drawn by another one are drawn anew
BACKGROUND = {"background", "_background_"}
IGNORED = {"ignore", "__ignore__"}  # labelme's name for what is not to count
FARTHEST = 100_000  # pixels of a coordinate
LARGEST_BITMAP = 1 << 26  # bytes of a compressed bitmap
LARGEST_MASK = 1 << 28  # pixels
TAGGED = re.compile(r"task-(\d+)-annotation-\d+-by-\d+-tag-(.+)-\d+\.png")  # masks of Label Studio
YOLO_FILES = ("data.yaml", "data.yml", "dataset.yaml")


class Shape(NamedTuple):
    """One labeled region. region: f(size (H, W)) -> (H, W) bool."""

    label: str
    region: object


class Annotated(NamedTuple):
    """An image and its shapes, later ones over earlier ones. size: the (H, W) they are drawn at."""

    image: Path
    split: str
    size: tuple
    shapes: list


class Annotations(NamedTuple):
    """What the files of one tool hold. classes: names in order; left_out: {what could not be drawn: count};
    files: those that were read.
    """

    tool: str
    classes: list
    images: list
    left_out: dict
    files: list


# --- regions ----------------------------------------------------------------------------------------------
def polygon(points, where, least=3):
    """Return an outline as (n, 2) float64 of x and y. Raises InputError that says `where` it is none, or has
    fewer points than `least`.
    """
    try:
        outline = np.asarray(points, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: the points of a polygon are pairs of numbers x y") from None
    if not np.isfinite(outline).all():
        raise InputError(f"{where} has coordinates that are no numbers (NaN or infinite): correct or remove "
                         "it")
    if np.abs(outline).max(initial=0) > FARTHEST:  # pycocotools walks every pixel of an edge
        raise InputError(f"{where} lies more than {FARTHEST} pixels from its image: correct or remove it")
    if len(outline) < least:
        raise InputError(f"{where} is a polygon of {count_of(len(outline), 'point')}, it needs three: "
                         "correct or remove it")
    return outline


def inside(outlines, holes, size):
    """Return (H, W) bool: what lies in any of the outlines and in none of the holes, both (n, 2)."""
    filled = [coco_mask.decode(coco_mask.frPyObjects([ring.ravel().tolist() for ring in rings], *size)).any(2)
              if rings else np.zeros(size, bool) for rings in (outlines, holes)]
    return filled[0] & ~filled[1]


def run_lengths(rle, where, size):
    """Return (H, W) bool of COCO's run lengths, as text or as numbers. Raises InputError.

    pycocotools would leave what the runs do not reach to chance.
    """
    try:
        height, width = map(int, rle["size"])
        counts = rle["counts"] if isinstance(rle["counts"], list) else text_counts(rle["counts"])
        counts = np.array(counts, np.int64)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        raise InputError(f"{where} has run lengths that are none (COCO's `size` and `counts`)") from None
    if (height, width) != tuple(size):
        raise InputError(f"{where} has run lengths of {height}x{width} pixels, its image has "
                         f"{size[0]}x{size[1]}")
    if counts.sum() != height * width or counts.min() < 0:
        raise InputError(f"{where} has run lengths of {counts.sum()} pixels in all, its image has "
                         f"{height * width}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def text_counts(text):
    """Return the numbers in the text that COCO compresses run lengths to: five bits a character, lowest
    first, signed; from the third on they are differences to the last but one.
    """
    counts, number, shift = [], 0, 0
    for character in text.encode("ascii"):
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(text)
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (bits >> 4 & 1) << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    return counts


def bitmap(data, where, compressed):
    """Return (h, w) bool of a picture in base64, zlib-compressed (Supervisely) or not (labelme)."""
    try:
        content = base64.b64decode(data)
        content = zlib.decompressobj().decompress(content, LARGEST_BITMAP) if compressed else content
        pixels = np.array(Image.open(io.BytesIO(content), formats=["PNG"]).convert("RGBA"))
    except (ValueError, TypeError, OSError, zlib.error, SyntaxError, Image.DecompressionBombError):
        raise InputError(f"{where} has a bitmap that cannot be read: export it again") from None
    return (pixels[..., :3].max(2) > 0) & (pixels[..., 3] > 0)


def placed(small, left, top, size):
    """Return (H, W) bool: a bitmap (h, w) whose first pixel lies at (left, top), cut off at the edges."""
    whole = np.zeros(size, bool)
    part = small[max(0, -top):, max(0, -left):]
    target = whole[max(0, top):, max(0, left):][:part.shape[0], :part.shape[1]]
    target[:] = part[:target.shape[0], :target.shape[1]]
    return whole


def rectangle(points):
    """Two opposite corners (2, 2) -> the polygon (4, 2)."""
    (left, top), (right, bottom) = points
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], np.float64)


def circle(points):
    """Center and a point of the circle (2, 2) -> a polygon (CORNERS, 2)."""
    center, edge = np.asarray(points, np.float64)
    angles = np.arange(CORNERS) * 2 * math.pi / CORNERS
    return center + math.dist(center, edge) * np.stack([np.cos(angles), np.sin(angles)], 1)


# --- one reader per tool ----------------------------------------------------------------------------------
# f([(path, content)], photos) -> Annotations, of the files that its entry in JSON_TOOLS recognizes.
class Photos:
    """The image files below a folder, found by the names that annotation files give them."""

    def __init__(self, root, paths):
        self.root, self.names, self.stems = root, {}, {}
        for path in paths:
            self.names.setdefault(path.name, []).append(path)
            self.stems.setdefault(path.stem, []).append(path)

    def called(self, name, near, where):
        """Return the image that a file in the folder `near` calls `name`. Raises InputError."""
        parts = str(name).replace("\\", "/").split("/")
        found = self.names.get(parts[-1]) or self.stems.get(Path(parts[-1]).stem) or []
        if not found:
            raise InputError(f"{where} is of the image {name}, which is not below {self.root}: add it or "
                             "remove the entry")
        named = [part for part in parts[:-1] if part not in (".", "..")]
        wanted = (*near.relative_to(self.root).parts, *named)
        shared = [count_shared_folders(wanted, self.folders(path)) for path in found]
        best = [path for path, number in zip(found, shared, strict=True) if number == max(shared)]
        if len(best) > 1:
            raise InputError(f"{where} is of the image {name}, and {best[0]} and {best[1]} are called so: "
                             "rename one")
        return best[0]

    def folders(self, path):
        """Return the names of the folders between the root and a file."""
        return path.relative_to(self.root).parts[:-1]

    def split(self, path):
        """Return train, val, test or "" (nothing) by the names of the folders above a file."""
        return role_of(self.folders(path)).split


def size_of(content, keys, image):
    """Return the (H, W) that an annotation file gives under `keys`, else that of the image upright.

    Raises InputError for a size that no mask could be drawn at.
    """
    sides = [content.get(key) for key in keys]
    if not all(isinstance(side, int) and 0 < side < 100_000 for side in sides):
        return upright_size(image)
    if math.prod(sides) > LARGEST_MASK:
        raise InputError(f"the annotations say that {image} has {sides[0]}x{sides[1]} pixels: correct them")
    return tuple(sides)


def upright_size(image):
    """Return the (H, W) of an image file as it is read."""
    size, orientation = read_orientation(image)
    return size[::-1] if orientation >= 5 else size


def read_coco(found, photos):
    """COCO: polygons and run lengths, smaller over larger; crowds count as their class."""
    names, images, left_out = [], {}, Counter()
    for path, content in found:
        classes = coco_classes(path, content)
        names += [name for name in classes.values() if name not in names]
        split = next((SPLIT_OF[word] for word in words_of(path.stem) if word in SPLIT_OF), "")
        here = {}
        for entry in content["images"]:
            where = f"{path} image {entry.get('id')}"
            image = photos.called(entry.get("file_name"), path.parent, where)
            size = size_of(entry, ("height", "width"), image)
            if entry.get("id") in here or image in images:
                raise InputError(f"{where} ({image.name}) is listed twice: remove one")
            here[entry.get("id")] = images[image] = Annotated(
                image, photos.split(image) or split or photos.split(path), size, [])
        for number, entry in enumerate(content["annotations"]):
            where = f"{path} annotation {entry.get('id', number)}"
            if entry.get("category_id") not in classes or entry.get("image_id") not in here:
                kind = "image" if entry.get("category_id") in classes else "category"
                raise InputError(f"{where} names {kind} {entry.get(f'{kind}_id')}, which the file does not "
                                 "list")
            image, shape = here[entry["image_id"]], entry.get("segmentation")
            label = classes[entry["category_id"]]
            if isinstance(shape, dict):
                area, region = entry.get("area"), partial(run_lengths, shape, where)
                region(image.size)  # says now what is wrong
            elif shape:
                outlines = [polygon(ring, where) for ring in shape]
                area, region = sum(map(area_of, outlines)), partial(inside, outlines, [])
            else:
                left_out["box without a polygon"] += 1
                continue
            image.shapes.append((area or 0, Shape(label, region)))
    for image in images.values():
        image.shapes[:] = [shape for _, shape in sorted(image.shapes, key=lambda pair: -pair[0])]
    return Annotations("COCO", names, list(images.values()), left_out, [path for path, _ in found])


def coco_classes(path, content):
    """Return {id: name} of a COCO file, without Roboflow's head of the list. Raises InputError."""
    entries = [(entry.get("id"), str(entry.get("name", "")).strip(), entry.get("supercategory"))
               for entry in content["categories"]]
    used = {entry.get("category_id") for entry in content["annotations"]}
    heads = {above for _, _, above in entries}
    entries = [(id, name) for id, name, _ in entries if id in used or name not in heads]
    for column, kind in ((0, "id"), (1, "name")):
        twice = [value for value, count in Counter(entry[column] for entry in entries).items() if count > 1]
        if twice:
            raise InputError(f"{path} lists two categories of the {kind} {twice[0]}: rename one")
    return dict(entries)


def area_of(outline):
    """Return the area of a polygon (n, 2)."""
    (x, y), (after_x, after_y) = outline.T, np.roll(outline, -1, 0).T
    return abs((x * after_y - after_x * y).sum()) / 2


def read_labelme(found, photos):
    """labelme: polygons, rectangles, circles and bitmaps, later over earlier."""
    images, left_out = {}, Counter()
    for path, content in found:
        image = photos.called(content["imagePath"] or path.stem, path.parent, str(path))
        if image in images:
            raise InputError(f"{path} and another file are of the image {image}: remove one")
        size = size_of(content, ("imageHeight", "imageWidth"), image)
        images[image] = Annotated(image, photos.split(image), size, [])
        for number, entry in enumerate(content["shapes"], 1):
            where, kind = f"{path} shape {number}", entry.get("shape_type") or "polygon"
            if kind in ("rectangle", "circle", "mask"):
                points = polygon(entry.get("points", []), where, least=0)
                if len(points) == 4 and kind == "rectangle":
                    points = np.stack([points.min(0), points.max(0)])
                if len(points) != 2:
                    raise InputError(f"{where} is a {kind} of {count_of(len(points), 'point')}, it needs two")
            if kind == "mask":
                left, top = points.min(0).round().astype(int).tolist()
                region = partial(placed, bitmap(entry.get("mask"), where, False), left, top)
            elif kind in ("rectangle", "circle"):
                region = partial(inside, [{"rectangle": rectangle, "circle": circle}[kind](points)], [])
            elif kind == "polygon":
                region = partial(inside, [polygon(entry.get("points", []), where)], [])
            else:
                left_out[kind] += 1
                continue
            images[image].shapes.append(Shape(str(entry.get("label", "")).strip(), region))
    labels = {shape.label for image in images.values() for shape in image.shapes}
    files = [path for path, _ in found]
    return Annotations("labelme", sorted(labels), list(images.values()), left_out, files)


def read_supervisely(found, photos):
    """Supervisely: polygons with holes, bitmaps and rectangles, later over earlier; classes of meta.json."""
    images, left_out, names = {}, Counter(), []
    metas = sorted(photos.root.rglob("meta.json"))
    for meta in metas:
        titles = [str(entry.get("title", "")) for entry in read_json(meta).get("classes", [])]
        names += [title for title in titles if title not in names]
    for path, content in found:
        if path in metas:
            continue
        image = photos.called(path.stem, path.parent, str(path))
        tags = [str(tag.get("name", "")).lower() for tag in content.get("tags", [])]
        split = next((SPLIT_OF[tag] for tag in tags if tag in SPLIT_OF), photos.split(image))
        size = size_of(content["size"], ("height", "width"), image)
        images[image] = Annotated(image, split, size, [])
        for number, entry in enumerate(content["objects"], 1):
            where, kind = f"{path} object {number}", entry.get("geometryType")
            label, points = str(entry.get("classTitle", "")), entry.get("points", {})
            if label not in names:
                if metas:
                    raise InputError(f"{where} is of the class {label}, which {metas[0]} does not list")
                names.append(label)
            if kind == "polygon":
                holes = [polygon(ring, where) for ring in points.get("interior", [])]
                region = partial(inside, [polygon(points.get("exterior", []), where)], holes)
            elif kind == "rectangle":
                corners = polygon(points.get("exterior", []), where, least=0)
                region = partial(inside, [rectangle(corners)], [])
            elif kind == "bitmap":
                drawn = entry.get("bitmap", {})
                left, top = map(int, drawn.get("origin", (0, 0)))
                region = partial(placed, bitmap(drawn.get("data"), where, True), left, top)
            else:
                left_out[str(kind)] += 1
                continue
            images[image].shapes.append(Shape(label, region))
    files = [*metas, *(path for path, _ in found)]
    return Annotations("Supervisely", names, list(images.values()), left_out, files)


def read_yolo(listing, photos):
    """YOLO: polygons in shares of the image's sides, later over earlier; an image without a file is empty."""
    try:
        names = (yaml.safe_load(listing.read_text(encoding="utf-8-sig")) or {}).get("names")
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        raise InputError(f"{listing} is not YAML with `names`: export it again") from None
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not names:
        raise InputError(f"{listing} names no classes (`names:`): export it again")
    names = {int(id): str(name) for id, name in names.items()}
    if len(set(names.values())) < len(names):
        raise InputError(f"{listing} names a class twice: rename one")
    labels = sorted(path for path in photos.root.rglob("*.txt") if "labels" in photos.folders(path))
    images, left_out = {}, Counter()
    for path in labels:
        beside = ("images" if name == "labels" else name for name in photos.folders(path))
        image = photos.called(path.stem, photos.root.joinpath(*beside), str(path))
        images[image] = Annotated(image, photos.split(image), upright_size(image), [])
        height, width = images[image].size
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            where, cells = f"{path} line {number}", line.split()
            if not cells:
                continue
            if not cells[0].isdecimal() or int(cells[0]) not in names:
                raise InputError(f"{where} has the class {cells[0]}, which {listing} does not list")
            if len(cells) == 5:
                left_out["box without a polygon"] += 1
                continue
            outline = polygon(cells[1:], where) * (width, height)
            images[image].shapes.append(Shape(names[int(cells[0])], partial(inside, [outline], [])))
    for paths in photos.names.values():
        for image in paths:
            if "images" in photos.folders(image) and image not in images:
                images[image] = Annotated(image, photos.split(image), upright_size(image), [])
    return Annotations("YOLO", list(names.values()), list(images.values()), left_out, [listing, *labels])


def read_label_studio(pictures, photos, contents):
    """Label Studio: a picture for each label of a task, 0 or 255, later ones over earlier.

    contents: of the JSON files beside them, of which the export names the image of each task; without it, an
    image is called like the number of its task.
    """
    tasks = {task["id"]: next(iter(task["data"].values())) for content in contents
             if isinstance(content, list) for task in content
             if isinstance(task, dict) and task.get("data") and "id" in task}
    images, labels = {}, set()
    for path in pictures:
        task, label = TAGGED.fullmatch(path.name).groups()
        name = str(tasks.get(int(task), task)).rsplit("/", 1)[-1]
        try:
            image = photos.called(name, path.parent, str(path))
        except InputError as error:
            raise InputError(f"{error}; masks of Label Studio name the number of a task alone: put its JSON "
                             f"export beside them, or call the image of task {task} {task}.jpg") from None
        if image not in images:
            images[image] = Annotated(image, photos.split(image), upright_size(image), [])
        images[image].shapes.append(Shape(label, partial(picture, path)))
        labels.add(label)
    return Annotations("Label Studio", sorted(labels), list(images.values()), {}, pictures)


def picture(path, size):
    """Return (H, W) bool: where a picture is not 0. Raises InputError where it has not that size."""
    pixels = decode_mask(path).pixels
    pixels = pixels.max(2) if pixels.ndim == 3 else pixels
    if pixels.shape != size:
        (height, width), (tall, wide) = pixels.shape, size
        raise InputError(f"{path} has {height}x{width} pixels, its image {tall}x{wide}: is it of another "
                         "one?")
    return pixels > 0


JSON_TOOLS = {  # keys that a file of each has at its top
    read_coco: {"images", "annotations", "categories"},
    read_labelme: {"shapes", "imagePath"},
    read_supervisely: {"objects", "size"},
}


def read_json(path):
    """Return the content of a JSON file. Raises InputError where it is none."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): export it again, or move it away") from None


def read_annotations(root, paths):
    """Return the Annotations below a folder whose image files are `paths`, or None. Raises InputError."""
    photos = Photos(root, paths)
    files = sorted(path for path in root.rglob("*.json")
                   if not any(part.startswith(".") for part in path.relative_to(root).parts))
    contents = in_parallel(read_json, files, "reading annotations")
    for read, keys in JSON_TOOLS.items():
        found = [(path, content) for path, content in zip(files, contents, strict=True)
                 if isinstance(content, dict) and keys <= content.keys()]
        if found:
            broken = [content for content in contents if isinstance(content, InputError)]
            if broken:
                raise broken[0]
            return careful(read, found, photos)
    tagged = [path for path in paths if TAGGED.fullmatch(path.name)]
    if tagged:
        photos = Photos(root, [path for path in paths if path not in tagged])
        return careful(read_label_studio, tagged, photos, contents)
    listing = next((path for name in YOLO_FILES for path in sorted(root.rglob(name))), None)
    return careful(read_yolo, listing, photos) if listing else None


def careful(read, found, *more):
    """Return read(found, *more). Raises InputError where the files have not the form of their tool."""
    try:
        return read(found, *more)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        one = found[0] if isinstance(found, list) else found
        one = one[0] if isinstance(one, tuple) else one
        tool = read.__doc__.split(":")[0]
        raise InputError(f"{one} or a file like it has not the form of {tool} annotations "
                         f"({type(error).__name__}: {error}): export it again") from None


# --- drawing ----------------------------------------------------------------------------------------------
def find_masks(root):
    """Return the FolderContent of images and masks under `root`: those of layout.find_pairs, else masks drawn
    from annotation files. Raises InputError.
    """
    try:
        return find_pairs(root)
    except NoMasks:
        found = read_annotations(root, list_images(root))
        if found is None:
            raise
    return draw_annotations(root, found)


def draw_annotations(root, found):
    """Draw the masks of Annotations and return the FolderContent. Raises InputError."""
    names = [name for name in found.classes if name.lower() not in BACKGROUND | IGNORED]
    if not 0 < len(names) < MOST_CLASSES:
        raise InputError(f"{found.files[0]} and what belongs to it hold {len(names)} names of classes; "
                         f"1 to {MOST_CLASSES - 1} are read, beside the background")
    values = {name: names.index(name) + 1 if name in names else IGNORE if name.lower() in IGNORED
              else len(names) + 1 for name in found.classes}
    folder, splits = masks_folder(root, found), {}
    for image in sorted(found.images):
        mask = folder / f"{image.image.relative_to(root)}.png"
        splits.setdefault(image.split or "train", []).append(Sample(image.image, mask))
    fill_folder(folder, lambda image, part: draw(
        image, values, part / f"{image.image.relative_to(root)}.png"), found.images, "drawing masks")
    shapes = sum(len(image.shapes) for image in found.images)
    order = "smaller over larger" if found.tool == "COCO" else "later over earlier"
    notes = [f"{found.tool} annotations: {count_of(shapes, 'shape')} drawn over "
             f"{count_of(len(found.images), 'image')}, {order}; the rest is background; masks in {folder}"]
    kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(found.left_out.items()))
    doubts = [f"not drawn, because they enclose nothing: {kinds}"] if kinds else []
    labeled = [len(names) + 1] if len(names) + 1 in values.values() else []  # as background
    entries = [*(Entry("background", None, value) for value in (0, *labeled)),
               *(Entry(name, None, values[name]) for name in names)]
    drawn = FolderContent(splits, {}, {}, notes, doubts, entries)
    use_lists(drawn, root, root)
    drawn.splits.setdefault("train", [])
    return drawn


def masks_folder(root, found):
    """Return the folder for masks of these Annotations, named by all that they depend on."""
    state = hashlib.sha256(f"{VERSION}".encode())
    for path in found.files:
        state.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for image in sorted(found.images):
        state.update(f"{image.image.relative_to(root)} {image.size}\n".encode())
    return drawn_folder() / state.hexdigest()[:16]


def draw(image, values, path):
    """Write the mask of an Annotated image; values: {label: mask value}."""
    mask = np.zeros(image.size, np.uint8)
    for shape in image.shapes:
        mask[shape.region(image.size)] = values[shape.label]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
