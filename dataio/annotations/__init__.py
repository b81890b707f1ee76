"""Annotation files of labeling tools, drawn once as masks: COCO, labelme, YOLO, Supervisely, Label Studio.

    pairs = find_masks(root)           # layout.find_pairs, or the masks drawn from annotation files
    pairs.splits, pairs.entries        # {split: [Sample]}, the classes that these files name

A tool is a module with find_files(folder) -> its annotation files and read(files, folder) -> Annotations, and
a line in TOOLS. It only says what the files hold; what is drawn, refused or doubtful is decided here.

The masks are PNG files of class numbers in the user's cache (~/.cache/dinoseg/masks), drawn anew when an
annotation file changes; the folder itself stays as it is. What is not labeled is background.
"""
import hashlib
from collections import Counter

import numpy as np
from PIL import Image

from config import IGNORE, InputError, count_of
from dataio.annotations import coco, label_studio, labelme, supervisely, yolo
from dataio.annotations.files import FolderFiles
from dataio.labels import MOST_CLASSES, Entry
from dataio.layout import FolderContent, NoMasks, find_pairs, use_lists
from dataio.readers import Sample, drawn_folder
from dataio.scan import fill_folder

TOOLS = {  # the first that has files in a folder is read
    "COCO": coco,
    "labelme": labelme,
    "Supervisely": supervisely,
    "Label Studio": label_studio,
    "YOLO": yolo,
}
VERSION = 1  # of the drawing: masks drawn by another version are drawn anew
BACKGROUND_NAMES = {"background", "_background_"}
IGNORED_NAMES = {"ignore", "__ignore__"}  # labelme's name for what is not counted


def find_masks(root):
    """Return the FolderContent of the images and masks under `root`: those of layout.find_pairs, else masks
    drawn from annotation files. Raises InputError.
    """
    try:
        return find_pairs(root)
    except NoMasks:
        folder = FolderFiles(root)
        for tool, reader in TOOLS.items():
            files = reader.find_files(folder)
            if files:
                return draw_annotations(root, tool, reader.read(files, folder))
        raise


def draw_annotations(root, tool, annotations):
    """Draw the masks of Annotations and return the layout.FolderContent. Raises InputError."""
    images = sorted(annotations.images, key=lambda image: image.path)
    sources = {}
    for image in images:
        if image.path in sources:
            raise InputError(f"{sources[image.path]} and {image.source} are both of the image {image.path}: "
                             "remove one of them")
        sources[image.path] = image.source
    shapes = [shape for image in images for shape in image.shapes]
    drawn = [shape for shape in shapes if shape.draw]
    classes = annotations.classes or sorted({shape.label for shape in drawn})
    values, entries = mask_values(classes, annotations.files[0])
    target, splits = masks_folder(root, annotations.files, images), {}

    def write_mask(image, folder):
        mask = np.zeros(image.size, np.uint8)
        for shape in image.shapes:
            if shape.draw:
                mask[shape.draw(size=image.size)] = values[shape.label]
        path = mask_path(image, root, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)

    fill_folder(target, write_mask, images, "drawing masks")
    for image in images:
        sample = Sample(image.path, mask_path(image, root, target))
        splits.setdefault(image.split or "train", []).append(sample)
    note = (f"{tool} annotations: {count_of(len(drawn), 'shape')} drawn over "
            f"{count_of(len(images), 'image')}, {annotations.order}; the rest is background; masks in "
            f"{target}")
    kinds = Counter(shape.kind for shape in shapes if not shape.draw)
    counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
    doubts = [f"not drawn, because they enclose nothing: {counts}"] if kinds else []
    content = FolderContent(splits, [], [], [note], doubts, entries)
    use_lists(content, root, root)
    content.splits.setdefault("train", [])
    return content


def mask_values(classes, file):
    """Return ({label: mask value}, [labels.Entry]): 0 is what has no label, 1.. are the classes.

    What is labeled as background has a value of its own: --unlabelled ignore keeps it. Raises InputError.
    """
    names = [name for name in classes if name.lower() not in BACKGROUND_NAMES | IGNORED_NAMES]
    if not 0 < len(names) < MOST_CLASSES:
        raise InputError(f"{file} and the files that belong to it name {len(names)} classes; 1 to "
                         f"{MOST_CLASSES - 1} are possible, beside the background")
    values = {name: value for value, name in enumerate(names, 1)}
    entries = [Entry("background", None, 0), *(Entry(name, None, value) for name, value in values.items())]
    for name in classes:
        if name.lower() in IGNORED_NAMES:
            values[name] = IGNORE
        elif name.lower() in BACKGROUND_NAMES:
            values[name] = len(names) + 1
    if len(names) + 1 in values.values():
        entries.insert(1, Entry("background", None, len(names) + 1))
    return values, entries


def masks_folder(root, files, images):
    """Return the folder for the masks of annotation files, named by all that the masks depend on."""
    state = hashlib.sha256(f"{VERSION}".encode())
    for path in files:
        state.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for image in images:
        state.update(f"{image.path.relative_to(root)} {image.size}\n".encode())
    return drawn_folder() / state.hexdigest()[:16]


def mask_path(image, root, folder):
    """Return the path of the mask of an AnnotatedImage in a folder of masks."""
    return folder / f"{image.path.relative_to(root)}.png"
