"""COCO, also as Roboflow exports it: images, categories and annotations, which are polygons or run lengths.

Smaller shapes lie over larger ones; crowds count as their class; boxes without an outline cannot be drawn.
"""
from functools import partial

from config import InputError
from dataio.annotations.files import AnnotatedImage, Annotations, given_size, read_shapes
from dataio.annotations.shapes import Shape, decode_runs

OTHER_TASKS = ("panoptic", "captions", "keypoints", "image_info")  # in the names of COCO's own files


def find_files(folder):
    """Return the COCO files of a FolderFiles, without those of other tasks beside instances_*.json."""
    contents = folder.json_with("images", "annotations")
    files = [path for path, content in contents.items() if not is_panoptic(content["annotations"])]
    masks = [path for path in files if not any(word in path.stem for word in OTHER_TASKS)]
    return masks or files


def is_panoptic(annotations):
    """Return whether annotations tell of pictures in which a color is an object."""
    return isinstance(annotations, list) and any(isinstance(entry, dict) and "segments_info" in entry
                                                 for entry in annotations)


def read(files, folder):
    """Return the Annotations of COCO files."""
    classes, images, notes = [], [], []
    for path in files:
        with folder.reading(path, "COCO"):
            categories = read_categories(path, folder.json[path])
            images += read_images(path, folder.json[path], categories)
            classes += [name for name in categories.values() if name not in classes]
            if not folder.json[path].get("categories"):
                notes.append(f"{path} has no `categories`: its classes are called by their numbers")
    aside = sorted(folder.json_with("images", "annotations").keys() - set(files))
    if aside:
        notes.append(f"left aside: {', '.join(path.name for path in aside)} (no masks of classes)")
    return Annotations(classes, images, files, by_area=True, notes=notes)


def read_categories(path, content):
    """Return {id: name}, without the head of the list that Roboflow adds: of no supercategory, but that of
    others, and not used. Raises InputError.
    """
    used = [entry.get("category_id") for entry in content["annotations"] if isinstance(entry, dict)]
    if not content.get("categories"):
        return {id: f"category {id}" for id in sorted(filter(lambda id: type(id) is int, set(used)))}
    heads = {entry.get("supercategory") for entry in content["categories"]}
    categories = {}
    for entry in content["categories"]:
        id, name = entry["id"], str(entry["name"]).strip()
        if name in heads and entry.get("supercategory") in (None, "", "none") and id not in used:
            continue
        if id in categories or name in categories.values():
            raise InputError(f"{path} lists two categories of the id {id} or the name {name}: rename one")
        categories[id] = name
    return categories


def read_images(path, content, categories):
    """Return the [AnnotatedImage] of a file."""
    images, strays = {}, []  # by id

    def read_shape(entry, where):
        where = f"{path} annotation {entry['id']}" if "id" in entry else where
        if entry["image_id"] not in images:
            strays.append(Shape("", "", where, problem="of an image that its file does not list"))
            return
        label = categories.get(entry["category_id"])
        shape = Shape(label, "", where, problem="of a class that its file does not list")
        if label is not None:
            shape = shape_of(entry.get("segmentation"), shape._replace(problem=""))
        images[entry["image_id"]].shapes.append(shape)

    for entry in content["images"]:
        source = f"{path} image {entry['id']}"
        if entry["id"] in images:
            raise InputError(f"{source} is listed twice: remove one of the entries")
        size = given_size(entry, "height", "width")
        images[entry["id"]] = AnnotatedImage(entry["file_name"], source, path, [], size)
    shapes = read_shapes(content["annotations"], read_shape, f"{path} annotation number", "COCO")
    strays += filter(None, shapes)  # those that could not be read
    return [*images.values(), *([AnnotatedImage(None, str(path), path, strays)] if strays else [])]


def shape_of(segmentation, shape):
    """Return a Shape with what the `segmentation` of an annotation holds."""
    if isinstance(segmentation, dict):
        return shape._replace(kind="run lengths", bitmap=partial(decode_runs, segmentation))
    if not segmentation:
        return shape._replace(kind="box", problem="of the kind box, without an outline")
    flat = not isinstance(segmentation[0], list) or all(len(ring) == 2 for ring in segmentation)
    return shape._replace(kind="polygon", rings=[segmentation] if flat else segmentation)
