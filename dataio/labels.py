"""What the values or colors in masks mean: class lists as people have them, binary masks, blurred masks.

    entries, notes = known_classes(root)                    # [Entry] of the folder's classes.txt
    meaning = decode_masks(samples, facts, entries)         # meaning.classes, meaning.table; facts: MaskFacts

classes.txt (or another of class_file) names the classes, one per line: `name` (the line number is the mask
value), `name R G B` (masks painted in colors), `name = VALUE ...`, or a table with columns of these,
separated by commas, semicolons, colons or tabs, with or without a header. Lines of the same name are one
class; the name `ignore` is not counted.
"""
import csv
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from config import IGNORE, InputError
from dataio.classes import fill_colors
from dataio.readers import OUTSIDE, outside_message, pack_color, ranges, unpack_color, value_table

CLASS_FILES = ("classes.txt", "classes.csv", "class_dict.csv", "_classes.csv", "labelmap.txt")
MOST_CLASSES = 250
NAME_COLUMNS = {"name", "names", "class", "classes", "label", "labels", "category", "class_name"}
COLOR_COLUMNS = ({"r", "red"}, {"g", "green"}, {"b", "blue"})
VALUE_COLUMNS = {"id", "value", "index", "idx", "pixel value", "class_id", "label_id", "pixel", "train_id",
                 "trainid"}
UNUSED_VALUE = 1000  # and above: values for classes that are in no mask
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


# --- classes.txt ------------------------------------------------------------------------------------------
def known_classes(root, class_names=(), annotated=None):
    """Return ([Entry], notes) of the classes that somebody named, [] where nobody did.

    class_names: of --classes; annotated: [Entry] of the files that the masks were drawn from. Raises
    InputError where these contradict each other or the folder's class file cannot be read.
    """
    if annotated:
        return in_order(annotated, class_names) if class_names else annotated, []
    path = class_file(root)
    if path is None:
        check_names(class_names)
        return [Entry(name) for name in class_names], []
    entries = read_classes(path)
    if class_names:
        raise InputError(f"--classes has no effect, {path} names the classes: leave it out")
    if len(entries) > MOST_CLASSES:
        raise InputError(f"{path} has {len(entries)} lines; at most {MOST_CLASSES} are read")
    return entries, [f"the classes are those of {path}"] if path != root / "classes.txt" else []


def check_names(class_names):
    """Raise InputError where the names of --classes are too many, or a single one."""
    if class_names and not 2 <= len({*class_names} - {"ignore"}) <= len(class_names) <= MOST_CLASSES:
        raise InputError(f"--classes names {len(class_names)} classes; give two to {MOST_CLASSES}, in the "
                         "order of the mask values")


def in_order(entries, class_names):
    """Return `entries` in the order of the names of --classes. Raises InputError where a name is missing."""
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
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: write `name` or `name R G B` per line") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1)
                if line.strip() and not line.lstrip().startswith("#")]
    if path.suffix.lower() == ".csv" and numbered and numbered[0][1].strip().lower() in NAME_COLUMNS:
        numbered = numbered[1:]  # the title of the only column
    if path.name == "labelmap.txt":  # of CVAT: label:R,G,B:parts:actions
        numbered = [(number, re.sub(r":(\d+),(\d+),(\d+):.*", r" \1 \2 \3", line))
                    for number, line in numbered]
    entries = table_entries(path, [line for _, line in numbered])
    if not entries:
        for number, line in numbered:
            entries += line_entries(f"{path} line {number}", line)
    entries = [entry._replace(name="ignore") if entry.name.lower() == "ignore" else entry
               for entry in entries]
    check_entries(path, entries)
    return entries


def line_entries(where, line):
    """Return the [Entry] of a line of read_classes that is not a row of a table. Raises InputError."""
    words = line.replace("=", " = ").split()
    if "=" in words:
        words, texts = words[:words.index("=")], words[words.index("=") + 1:]
        values = [int(text) if text.isdecimal() else 65536 for text in texts]
        if not words or not values or max(values) > 65535:
            raise InputError(f"{where}: write `name = VALUE`, values are numbers 0..65535")
        return [Entry(" ".join(words), None, value) for value in values]
    if len(words) > 3 and numbers(words[-3:]):  # name R G B, maybe behind a value
        color, words = words[-3:], words[:-3]
    elif len(words) > 3 and numbers(words[:3]) and not numbers(words[3:4]):  # R G B name
        color, words = words[:3], words[3:]
    else:
        return [Entry(" ".join(words))]
    color, value = tuple(map(int, color)), None
    if len(words) > 1 and numbers(words[:1]) and not numbers(words[1:2]):
        value, words = int(words[0]), words[1:]
    if max(color) > 255:
        raise InputError(f"{where}: {color} is not a color: give three numbers 0..255")
    return [Entry(" ".join(words), color, value)]


def numbers(words):
    """Return whether all words are whole numbers."""
    return all(word.isdecimal() for word in words)


def table_entries(path, lines):
    """Return the [Entry] of lines that are a table with columns of names, values or colors, else [].

    A header tells which column is which; without one, three columns of numbers are a color, a single one is
    the value, and of four the first is. Raises InputError for two columns of values.
    """
    rows = table_rows(lines)
    titles = [cell.lower() for cell in rows[0]] if rows else []
    titled = bool(NAME_COLUMNS & set(titles)) and not any(title.isdecimal() for title in titles)
    rows = rows[1:] if titled else rows
    if not rows:
        return []
    numeric = [column for column, cells in enumerate(zip(*rows, strict=True)) if numbers(cells)]
    texts = [column for column in range(len(titles)) if column not in numeric]
    if titled:
        texts.sort(key=lambda column: titles[column] not in NAME_COLUMNS)
        color = []
        for channel in COLOR_COLUMNS:
            color += [column for column in numeric if titles[column] in channel][:1]
        color = color if len(color) == 3 else []
        values = [column for column in numeric if column not in color and titles[column] in VALUE_COLUMNS]
    else:
        color = numeric[-3:] if len(numeric) in (3, 4) else []
        values = [column for column in numeric if column not in color]
    if not texts or not titled and (len(texts) > 1 or not numeric):
        return []
    if len(values) > 1:
        columns = " and ".join(titles[column] if titled else str(column + 1) for column in values)
        raise InputError(f"{path} has several columns of numbers ({columns}): leave the one that the masks "
                         "hold")
    entries = []
    for row in rows:
        rgb = tuple(min(int(row[column]), 256) for column in color)
        entries.append(Entry(row[texts[0]], rgb or None, min(int(row[values[0]]), 65536) if values else None))
    return entries


def table_rows(lines):
    """Return the cells of lines that are a table: all with the same number of them, two or more; else []."""
    lines = [re.sub(r"\b(\d+)\.0+\b", r"\1", line) for line in lines if line.strip(" ,;:\t")]
    if all(re.match(r"\s*\d+[.)]?\s+[^\d\s=]", line) and not numbers(line.split()[-3:]) for line in lines):
        lines = [re.sub(r"^\s*(\d+)[.)]?\s+", r"\1\t", line) for line in lines]  # `3 road`, `3. road`
    for mark in ",;\t:":
        try:
            rows = [list(map(str.strip, row)) for row in csv.reader(lines, delimiter=mark)]
        except csv.Error:
            return []
        if len({len(row) for row in rows}) == 1 and len(rows[0]) > 1:
            return rows
    return []


def check_entries(path, entries):
    """Raise InputError where the lines of classes.txt contradict each other or cannot be."""
    for entry in entries:
        if not entry.name or max(entry.color or (0,)) > 255 or (entry.value or 0) > 65535:
            name = entry.name or "a class without a name"
            raise InputError(f"{path}: {name} needs a name, a color of 0..255 or a value of 0..65535")
    for kind, index in (("color", 1), ("value", 2)):
        used = Counter(entry[index] for entry in entries if entry[index] is not None)
        if used and max(used.values()) > 1:
            twice = used.most_common(1)[0][0]
            raise InputError(f"{path} has the {kind} {twice} twice; each {kind} means one class")
    if len({entry.value is None for entry in entries}) > 1:
        raise InputError(f"{path} gives values (`name = VALUE`) on some lines only: give them on all or none")
    count = len({entry.name for entry in entries} - {"ignore"})
    if not 2 <= count <= MOST_CLASSES:
        raise InputError(f"{path} names {count} class{'es' * (count != 1)}; it needs two to {MOST_CLASSES}, "
                         "one per line")


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
        snapped = snap(pixels, colors, [code for code in named if code is not None])
        if not snapped:
            raise InputError(f"{samples[0].mask} and others are JPEG files, which blur classes into one "
                             "another, too far to tell them apart here: export masks as PNG")
        notes = [snap_note(pixels, colors, snapped)]
        first_masks = {code: path for code, path in first_masks.items() if snapped[code] == code}
    meaning = named_colors(entries) if colors else named_values(first_masks, entries)
    for code, mode in snapped.items():
        meaning.table[code] = IGNORE if mode is None else meaning.table[mode]
    for sample, mask in zip(samples, masks, strict=True):
        codes = codes_of(mask, meaning.table)
        wrong = meaning.table[codes] == OUTSIDE
        if wrong.any():
            raise InputError(outside_message(sample.mask, codes[wrong], mask.counts[wrong], meaning.table,
                                             meaning.classes))
    return meaning._replace(notes=meaning.notes + notes)


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
    first_masks, pixels = {}, {}
    for sample, mask in zip(samples, masks, strict=True):
        codes = mask.colors if colors else mask.values
        if codes is None and colors:
            raise InputError(f"{sample.mask} has no colors, and other masks are painted")
        if codes is None:
            raise InputError(f"{sample.mask} is painted in colors: list them in classes.txt, one "
                             "`name R G B` per line")
        for code, count in zip(codes.tolist(), mask.counts.tolist(), strict=True):
            first_masks.setdefault(code, sample.mask)
            pixels[code] = pixels.get(code, 0) + count
    return first_masks, pixels


def class_list(entries):
    """Return [(name, (R, G, B))] of [Entry], the first color of a name counts, and {name: class id}."""
    colors = {}
    for entry in entries:
        if entry.name != "ignore":
            colors[entry.name] = colors.get(entry.name) or entry.color
    ids = {name: id for id, name in enumerate(colors)} | {"ignore": IGNORE}
    return fill_colors(list(colors.items())), ids


def named_colors(entries):
    """Return the MaskMeaning of masks that are painted in the colors of [Entry]."""
    classes, ids = class_list(entries)
    codes = {pack_color(*entry.color): ids[entry.name] for entry in entries}
    return MaskMeaning(classes, value_table(codes, size=1 << 24), [])


def named_values(first_masks, entries):
    """Return the MaskMeaning of {mask value: first mask that has it}; 255 is ignored unless it is named.

    Entries without values name the lines 0, 1, ..., or black and white. Raises InputError for values that
    nobody named and that are not 0..K-1.
    """
    values, notes = sorted(first_masks), []
    if entries and entries[0].value is not None:
        pass
    elif is_binary(values, entries):
        first, second = entries or [Entry("background"), Entry("foreground")]
        entries = [first._replace(value=0), second._replace(value=values[-1])]
        notes = [f"masks hold 0 and {values[-1]}: read as 0 = {first.name}, 1 = {second.name}"]
    elif entries:
        entries = [entry._replace(value=line) for line, entry in enumerate(entries)]
    else:
        entries = unnamed_entries(values, first_masks)
        notes = [f"no classes.txt: the masks hold {len(entries)} classes"]
    classes, ids = class_list(entries)
    table = {IGNORE: IGNORE, **{entry.value: ids[entry.name] for entry in entries}}
    return MaskMeaning(classes, value_table(table), notes)


def is_binary(values, entries):
    """Return whether sorted mask values are 0 and 255 (or 65535), which is the second class and not void."""
    names = [entry.name for entry in entries]
    if values[0] != 0 or values[-1] not in (255, 65535) or 1 in values:
        return False
    return len({*names} - {"ignore"}) == len(names) == 2 if names else len(values) == 2


def unnamed_entries(values, first_masks):
    """Return the [Entry] of mask values 0..K-1 and 255. Raises InputError for others."""
    counted = [value for value in values if value != IGNORE]
    if counted != list(range(len(counted))) or not 2 <= len(counted) <= MOST_CLASSES:
        odd = next((value for id, value in enumerate(counted) if value != id), values[0])
        raise InputError(f"the masks hold the values {ranges(values)}, which are not 0..K-1 ({odd} first in "
                         f"{first_masks[odd]}): repair them, or name them in classes.txt, one name per line")
    return [Entry(f"class {value}" if value else "background", None, value) for value in counted]


# --- pixels of the classes --------------------------------------------------------------------------------
def codes_of(mask, table):
    """Return the colors of MaskFacts for a value table of colors, else the values; None without."""
    return mask.colors if len(table) > 65536 else mask.values


def class_pixels(masks, table, num_classes):
    """Return (N, K) pixel counts of every class in N masks, from their MaskFacts."""
    pixels = np.zeros((len(masks), num_classes), np.int64)
    for row, mask in zip(pixels, masks, strict=True):
        ids = table[codes_of(mask, table)]
        np.add.at(row, ids[ids != IGNORE], mask.counts[ids != IGNORE])
    return pixels


def ignored_share(masks, table):
    """Return the share of all pixels that a value table ignores, from the MaskFacts of the masks."""
    ignored = sum(mask.counts[table[codes_of(mask, table)] == IGNORE].sum() for mask in masks)
    return ignored / max(1, sum(mask.counts.sum() for mask in masks))


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
