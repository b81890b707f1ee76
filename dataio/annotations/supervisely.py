"""Supervisely: a JSON file for each image, of polygons with holes, bitmaps and rectangles.

meta.json lists the classes. A tag of an image may name its split.
"""
from functools import partial

from dataio.annotations.files import AnnotatedImage, Annotations, given_size, read_shapes
from dataio.annotations.shapes import Shape, decode_png, rectangle
from dataio.layout import SPLIT_OF


def find_files(folder):
    """Return the Supervisely files of a FolderFiles, and meta.json."""
    files = list(folder.json_with("objects", "size"))
    return files and [*files, *(path for path in folder.json if path.name == "meta.json")]


def read(files, folder):
    """Return the Annotations of Supervisely files."""
    metas, classes, images = [path for path in files if path.name == "meta.json"], [], []
    for path in metas:
        with folder.reading(path, "Supervisely"):
            classes += [str(entry["title"]) for entry in folder.json[path].get("classes", [])]
    read_object = reader_of(classes if metas else None)
    for path in files[:len(files) - len(metas)]:
        with folder.reading(path, "Supervisely"):
            content = folder.json[path]
            tags = [str(tag["name"]).lower() for tag in content.get("tags", [])]
            split = next((SPLIT_OF[tag] for tag in tags if tag in SPLIT_OF), "")
            shapes = read_shapes(content["objects"], read_object, f"{path} object", "Supervisely")
            size = given_size(content["size"], "height", "width")
            images.append(AnnotatedImage(path.stem, str(path), path, shapes, size, split))
    return Annotations(classes, images, files)


def reader_of(classes):
    """Return the function that reads an object; classes: names that it may have, None = any."""
    def read_object(entry, where):
        label, kind, points = entry["classTitle"], str(entry["geometryType"]), entry.get("points", {})
        shape = Shape(label, kind, where)
        if classes is not None and label not in classes:
            return shape._replace(problem="of a class that meta.json does not list")
        if kind == "polygon":
            return shape._replace(rings=[points["exterior"]], holes=points.get("interior", ()))
        if kind == "rectangle":
            return shape._replace(rings=[rectangle(points["exterior"])])
        if kind == "bitmap":
            left, top = entry["bitmap"]["origin"]
            data = entry["bitmap"]["data"]
            return shape._replace(bitmap=partial(decode_png, data, left, top, compressed=True))
        return shape

    return read_object
