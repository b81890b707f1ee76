"""SuperAnnotate: NAME.json or NAME___objects.json of each image holds its shapes, NAME___pixel.json the
colors of its objects in NAME___save.png; classes/classes.json lists the classes.

NAME___fuse.png, where it is, is a painted mask, which layout.py finds. Angles are degrees, clockwise.
"""
from functools import partial

from dataio.annotations.files import AnnotatedImage, Annotations, given_size, read_shapes
from dataio.annotations.shapes import Shape, ellipse, read_picture, rectangle
from dataio.layout import OBJECTS

NO_SHAPES = ("tag", "meta", "comment")


def find_files(folder):
    """Return the SuperAnnotate files of a FolderFiles, the lists of classes and the pictures."""
    files = list(folder.json_with("metadata", "instances"))
    return files and [*files, *class_lists(folder), *(path for path in folder.images
                                                      if path.stem.endswith(OBJECTS))]


def class_lists(folder):
    """Return the files that list classes."""
    return [path for path, content in folder.json.items()
            if path.name == "classes.json" and isinstance(content, list)]


def read(files, folder):
    """Return the Annotations of SuperAnnotate files."""
    classes, images = {}, []  # {id: name}
    for path in class_lists(folder):
        with folder.reading(path, "SuperAnnotate"):
            classes |= {entry["id"]: entry["name"] for entry in folder.json[path]}

    def label_of(instance):
        return instance.get("className") or classes.get(instance.get("classId"))

    def read_instance(instance, where):
        return shape_of(instance, Shape(label_of(instance), str(instance["type"]), where))

    for path in folder.json_with("metadata", "instances"):
        with folder.reading(path, "SuperAnnotate"):
            content = folder.json[path]
            name = content["metadata"].get("name") or path.stem.split("___")[0]
            size = given_size(content["metadata"], "height", "width")
            instances = [entry for entry in content["instances"] if entry.get("type") not in NO_SHAPES]
            shapes = pixel_shapes(path, instances, label_of) if path.stem.endswith("___pixel") else \
                read_shapes(instances, read_instance, f"{path} instance", "SuperAnnotate")
            images.append(AnnotatedImage(name, str(path), path, shapes, size))
    return Annotations(list(classes.values()), images, files)


def shape_of(instance, shape):
    """Return a Shape with what an instance of a vector file holds. Raises BadLabel."""
    points = instance.get("points")
    if shape.kind == "polygon":
        return shape._replace(rings=[points], holes=instance.get("exclude") or ())
    if shape.kind == "bbox":
        return shape._replace(rings=[rectangle([points[key] for key in ("x1", "y1", "x2", "y2")])])
    if shape.kind == "rbbox":  # its corners in turn
        return shape._replace(rings=[[points[f"{axis}{corner}"] for corner in (1, 2, 3, 4) for axis in "xy"]])
    if shape.kind == "ellipse":
        center, radii = [instance["cx"], instance["cy"]], [instance["rx"], instance["ry"]]
        return shape._replace(rings=[ellipse(center, radii, instance.get("angle", 0))])
    return shape._replace(kind="skeleton") if shape.kind == "template" else shape


def pixel_shapes(path, instances, label_of):
    """Return a Shape for each class of a pixel file, of all colors of its instances: each would decode the
    picture.
    """
    colors = {}
    for instance in instances:
        for part in instance["parts"]:
            colors.setdefault(str(label_of(instance) or ""), []).append(color_code(part["color"]))
    picture = path.with_name(path.name.replace("___pixel.json", "___save.png"))
    return [Shape(label, "picture", f"{path} class {label}", bitmap=partial(read_picture, picture, codes))
            for label, codes in colors.items()]


def color_code(text):
    """Return the number of a color #RRGGBB. Raises ValueError."""
    if len(text) != 7 or text[0] != "#":
        raise ValueError(f"no color: {text}")
    return int(text[1:], 16)
