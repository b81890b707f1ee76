"""labelme: a JSON file for each image, of polygons, rectangles, circles and masks; later over earlier."""
from functools import partial

import numpy as np

from config import InputError, count_of
from dataio.annotations.files import AnnotatedImage, Annotations, annotated_size, form_errors
from dataio.annotations.shapes import Shape, bitmap, circle, outline, polygons, rectangle


def find_files(folder):
    """Return {path: content} of the labelme files of a FolderFiles. Raises InputError."""
    return folder.json_with("shapes", "imagePath")


def read(files, folder):
    """Return the Annotations of {path: content}. Raises InputError."""
    images = []
    for path, content in files.items():
        with form_errors(path, "labelme"):
            image = folder.find_image(content["imagePath"] or path.stem, path.parent, str(path))
            size = annotated_size(content, ("imageHeight", "imageWidth"), image)
            shapes = [read_shape(entry, f"{path} shape {number}")
                      for number, entry in enumerate(content["shapes"], 1)]
            images.append(AnnotatedImage(image, folder.split_of(image), size, shapes, str(path)))
    return Annotations([], images, list(files))


def read_shape(entry, where):
    """Return the Shape of an entry. Raises InputError."""
    label, kind = str(entry.get("label", "")).strip(), str(entry.get("shape_type") or "polygon")
    if kind == "polygon":
        draw = partial(polygons, [outline(entry.get("points", []), where)])
    elif kind == "rectangle":
        draw = partial(polygons, [rectangle(two_points(entry, kind, where))])
    elif kind == "circle":
        draw = partial(polygons, [circle(two_points(entry, kind, where))])
    elif kind == "mask":
        left, top = two_points(entry, kind, where).min(0).round().astype(int).tolist()
        draw = partial(bitmap, entry.get("mask"), left, top, where)
    else:
        draw = None
    return Shape(label, kind, draw)


def two_points(entry, kind, where):
    """Return the two points of a shape, (2, 2); a rectangle may have four corners. Raises InputError."""
    points = outline(entry.get("points", []), where, least=0)
    if len(points) == 4 and kind == "rectangle":
        return np.stack([points.min(0), points.max(0)])
    if len(points) != 2:
        raise InputError(f"{where} is a {kind} of {count_of(len(points), 'point')}, two are needed: correct "
                         "or remove it")
    return points
