"""ISAT (Segment Anything annotator): a JSON file for each image, of polygons; isat.yaml lists the classes.

A higher layer lies over a lower one, so that holes are objects of the class __background__.
"""
import yaml

from config import InputError
from dataio.annotations.files import AnnotatedImage, Annotations, given_size, read_shapes
from dataio.annotations.shapes import Shape


def find_files(folder):
    """Return the ISAT files of a FolderFiles, and isat.yaml."""
    contents = folder.json_with("info", "objects")
    files = [path for path, content in contents.items() if is_isat(content["info"])]
    return files and [*files, *class_files(folder)]


def is_isat(info):
    """Return whether the `info` of a file is that of ISAT; its first versions wrote its name as a note."""
    return isinstance(info, dict) and "ISAT" in (info.get("description"), info.get("note"))


def class_files(folder):
    """Return the files that list classes."""
    return [path for path in folder.with_ending(".yaml", ".yml") if path.stem == "isat"]


def read(files, folder):
    """Return the Annotations of ISAT files."""
    classes, images = [], []
    for path in class_files(folder):
        with folder.reading(path, "ISAT"):
            classes += read_classes(path)
    for path in files:
        if path.suffix != ".json":
            continue
        with folder.reading(path, "ISAT"):
            content = folder.json[path]
            info = content["info"]
            shapes = read_shapes(content["objects"], read_object, f"{path} object", "ISAT")
            images.append(AnnotatedImage(info.get("name") or path.stem, str(path), path, shapes,
                                         given_size(info, "height", "width")))
    return Annotations(classes, images, files)


def read_classes(path):
    """Return the names in isat.yaml. Raises InputError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError):
        raise InputError(f"{path} is not valid YAML: export it again, or move it away") from None
    return [str(entry["name"]) for entry in content["label"]]


def read_object(entry, where):
    """Return the Shape of an object."""
    kind = str(entry.get("shape_type") or "polygon")
    shape = Shape(entry["category"], kind, where, order=float(entry.get("layer") or 0))
    return shape._replace(rings=[entry["segmentation"]]) if kind == "polygon" else shape
