"""Label Studio, brush labels as PNG: a picture for each label of a task, 0 or 255.

Their names hold the number of the task alone: the JSON export beside them says the image of each task;
without it, an image is called like the number of its task.
"""
import re
from functools import partial

from dataio.annotations.files import AnnotatedImage, Annotations
from dataio.annotations.shapes import Shape, read_picture

PICTURE_NAME = re.compile(r"task-(\d+)-annotation-\d+-by-\d+-tag-(.+)-\d+\.png")


def find_files(folder):
    """Return the pictures of a FolderFiles, and the JSON exports beside them."""
    pictures = [path for path in folder.images if PICTURE_NAME.fullmatch(path.name)]
    return pictures and [*pictures, *(path for path, content in folder.json.items()
                                      if isinstance(content, list))]


def read(files, folder):
    """Return the Annotations of pictures."""
    image_names, images = {}, {}  # by number of the task
    for path in files:
        if path.suffix == ".json":
            with folder.reading(path, "Label Studio"):
                image_names |= {task["id"]: next(iter(task["data"].values())) for task in folder.json[path]
                                if isinstance(task, dict) and task.get("data") and "id" in task}
    for path in files:
        if match := PICTURE_NAME.fullmatch(path.name):
            task, label = match.groups()
            name = str(image_names.get(int(task), task)).rsplit("/", 1)[-1]
            if task not in images:
                images[task] = AnnotatedImage(name, f"{path} (task {task})", path, [])
            images[task].shapes.append(Shape(label, "picture", str(path), bitmap=partial(read_picture, path)))
    return Annotations([], list(images.values()), files)
