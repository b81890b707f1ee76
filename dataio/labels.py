"""What the values or colors in masks mean: class lists as people have them, binary masks, blurred masks.

    classes, table, notes = decode_masks(root, samples, facts)      # of a folder; facts: MaskFacts

classes.txt (or another of class_file) names the classes, one per line: `name` (the line number is the mask
value), `name R G B` (masks painted in colors), `name = VALUE ...`, or a table with columns of these,
separated by commas, semicolons, colons or tabs, with or without a header. Lines of the same name are one
class; the name `ignore` is not counted.
"""
import csv
import re
from shlex import quote
from typing import NamedTuple

import numpy as np

from config import IGNORE, InputError
from dataio.classes import fill_colors
from dataio.readers import (OUTSIDE, index_table, outside_message, pack_color, ranges, unpack_color,
                            value_table)

CLASS_FILES = ("classes.txt", "classes.csv", "class_dict.csv", "_classes.csv", "labelmap.txt")
MOST_CLASSES = 250
NAME_COLUMNS = {"name", "names", "class", "classes", "label", "labels", "category", "class_name"}
COLOR_COLUMNS = ({"r", "red"}, {"g", "green"}, {"b", "blue"})
VALUE_COLUMNS = {"id", "value", "index", "idx", "pixel value", "class_id", "label_id", "pixel", "train_id",
                 "trainid"}
NOWHERE = 1000  # and above: values for classes that no mask shows
GAP = 24  # steps of 255 by which the values that a lossy format blurred must be apart
BLURRED = 0.15  # share of the pixels that may lie further than half of GAP from all of them
MODE_SHARE, PEAK_SHARE, PEAK = 5e-3, 1e-4, 20  # see find_modes


class Entry(NamedTuple):
    """One line of classes.txt: a class or `ignore`, and the color or the mask value that stands for it."""

    name: str
    color: tuple = None
    value: int = None


def in_order(entries, names):
    """Return the [Entry] of `names`, in their order, with the values of `entries`. Raises InputError where
    one of these is not among them.
    """
    known = {entry.name for entry in entries}
    unknown = known - {*names, "background", "ignore"}  # these two the masks need not show
    if unknown:
        raise InputError(f"the annotations name the class {min(unknown)}, which is not among "
                         f"{', '.join(names)}: give --classes all of them, or leave it out")
    nowhere = [Entry(name, None, NOWHERE + number) for number, name in enumerate(names) if name not in known]
    kept = [entry for entry in entries if entry.name in {*names, "ignore"}]
    return sorted([*kept, *nowhere], key=lambda entry: [*names, "ignore"].index(entry.name))


# --- classes.txt ------------------------------------------------------------------------------------------
def class_file(root):
    """Return the file that names the classes of a folder, or None: the first of CLASS_FILES in it or in the
    one folder that it holds, else a .csv file with `class` in its name, up to two folders deeper.

    Raises InputError where there are several that differ.
    """
    inner = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for folder in (root, *(inner if len(inner) == 1 else ())):
        for name in CLASS_FILES:
            if (folder / name).is_file():
                return folder / name
    found = sorted(path for depth in ("*", "*/*", "*/*/*") for path in root.glob(f"{depth}.csv")
                   if "class" in path.stem.lower() and not path.name.startswith(".")
                   and path.name != "per_class.csv")  # what evaluate.py writes
    if len({path.read_bytes() for path in found}) > 1:
        raise InputError(f"{found[0]} and {found[1]} may both name the classes: copy the right one to "
                         f"{root / 'classes.txt'}")
    return found[0] if found else None


def read_classes(path):
    """Read classes.txt: return its lines as [Entry], a line with several values as several. Raises
    InputError.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: write `name` or `name R G B` per line") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1)
                if line.strip() and not line.lstrip().startswith("#")]
    if path.suffix.lower() == ".csv" and numbered and numbered[0][1].strip().lower() in NAME_COLUMNS:
        numbered = numbered[1:]  # the title of the one column
    if path.name == "labelmap.txt":  # of CVAT: label:R,G,B:parts:actions
        numbered = [(number, re.sub(r":(\d+),(\d+),(\d+):.*", r" \1 \2 \3", line))
                    for number, line in numbered]
    entries = table_entries(path, [line for _, line in numbered])
    if entries is None:
        parsed = [line_entries(f"{path} line {number}", line) for number, line in numbered]
        entries = [entry for line in parsed for entry in line]
    entries = [entry._replace(name="ignore") if entry.name.lower() == "ignore" else entry
               for entry in entries]
    check_entries(path, entries)
    return entries


def line_entries(where, line):
    """Return the [Entry] of a line `name`, `name R G B`, `R G B name`, `VALUE name R G B` or `name =
    VALUE ...`. Raises InputError.
    """
    words = line.replace("=", " = ").split()
    color, values = None, [None]
    if "=" in words:
        words, texts = words[:words.index("=")], words[words.index("=") + 1:]
        values = [int(text) if text.isdecimal() else 65536 for text in texts]
        if not words or not values or max(values) > 65535:
            raise InputError(f"{where}: write `name = VALUE`, values are numbers 0..65535")
    elif len(words) > 3 and (numbers(words[-3:]) or numbers(words[:3]) and not numbers(words[3:4])):
        rgb, words = (words[-3:], words[:-3]) if numbers(words[-3:]) else (words[:3], words[3:])
        if len(words) > 1 and numbers(words[:1]) and not numbers(words[1:2]):
            values, words = [int(words[0])], words[1:]
        color = tuple(map(int, rgb))
        if max(color) > 255:
            raise InputError(f"{where}: {color} is not a color: give three numbers 0..255")
    return [Entry(" ".join(words), color, value) for value in values]


def numbers(words):
    """Return whether all words are whole numbers."""
    return all(word.isdecimal() for word in words)


def table_entries(path, lines):
    """Return the [Entry] of lines that are a table with columns of names, values or colors, else None.

    A header says which column is which; without one, three columns of numbers are a color, one is the value,
    and of four the first is. Raises InputError for two columns of values.
    """
    lines = [re.sub(r"\b(\d+)\.0+\b", r"\1", line) for line in lines if line.strip(" ,;:\t")]
    if lines and all(re.match(r"\s*\d+[.)]?\s+[^\d\s=]", line) and not numbers(line.split()[-3:])
                     for line in lines):
        lines = [re.sub(r"^\s*(\d+)[.)]?\s+", r"\1\t", line) for line in lines]  # `3 road`, `3. road`
    tables = ([[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=mark)]
              for mark in ",;\t:")
    try:
        rows = next(rows for rows in tables if len({len(row) for row in rows}) == 1 and len(rows[0]) > 1)
    except (StopIteration, csv.Error):
        return None
    header, *body = rows
    titles = [cell.lower() for cell in header]
    titled = bool(NAME_COLUMNS & set(titles)) and not any(cell.isdecimal() for cell in header)
    body, titles = (body, titles) if titled else (rows, [""] * len(header))
    if not body:
        return None
    numeric = [column for column in range(len(header)) if all(row[column].isdecimal() for row in body)]
    texts = [column for column in range(len(header)) if column not in numeric]
    name = next((column for column in texts if titles[column] in NAME_COLUMNS), texts[0] if texts else None)
    if name is None or not numeric and not titled or len(texts) > 1 and not titled:
        return None
    color = [next((column for column in numeric if titles[column] in names), None) for names in COLOR_COLUMNS]
    if None in color:
        color = numeric[-3:] if len(numeric) in (3, 4) and not titled else None
    rest = [column for column in numeric if column not in (color or ())]
    if titled:
        rest = [column for column in rest if titles[column] in VALUE_COLUMNS]
    if len(rest) > 1:
        shown = " and ".join(titles[column] or str(column + 1) for column in rest)
        raise InputError(f"{path} has several columns of numbers ({shown}): leave the one that the masks "
                         "hold")
    value = rest[0] if rest else None
    return [Entry(row[name], tuple(min(int(row[column]), 256) for column in color) if color else None,
                  min(int(row[value]), 65536) if value is not None else None) for row in body]


def check_entries(path, entries):
    """Raise InputError where the lines of classes.txt contradict each other or cannot be."""
    for entry in entries:
        if not entry.name or max(entry.color or (0,)) > 255 or (entry.value or 0) > 65535:
            named = entry.name or "a class without a name"
            raise InputError(f"{path}: {named} needs a name, a color of 0..255 or a value of 0..65535")
    for kind, used in (("color", [entry.color for entry in entries if entry.color]),
                       ("value", [entry.value for entry in entries if entry.value is not None])):
        twice = [item for item in used if used.count(item) > 1]
        if twice:
            raise InputError(f"{path} has the {kind} {twice[0]} twice; one {kind} means one class")
    if len({entry.value is None for entry in entries}) > 1:
        raise InputError(f"{path} gives values (`name = VALUE`) on some lines only: give them on all or none")
    count = len({entry.name for entry in entries} - {"ignore"})
    if not 2 <= count <= MOST_CLASSES:
        raise InputError(f"{path} names {count} class{'es' * (count != 1)}; it needs two to {MOST_CLASSES}, "
                         "one per line")


# --- what masks mean --------------------------------------------------------------------------------------
def stored(mask, table):
    """Return what a value table decodes of a mask's facts: its colors for a table of colors, else its
    values.
    """
    return mask.colors if len(table) > 65536 else mask.values


def decode_masks(root, samples, masks, class_names=(), listed=None, blurred=False):
    """Decide what the masks of a folder mean: return (classes, value table, notes).

    masks: the MaskFacts of every sample; listed: [Entry] instead of those of the folder's classes.txt;
    blurred: whether to snap other masks than JPEG files too. Raises InputError that names the first mask that
    does not fit.
    """
    path = None if listed else class_file(root)
    listed = read_classes(path) if path else listed or []
    if listed and class_names:
        raise InputError(f"--classes has no effect, {path} names the classes: leave it out")
    colors = bool(listed) and all(entry.color for entry in listed) and any(
        is_painted(mask, listed) for mask in masks)
    found, pixels = {}, {}  # of every value or color the first mask that has it, and its pixels
    for sample, mask in zip(samples, masks, strict=True):
        values = mask.colors if colors else mask.values
        if values is None:
            reason = "has no colors, and other masks are painted" if colors else \
                "is painted in colors: list them in classes.txt, one `name R G B` per line"
            raise InputError(f"{sample.mask} {reason}{says(root)}")
        for value, count in zip(values.tolist(), mask.counts.tolist(), strict=True):
            found.setdefault(value, sample.mask)
            pixels[value] = pixels.get(value, 0) + count
    snapped, notes = {}, []
    if blurred or any(mask.kind == "JPEG" for mask in masks):
        named = [pack_color(*entry.color) if colors else entry.value for entry in listed]
        snapped, notes = snap(pixels, colors, [code for code in named if code is not None])
        if not snapped:
            raise InputError(f"{samples[0].mask} and others are JPEG files, which blur classes into one "
                             f"another, too far to tell them apart here: export masks as PNG{says(root)}")
        found = {code: path for code, path in found.items() if snapped[code] == code}
    if path and path != root / "classes.txt":
        notes.append(f"the classes are those of {path}")
    entries = listed or [Entry(name) for name in class_names]
    if len(entries) > MOST_CLASSES:
        raise InputError(f"--classes names {len(entries)} classes, and {MOST_CLASSES} can be: masks have 8 "
                         "bits")
    try:
        classes, table, said = decide_classes(found, entries, colors)
    except InputError as error:
        raise InputError(f"{error}{says(root)}") from None
    table[list(snapped)] = [IGNORE if mode is None else table[mode] for mode in snapped.values()]
    for sample, mask in zip(samples, masks, strict=True):
        values = stored(mask, table)
        wrong = table[values] == OUTSIDE
        if wrong.any():
            text = outside_message(sample.mask, values[wrong], mask.counts[wrong], table, classes)
            raise InputError(f"{text}{says(root)}")
    return classes, table, said + notes


def says(root):
    """Return the end of a message about masks: the command that says more."""
    return f"; python check_data.py --data-root {quote(str(root))} says more"


def is_painted(mask, listed):
    """Return whether a mask (its MaskFacts) is painted in the `listed` colors rather than an index mask.

    RGB masks are, unless they are gray in values that are not listed. Palette and gray masks are where their
    colors are listed, but stand for other entries of the list than their indices do.
    """
    if mask.colors is None:
        return False
    codes = [pack_color(*entry.color) for entry in listed]
    all_listed = bool(np.isin(mask.colors, codes).all())
    if mask.mode in ("P", "L", "1", "LA"):
        by_index = np.array([*codes, *[-1] * 65536])[mask.values]
        return all_listed and bool((by_index != mask.colors).any())
    return all_listed or mask.values is None


def decide_classes(found, entries, colors):
    """Decide the classes of a folder: `found` = {mask value: first mask with it}, `entries` = [Entry].

    Entries of one name are one class: several values may mean it. Returns (classes, value table, notes).
    Raises InputError where values and names make no sense together.
    """
    entries = [Entry(*entry) for entry in entries]
    ids = {"ignore": IGNORE}  # of every name, in the order of first mention
    for entry in entries:
        ids.setdefault(entry.name, len(ids) - 1)
    kept = [(name, next((entry.color for entry in entries if entry.name == name and entry.color), None))
            for name in ids if name != "ignore"]
    if entries and len(kept) < 2:
        raise InputError("--classes needs at least two names, in the order of the mask values")
    if colors:
        codes = {pack_color(*entry.color): ids[entry.name] for entry in entries}
        return fill_colors(kept), value_table(codes, size=1 << 24), []
    if entries and entries[0].value is not None:
        table = {IGNORE: IGNORE, **{entry.value: ids[entry.name] for entry in entries}}
        return fill_colors(kept), value_table(table), []
    by_index = {IGNORE: IGNORE, **{line: ids[entry.name] for line, entry in enumerate(entries)}}
    # 0 and 255 (or 65535) with two classes and no `ignore`: a binary mask, in which 255 is the second class
    values = sorted(found)
    binary = values[0] == 0 and values[-1] in (255, 65535) and 1 not in found and len(kept) == len(entries)
    if binary and (len(kept) == 2 or (not entries and len(values) == 2)):
        white = values[-1]
        kept = kept or [("background", None), ("foreground", None)]
        table = value_table({IGNORE: IGNORE, 0: 0, white: 1})
        note = f"masks hold 0 and {white}: read as 0 = {kept[0][0]}, 1 = {kept[1][0]}"
        return fill_colors(kept), table, [note]
    if entries:
        return fill_colors(kept), value_table(by_index), []
    counted = [value for value in values if value != IGNORE]
    if counted != list(range(len(counted))) or not 2 <= len(counted) <= MOST_CLASSES:
        odd = next((value for id, value in enumerate(counted) if value != id), values[0])
        raise InputError(f"the masks hold the values {ranges(values)}, which are not 0..K-1 ({odd} first in "
                         f"{found[odd]}): repair them, or name them in classes.txt, one name per line")
    named = [(f"class {value}" if value else "background", None) for value in counted]
    note = f"no classes.txt: the masks hold {len(counted)} classes"
    return fill_colors(named), index_table(len(named)), [note]


def class_pixels(scans, table, num_classes):
    """Return (N, K) pixel counts of every class in every mask, from (values or colors, counts) of each."""
    pixels = np.zeros((len(scans), num_classes), np.int64)
    for row, (values, counts) in zip(pixels, scans, strict=True):
        ids = table[values]
        np.add.at(row, ids[ids != IGNORE], counts[ids != IGNORE])
    return pixels


# --- masks that a lossy format or resizing blurred --------------------------------------------------------
def rgb_of(codes, colors):
    """Return codes (n,), values or 24-bit colors, as (n, 3) or, of values, (n, 1) int64."""
    codes = np.asarray(codes, np.int64)
    return np.stack(unpack_color(codes), 1) if colors else codes[:, None]


def find_modes(codes, pixels, colors):
    """Return the codes that blurred masks were drawn in, at least GAP apart: those that hold MODE_SHARE of
    the pixels, or PEAK_SHARE and PEAK times as much as the codes around them do on average.

    codes (n,), pixels (n,) int64.
    """
    points, modes = rgb_of(codes, colors), []
    for index in np.argsort(-pixels, kind="stable")[:1000]:
        distance = np.abs(points - points[index]).max(1)
        around = pixels[(distance > 0) & (distance < GAP)]
        share = pixels[index] / pixels.sum()
        if share < PEAK_SHARE:
            break  # so are all that follow
        peak = pixels[index] >= PEAK * around.sum() / max(1, len(around))
        if (share >= MODE_SHARE or peak) and all(distance[mode] >= GAP for mode in modes):
            modes.append(index)
    return [int(codes[index]) for index in modes]


def snap(pixels, colors, modes=()):
    """Return ({code: the mode that it was, None = unclear}, notes) of blurred masks; {} where none are clear.

    pixels: {value or color: pixels in all masks}; modes: the codes that the masks were drawn in, else those
    of find_modes. With two modes, everything is the nearer one; between more, a mixture of two may look like
    a third: what lies further than half of GAP from all is unclear.
    """
    codes, counts = np.array(list(pixels)), np.array(list(pixels.values()))
    modes = sorted(modes) or sorted(find_modes(codes, counts, colors))
    points, centers = rgb_of(codes, colors), rgb_of(modes, colors)  # (n, c), (k, c)
    apart = np.abs(centers[:, None] - centers[None]).max(2) + 256 * np.eye(len(modes), dtype=int)
    if not 2 <= len(modes) <= MOST_CLASSES or apart.min() < GAP:
        return {}, []
    distance = np.stack([np.abs(points - center).max(1) for center in centers], 1)  # (n, k)
    nearest, far = distance.argmin(1), distance.min(1) > GAP // 2
    if counts[far].sum() > BLURRED * counts.sum():
        return {}, []
    unclear = far & (len(modes) > 2)
    moved = 100 * counts[(distance.min(1) > 0) & ~unclear].sum() / counts.sum()
    shown = ", ".join(str(tuple(center.tolist())) if colors else str(mode)
                      for mode, center in zip(modes, centers, strict=True))
    note = f"blurred masks (JPEG or resized): {moved:.2f} % of the pixels snapped to {shown}"
    if unclear.any():
        note += f", {100 * counts[unclear].sum() / counts.sum():.2f} % lie between them and are ignored"
    return {int(code): None if bad else modes[mode]
            for code, bad, mode in zip(codes, unclear, nearest, strict=True)}, [note]
