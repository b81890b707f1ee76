"""CVAT, "CVAT for images 1.1": annotations.xml, of polygons, masks, boxes and ellipses.

z_order says what lies over what. Coordinates are continuous, as everywhere: a box to 10 ends before pixel 10.
"""
import xml.etree.ElementTree as ElementTree
from functools import partial

from config import InputError
from dataio.annotations.files import AnnotatedImage, Annotations, given_size, read_shapes, split_in
from dataio.annotations.shapes import Shape, decode_rows, ellipse, rectangle, turned

NO_SHAPES = {"tag", "attribute"}  # of an image


def find_files(folder):
    """Return the CVAT files of a FolderFiles that list images, not tracks."""
    return [path for path in folder.with_ending(".xml") if holds(path, b"<annotations", b"<image ")]


def holds(path, *texts):
    """Return whether a file holds all of `texts`, bytes."""
    content = path.read_bytes()
    return all(text in content for text in texts)


def read(files, folder):
    """Return the Annotations of CVAT files."""
    classes, images = [], []
    for path in files:
        with folder.reading(path, "CVAT"):
            root = read_xml(path)
            labels = [label for label in root.iterfind("meta//labels/label") if label.find("parent") is None]
            classes += [label.findtext("name") for label in labels]  # without the joints of skeletons
            for image in root.iterfind("image"):
                name = image.attrib["name"]
                source = f"{path} image {name}"
                entries = [entry for entry in image if entry.tag not in NO_SHAPES]
                shapes = read_shapes(entries, read_shape, f"{source} shape", "CVAT")
                size = given_size({side: int(image.get(side)) for side in ("height", "width")},
                                  "height", "width")
                split = split_in(image.get("subset", ""))
                images.append(AnnotatedImage(name, source, path, shapes, size, split))
    return Annotations(list(filter(None, classes)), images, files)


def read_xml(path):
    """Return the root element of an XML file. Raises InputError, also for entities: they may be bombs."""
    content = path.read_bytes()
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise InputError(f"{path} declares a DOCTYPE or entities, which CVAT never does: export it again")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{path} is not valid XML ({error}): export it again, or move it away") from None


def read_shape(entry, where):
    """Return the Shape of an element of an image. Raises BadLabel."""
    kind, values = entry.tag, entry.attrib
    shape = Shape(values["label"], kind, where, order=float(values.get("z_order", 0)))
    degrees = float(values.get("rotation", 0))
    if kind == "polygon":
        return shape._replace(rings=[values["points"].replace(";", ",").split(",")])
    if kind == "box":
        corners = rectangle([values[key] for key in ("xtl", "ytl", "xbr", "ybr")])
        return shape._replace(rings=[turned(corners, corners.mean(0), degrees)])
    if kind == "ellipse":
        center, radii = [values["cx"], values["cy"]], [values["rx"], values["ry"]]
        return shape._replace(rings=[ellipse(center, radii, degrees)])
    if kind == "mask":
        box = [int(values[key]) for key in ("left", "top", "width", "height")]
        return shape._replace(bitmap=partial(decode_rows, values["rle"].split(","), *box))
    return shape
