"""labelme and X-AnyLabeling: a JSON file for each image, of polygons, boxes, circles and masks."""
from functools import partial

import numpy as np

from dataio.annotations.files import AnnotatedImage, Annotations, given_size, read_shapes
from dataio.annotations.shapes import Shape, as_points, circle, decode_png, rectangle

OUTLINES = {"polygon", "rotation", "oriented_rectangle", "quadrilateral"}  # whose points are the outline


def find_files(folder):
    """Return the labelme files of a FolderFiles."""
    return list(folder.json_with("shapes", "imagePath"))


def read(files, folder):
    """Return the Annotations of labelme files."""
    images = []
    for path in files:
        with folder.reading(path, "labelme"):
            content = folder.json[path]
            shapes = read_shapes(content["shapes"], read_shape, f"{path} shape", "labelme")
            images.append(AnnotatedImage(content["imagePath"] or path.stem, str(path), path, shapes,
                                         given_size(content, "imageHeight", "imageWidth")))
    return Annotations([], images, files)


def read_shape(entry, where):
    """Return the Shape of an entry. Raises BadLabel."""
    kind, points = str(entry.get("shape_type") or "polygon"), entry["points"]
    shape = Shape(entry["label"], kind, where)
    if kind in OUTLINES:
        return shape._replace(rings=[points])
    if kind == "rectangle" and len(points) == 4:  # its corners, in X-AnyLabeling
        return shape._replace(rings=[rectangle([as_points(points).min(0), as_points(points).max(0)])])
    if kind in ("rectangle", "circle"):
        return shape._replace(rings=[(rectangle if kind == "rectangle" else circle)(points)])
    if kind in ("mask", "alpha_mask"):
        left, top = np.round(as_points(points).min(0))
        return shape._replace(bitmap=partial(decode_png, entry["mask"], left, top))
    return shape
