"""Label Studio, brush labels as PNG: a picture for each label of a task, 0 or 255; later over earlier.

Their names hold the number of the task alone: the JSON export beside them says the image of each task;
without it, an image is called like the number of its task.
"""
import re
from functools import partial

from config import InputError
from dataio.annotations.files import AnnotatedImage, Annotations, form_errors
from dataio.annotations.shapes import Shape, picture
from dataio.images import image_size

PICTURE_NAME = re.compile(r"task-(\d+)-annotation-\d+-by-\d+-tag-(.+)-\d+\.png")


def find_files(folder):
    """Return the pictures of a FolderFiles."""
    return [path for path in folder.images if PICTURE_NAME.fullmatch(path.name)]


def read(files, folder):
    """Return the Annotations of pictures. Raises InputError."""
    exports = {path: content for path, content in folder.json.items() if isinstance(content, list)}
    image_names = {}  # by number of the task
    for path, tasks in exports.items():
        with form_errors(path, "Label Studio"):
            for task in tasks:
                if isinstance(task, dict) and task.get("data") and "id" in task:
                    image_names[task["id"]] = next(iter(task["data"].values()))
    images = {}
    for path in files:
        task, label = PICTURE_NAME.fullmatch(path.name).groups()
        name = str(image_names.get(int(task), task)).rsplit("/", 1)[-1]
        try:
            image = folder.find_image(name, path.parent, str(path))
        except InputError as error:
            raise InputError(f"{error}; masks of Label Studio name the number of a task alone: put its JSON "
                             f"export beside them, or call the image of task {task} {task}.jpg") from None
        if image not in images:
            images[image] = AnnotatedImage(image, folder.split_of(image), image_size(image), [], str(path))
        images[image].shapes.append(Shape(label, "picture", partial(picture, path)))
    return Annotations([], list(images.values()), [*files, *exports])
