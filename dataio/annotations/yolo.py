"""YOLO segmentation, as Ultralytics and Roboflow write it: data.yaml names the classes, labels/*.txt hold the
polygons of images/*, a class number and x y x y ... in shares of the sides on each line; they may lie beside
their images too.

Other YAML files with `names` do too, and classes.txt, a name a line; of several, each label file takes the
nearest. An image without a text file is background where others of its folder have one; boxes, which have
four numbers, cannot be drawn.
"""
import os
import re

import yaml

from config import InputError
from dataio.annotations.files import AnnotatedImage, Annotations, read_shapes
from dataio.annotations.shapes import BadLabel, Shape

CLASS_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")
YAML = (".yaml", ".yml")


def find_files(folder):
    """Return the files that name the classes and the label files of a FolderFiles, or []."""
    paths = folder.with_ending(*YAML, ".txt", ".names")
    named = sorted(filter(names_classes, paths), key=lambda path: (
        len(path.parts), path.suffix not in YAML, path.name not in CLASS_FILES))
    beside = {image.with_suffix(".txt") for image in folder.images}
    texts = [path for path in paths if path.suffix.lower() == ".txt" and path not in named
             and ("labels" in folder.folders_of(path) or path in beside)]
    return [*named, *texts] if named and texts else []


def names_classes(path):
    """Return whether a file names classes: by its name, or a YAML file by what it holds."""
    return path.name in CLASS_FILES or path.suffix in YAML and bool(
        re.search(rb"^['\"]?names['\"]?\s*:", path.read_bytes(), re.MULTILINE))


def read(files, folder):
    """Return the Annotations of YOLO files. Raises InputError."""
    named = [path for path in files if names_classes(path)]
    texts = {path: nearest(path, named) for path in files if path not in named}
    classes = {path: read_classes(path) for path in named if path in texts.values()}
    images, labeled = [], set()
    for path, class_file in texts.items():
        name = image_name(path, folder)
        images.append(AnnotatedImage(name, str(path), path, read_lines(path, classes[class_file])))
        labeled.update(folder.find_images(name, path))
    folders = {image.parent for image in labeled}
    images += [AnnotatedImage(image, str(image), image, []) for image in folder.images
               if image.parent in folders and image not in labeled]
    names = dict.fromkeys(name for by_number in classes.values() for name in by_number.values())
    return Annotations(list(names), images, files, shares=True)


def nearest(path, class_files):
    """Return that of the files that name classes whose folder has most in common with a label file's, the
    first of several.
    """
    return max(class_files, key=lambda file: len(os.path.commonpath([path, file.parent])))


def image_name(path, folder):
    """Return what the image of a label file is called, `images` in place of the folder `labels`."""
    folders = ["images" if name == "labels" else name for name in folder.folders_of(path)]
    return "/".join([*folders, path.stem])


def read_classes(path):
    """Return {number: name} of a file that names the classes. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    try:  # all values as text: YAML would take the name `no` for False
        content = yaml.load(text, yaml.BaseLoader) if path.suffix in YAML else {"names": text.split("\n")}
        names = content["names"]
        if isinstance(names, list):
            names = dict(pair for number, name in enumerate(names)
                         for pair in (name.items() if isinstance(name, dict) else [(number, name)]))
        classes = {int(number): name.strip() for number, name in names.items() if name.strip()}
    except (yaml.YAMLError, AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise InputError(f"{path} does not name the classes (`names:`): export it again") from None
    if "kpt_shape" in content:
        raise InputError(f"{path} has `kpt_shape`: its labels are keypoints, without outlines; export the "
                         "annotations for segmentation")
    if not classes or len(set(classes.values())) < len(classes):
        raise InputError(f"{path} names no class, or one of them twice: rename it")
    return classes


def read_lines(path, classes):
    """Return the [Shape] of a label file, by {number: name} of the classes."""
    def read_line(line, where):
        number, *cells = line.split() or [""]
        if not number:
            return None
        try:
            label = classes[float(number)]
        except (KeyError, ValueError):
            raise BadLabel("of a class that the class list does not have") from None
        if len(cells) == 4:
            return Shape(label, "box", where, problem="of the kind box, without an outline")
        if len(cells) % 2:
            raise BadLabel("with an odd number of coordinates (is the last one a confidence?)")
        return Shape(label, "polygon", where, [cells])

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return [Shape("", "", str(path), problem="of a file that is not UTF-8 text")]
    return [shape for shape in read_shapes(lines, read_line, f"{path} line", "YOLO") if shape]
