"""The files of a folder with annotations: image files by their names, JSON files and what is in them.

    folder = FolderFiles(root)
    files = folder.json_with("images", "annotations")             # {path: content}
    image = folder.find_image("shots/a.jpg", path.parent, where)  # an image file below root
"""
import json
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from config import InputError
from dataio.layout import count_shared_folders, list_images, role_of
from dataio.images import image_size
from utils import in_parallel


class AnnotatedImage(NamedTuple):
    """What annotation files hold of an image.

    split: train, val, test or "" (unknown). size: the (H, W) at which the shapes are drawn. shapes: [Shape],
    later shapes over earlier. source: the file and entry that describe it.
    """

    path: Path
    split: str
    size: tuple
    shapes: list
    source: str


class Annotations(NamedTuple):
    """What the annotation files of a folder hold.

    classes: names in order, or [] for those of the shapes. images: [AnnotatedImage]. files: that were read.
    order: which shapes lie over which.
    """

    classes: list
    images: list
    files: list
    order: str = "later over earlier"


class FolderFiles:
    """The files below a folder. images: [path]; json: {path: content, or the InputError of reading it}."""

    def __init__(self, root):
        self.root, self.images = root, list_images(root)
        self.by_name, self.by_stem = defaultdict(list), defaultdict(list)
        for path in self.images:
            self.by_name[path.name].append(path)
            self.by_stem[path.stem].append(path)
        paths = list_images(root, (".json",))
        self.json = dict(zip(paths, in_parallel(read_json, paths, "reading annotations"), strict=True))

    def json_with(self, *keys):
        """Return {path: content} of JSON files with these keys. Raises InputError if others are broken."""
        files = {path: content for path, content in self.json.items()
                 if isinstance(content, dict) and content.keys() >= set(keys)}
        errors = [content for content in self.json.values() if isinstance(content, InputError)]
        if files and errors:
            raise errors[0]
        return files

    def find_image(self, name, near, where):
        """Return the image file that an annotation file in the folder `near` calls `name`; of several, that
        whose folders fit best. Raises InputError.
        """
        *folders, file_name = str(name).replace("\\", "/").split("/")
        candidates = self.by_name.get(file_name) or self.by_stem.get(Path(file_name).stem)
        if not candidates:
            raise InputError(f"{where} is of the image {name}, which is not below {self.root}: add it or "
                             "remove the entry")
        folders = [*near.relative_to(self.root).parts, *folders]
        scores = [count_shared_folders(folders, self.folders_of(path)) for path in candidates]
        best = [path for path, score in zip(candidates, scores, strict=True) if score == max(scores)]
        if len(best) > 1:
            raise InputError(f"{where} is of the image {name}, which {best[0]} and {best[1]} may be: rename "
                             "one of them")
        return best[0]

    def folders_of(self, path):
        """Return the names of the folders between the root and a file."""
        return path.relative_to(self.root).parts[:-1]

    def split_of(self, path):
        """Return the split that the names of the folders above a file say, or ""."""
        return role_of(self.folders_of(path)).split


def read_json(path):
    """Return the content of a JSON file. Raises InputError."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): export it again, or move it away") from None


@contextmanager
def form_errors(path, tool):
    """Turn the errors of reading a file that does not have the form of a tool's files into InputErrors."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} does not have the form of {tool} annotations ({type(error).__name__}: "
                         f"{error}): export it again") from None


def annotated_size(content, keys, image):
    """Return the (H, W) that an annotation file gives under two keys, else that of the image file."""
    sides = tuple(content.get(key) for key in keys)
    if all(type(side) is int and 0 < side < 100_000 for side in sides):
        return sides
    return image_size(image)
