"""Run lengths in a CSV file, as Kaggle's contests have them: `ImageId,EncodedPixels[,ClassId]` and the like.

    ImageId,EncodedPixels,ClassId          Image_Label,EncodedPixels          id,rle_mask
    a.jpg,1 3 10 5,2                       a.jpg_Fish,264918 937 266318 987   575d24d81d,

EncodedPixels are pairs of a first pixel, from 1, and a length; an empty cell means that there is nothing.
Pixels are numbered column by column in most contests, row by row in others: the shapes tell.
"""
import math
import re
from functools import partial
from typing import NamedTuple

import numpy as np

from config import InputError
from dataio.annotations.files import OBJECT, AnnotatedImage, Annotations, given_size, read_csv, split_in
from dataio.annotations.shapes import BadLabel, Shape, runs_bitmap
from dataio.images import read_orientation
from utils import evenly_sampled, grouped, in_parallel

IMAGE_COLUMNS = ("imageid", "image", "img", "filename", "file", "imagename", "imageidclassid", "imagelabel",
                 "imageclass", "imageclassid", "idclass", "id", "name")
CLASS_COLUMNS = ("classid", "class", "label", "classname", "labelname", "category", "categoryid", "labelid")
RUN_COLUMNS = ("encodedpixels", "encodedpixel", "encoding", "rle", "rlemask", "runlengths", "annotation",
               "segmentation", "mask")
SIDES = (("height", "imgheight", "imageheight"), ("width", "imgwidth", "imagewidth"))
NOTHING = ("", "-1", "nan")
COMPARED = 200  # shapes that tell the order of the pixels
CLEAR = 0.8  # share of the steps from line to line that the right order has at most of those of the other


class Row(NamedTuple):
    """A row of a file. runs: "" where there is nothing; size: the (H, W) that it gives, or None; where: the
    file and the line.
    """

    image: str
    label: str
    runs: str
    size: tuple
    where: str


def find_files(folder):
    """Return the files of a FolderFiles with run lengths, without those that are to be handed in."""
    return [path for path in folder.with_ending(".csv")
            if "submission" not in path.stem.lower() and holds_runs(path)]


def holds_runs(path):
    """Return whether a file has the columns, and pairs of numbers in the first row that is not empty."""
    try:
        first = next((row.runs for row in read_rows(path) if row.runs), "")
    except (InputError, OSError, ValueError, LookupError):
        return False
    return bool(re.fullmatch(r"\d+(\s+\d+)+", first))


def read(files, folder):
    """Return the Annotations of files."""
    rows, paths = [], {}  # {name of an image: the file that has it}
    for path in files:
        with folder.reading(path, "run-length"):
            found = list(read_rows(path))
            rows += found
            paths |= dict.fromkeys((row.image for row in found), path)
    by_name = grouped(rows, lambda row: row.image)
    found = in_parallel(lambda name: size_of(by_name[name][0], paths[name], folder), list(by_name),
                        "reading images")
    sizes = {name: None if isinstance(size, InputError) else size
             for name, size in zip(by_name, found, strict=True)}
    by_columns, notes, doubts = find_order([row for row in rows if row.runs], sizes)
    images = []
    for name, entries in by_name.items():
        shapes = [Shape(row.label, "run lengths", row.where,
                        bitmap=partial(decode_pairs, row.runs, sizes[name], by_columns))
                  for row in entries if row.runs]
        images.append(AnnotatedImage(name, entries[0].where, paths[name], shapes, sizes[name]))
    classes = sorted({row.label for row in rows} - {""},
                     key=lambda label: (len(label) * label[-1:].isdecimal(), label))
    if classes == [OBJECT]:
        notes.append(f"no column names classes: the only one is called {OBJECT}")
    return Annotations(classes, images, files, by_area=True, notes=notes, doubts=doubts)


def read_rows(path):
    """Yield the Rows of a file. Raises KeyError without its columns, and InputError."""
    lines = read_csv(path)
    _, titles = next(lines, (1, []))
    titles = [re.sub(r"[\s_.-]", "", title).lower() for title in titles]
    image, label, runs, *sides = (next((titles.index(name) for name in names if name in titles), None)
                                  for names in (IMAGE_COLUMNS, CLASS_COLUMNS, RUN_COLUMNS, *SIDES))
    if image is None or runs is None:
        raise KeyError(f"no columns of images and runs: {', '.join(titles)}")
    for number, cells in lines:
        where = f"{path} line {number}"
        if len(cells) < len(titles):
            raise InputError(f"{where} has {len(cells)} cells of {len(titles)}: export it again")
        name, kind = cells[image].strip(), OBJECT if label is None else cells[label].strip()
        if re.search("label|class", titles[image]):  # a.jpg_Fish
            match = re.fullmatch(r"(.+\.[A-Za-z]{3,4})_(.+)", name) or re.fullmatch(r"(.+)_([^_]+)", name)
            name, kind = match.groups() if match else (name, "")
        kind = f"class {kind}" if kind.isdecimal() else kind
        text, given = cells[runs].strip(), [cells[side].strip() for side in sides if side is not None]
        size = given_size({side: int(text) for side, text in enumerate(given) if text.isdecimal()}, 0, 1)
        yield Row(name, kind, "" if text.lower() in NOTHING else text, size, where)


def size_of(row, path, folder):
    """Return the (H, W) that a Row gives, else that of its image; None where there is none, or EXIF turns it,
    so that pixels may be numbered before or after turning. Raises InputError.
    """
    images = [] if row.size else folder.find_images(row.image, path, split_in(path.stem))
    size, orientation = read_orientation(images[0]) if images else (row.size, 1)
    return size if orientation == 1 else None


def decode_pairs(text, size, by_columns):
    """Return the Bitmap of an image of pairs of a first pixel, from 1, and a length. Raises BadLabel."""
    if size is None:
        raise BadLabel("on a photo that EXIF turns, of which its file gives no size: save the photo upright")
    if not re.fullmatch(r"(\d{1,18}\s+)*\d{1,18}", text, re.ASCII):
        raise BadLabel("with run lengths that are not numbers from 1")
    numbers, pixels = np.array(text.split()).astype(np.int64), math.prod(size)
    if len(numbers) % 2:
        raise BadLabel("with an odd count of numbers, where each run has two")
    starts, lengths = numbers[::2] - 1, numbers[1::2]
    if numbers.min() < 1 or (starts + lengths).max() > pixels:
        raise BadLabel(f"with runs outside of its image, whose pixels are numbered from 1 to {pixels}")
    borders = np.stack([starts, starts + lengths], 1)[np.argsort(starts)].ravel()
    if (np.diff(borders) < 0).any():
        raise BadLabel("with runs that overlap")
    return runs_bitmap(np.diff(borders, prepend=0, append=pixels), *size, by_columns)


def find_order(rows, sizes):
    """Return (whether pixels are numbered column by column, notes, doubts): in the right order, neighboring
    columns or rows look alike; those of square images do so in either.
    """
    tells = [row for row in rows if sizes[row.image] and sizes[row.image][0] != sizes[row.image][1]
             and len(row.runs.split()) > 2]
    steps = np.zeros(2)
    for row in evenly_sampled(tells, COMPARED):
        try:
            pixels = decode_pairs(row.runs, sizes[row.image], by_columns=True).pixels.T.ravel()
        except BadLabel:
            continue  # named later
        steps += [np.count_nonzero(pixels[side:] != pixels[:-side]) for side in sizes[row.image]]
    names = "column by column", "row by row"
    if steps.min() < CLEAR * steps.max():
        by_columns = bool(steps[0] < steps[1])
        return by_columns, [f"pixels are numbered {names[not by_columns]}: so shapes hold together"], []
    reason = "" if tells else ", because all images are square"
    return True, [], [f"nothing tells whether pixels are numbered {names[0]} or {names[1]}{reason}: taken as "
                      f"{names[0]}, as in most contests of Kaggle; check.png of check_data.py shows it"]
