"""Label Studio, brush labels as PNG: a picture for each label of an annotation of a task, 0 or 255.

Their names hold the numbers of the task and the annotation: the JSON export beside them says the images of
each task, and which of its annotations counts; without it, an image is called like the number of its task.
"""
from collections import Counter
from functools import partial
from typing import NamedTuple

from config import count_of
from dataio.annotations.files import AnnotatedImage, Annotations
from dataio.annotations.label_studio import (PICTURE_NAME, UNTOLD, Task, kind_of, labeled_keys, name_in,
                                             read_tasks)
from dataio.annotations.shapes import Shape, read_picture
from dataio.layout import count_shared_folders
from utils import grouped

WITH_AREA = ("brush", "polygon", "ellipse", "rectangle")  # kinds of regions
UNCLEAR = "picture of several tasks of its number: keep the exports of a project in a folder of their own"


class Picture(NamedTuple):
    """A picture of a label. task, annotation: numbers; tool: the `from_name` of its regions."""

    path: object
    task: str
    annotation: int
    tool: str
    label: str


def find_files(folder):
    """Return the pictures of a FolderFiles, and the JSON exports beside them."""
    pictures = [path for path in folder.images if PICTURE_NAME.fullmatch(path.name)]
    return pictures and [*pictures, *(path for path, content in folder.json.items()
                                      if isinstance(content, list) and any(map(has_image, content)))]


def has_image(entry):
    """Return whether an entry of a list is a task, with annotations or without."""
    return isinstance(entry, dict) and ("data" in entry or "annotation_id" in entry)


def read(files, folder):
    """Return the Annotations of pictures."""
    tasks = read_tasks([path for path in files if path.suffix == ".json"], folder)
    pictures = [picture_of(path) for path in files if path.suffix != ".json"]
    by_task = grouped(pictures, task_finder(tasks, folder))
    folder.problems[UNCLEAR] += [str(picture.path) for picture in by_task.pop(None, [])]
    to_names, images, several, lost = labeled_keys(tasks), [], [], Counter()
    for task in dict.fromkeys([*by_task, *tasks]):
        by_annotation = grouped(by_task.get(task, []), lambda picture: picture.annotation)
        several += [task] * (len(by_annotation) > 1)
        taken, regions = taken_of(task, by_annotation), task.taken["regions"]
        kinds = [kind for kind in map(kind_of, regions) if kind in WITH_AREA]
        lost[task] = len(kinds) - (kinds.count("brush") if taken else 0)
        if not taken and (lost[task] or not task.annotations):
            continue  # neither pictures nor background
        tools = {name_in(region, "from_name"): name_in(region, "to_name") for region in regions}
        found = task.by_image(to_names, [(tools.get(picture.tool), picture) for picture in taken])
        if found is None:
            folder.problems[UNTOLD].append(str(task))
            continue
        path = taken[0].path if taken else task.path
        images += [AnnotatedImage(names, f"{path} (task {task.number})", path, list(map(shape_of, pictures)))
                   for names, pictures in found.items()]
    return Annotations([], images, files, notes=notes_on(several, +lost))


def picture_of(path):
    """Return the Picture of a file."""
    task, annotation, tool, label = PICTURE_NAME.fullmatch(path.name).groups()
    return Picture(path, task, int(annotation), tool, label)


def shape_of(picture):
    """Return the Shape of a Picture."""
    return Shape(picture.label, "picture", str(picture.path), bitmap=partial(read_picture, picture.path))


def task_finder(tasks, folder):
    """Return the function that finds the Task of a Picture, None where it cannot be told. Of several of its
    number it is the one with its annotation, else the one whose export is nearest.
    """
    by_number, nameless = grouped(tasks, lambda task: str(task.number)), {}

    def task_of(picture):
        found = by_number.get(picture.task)
        if not found:  # an image of this number; in several folders there may be several
            names = (picture.task,)
            key = (picture.task, *folder.find_images(names, picture.path))
            return nameless.setdefault(key, Task(picture.task, picture.path, {}, {"": names}, []))
        folders = folder.folders_of(picture.path)
        scores = [(any(annotation["id"] == picture.annotation for annotation in task.annotations),
                   count_shared_folders(folder.folders_of(task.path), folders)) for task in found]
        best = [task for task, score in zip(found, scores, strict=True) if score == max(scores)]
        return best[0] if len(best) == 1 else None

    return task_of


def taken_of(task, by_annotation):
    """Return those of {annotation: [Picture]} that the export takes, else those of the highest number."""
    if by_annotation.keys() & {annotation["id"] for annotation in task.annotations}:
        return by_annotation.get(task.taken["id"], [])
    return by_annotation[max(by_annotation)] if by_annotation else []


def notes_on(several, lost):
    """Return notes on tasks annotated several times, and on {task: regions without a picture}."""
    notes = []
    if several:
        notes.append(f"{count_of(len(several), 'task')} with pictures of several annotations, as "
                     f"{several[0]}: taken was the one that the JSON export says (the ground truth, else the "
                     "last), without it the one of the highest number")
    if lost:
        notes.append(f"not used: {count_of(lost.total(), 'shape')} of the JSON export without a PNG file, as "
                     f"polygons, of {next(iter(lost))}; without the PNG files the export itself is read")
    return notes
