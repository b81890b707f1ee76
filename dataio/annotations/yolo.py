"""YOLO segmentation, as Ultralytics and Roboflow write it: data.yaml names the classes, labels/*.txt hold the
polygons of images/*, a class number and x y x y ... in shares of the sides on each line.

Later polygons lie over earlier ones; an image without a text file is background; boxes are not drawn.
"""
from functools import partial

import yaml

from config import InputError
from dataio.annotations.files import AnnotatedImage, Annotations, form_errors
from dataio.annotations.shapes import Shape, outline, polygons
from dataio.images import image_size

CLASS_FILES = ("data.yaml", "data.yml", "dataset.yaml")


def find_files(folder):
    """Return [the file that names the classes] of a FolderFiles, or []."""
    return [path for name in CLASS_FILES for path in sorted(folder.root.rglob(name))][:1]


def read(files, folder):
    """Return the Annotations that belong to the file with the classes. Raises InputError."""
    class_file, images = files[0], []
    with form_errors(class_file, "YOLO"):
        classes = read_classes(class_file)
    texts = sorted(path for path in folder.root.rglob("*.txt") if "labels" in folder.folders_of(path))
    for path in texts:
        folders = ["images" if name == "labels" else name for name in folder.folders_of(path)]
        image = folder.find_image(path.stem, folder.root.joinpath(*folders), str(path))
        with form_errors(path, "YOLO"):
            size = image_size(image)
            shapes = read_shapes(path, size, classes, class_file)
            images.append(AnnotatedImage(image, folder.split_of(image), size, shapes, str(path)))
    labeled = {image.path for image in images}
    for image in folder.images:
        if "images" in folder.folders_of(image) and image not in labeled:
            images.append(AnnotatedImage(image, folder.split_of(image), image_size(image), [], str(image)))
    return Annotations(list(classes.values()), images, [class_file, *texts])


def read_classes(path):
    """Return {number: name} of data.yaml. Raises InputError."""
    try:
        names = (yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}).get("names")
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        raise InputError(f"{path} is not YAML with `names`: export it again") from None
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not names:
        raise InputError(f"{path} does not name the classes (`names:`): export it again")
    classes = {int(number): str(name) for number, name in names.items()}
    if len(set(classes.values())) < len(classes):
        raise InputError(f"{path} names a class twice: rename one of them")
    return classes


def read_shapes(path, size, classes, class_file):
    """Return the [Shape] of a text file. Raises InputError."""
    shapes = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        where, cells = f"{path} line {number}", line.split()
        if not cells:
            continue
        if not cells[0].isdecimal() or int(cells[0]) not in classes:
            raise InputError(f"{where} has the class {cells[0]}, which {class_file} does not list")
        label = classes[int(cells[0])]
        if len(cells) == 5:
            shapes.append(Shape(label, "box without a polygon", None))
        else:
            points = outline(cells[1:], where) * size[::-1]
            shapes.append(Shape(label, "polygon", partial(polygons, [points])))
    return shapes
