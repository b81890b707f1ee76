"""COCO, also as Roboflow exports it: images, categories and annotations, which are polygons or run lengths.

Smaller shapes lie over larger ones; crowds count as their class; boxes alone are not drawn.
"""
from functools import partial

from config import InputError
from dataio.annotations.files import AnnotatedImage, Annotations, annotated_size, form_errors
from dataio.annotations.shapes import Shape, area_of, outline, polygons, run_lengths
from dataio.layout import SPLIT_OF, words_of


def find_files(folder):
    """Return {path: content} of the COCO files of a FolderFiles. Raises InputError."""
    return folder.json_with("images", "annotations", "categories")


def read(files, folder):
    """Return the Annotations of {path: content}. Raises InputError."""
    classes, images = [], []
    for path, content in files.items():
        with form_errors(path, "COCO"):
            categories = read_categories(path, content)
            classes += [name for name in categories.values() if name not in classes]
            images += read_images(path, content, categories, folder)
    return Annotations(classes, images, list(files), "smaller over larger")


def read_categories(path, content):
    """Return {id: name}, without the head of the list that Roboflow adds. Raises InputError."""
    used = {entry.get("category_id") for entry in content["annotations"]}
    heads = {entry.get("supercategory") for entry in content["categories"]}
    categories = {}
    for entry in content["categories"]:
        id, name = entry.get("id"), str(entry.get("name", "")).strip()
        if name in heads and id not in used:
            continue
        if id in categories or name in categories.values():
            raise InputError(f"{path} lists two categories of the id {id} or the name {name}: rename one of "
                             "them")
        categories[id] = name
    return categories


def read_images(path, content, categories, folder):
    """Return the [AnnotatedImage] of a file. Raises InputError."""
    images = {}  # by id
    file_split = next((SPLIT_OF[word] for word in words_of(path.stem) if word in SPLIT_OF), "")
    for entry in content["images"]:
        id, source = entry.get("id"), f"{path} image {entry.get('id')}"
        if id in images:
            raise InputError(f"{source} is listed twice: remove one of the entries")
        image = folder.find_image(entry.get("file_name"), path.parent, source)
        split = folder.split_of(image) or file_split or folder.split_of(path)
        size = annotated_size(entry, ("height", "width"), image)
        images[id] = AnnotatedImage(image, split, size, [], source)
    for number, entry in enumerate(content["annotations"]):
        where = f"{path} annotation {entry.get('id', number)}"
        for key, listed in (("category_id", categories), ("image_id", images)):
            if entry.get(key) not in listed:
                raise InputError(f"{where} has the {key} {entry.get(key)}, which the file does not list")
        shape = read_shape(entry, categories[entry["category_id"]], where)
        images[entry["image_id"]].shapes.append(shape)
    for image in images.values():
        image.shapes.sort(key=lambda shape: -shape.area)
    return list(images.values())


def read_shape(entry, label, where):
    """Return the Shape of an annotation. Raises InputError."""
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, dict):
        return Shape(label, "region", partial(run_lengths, segmentation, where), entry.get("area") or 0)
    if segmentation:
        outlines = [outline(points, where) for points in segmentation]
        return Shape(label, "polygon", partial(polygons, outlines), sum(map(area_of, outlines)))
    return Shape(label, "box without a polygon", None)
