"""Supervisely: a JSON file for each image, of polygons with holes, bitmaps and rectangles.

Later shapes lie over earlier ones. meta.json lists the classes. A tag of an image may name its split.
"""
from functools import partial

from config import InputError
from dataio.annotations.files import AnnotatedImage, Annotations, annotated_size, form_errors, read_json
from dataio.annotations.shapes import Shape, bitmap, outline, polygons, rectangle
from dataio.layout import SPLIT_OF


def find_files(folder):
    """Return {path: content} of the Supervisely files of a FolderFiles. Raises InputError."""
    return folder.json_with("objects", "size")


def read(files, folder):
    """Return the Annotations of {path: content}. Raises InputError."""
    classes, images = [], []
    metas = sorted(folder.root.rglob("meta.json"))
    for meta in metas:
        with form_errors(meta, "Supervisely"):
            titles = [str(entry.get("title", "")) for entry in read_json(meta).get("classes", [])]
        classes += titles
    for path, content in files.items():
        with form_errors(path, "Supervisely"):
            image = folder.find_image(path.stem, path.parent, str(path))
            tags = [str(tag.get("name", "")).lower() for tag in content.get("tags", [])]
            split = next((SPLIT_OF[tag] for tag in tags if tag in SPLIT_OF), folder.split_of(image))
            size = annotated_size(content["size"], ("height", "width"), image)
            shapes = [read_shape(entry, f"{path} object {number}")
                      for number, entry in enumerate(content["objects"], 1)]
            images.append(AnnotatedImage(image, split, size, shapes, str(path)))
        unknown = [shape.label for shape in shapes if shape.label not in classes]
        if metas and unknown:
            raise InputError(f"{path} has a shape of the class {unknown[0]}, which {metas[0]} does not list")
        classes += unknown
    return Annotations(list(dict.fromkeys(classes)), images, [*metas, *files])


def read_shape(entry, where):
    """Return the Shape of an object. Raises InputError."""
    label, kind = str(entry.get("classTitle", "")), str(entry.get("geometryType"))
    points = entry.get("points", {})
    if kind == "polygon":
        holes = [outline(hole, where) for hole in points.get("interior", [])]
        draw = partial(polygons, [outline(points.get("exterior", []), where)], holes)
    elif kind == "rectangle":
        draw = partial(polygons, [rectangle(outline(points.get("exterior", []), where, least=0))])
    elif kind == "bitmap":
        content = entry.get("bitmap", {})
        left, top = map(int, content.get("origin", (0, 0)))
        draw = partial(bitmap, content.get("data"), left, top, where, compressed=True)
    else:
        draw = None
    return Shape(label, kind, draw)
