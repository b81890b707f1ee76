"""A black and white picture for each class or object of an image, in one of three layouts:

    masks/car/1.png     masks/tree/1.png        beside images/1.jpg, also car_masks/1.png or car/1_mask.png
    masks/1_car.png     masks/1_tree.png        or beside the images
    1/masks/0ac3.png    1/masks/77f0.png        beside 1/images/1.png: one class, called object (Data Science
                                                Bowl), or masks/1/car.png masks/1/tree.png

Every picture is black, or transparent, and of one other value. Smaller shapes lie over larger ones.
"""
import re
from collections import Counter
from functools import partial
from typing import NamedTuple

import numpy as np

from config import InputError, count_of
from dataio.annotations.files import OBJECT, AnnotatedImage, Annotations
from dataio.annotations.shapes import BadLabel, Shape, picture_codes, read_picture
from dataio.layout import KNOWN_WORDS, MASK_AFFIX, common_name, count_shared_folders, role_of, words_of
from dataio.scan import distinct
from utils import evenly_sampled, grouped, in_parallel

OPENED = 16  # pictures that are opened to see whether all are black and white
NEARLY_ALL = 0.8  # share of them that has to be; the others are named then
MUCH = 0.5  # share of the pixels above which classes that overlap are doubtful
NUMBERED = re.compile(r"((obj|object|instance|inst)[ _.-]*)?\d+", re.IGNORECASE)  # names of objects


class Picture(NamedTuple):
    """A picture of a class of an image; image: None where it is not there."""

    path: object
    image: object
    label: str


def find_files(folder):
    """Return the pictures of a FolderFiles, or []."""
    return [picture.path for picture in next(iter(find_readings(folder)), [])]


def read(files, folder):
    """Return the Annotations of pictures. Raises InputError where it is not clear which layout they have."""
    pictures, *others = find_readings(folder)
    if others:
        pairs = list(zip(pictures, others[0], strict=False))
        one, other = next((pair for pair in pairs if pair[0].image != pair[1].image), pairs[0])
        raise InputError(f"{one.path} may show {one.label} in {one.image} or {other.label} in {other.image}: "
                         "give classes other names than images, as in masks/car/1.png")
    by_image = grouped(pictures, lambda picture: picture.image)
    strays = [Shape("", "", str(picture.path), problem="of an image that is not there")
              for picture in by_image.pop(None, [])]
    images = [AnnotatedImage(None, "", files[0], strays)] if strays else []
    overlaps = []  # the share of each image with any
    found = in_parallel(look_at, list(by_image.values()), "reading masks")
    for (image, entries), (shapes, overlap) in zip(by_image.items(), found, strict=True):
        images.append(AnnotatedImage(image, str(image), entries[0].path, shapes))
        overlaps += [overlap] * (overlap > 0)
    classes = sorted({picture.label for picture in pictures if picture.image})
    each = f"class of an image: {', '.join(classes)}" if classes != [OBJECT] else \
        f"object of an image, which is of the only class, {OBJECT}"
    notes, doubts = [f"{count_of(len(pictures), 'black and white picture')}, one for each {each}"], []
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
    """Return ([Shape] of those pictures of an image that are not empty, the share of their pixels that lies
    in several classes).
    """
    shapes, covered = [], {}  # {class: (H, W) bool}
    for path, _, label in pictures:
        shape = Shape(label, "picture", str(path), bitmap=partial(read_picture, path))
        try:
            pixels = read_black_and_white(path)
        except BadLabel as error:
            shapes.append(shape._replace(problem=str(error)))
            continue
        shapes += [shape] * bool(pixels.any())
        before = covered.get(label, pixels)
        covered[label] = before | pixels if before.shape == pixels.shape else pixels
    if len({pixels.shape for pixels in covered.values()}) != 1:
        return shapes, 0  # the sizes are judged later
    count = np.sum(list(covered.values()), 0)
    return shapes, int((count > 1).sum()) / max(1, int((count > 0).sum()))


def read_black_and_white(path):
    """Return the pixels (H, W), bool, of a picture of 0 and one other value. Raises BadLabel."""
    codes = picture_codes(path)
    values, _ = distinct(codes)
    if len(values) > 2 or len(values) == 2 and values[0] != 0:
        raise BadLabel("of a picture with more values than 0 and another one, where all others have these")
    return codes > 0


def is_black_and_white(path):
    """Return whether a file holds 0 and one other value, or one of them."""
    try:
        read_black_and_white(path)
    except BadLabel:
        return False
    return True


def are_classes(samples, root):
    """Return whether the masks of Samples that pair by name lie in folders of classes: all are black and
    white, and in several folders whose names no folder of their images has, and which differ by more than
    numbers or hold the word class.
    """
    def words_above(path):
        return [word for name in path.relative_to(root).parts[:-1] for word in words_of(name)
                if word == "class" or word not in KNOWN_WORDS]

    labels = {tuple(word for word in words_above(sample.mask) if word not in words_above(sample.image))
              for sample in samples}
    names = {tuple(filter(str.isalpha, label)) for label in labels}  # part1 and part2 are no classes
    differ = len(names) > 1 or len(labels) > 1 and names == {("class",)}
    return differ and all(names) and all(
        is_black_and_white(sample.mask) for sample in evenly_sampled(samples, OPENED))


# --- which pictures belong to which image and class -------------------------------------------------------
def find_readings(folder):
    """Return the lists of Pictures of a FolderFiles by each layout that fits: of those that show most images.
    """
    roles = {path: role_of(above(path, folder)) for path in folder.images}
    below = [path for path, role in roles.items() if role.below_masks]
    others = [path for path, role in roles.items() if not role.below_masks and role.content != "other"]
    by_stem, layouts = grouped(others, lambda path: path.stem), (by_class_folder, by_suffix, by_image_folder)
    found = [layout(below, by_stem, folder) for layout in layouts]
    if not below:  # without a folder called masks: car/ and tree/ beside images/, 1_car.png beside 1.jpg
        apart = grouped(others, lambda path: roles[path].content == "images")
        images = grouped(apart.get(True, []), lambda path: path.stem)
        found = [by_class_folder(apart.get(False, []), images, folder), by_suffix(others, by_stem, folder)]
    fitting = [pictures for number, pictures in enumerate(found)
               if pictures not in found[:number] and is_complete(pictures)]
    counts = [len({picture.image for picture in pictures}) for pictures in fitting]
    return [pictures for pictures, count in zip(fitting, counts, strict=True) if count == max(counts)]


def above(path, folder):
    """Return the names of the folders between the root of a FolderFiles and a file, as they are spelled."""
    return path.relative_to(folder.root).parts[:-1]


def is_complete(pictures):
    """Return whether most of the Pictures have an image, there are several classes, or objects of one image,
    and nearly all of those that are opened are black and white.
    """
    shown = [picture for picture in pictures if picture.image]
    labels = {picture.label for picture in shown}
    several = len(labels) > 1 or labels == {OBJECT} and len({picture.image for picture in shown}) < len(shown)
    if 2 * len(shown) <= len(pictures) or not several:
        return False
    opened = [is_black_and_white(picture.path) for picture in evenly_sampled(pictures, OPENED)]
    return sum(opened) >= NEARLY_ALL * len(opened)


def by_class_folder(paths, by_stem, folder):
    """Return the [Picture] of masks/car/1.png and images/1.jpg: the class is the innermost folder that has
    not the name of one of images, as the scene in masks/car/scene/1.png and images/scene/1.jpg. by_stem:
    {stem: images}.
    """
    pictures = []
    shared = {name for same in by_stem.values() for image in same for name in folder.folders_of(image)}
    for path in paths:
        images = by_stem.get(path.stem) or by_stem.get(common_name(path, MASK_AFFIX), [])
        scenes = shared.intersection(folder.folders_of(path))
        images = [image for image in images if scenes.issubset(folder.folders_of(image))]
        names = [name for name in above(path, folder)
                 if name.lower() not in shared and not set(words_of(name)) <= KNOWN_WORDS]
        if not names:
            return []
        pictures.append(Picture(path, nearest(path, images, folder), bare(names[-1])))
    return pictures


def by_suffix(paths, by_stem, folder):
    """Return the [Picture] of 1_car.png and 1.jpg."""
    pictures = []
    for path in paths:
        cuts = [cut for cut in re.finditer(r"[ _.-]+(?=[^ _.-])", path.stem)
                if path.stem[:cut.start()] in by_stem]
        label = bare(path.stem[cuts[-1].end():]) if cuts else ""
        if label and not NUMBERED.fullmatch(label):
            image = nearest(path, by_stem[path.stem[:cuts[-1].start()]], folder)
            pictures.append(Picture(path, image, label))
        elif path not in by_stem.get(path.stem, ()):
            pictures.append(Picture(path, None, ""))
    labels = {picture.label for picture in pictures}
    return pictures if 2 * len(labels) <= len(pictures) else []  # else names of objects, or of photos


def by_image_folder(paths, by_stem, folder):
    """Return the [Picture] of 1/masks/0ac3.png and 1/images/1.png, or of masks/1/car.png and images/1.jpg:
    names are classes where most pictures have one that is there again.
    """
    pictures = []
    for path in paths:
        name = next((name for name in reversed(above(path, folder)) if name in by_stem), "")
        label = re.sub(rf"^{re.escape(name)}[ _.-]+", "", path.stem)
        pictures.append(Picture(path, nearest(path, by_stem.get(name, []), folder), bare(label)))
    counts = Counter(picture.label for picture in pictures if not NUMBERED.fullmatch(picture.label))
    if 2 * sum(count for count in counts.values() if count > 1) <= len(pictures):
        pictures = [picture._replace(label=OBJECT) for picture in pictures]
    return pictures


def bare(name):
    """Return a name without the words for a mask."""
    return MASK_AFFIX.fullmatch(name)[1]


def nearest(path, images, folder):
    """Return that of several images of one name whose split and folders are those of a picture, or None."""
    split = folder.split_of(path)
    images = [image for image in images if image != path
              and (not split or folder.split_of(image) in ("", split))]
    scores = [count_shared_folders(above(image, folder), above(path, folder)) for image in images]
    best = [image for image, score in zip(images, scores, strict=True) if score == max(scores)]
    return best[0] if len(best) == 1 else None
