"""A black and white picture for each class or object of an image, in one of three layouts:

    masks/car/1.png     masks/tree/1.png        beside images/1.jpg, also car_masks/1.png
    masks/1_car.png     masks/1_tree.png        or beside the images
    1/masks/0ac3.png    1/masks/77f0.png        beside 1/images/1.png: one class, called object (Data Science
                                                Bowl), or masks/1/car.png masks/1/tree.png

Every picture holds 0 and one other value. Smaller shapes lie over larger ones.
"""
import re
from functools import partial
from typing import NamedTuple

import numpy as np

from config import InputError, count_of
from dataio.annotations.files import AnnotatedImage, Annotations
from dataio.annotations.shapes import BadLabel, Shape, read_picture
from dataio.layout import KNOWN_WORDS, MASK_AFFIX, count_shared_folders, role_of, words_of
from dataio.readers import decode_mask
from dataio.scan import distinct
from utils import evenly_sampled, grouped, in_parallel

OPENED = 16  # pictures that are opened to see whether all are black and white
NEARLY_ALL = 0.8  # share of them that has to be; the others are named then
MUCH = 0.5  # share of the pixels above which classes that overlap are doubtful
OBJECT = "object"  # the class of pictures whose names say none


class Picture(NamedTuple):
    """A picture of a class of an image; image: None where it is not there."""

    path: object
    image: object
    label: str


def find_files(folder):
    """Return the pictures of a FolderFiles, or []."""
    return [picture.path for picture in find_pictures(folder)]


def read(files, folder):
    """Return the Annotations of pictures."""
    pictures = find_pictures(folder)
    by_image = grouped([picture for picture in pictures if picture.image], lambda picture: picture.image)
    strays = [Shape("", "", str(picture.path), problem="of an image that is not there")
              for picture in pictures if not picture.image]
    images = [AnnotatedImage(None, "", files[0], strays)] if strays else []
    overlaps = []  # the share of each image with any
    found = in_parallel(look_at, list(by_image.values()), "reading masks")
    for (image, entries), (contents, overlap) in zip(by_image.items(), found, strict=True):
        shapes = [shape_of(picture, content) for picture, content in zip(entries, contents, strict=True)]
        splits = {folder.split_of(picture.path) for picture in entries} - {""}
        split = splits.pop() if len(splits) == 1 and not folder.split_of(image) else ""
        images.append(AnnotatedImage(image, str(image), image, list(filter(None, shapes)), split=split))
        overlaps += [overlap] * (overlap > 0)
    classes = sorted({picture.label for picture in pictures})
    notes = [f"{count_of(len(pictures), 'black and white picture')}, one for each "
             + (f"class of an image: {', '.join(classes)}" if classes != [OBJECT] else
                f"object of an image, which is of the only class, {OBJECT}")]
    doubts = []
    if overlaps:
        share = np.mean(overlaps)
        line = (f"pictures of different classes overlap in {count_of(len(overlaps), 'image')}, in "
                f"{100 * share:.0f} % of their pixels: smaller shapes lie over larger ones")
        if share > MUCH:
            doubts.append(f"{line}; are these classes, or drawings of the same by several people?")
        else:
            notes.append(line)
    return Annotations(classes, images, files, by_area=True, notes=notes, doubts=doubts)


def look_at(pictures):
    """Return ([what is wrong with each of the pictures of an image, "empty" or ""], the share of their pixels
    that lies in several classes).
    """
    contents, covered = [], {}  # {class: (H, W) bool}
    for picture in pictures:
        try:
            pixels = read_black_and_white(picture.path).pixels
            contents.append("" if pixels.any() else "empty")
            before = covered.get(picture.label, np.zeros_like(pixels))
            covered[picture.label] = before | pixels if before.shape == pixels.shape else pixels
        except BadLabel as error:
            contents.append(str(error))
    if len({pixels.shape for pixels in covered.values()}) != 1:
        return contents, 0
    count = sum(pixels.astype(np.uint8) for pixels in covered.values())
    return contents, int((count > 1).sum()) / max(1, int((count > 0).sum()))


def shape_of(picture, content):
    """Return the Shape of a Picture, None where it is empty; content: as look_at says."""
    shape = Shape(picture.label, "picture", str(picture.path))
    if content:
        return None if content == "empty" else shape._replace(problem=content)
    return shape._replace(bitmap=partial(read_picture, picture.path))


def read_black_and_white(path):
    """Return the Bitmap of a picture of 0 and one other value. Raises BadLabel."""
    bitmap = read_picture(path)
    if not is_black_and_white(path):
        raise BadLabel("of a picture with more values than 0 and another one, where all others have these")
    return bitmap


def is_black_and_white(path):
    """Return whether a file holds 0 and one other value, or one of them."""
    try:
        codes, _ = distinct(decode_mask(path).codes)
    except InputError:
        return False
    return len(codes) < 2 or len(codes) == 2 and codes[0] == 0


def are_classes(samples, root):
    """Return whether the masks of Samples that pair by name lie in folders of classes: all are black and
    white, and in several folders whose names, without numbers, no folder of their images has.
    """
    labels = set()
    for sample in samples:
        image, mask = (role_of(path.relative_to(root).parts[:-1]).group for path in sample[:2])
        labels.add(tuple(word for word in mask if word not in image))
    named = all(label and all(map(str.isalpha, label)) for label in labels)
    return len(labels) > 1 and named and all(
        is_black_and_white(sample.mask) for sample in evenly_sampled(samples, OPENED))


# --- which pictures belong to which image and class -------------------------------------------------------
def find_pictures(folder):
    """Return the [Picture] of a FolderFiles: of the one layout that fits, [] where none or several do."""
    roles = {path: role_of(folder.folders_of(path)) for path in folder.images}
    below = [path for path, role in roles.items() if role.below_masks]
    others = [path for path, role in roles.items() if not role.below_masks and role.content != "other"]
    named = [path for path in others if roles[path].content == "images"]
    apart = [path for path in others if roles[path].content != "images"]
    found = []
    if below and others:
        found = [by_class_folder(below, others, folder), by_suffix(below, others, folder),
                 by_image_folder(below, others, folder)]
    elif others:  # without a folder called masks: car/ and tree/ beside images/, 1_car.png beside 1.jpg
        found = [by_class_folder(apart, named, folder), by_suffix(others, others, folder)]
    fitting = [pictures for pictures in found if is_complete(pictures)]
    return fitting[0] if len(fitting) == 1 else []


def is_complete(pictures):
    """Return whether most of the Pictures have an image, there are several classes, or objects of one image,
    and nearly all of those that are opened are black and white.
    """
    images = [picture.image for picture in pictures if picture.image]
    if 2 * len(images) <= len(pictures):
        return False
    labels = {picture.label for picture in pictures}
    if len(labels) < 2 and (labels != {OBJECT} or len(set(images)) == len(images)):
        return False
    opened = [is_black_and_white(picture.path) for picture in evenly_sampled(pictures, OPENED)]
    return sum(opened) >= NEARLY_ALL * len(opened)


def by_class_folder(paths, images, folder):
    """Return the [Picture] of masks/car/1.png and images/1.jpg."""
    by_stem = grouped(images, lambda path: path.stem)
    pictures = []
    for path in paths:
        names = [name for name in folder.folders_of(path) if not set(words_of(name)) <= KNOWN_WORDS]
        if not names:
            return []
        label = MASK_AFFIX.fullmatch(names[-1])[1]
        pictures.append(Picture(path, nearest(path, by_stem.get(path.stem, []), folder), label))
    return pictures


def by_suffix(paths, images, folder):
    """Return the [Picture] of 1_car.png and 1.jpg."""
    by_stem, pictures = grouped(images, lambda path: path.stem), []
    for path in paths:
        ends = [match.span() for match in re.finditer(r"[ _.-]+", path.stem)]
        start, end = next(((start, end) for start, end in reversed(ends) if path.stem[:start] in by_stem),
                          (0, 0))
        label = MASK_AFFIX.fullmatch(path.stem[end:])[1]
        if end and not label.isdecimal():
            pictures.append(Picture(path, nearest(path, by_stem[path.stem[:start]], folder), label))
        elif path not in images:
            pictures.append(Picture(path, None, ""))
    if len({picture.label for picture in pictures}) * 2 > len(pictures):  # names of objects, or of photos
        return []
    return pictures


def by_image_folder(paths, images, folder):
    """Return the [Picture] of 1/masks/0ac3.png and 1/images/1.png, or of masks/1/car.png and images/1.jpg."""
    by_stem, pictures = grouped(images, lambda path: path.stem), []
    for path in paths:
        names = [name for name in reversed(folder.folders_of(path)) if name in by_stem]
        image = nearest(path, by_stem[names[0]], folder) if names else None
        pictures.append(Picture(path, image, path.stem))
    repeated = {label for label, same in grouped(pictures, lambda picture: picture.label).items()
                if len(same) > 1 and not label.isdecimal()}
    if not all(picture.label in repeated for picture in pictures):
        pictures = [picture._replace(label=OBJECT) for picture in pictures]
    return pictures


def nearest(path, images, folder):
    """Return that of several images of one name whose split and folders are those of a picture, or None."""
    split = folder.split_of(path)
    images = [image for image in images if image != path
              and (not split or folder.split_of(image) in ("", split))]
    scores = [count_shared_folders(folder.folders_of(image), folder.folders_of(path)) for image in images]
    best = [image for image, score in zip(images, scores, strict=True) if score == max(scores)]
    return best[0] if len(best) == 1 else None
