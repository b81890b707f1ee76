"""The files of a folder with annotations: image files by their names, JSON files and what is in them.

    folder = FolderFiles(root)
    files = folder.json_with("images", "annotations")   # {path: content}
    with folder.reading(path, "COCO"):                   # what is wrong with its form is noted, not raised
        images.append(AnnotatedImage("shots/a.jpg", f"{path} image 1", path, shapes, size=(480, 640)))
"""
import csv
import json
import os
import re
import unicodedata
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from config import InputError
from dataio.annotations.shapes import BadLabel, Shape
from dataio.images import IMAGE_ENDINGS
from dataio.layout import SPLIT_OF, count_shared_folders, list_files, role_of, words_of
from utils import in_parallel

FORM_ERRORS = (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError)
OBJECT = "object"  # the class of shapes where nothing names one
FEW, MOSTLY = 20, 0.7  # values of a property that may all differ; share of different ones among more of them


class AnnotatedImage(NamedTuple):
    """What an annotation file holds of an image.

    name: what it calls the image file, or a tuple of names to try, or the Path of the image; source: the file
    and entry; path: the file, whose folders tell which of several images is meant. shapes: [Shape]. size: the
    (H, W) of the image that the file gives, None = none. split: train, val or test where the file says so.
    """

    name: str
    source: str
    path: Path
    shapes: list
    size: tuple = None
    split: str = ""


class Annotations(NamedTuple):
    """What the annotation files of a folder hold.

    classes: names in order, or [] for those of the shapes. images: [AnnotatedImage]. files: that were read.
    shares: whether points are shares 0..1 of the sides. by_area: whether smaller shapes lie over larger ones
    rather than later ones over earlier. notes, doubts: lines on how the files were understood, and on what of
    that may be wrong. state: what the masks depend on beside the files.
    """

    classes: list
    images: list
    files: list
    shares: bool = False
    by_area: bool = False
    notes: list = ()
    doubts: list = ()
    state: str = ""


class FolderFiles:
    """The files below a folder. files, images: [path]; folders: the names of those that images lie in, not
    masks; json: {path: content}; broken: {path: InputError} of JSON files that cannot be read.

    problems: {what is wrong: [file or entry]}, of everything that cannot be used.
    """

    def __init__(self, root):
        self.root, self.files, self.problems = root, list_files(root), defaultdict(list)
        self.images = self.with_ending(*IMAGE_ENDINGS)
        self.by_name, self.by_stem = defaultdict(list), defaultdict(list)
        for path in self.images:
            self.by_name[parts_of(path.name)[-1]].append(path)
            self.by_stem[parts_of(path.stem)[-1]].append(path)
        self.folders = {name for path in self.images for name in self.folders_of(path)
                        if self.role(path).content not in ("masks", "other")}
        paths = self.with_ending(".json", ".geojson")
        contents = dict(zip(paths, in_parallel(read_json, paths, "reading annotations"), strict=True))
        self.broken = {path: error for path, error in contents.items() if isinstance(error, InputError)}
        self.json = {path: content for path, content in contents.items() if path not in self.broken}

    def with_ending(self, *endings):
        """Return the files with one of these endings (.xml), sorted."""
        return [path for path in self.files if path.suffix.lower() in endings]

    def json_with(self, *keys):
        """Return {path: content} of the JSON files that are an object with these keys."""
        return {path: content for path, content in self.json.items()
                if isinstance(content, dict) and content.keys() >= set(keys)}

    @contextmanager
    def reading(self, path, tool):
        """Context in which a file that does not have the form of a tool's files becomes a problem."""
        try:
            yield
        except InputError as error:
            self.problems["file to correct"].append(str(error))
        except FORM_ERRORS as error:
            self.problems[f"file without the form of {tool} annotations: export it again"].append(
                f"{path} ({type(error).__name__}: {error})")

    def find_images(self, names, near, split=""):
        """Return the image files that an annotation file `near` calls by one of `names`: several where
        nothing tells which is meant. A Path is the file itself.

        The path that the name says counts first, then the folders that it shares with the image, then what
        these hold (images rather than overlays), then the split. None of another split, or of other folders
        where those that the name says are there, is meant: it is the one that is missing.
        """
        if isinstance(names, Path):
            return [names]
        for name in names if isinstance(names, tuple) else (names,):
            *folders, file_name = parts_of(name)
            known = [] if is_absolute(name) else [folder for folder in folders if folder in self.folders]
            candidates = [path for path in self.by_name.get(file_name) or self.of_stem(file_name)
                          if self.may_be(path, folders, known, near)]
            ranks = [self.rank(path, folders, file_name, near, split) for path in candidates]
            best = [path for path, rank in zip(candidates, ranks, strict=True) if rank == max(ranks)]
            if best:
                return best
        return []

    def may_be(self, path, folders, known, near):
        """Return whether an image may be what a name with these folders in a file `near` means; known: those
        of them that there are below the root.
        """
        own = self.folders_of(path)
        splits = {self.split_of(path), role_of(tuple(folders)).split or self.split_of(near)} - {""}
        groups = [name for name in self.folders_of(near) if name in self.folders and is_group(name)]
        return (count_shared_folders(known, own) == len(known) and len(splits) < 2
                and (bool(known) or set(groups) <= set(own)))

    def rank(self, path, folders, file_name, near, split):
        """Return how well an image fits a name in a file `near`, as a tuple to compare."""
        own = self.folders_of(path)
        said = [os.path.normpath("/".join([*above, *folders, file_name]))
                for above in ((), self.folders_of(near))]
        shared = count_shared_folders([*self.folders_of(near), *folders], own)
        content = self.role(path).content
        holds = (content == "images") - (content in ("masks", "other"))
        of_split = bool(split) and self.split_of(path) == split
        return "/".join([*own, file_name]) in said, shared, holds, of_split

    def of_stem(self, name):
        """Return the image files that are called like a name but for the ending: a mask is none, where the
        name has an ending.
        """
        stem = Path(name).stem if Path(name).suffix in IMAGE_ENDINGS else name
        return [path for path in self.by_stem.get(stem, []) if stem == name
                or self.role(path).content not in ("masks", "other")]

    def folders_of(self, path):
        """Return the names of the folders between the root and a file, in lower case."""
        return parts_of(path.relative_to(self.root))[:-1]

    def split_of(self, path):
        """Return the split that the names of the folders above a file say, or ""."""
        return self.role(path).split

    def role(self, path):
        """Return the layout.FolderRole of the folders between the root and a file."""
        return role_of(path.relative_to(self.root).parts[:-1])


def parts_of(name):
    """Return the folders and the name in a path, in lower case, of one way to write letters (NFC): those of
    Windows, of URLs and of macOS are read too.
    """
    text = unicodedata.normalize("NFC", str(name)).replace("\\", "/").lower()
    if "://" in text:
        text = text.split("?")[0]
    return tuple(part for part in text.split("/") if part not in ("", ".")) or ("",)


def is_absolute(name):
    """Return whether a name is a path from the root of another machine, or a URL."""
    return bool(re.match(r"[/\\]|[A-Za-z]:[/\\]|\w+://", str(name)))


def is_group(name):
    """Return whether a folder's name tells neither what lies in it nor a split, as that of a scene."""
    role = role_of((name,))
    return bool(role.group) and not role.content and not role.split


def split_in(name):
    """Return the split that the words of a name say, "" where they say none or several."""
    splits = {SPLIT_OF[word] for word in words_of(name) if word in SPLIT_OF}
    return splits.pop() if len(splits) == 1 else ""


def read_json(path):
    """Return the content of a JSON file. Raises InputError."""
    try:
        return json.loads(path.read_bytes())  # UTF-8, 16 or 32
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): export it again, or move it away") from None


def read_shapes(entries, read, where, tool):
    """Return [read(entry, where)] of the entries of a file, a Shape with a problem where that fails.

    where: the file and what it calls its entries, which are numbered from 1.
    """
    shapes = []
    for number, entry in enumerate(entries, 1):
        place = f"{where} {number}"
        try:
            shapes.append(read(entry, place))
        except BadLabel as error:
            shapes.append(Shape("", "", place, problem=str(error)))
        except FORM_ERRORS as error:
            shapes.append(Shape("", "", f"{place} ({type(error).__name__}: {error})",
                                problem=f"without the form of {tool} annotations"))
    return shapes


def given_size(content, *keys):
    """Return the (H, W) that a file gives an image under two keys, None where it gives none."""
    sides = tuple(content.get(key) for key in keys)
    sides = tuple(int(side) if isinstance(side, float) and side.is_integer() else side for side in sides)
    return sides if all(type(side) is int and 0 < side < 100_000 for side in sides) else None


def read_csv(path):
    """Yield (number of the line, cells) of the rows of a CSV file, whose first line tells whether commas or
    semicolons end cells. Raises InputError.
    """
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8-sig", newline="") as file:
        line = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=";" if line.count(";") > line.count(",") else ",")
        try:
            for cells in filter(None, reader):
                yield reader.line_num, cells
        except csv.Error as error:
            raise InputError(f"{path} is not a readable CSV file ({error}): export it again") from None


def class_properties(rows):
    """Return {property: [value]} of the properties that may be the class; rows: {property: value} of each
    shape. Values that mostly differ from shape to shape are names or remarks.
    """
    values = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: found for name, found in values.items()
            if len(found) <= FEW or len(set(found)) <= MOSTLY * len(found)}
