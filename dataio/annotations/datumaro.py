"""Datumaro, also as CVAT exports it: annotations/SUBSET.json, of polygons, masks, boxes and ellipses.

z_order says what lies over what. An ellipse is given by its box, x y x y, a box by x, y, width and height.
"""
from functools import partial

from dataio.annotations.files import AnnotatedImage, Annotations, given_size, read_shapes, split_in
from dataio.annotations.shapes import Shape, as_points, box, decode_runs, ellipse, turned

NO_SHAPES = ("label", "caption")  # of an image


def find_files(folder):
    """Return the Datumaro files of a FolderFiles."""
    return list(folder.json_with("categories", "items"))


def read(files, folder):
    """Return the Annotations of Datumaro files."""
    classes, images = [], []
    for path in files:
        with folder.reading(path, "Datumaro"):
            content = folder.json[path]
            labels = [str(entry["name"]) for entry in content["categories"]["label"]["labels"]]
            classes += labels
            for item in content["items"]:
                images.append(read_item(item, path, reader_of(labels)))
    return Annotations(classes, images, files)


def read_item(item, path, read_annotation):
    """Return the AnnotatedImage of an item of a file."""
    source = f"{path} item {item['id']}"
    image = item.get("image") or item.get("media") or {}
    name = f"{path.stem}/{image.get('path') or item['id']}"
    size = dict(enumerate(image.get("size") or ()))
    entries = [entry for entry in item["annotations"] if entry.get("type") not in NO_SHAPES]
    shapes = read_shapes(entries, read_annotation, f"{source} annotation", "Datumaro")
    return AnnotatedImage(name, source, path, shapes, given_size(size, 0, 1), split_in(path.stem))


def reader_of(labels):
    """Return the function that reads an annotation, by the names of the labels."""
    def read_annotation(entry, where):
        id, kind = entry.get("label_id"), str(entry["type"])
        label = labels[id] if type(id) is int and 0 <= id < len(labels) else ""
        shape = Shape(label, kind, where, order=float(entry.get("z_order") or 0))
        degrees = (entry.get("attributes") or {}).get("rotation", 0)  # as CVAT writes it
        if kind == "polygon":
            return shape._replace(rings=[entry["points"]])
        if kind == "mask":
            return shape._replace(bitmap=partial(decode_runs, entry["rle"]))
        if kind == "bbox":
            corners = box(*entry["bbox"])
            return shape._replace(rings=[turned(corners, corners.mean(0), degrees)])
        if kind == "ellipse":
            start, end = as_points(entry["points"])
            return shape._replace(rings=[ellipse((start + end) / 2, (end - start) / 2, degrees)])
        return shape

    return read_annotation
