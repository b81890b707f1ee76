"""Label Studio, brush labels as PNG: a picture for each label of an annotation of a task, 0 or 255.

Their names hold the numbers of the task and the annotation: the JSON export beside them says the images of
each task, and which of its annotations counts; without it, an image is called like the number of its task.
"""
from collections import Counter
from functools import partial
from typing import NamedTuple

from config import count_of
from dataio.annotations.files import AnnotatedImage, Annotations
from dataio.annotations.label_studio import PICTURE_NAME, UNTOLD, Task, exports, kind_of, read_tasks
from dataio.annotations.shapes import Shape, read_picture
from utils import grouped

WITH_AREA = ("brush", "polygon", "ellipse", "rectangle")  # kinds of regions
UNCLEAR = "picture of several tasks of its number: take the exports of one server alone"


class Picture(NamedTuple):
    """A picture of a label. task, annotation: numbers; tool: the `from_name` of its regions."""

    path: object
    task: str
    annotation: str
    tool: str
    label: str


def find_files(folder):
    """Return the pictures of a FolderFiles, and the JSON exports beside them."""
    pictures = [path for path in folder.images if PICTURE_NAME.fullmatch(path.name)]
    return pictures and [*pictures, *exports(folder)]


def read(files, folder):
    """Return the Annotations of pictures."""
    tasks = read_tasks([path for path in files if path.suffix == ".json"], folder)
    pictures = [Picture(path, *PICTURE_NAME.fullmatch(path.name).groups()) for path in files
                if path.suffix != ".json"]
    by_task = pictures_by_task(pictures, tasks, folder)
    images, several, lost = [], [], Counter()
    for task in dict.fromkeys([*by_task, *tasks]):
        by_annotation = grouped(by_task.get(task, []), lambda picture: picture.annotation)
        several += [task] * (len(by_annotation) > 1)
        taken, regions = taken_of(task, by_annotation), task.taken["regions"]
        kinds = [kind for kind in map(kind_of, regions) if kind in WITH_AREA]
        lost[task] = len(kinds) - (kinds.count("brush") if taken else 0)
        if not taken and (lost[task] or not task.annotations):
            continue  # neither pictures nor background
        tools = {region.get("from_name"): region.get("to_name") for region in regions}
        found = task.by_image([(tools.get(picture.tool), picture) for picture in taken])
        if found is None:
            folder.problems[UNTOLD].append(str(task))
            continue
        first = taken[0].path if taken else task.path
        for names, shown in found.items():
            shapes = [Shape(label, "picture", str(path), bitmap=partial(read_picture, path))
                      for path, *_, label in shown]
            images.append(AnnotatedImage(names, f"{first} (task {task.number})", first, shapes))
    notes, lost = [], +lost
    if several:
        notes.append(f"{count_of(len(several), 'task')} with pictures of several annotations, as "
                     f"{several[0]}: taken was the one that the JSON export says (the ground truth, else the "
                     "last), without it the one of the highest number")
    if lost:
        notes.append(f"not used: {count_of(lost.total(), 'shape')} of the JSON export without a PNG file, as "
                     f"polygons, of {next(iter(lost))}; without the PNG files the export itself is read")
    return Annotations([], images, files, notes=notes)


def pictures_by_task(pictures, tasks, folder):
    """Return {Task: [Picture]}. The image of a task without an export is called like its number."""
    by_number, found = grouped(tasks, lambda task: task.number), {}
    for picture in pictures:
        path, number = picture.path, picture.task
        named = by_number.get(number) or by_number.setdefault(
            (number, path.parent), [Task(number, path, {}, [(number,)], [])])
        if len(named) > 1:
            folder.problems[UNCLEAR].append(str(path))
        else:
            found.setdefault(named[0], []).append(picture)
    return found


def taken_of(task, by_annotation):
    """Return those of {annotation: [Picture]} that the export takes, else those of the highest number."""
    if by_annotation.keys() & {annotation["id"] for annotation in task.annotations}:
        return by_annotation.get(task.taken["id"], [])
    return by_annotation[max(by_annotation, key=int)] if by_annotation else []
