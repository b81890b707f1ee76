"""Label Studio, brush labels as PNG: a picture for each label of a task, 0 or 255.

Their names hold the number of the task alone: the JSON export beside them says the image of each task;
without it, an image is called like the number of its task.
"""
import re
from functools import partial
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from dataio.annotations.files import AnnotatedImage, Annotations
from dataio.annotations.shapes import Shape, read_picture
from dataio.images import IMAGE_ENDINGS

UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # digits before the name of a file, whose spaces became _
PICTURE_NAME = re.compile(r"task-(\d+)-annotation-\d+-by-\d+-tag-(.+)-\d+\.png")


def find_files(folder):
    """Return the pictures of a FolderFiles, and the JSON exports beside them."""
    pictures = [path for path in folder.images if PICTURE_NAME.fullmatch(path.name)]
    return pictures and [*pictures, *(path for path, content in folder.json.items()
                                      if isinstance(content, list))]


def read(files, folder):
    """Return the Annotations of pictures."""
    names_of, images = {}, {}  # by number of the task
    for path in files:
        if path.suffix == ".json":
            with folder.reading(path, "Label Studio"):
                names_of |= {task["id"]: image_names(task["data"]) for task in folder.json[path]
                             if isinstance(task, dict) and task.get("data") and "id" in task}
    for path in files:
        if match := PICTURE_NAME.fullmatch(path.name):
            task, label = match.groups()
            if task not in images:
                names = names_of.get(int(task), task)
                images[task] = AnnotatedImage(names, f"{path} (task {task})", path, [])
            images[task].shapes.append(Shape(label, "picture", str(path), bitmap=partial(read_picture, path)))
    return Annotations([], list(images.values()), files)


def image_names(data):
    """Return the names that the image file of a task may have, by its `data`: {key: URL or path}.

    Raises ValueError where it has none.
    """
    paths = [path_of(text) for text in data.values() if isinstance(text, str)]
    if not paths:
        raise ValueError("no image")
    names = []
    for path in [path for path in paths if PurePosixPath(path).suffix.lower() in IMAGE_ENDINGS] or paths:
        names.append(path)
        if match := UPLOADED.fullmatch(PurePosixPath(path).name):
            names += [match[1], match[1].replace("_", " ")]
    return tuple(names)


def path_of(url):
    """Return the path in a URL: of /data/upload/3/name.jpg, /data/local-files/?d=a/name.jpg, s3://..."""
    parts = urlsplit(url)
    folder = parse_qs(parts.query).get("d", [""])[0]
    return folder if folder and "local-files" in parts.path else unquote(parts.path)
