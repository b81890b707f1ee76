"""What the values or colors in masks mean: class lists as people have them, binary masks, blurred masks.

    entries, notes = known_classes(root)                    # [Entry] of the folder's classes.txt
    meaning = decode_masks(samples, facts, entries)         # meaning.classes, meaning.table; facts: MaskFacts

classes.txt (or another of class_file) names the classes, one per line: `name` (the line number is the mask
value), `name R G B` (masks painted in colors), `name = VALUE ...`, or a table with columns of these,
separated by commas, semicolons, colons or tabs, with or without a header. Lines of the same name are one
class; the name `ignore` is not counted. Behind lines of names, `ignore = VALUE` may follow.
"""
import csv
import io
import json
import operator
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import IGNORE, InputError
from dataio.classes import BLACK, fill_colors
from dataio.readers import (COLORS, MASK_VALUES, NODATA, OUTSIDE, outside_message, pack_color, ranges,
unpack_color, value_table)
from utils import is_background, is_ignored, write_text

CLASS_FILES = (
    "classes.txt", "classes.csv", "class_dict.csv",
    "_classes.csv",  # Roboflow
    "labelmap.txt", "label_colors.txt",  # CVAT, the second of CamVid too
    "class_names.txt",  # labelme2voc
    "classification.txt",
    "classes.json", "classes/classes.json",  # SuperAnnotate
    "label_classes.json",  # Hasty
)
MOST_CLASSES = 250
NAMES_IN_NOTE = 5
NAME_COLUMNS = {"name", "names", "class", "classes", "label", "labels", "category", "class_name"}
COLOR_COLUMNS = ({"r", "red"}, {"g", "green"}, {"b", "blue"})
VALUE_COLUMNS = {"id", "value", "index", "idx", "pixel value", "class_id", "label_id", "pixel", "train_id",
                 "trainid"}
UNUSED_VALUE = 1000  # and above: values for classes that are in no mask
NO_VALUE = 65536  # stands for text that is not a mask value
GAP = 24  # steps of 255 by which the values that a lossy format blurred must be apart
BLURRED = 0.15  # share of the pixels that may lie further than half of GAP from all of them
MODE_SHARE, PEAK_SHARE, PEAK = 5e-3, 1e-4, 20  # see find_modes


class Entry(NamedTuple):
    """One line of classes.txt: a class or `ignore`, and the color or the mask value that stands for it."""

    name: str
    color: tuple = None
    value: int = None


class MaskMeaning(NamedTuple):
    """classes: [(name, (R, G, B))]; table: {mask value or color: class id} as in DataSource; notes: lines."""

    classes: list
    table: np.ndarray
    notes: list


class NamedTwice(InputError):
    """--classes names the classes of masks, and a class file does."""


# --- classes.txt ------------------------------------------------------------------------------------------
def known_classes(root, class_names=(), annotated=None):
    """Return ([Entry], notes) of the classes that somebody named, [] where nobody did.

    class_names: of --classes; annotated: [Entry] of the files that the masks were drawn from. Raises
    InputError where these contradict each other or the folder's class file cannot be read; NamedTwice where
    masks have --classes beside that file.
    """
    named = standard_entries([Entry(name) for name in class_names])
    if annotated:
        entries = in_order(annotated, [entry.name for entry in named]) if named else annotated
        return entries, unused_note(root, annotated)
    path = class_file(root)
    if path is None:
        check_names([entry.name for entry in named])
        return named, minus_one_note(named)
    if class_names:
        raise NamedTwice(f"--classes has no effect, {path} names the classes: leave it out")
    entries = read_classes(path)
    notes = [f"the classes are those of {path}"] if path != root / "classes.txt" else []
    return entries, notes + minus_one_note(entries)


def unused_note(root, annotated):
    """Return [a line on a class file whose names are not those of the [Entry] of annotation files]."""
    try:
        path = class_file(root)
        listed = file_entries(path) if path else []
    except InputError:
        return []  # of no list of classes, and nothing needs it
    names, others = ({entry.name for entry in entries if not is_background(entry.name)} - {"ignore"}
                     for entries in (listed, annotated))
    if not names or names == others or len(listed) > MOST_CLASSES:
        return []
    return [f"not used: {path}, because the annotation files name the classes; they differ in "
            f"{', '.join(sorted(names ^ others)[:NAMES_IN_NOTE])}"]


def standard_entries(entries):
    """Return [Entry] with the name `ignore` for all that is_ignored. A list of names that begins with
    labelme's `__ignore__` counts from -1, as labelme does.
    """
    if entries and entries[0].name.lower() == "__ignore__" and not any(
            entry.color or entry.value is not None for entry in entries):
        entries = [*entries[1:], entries[0]._replace(value=-1)]
    return [entry._replace(name="ignore") if is_ignored(entry.name) else entry for entry in entries]


def minus_one_note(entries):
    """Return [a line that says from where the names of a list count, where `ignore` is -1]."""
    if Entry("ignore", None, -1) not in entries or entries[0].value is not None:
        return []
    return [f"the class list counts from -1, as labelme's do: -1 = ignore, 0 = {entries[0].name}"]


def check_names(class_names):
    """Raise InputError where the names of --classes are too many, or a single one."""
    if class_names and not 2 <= len({*class_names} - {"ignore"}) <= len(class_names) <= MOST_CLASSES:
        raise InputError(f"--classes names {len(class_names)} classes; give two to {MOST_CLASSES}, in the "
                         "order of the mask values")


def in_order(entries, class_names):
    """Return `entries` in the order of the names of --classes. Raises InputError where a name is missing."""
    class_names = ["background" if is_background(name) else name for name in class_names]
    annotated = {entry.name for entry in entries}
    unknown = annotated - {*class_names, "background", "ignore"}  # these two the masks need not show
    if unknown:
        raise InputError(f"the annotations name the class {min(unknown)}, which is not among "
                         f"{', '.join(class_names)}: give --classes all of them, or leave it out")
    check_names(class_names)
    unused = [Entry(name, None, UNUSED_VALUE + number) for number, name in enumerate(class_names)
              if name not in annotated]
    order = [*class_names, "ignore"]
    named = [entry for entry in entries if entry.name in order]
    return sorted([*named, *unused], key=lambda entry: order.index(entry.name))


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
    tables = sorted(path for depth in ("*", "*/*", "*/*/*") for path in root.glob(f"{depth}.csv")
                    if "class" in path.stem.lower() and not path.name.startswith(".")
                    and path.name != "per_class.csv")  # what evaluate.py writes
    if len({path.read_bytes() for path in tables}) > 1:
        raise InputError(f"{tables[0]} and {tables[1]} may both name the classes: copy the right file to "
                         f"{root / 'classes.txt'}")
    return tables[0] if tables else None


def read_classes(path):
    """Return the [Entry] of a class file, several for several values. Raises InputError."""
    entries = file_entries(path)
    check_entries(path, entries)
    return entries


def file_entries(path):
    """Return the [Entry] of a class file, which may contradict each other. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: write `name` or `name R G B` per line") from None
    return standard_entries(json_entries(path, text) if path.suffix == ".json" else text_entries(path, text))


def json_entries(path, text):
    """Return the [Entry] of SuperAnnotate's or Hasty's list of classes, and last the background, which these
    leave out: black, or the value 0. Raises InputError.
    """
    try:
        entries = [Entry(str(row.get("class_name") or row["name"]), hex_color(row["color"]),
                         operator.index(row["png_index"]) if "png_index" in row else None)
                   for row in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f'{path} is not a list of classes as {{"name": "car", "color": "#ff0000"}}: write '
                         "classes.txt, `name` or `name R G B` per line") from None
    values = {entry.value for entry in entries} - {None}
    is_black_free = all(entry.color != BLACK for entry in entries)
    if 0 not in values and (values or is_black_free):
        name = next((entry.name for entry in entries if is_background(entry.name)), "background")
        entries.append(Entry(name, BLACK if is_black_free else None, 0 if values else None))
    return entries


def hex_color(text):
    """Return #RRGGBB or #RRGGBBAA as (R, G, B). Raises TypeError for other text."""
    return tuple(bytes.fromhex(re.fullmatch("#([0-9a-fA-F]{6})(?:[0-9a-fA-F]{2})?", text)[1]))


def text_entries(path, text):
    """Return the [Entry] of the text of a class file. Raises InputError."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if path.suffix.lower() == ".csv" and lines and lines[0].strip().lower() in NAME_COLUMNS:
        lines = lines[1:]  # the title of the only column
    if path.name == "labelmap.txt":  # of CVAT: label:R,G,B:parts:actions
        lines = [re.sub(r":(\d+),(\d+),(\d+):.*", r" \1 \2 \3", line) for line in lines]
    return table_entries(path, lines) or [entry for line in lines for entry in line_entries(line)]


def line_entries(line):
    """Return the [Entry] of a line of a class file that is not a row of a table."""
    words = line.replace("=", " = ").split()
    if "=" in words:
        name, texts = words[:words.index("=")], words[words.index("=") + 1:]
        values = [int(text) if numbers([text]) else NO_VALUE for text in texts or [""]]
        return [Entry(" ".join(name), None, value) for value in values]
    if len(words) > 3 and numbers(words[-3:]):  # name R G B, maybe behind a value
        color, words = words[-3:], words[:-3]
    elif len(words) > 3 and numbers(words[:3]) and not numbers(words[3:4]):  # R G B name
        color, words = words[:3], words[3:]
    else:
        return [Entry(" ".join(words))]
    value = None
    if len(words) > 1 and numbers(words[:1]) and not numbers(words[1:2]):
        value, words = int(words[0]), words[1:]
    return [Entry(" ".join(words), tuple(map(int, color)), value)]


def numbers(words):
    """Return whether all words are whole numbers, maybe with a minus."""
    return all(word.removeprefix("-").isdecimal() for word in words)


def table_entries(path, lines):
    """Return the [Entry] of lines that are a table with columns of names, values or colors, else [].

    A header tells which column is which; without one, three columns of numbers are a color, a single one is
    the value, and of four the first is. Raises InputError for two columns of values.
    """
    rows, titles = table_rows(lines), []
    if rows and NAME_COLUMNS & set(map(str.lower, rows[0])) and not any(numbers([cell]) for cell in rows[0]):
        titles, rows = [cell.lower() for cell in rows[0]], rows[1:]
    if not rows:
        return []
    numeric = [column for column, cells in enumerate(zip(*rows, strict=True)) if numbers(cells)]
    texts = [column for column in range(len(rows[0])) if column not in numeric]
    if titles:
        texts.sort(key=lambda column: titles[column] not in NAME_COLUMNS)
        color = [column for channel in COLOR_COLUMNS for column in numeric if titles[column] in channel]
        color = color if len(color) == 3 else []
        values = [column for column in numeric if column not in color and titles[column] in VALUE_COLUMNS]
    else:
        color = numeric[-3:] if len(numeric) in (3, 4) else []
        values = [column for column in numeric if column not in color]
    if not texts or not titles and (len(texts) > 1 or not numeric):
        return []
    if len(values) > 1:
        raise InputError(f"{path} has {len(values)} columns of numbers: leave the one that the masks hold")
    entries = []
    for row in rows:
        rgb = tuple(int(row[column]) for column in color) or None
        entries.append(Entry(row[texts[0]], rgb, int(row[values[0]]) if values else None))
    return entries


def table_rows(lines):
    """Return the cells of lines that are a table: all with the same number of them, two or more; else []."""
    lines = [re.sub(r"^(\s*-?\d+)\.0+\b", r"\1", line) for line in lines if line.strip(" ,;:\t")]
    if all(re.match(r"\s*-?\d+[.)]?\s+[^\d\s=]", line) and not numbers(line.split()[-3:]) for line in lines):
        lines = [re.sub(r"^\s*(-?\d+)[.)]?\s+", r"\1\t", line) for line in lines]  # `3 road`, `3. road`
    for mark in ",;\t:":
        try:
            rows = [[re.sub(r"^(-?\d+)\.0+$", r"\1", cell.strip()) for cell in row]
                    for row in csv.reader(lines, delimiter=mark)]
        except csv.Error:
            return []
        if len({len(row) for row in rows}) == 1 and len(rows[0]) > 1:
            return rows
    return []


def check_entries(path, entries):
    """Raise InputError where the lines of a class file contradict each other or cannot be."""
    for name, color, value in entries:
        if not name or {*(color or ())} - {*range(256)} or (value or 0) not in MASK_VALUES:
            raise InputError(f"{path}: {name or 'a class without a name'} needs a name, a color of 0..255 or "
                             f"a value of {MASK_VALUES[0]}..{MASK_VALUES[-1]}, as in `name R G B` or `name = "
                             "VALUE`")
    for kind, used in (("color", [entry.color for entry in entries if entry.color]),
                       ("value", [entry.value for entry in entries if entry.value is not None])):
        for code, count in Counter(used).items():
            if count > 1:
                raise InputError(f"{path} has the {kind} {code} twice; each {kind} means one class")
    lines = [entry for entry in entries if entry.value is None]  # 0, 1, ...
    behind = entries[len(lines):]
    if lines and (entries[:len(lines)] != lines or any(
            entry.name != "ignore" or entry.value in range(len(lines)) for entry in behind)):
        raise InputError(f"{path} gives values (`name = VALUE`) on some lines only: give them on all or none "
                         "or, below all names, for other values that mean `ignore`")
    count = len({entry.name for entry in entries} - {"ignore"})
    if not 2 <= count <= MOST_CLASSES or len(entries) > MOST_CLASSES:
        raise InputError(f"{path} names {count} of two to {MOST_CLASSES} classes in {len(entries)} lines: "
                         "write a line for each class")


# --- writing classes.txt ----------------------------------------------------------------------------------
def save_classes(classes, folder):
    """Write the classes.txt of a folder with masks of class ids and 255, from which read_classes returns the
    same [(name, (R, G, B))]; of two classes it says that 255 is neither, which masks of 0 and 255 alone would
    leave open. A name that no class list can hold is changed, which is printed.
    """
    path, (names, colors) = folder / "classes.txt", zip(*classes, strict=True)
    written = writable_names(names)
    for name, new in zip(names, written, strict=True):
        if new != name:
            print(f"{path}: the class {name!r} is called {new!r}, because no class list can hold its name")
    write_text(path, class_list(written, colors) or "".join(f"{name}\n" for name in written))


def class_list(names, colors):
    """Return the text of a classes.txt with names and colors or, where colors are equal, values: lines, else
    a table, whichever is read as these; None where nothing is.
    """
    entries = [Entry(name, tuple(color), id)
               for id, name, color in zip(range(len(names)), names, colors, strict=True)]
    colored = [entry._replace(value=None) for entry in entries]
    numbered = [entry._replace(color=None) for entry in entries]
    ignored = [Entry("ignore", None, IGNORE)] * (len(names) == 2)
    candidates = [(text_lines(colored + ignored), colored + ignored), (text_table(entries), entries),
                  (text_lines(numbered), numbered), (text_table(numbered), numbered)]
    if not ignored:
        candidates.insert(1, (text_table(colored), colored))
    return next((text for text, meant in candidates if read_back(text) == meant), None)


def text_lines(entries):
    """Return [Entry] as lines, `name R G B` or `name = VALUE`."""
    return "".join(f"{name} {' '.join(map(str, color))}\n" if color else f"{name} = {value}\n"
                   for name, color, value in entries)


def text_table(entries):
    """Return [Entry], all with a color, a value or both, as a table with titles."""
    table, has_values = io.StringIO(), entries[0].value is not None
    titles = "name", *("rgb" if entries[0].color else ""), *["value"] * has_values
    rows = [(name, *(color or ()), *[value] * has_values) for name, color, value in entries]
    csv.writer(table, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([titles, *rows])
    return table.getvalue()


def read_back(text):
    """Return the [Entry] that read_classes returns of the text of a classes.txt, None where it refuses it."""
    path = Path("classes.txt")
    try:
        stored = text.encode("utf-8", "backslashreplace").decode("utf-8-sig")
        entries = standard_entries(text_entries(path, stored))
        check_entries(path, entries)
    except InputError:
        return None
    return entries


def writable_names(names):
    """Return names, all different, that class_list can write: the same where it can, else without what cannot
    be printed or, as `ignore` and nothing, with `class` before them.
    """
    written = []
    for id, name in enumerate(names):
        clean = " ".join("".join(char if char.isprintable() else " " for char in name).split())
        options = [clean, f"class {clean}", *(f"class {id + more}" for more in range(2 * len(names)))]
        free = (option for option in options if option not in {*names, *written})
        written.append(next(filter(is_writable, chain([name], free))))
    return written


def is_writable(name):
    """Return whether class_list can write a name beside another one."""
    return class_list([name, "other" if name != "other" else "another"], [(0, 0, 0), (1, 1, 1)]) is not None


# --- what masks mean --------------------------------------------------------------------------------------
def decode_masks(samples, masks, entries, blurred=False):
    """Decide what the masks of a folder mean: return the MaskMeaning.

    masks: the MaskFacts of every sample; entries: [Entry] of known_classes; blurred: whether to snap other
    masks than JPEG files too. Raises InputError that names the first mask that does not fit.
    """
    colors = bool(entries) and all(entry.color for entry in entries) and any(
        is_painted(mask, entries) for mask in masks)
    first_masks, pixels = count_codes(samples, masks, colors)
    snapped, notes = {}, []
    if blurred or any(mask.kind == "JPEG" for mask in masks):
        named = [pack_color(*entry.color) if colors else entry.value for entry in entries]
        pixels = {code: count for code, count in pixels.items() if code >= 0}
        snapped = snap(pixels, colors, [code for code in named if code is not None and code >= 0])
        if not snapped:
            raise InputError(f"{samples[0].mask} and others are JPEG files, which blur classes into one "
                             "another, too far to tell them apart here: export masks as PNG")
        notes = [snap_note(pixels, colors, snapped)]
        first_masks = {code: path for code, path in first_masks.items() if snapped.get(code, code) == code}
    if not colors:
        entries, value_notes = with_values(entries, first_masks)
        notes = value_notes + notes
    classes, table = classes_and_table(entries, colors, below_0=min(first_masks) < 0)
    for code, mode in snapped.items():
        table[code] = IGNORE if mode is None else table[mode]
    for sample, mask in zip(samples, masks, strict=True):
        codes = codes_of(mask, table)
        wrong = table[codes] == OUTSIDE
        if wrong.any():
            raise InputError(outside_message(sample.mask, codes[wrong], mask.counts[wrong], table, classes))
    return MaskMeaning(classes, table, notes)


def is_painted(mask, entries):
    """Return whether a mask (its MaskFacts) is painted in the colors of `entries` rather than an index mask.

    RGB masks are, unless they are gray in values that are not listed. Palette and gray masks are where their
    colors are listed, but stand for other entries of the list than their indices do.
    """
    if mask.colors is None:
        return False
    codes = [pack_color(*entry.color) for entry in entries]
    all_listed = bool(np.isin(mask.colors, codes).all())
    if mask.mode in ("P", "L", "1", "LA"):
        by_index = np.array([*codes, *[-1] * 65536])[mask.values]
        return all_listed and bool((by_index != mask.colors).any())
    return all_listed or mask.values is None


def count_codes(samples, masks, colors):
    """Return ({value or color: first mask that has it}, {the same: pixels in all}). Raises InputError."""
    first_masks, pixels = {}, Counter()
    for sample, mask in zip(samples, masks, strict=True):
        codes = mask.colors if colors else mask.values
        if codes is None:
            raise InputError(f"{sample.mask} has no colors, and other masks are painted" if colors else
                             f"{sample.mask} is painted in colors: list them in classes.txt, one "
                             "`name R G B` per line")
        for code, count in zip(codes.tolist(), mask.counts.tolist(), strict=True):
            first_masks.setdefault(code, sample.mask)
            pixels[code] += count
    return first_masks, pixels


def classes_and_table(entries, colors, below_0=False):
    """Return ([(name, (R, G, B))], value table) of [Entry]: of their colors, else of their values; below_0:
    whether masks hold values below 0.

    Equal names are one class, whose first color counts; NODATA is ignored, and 255 unless it is the value of
    an entry.
    """
    first_colors = {}
    for entry in entries:
        if entry.name != "ignore":
            first_colors[entry.name] = first_colors.get(entry.name) or entry.color
    ids = {name: id for id, name in enumerate(first_colors)} | {"ignore": IGNORE}
    if colors:
        table = value_table({pack_color(*entry.color): ids[entry.name] for entry in entries}, COLORS)
    else:
        ignored = dict.fromkeys([IGNORE, NODATA] if below_0 else [IGNORE], IGNORE)
        table = value_table(ignored | {entry.value: ids[entry.name] for entry in entries})
    return fill_colors(list(first_colors.items())), table


def with_values(entries, first_masks):
    """Return ([Entry] that all have a value, notes) for {mask value: first mask that has it}.

    Entries without values name the lines 0, 1, ..., or black and white. Raises InputError for values that
    nobody named and that are not 0..K-1.
    """
    if entries and entries[0].value is not None:
        return entries, []
    named = [entry for entry in entries if entry.value is None]
    ignored = entries[len(named):]
    values = sorted(first_masks.keys() - {NODATA, *(entry.value for entry in ignored)})
    if is_binary(values, named):
        first, second = named or [Entry("background"), Entry("foreground")]
        return ([first._replace(value=0), second._replace(value=values[-1]), *ignored],
                [f"masks hold 0 and {values[-1]}: read as 0 = {first.name}, 1 = {second.name}"])
    if named:
        return [entry._replace(value=line) for line, entry in enumerate(named)] + ignored, []
    entries = unnamed_entries(values, first_masks)
    return entries, [f"no classes.txt: the masks hold {len(entries)} classes"]


def is_binary(values, entries):
    """Return whether sorted mask values are 0 and 255 (or 65535), which is the second class and not void."""
    names = [entry.name for entry in entries]
    if not values or values[0] != 0 or values[-1] not in (255, 65535) or 1 in values:
        return False
    return len({*names} - {"ignore"}) == len(names) == 2 if names else len(values) == 2


def unnamed_entries(values, first_masks):
    """Return the [Entry] of mask values 0..K-1 and 255. Raises InputError for others."""
    counted = [value for value in values if value != IGNORE]
    if counted != list(range(len(counted))) or not 2 <= len(counted) <= MOST_CLASSES:
        odd = next((value for id, value in enumerate(counted) if value != id), min(first_masks))
        how = "one name per line"
        if min(values, default=0) < 0:
            how = "as `name = VALUE`, with `ignore = VALUE` for what is not counted"
        raise InputError(f"the masks hold the values {ranges(sorted(first_masks))}, which are not 0..K-1 "
                         f"({ranges([odd])} first in {first_masks[odd]}): repair them, or name them in "
                         f"classes.txt, {how}")
    return [Entry(f"class {value}" if value else "background", None, value) for value in counted]


# --- pixels of the classes --------------------------------------------------------------------------------
def codes_of(mask, table):
    """Return the colors of MaskFacts for a value table of colors, else the values; None without."""
    return mask.colors if len(table) == COLORS else mask.values


def class_pixels(masks, table, num_classes):
    """Return (N, K) pixel counts of every class in N masks, from their MaskFacts."""
    pixels = np.zeros((len(masks), num_classes), np.int64)
    for row, mask in zip(pixels, masks, strict=True):
        ids = table[codes_of(mask, table)]
        np.add.at(row, ids[ids != IGNORE], mask.counts[ids != IGNORE])
    return pixels


def ignored_share(masks, class_counts):
    """Return the share of all pixels that is ignored, from MaskFacts and what class_pixels() counted."""
    return 1 - class_counts.sum() / sum(mask.counts.sum() for mask in masks)


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
    """Return {code: the mode that it was, None = unclear} of blurred masks, {} where the modes are not clear.

    pixels: {value or color: pixels in all masks}; modes: the codes that the masks were drawn in, else those
    of find_modes. With two modes, everything is the nearer one; between more, a mixture of two may look like
    a third: what lies further than half of GAP from all is unclear.
    """
    codes, counts = np.array(list(pixels)), np.array(list(pixels.values()))
    modes = sorted(modes) or sorted(find_modes(codes, counts, colors))
    points, centers = rgb_of(codes, colors), rgb_of(modes, colors)  # (n, c), (k, c)
    apart = np.abs(centers[:, None] - centers[None]).max(2) + 256 * np.eye(len(modes), dtype=int)
    if not 2 <= len(modes) <= MOST_CLASSES or apart.min() < GAP:
        return {}
    distance = np.stack([np.abs(points - center).max(1) for center in centers], 1)  # (n, k)
    nearest, far = distance.argmin(1), distance.min(1) > GAP // 2
    if counts[far].sum() > BLURRED * counts.sum():
        return {}
    return {int(code): None if is_far and len(modes) > 2 else modes[mode]
            for code, is_far, mode in zip(codes, far, nearest, strict=True)}


def snap_note(pixels, colors, snapped):
    """Return the line on what snap() did to {value or color: pixels in all masks}."""
    total = sum(pixels.values())
    modes = sorted({mode for mode in snapped.values() if mode is not None})
    moved = sum(pixels[code] for code, mode in snapped.items() if mode not in (code, None))
    unclear = sum(pixels[code] for code, mode in snapped.items() if mode is None)
    names = ", ".join(str(unpack_color(mode) if colors else mode) for mode in modes)
    note = f"blurred masks (JPEG or resized): {100 * moved / total:.2f} % of the pixels snapped to {names}"
    return note + f", {100 * unclear / total:.2f} % lie between them and are ignored" * (unclear > 0)
