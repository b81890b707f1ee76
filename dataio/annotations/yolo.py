"""YOLO segmentation, as Ultralytics and Roboflow write it: data.yaml names the classes, labels/*.txt hold the
polygons of images/*, a class number and x y x y ... in shares of the sides on each line; they may lie beside
their images too.

classes.txt names them, a name a line, where there is no data.yaml. An image without a text file is
background; boxes, which have four numbers, cannot be drawn.
"""
import yaml

from config import InputError
from dataio.annotations.files import AnnotatedImage, Annotations, read_shapes
from dataio.annotations.shapes import BadLabel, Shape

CLASS_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")


def find_files(folder):
    """Return the file that names the classes and the label files of a FolderFiles, or []."""
    named = [path for name in CLASS_FILES for path in sorted(folder.root.rglob(name))]
    beside = {image.with_suffix(".txt") for image in folder.images}
    texts = [path for path in folder.with_ending(".txt") if path.name not in CLASS_FILES
             and ("labels" in folder.folders_of(path) or path in beside)]
    return [named[0], *texts] if named and texts else []


def read(files, folder):
    """Return the Annotations of YOLO files. Raises InputError."""
    class_file, *texts = files
    classes, images, labeled = read_classes(class_file), [], set()
    for path in texts:
        with folder.reading(path, "YOLO"):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            shapes = [shape for shape in read_shapes(lines, classes_reader(classes), f"{path} line", "YOLO")
                      if shape]
            images.append(AnnotatedImage(path.stem, str(path), images_path(path, folder), shapes))
            labeled.update(folder.find_images(path.stem, images_path(path, folder)))
    for image in folder.images:
        if "images" in folder.folders_of(image) and image not in labeled:
            images.append(AnnotatedImage(image.name, str(image), image, []))
    return Annotations(list(classes.values()), images, files, shares=True)


def images_path(path, folder):
    """Return the path of a label file with `images` in place of `labels` in the names of its folders."""
    folders = ["images" if name == "labels" else name for name in folder.folders_of(path)]
    return folder.root.joinpath(*folders, path.name)


def read_classes(path):
    """Return {number: name} of the file that names the classes. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_yaml = path.suffix in (".yaml", ".yml")
        names = yaml.safe_load(text)["names"] if is_yaml else text.split("\n")
        names = dict(enumerate(names)) if isinstance(names, list) else names
        classes = {int(number): str(name).strip() for number, name in names.items() if name or is_yaml}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} does not name the classes (`names:`): export it again") from None
    if not classes or len(set(classes.values())) < len(classes):
        raise InputError(f"{path} names no class, or one of them twice: rename it")
    return classes


def classes_reader(classes):
    """Return the function that reads a line, by {number: name} of the classes."""
    def read_line(line, where):
        number, *cells = line.split() or [""]
        if not number:
            return None
        if not number.isdecimal() or int(number) not in classes:
            raise BadLabel("of a class that the class list does not have")
        label = classes[int(number)]
        if len(cells) == 4:
            return Shape(label, "box", where, problem="of the kind box, without an outline")
        return Shape(label, "polygon", where, [cells])

    return read_line
