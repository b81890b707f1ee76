"""A folder of the user's own as a data set: finds the layout, the classes and a validation part.

    python train.py --dataset folder --data-root my_photos      # images/ + masks/, or any layout below

classes.txt in the folder names the classes, one per line: `name` (the line number is the mask value), `name R
G B` (masks painted in colors) or `name = VALUE ...`. Lines of the same name are one class; the name
`ignore` is not counted. Without classes.txt, --classes or the masks decide; the run says so.
"""
from typing import NamedTuple

import numpy as np

from config import IGNORE, InputError
from dataio.classes import spare_color
from dataio.readers import (OUTSIDE, DataSource, index_table, outside_message, pack_color, pair_files, ranges,
                     read_orientation, value_table)
from dataio.scan import fits, in_parallel, scan_mask
from dataio.stratify import share_table, split_samples

# (images, masks) of one split, tried in this order; names match in any case, `|` separates spellings.
LAYOUTS = [
    ("{split}_images|{split}_imgs", "{split}_labels|{split}_masks"),
    ("{split}/images|{split}/imgs|{split}/img", "{split}/masks|{split}/labels|{split}/annotations"),
    ("images/{split}|imgs/{split}|img/{split}", "masks/{split}|labels/{split}|annotations/{split}"),
]
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"),
               "test": ("test", "testing")}
UNSPLIT = ("images|imgs|img|JPEGImages", "masks|labels|annotations|SegmentationClass")
MOST_CLASSES = 250


class Entry(NamedTuple):
    """One line of classes.txt: a class or `ignore`, and the color or the mask value that stands for it."""

    name: str
    color: tuple = None
    value: int = None


def folder(root, options, download=False):
    """Return the DataSource of a folder in any of LAYOUTS; every mask is read once. Raises InputError.

    options: config.DataOptions, of which val_fraction and classes (names) count.
    """
    check_root(root)
    splits = {split: pair_files(*pair) for split, pair in find_layout(root).items()}
    samples = [sample for part in splits.values() for sample in part]
    facts = in_parallel(scan_pair, samples, "reading masks")
    damaged = next((error for error in facts if isinstance(error, InputError)), None)
    if damaged:
        raise damaged
    masks = [mask for mask, _ in facts]
    classes, table, notes = decode_masks(root, samples, masks, options.classes)
    different = sum(differs for _, differs in facts)
    if different:
        notes.append(f"{different} of {len(samples)} masks differ in size from their image: resized "
                     "(nearest) to it")
    if "val" not in splits:
        train = splits["train"]
        facts = dict(zip(samples, masks, strict=True))
        scans = [(stored(facts[sample], table), facts[sample].counts) for sample in train]
        pixels = class_pixels(scans, table, len(classes))
        parts = split_samples(train, pixels, options.val_fraction)
        notes.append(
            f"no validation folder: {len(parts['val'])} of {len(train)} images validate (stratified)"
        )
        notes += share_table(dict(zip(train, pixels, strict=True)), parts, classes)
        splits.update(parts)
    return DataSource("folder", classes, splits, table, notes)


def check_root(root):
    """Raise InputError where --data-root does not exist."""
    if not root.is_dir():
        raise InputError(f"--data-root {root} does not exist: give the folder that holds the data set")


def scan_pair(sample):
    """Return (MaskFacts of the mask, whether its size differs from the image's). Raises InputError."""
    mask = scan_mask(sample.mask)
    return mask, not fits(mask.size, *read_orientation(sample.image))


def stored(mask, table):
    """Return what a value table decodes of a mask's facts: its colors for a table of colors, else its
    values.
    """
    return mask.colors if len(table) > 65536 else mask.values


def decode_masks(root, samples, masks, class_names=()):
    """Decide what the masks of a folder mean: return (classes, value table, notes).

    masks: the MaskFacts of every sample. Raises InputError that names the first mask that does not fit.
    """
    listed = read_classes(root / "classes.txt") if (root / "classes.txt").is_file() else []
    if listed and class_names:
        raise InputError(f"--classes has no effect, {root / 'classes.txt'} names the classes: leave it out")
    colors = bool(listed) and all(entry.color for entry in listed) and any(
        is_painted(mask, listed) for mask in masks)
    found = {}  # every value or color, and the first mask that has it
    for sample, mask in zip(samples, masks, strict=True):
        values = mask.colors if colors else mask.values
        if values is None:
            reason = "has no colors, and other masks are painted" if colors else \
                "is painted in colors: list them in classes.txt, one `name R G B` per line"
            raise InputError(f"{sample.mask} {reason}")
        for value in values.tolist():
            found.setdefault(value, sample.mask)
    entries = listed or [Entry(name) for name in class_names]
    classes, table, notes = decide_classes(found, entries, colors)
    for sample, mask in zip(samples, masks, strict=True):
        values = stored(mask, table)
        wrong = table[values] == OUTSIDE
        if wrong.any():
            raise InputError(outside_message(sample.mask, values[wrong], mask.counts[wrong], table, classes))
    return classes, table, notes


# --- layout -----------------------------------------------------------------------------------------------
def find_folder(root, spellings, split=""):
    """Return the first folder below `root` that matches one of `a|b|c` in any case, or None."""
    for spelling in spellings.format(split=split).split("|"):
        found = root
        for part in spelling.split("/"):
            children = sorted(found.iterdir()) if found and found.is_dir() else []
            found = next((child for child in children if child.name.lower() == part.lower()), None)
        if found and found.is_dir():
            return found
    return None


def find_layout(root):
    """Return {"train": (image folder, mask folder), "val": ..., "test": ...}; those that are there.

    Raises InputError that lists the layouts where none fits.
    """
    for images, masks in LAYOUTS:
        found = {}
        for split, names in SPLIT_NAMES.items():
            pairs = [(find_folder(root, images, name), find_folder(root, masks, name)) for name in names]
            found.update((split, pair) for pair in pairs if all(pair))
        if "train" in found:
            return found
    pair = find_folder(root, UNSPLIT[0]), find_folder(root, UNSPLIT[1])
    if all(pair):
        return {"train": pair}
    raise InputError(f"no images and masks found under {root}: it needs images/ and masks/, or train/images "
                     "train/masks val/images val/masks, or images/train masks/train images/val masks/val, or "
                     "train_images train_labels valid_images valid_labels")


# --- classes ----------------------------------------------------------------------------------------------
def read_classes(path):
    """Read classes.txt: return its lines as [Entry], a line with several values as several. Raises
    InputError.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: write `name` or `name R G B` per line") from None
    entries = []
    for number, words in enumerate((line.replace("=", " = ").split() for line in lines), 1):
        if not words or words[0].startswith("#"):
            continue
        color, values = None, [None]
        if "=" in words:
            words, texts = words[:words.index("=")], words[words.index("=") + 1:]
            values = [int(text) if text.isdecimal() else 65536 for text in texts]
            if not words or not values or max(values) > 65535:
                raise InputError(f"{path} line {number}: write `name = VALUE`, values are numbers 0..65535")
        elif len(words) > 3 and all(word.isdecimal() for word in words[-3:]):
            *words, red, green, blue = words
            color = int(red), int(green), int(blue)
            if max(color) > 255:
                raise InputError(f"{path} line {number}: {color} is not a color: give three numbers 0..255")
        name = "ignore" if " ".join(words).lower() == "ignore" else " ".join(words)
        entries += [Entry(name, color, value) for value in values]
    check_entries(path, entries)
    return entries


def check_entries(path, entries):
    """Raise InputError where the lines of classes.txt contradict each other."""
    for kind, used in (("color", [entry.color for entry in entries if entry.color]),
                       ("value", [entry.value for entry in entries if entry.value is not None])):
        twice = [item for item in used if used.count(item) > 1]
        if twice:
            raise InputError(f"{path} has the {kind} {twice[0]} twice; one {kind} means one class")
    if len({entry.value is None for entry in entries}) > 1:
        raise InputError(f"{path} gives values (`name = VALUE`) on some lines only: give them on all or none")
    count = len({entry.name for entry in entries} - {"ignore"})
    if not 2 <= count <= MOST_CLASSES:
        raise InputError(f"{path} names {count} classes; it needs two to {MOST_CLASSES}, one per line")


def is_painted(mask, listed):
    """Return whether a mask (its MaskFacts) is painted in the `listed` colors rather than an index mask.

    RGB masks are, unless they are gray in values that are not listed. Palette masks are where their colors
    are listed, but stand for other entries of the list than their indices do.
    """
    if mask.mode not in ("RGB", "RGBA", "CMYK", "YCbCr", "P", "PA"):
        return False
    codes = [pack_color(*entry.color) for entry in listed]
    all_listed = bool(np.isin(mask.colors, codes).all())
    if mask.mode == "P":
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
        return with_colors(kept), value_table(codes, size=1 << 24), []
    if entries and entries[0].value is not None:
        table = {IGNORE: IGNORE, **{entry.value: ids[entry.name] for entry in entries}}
        return with_colors(kept), value_table(table), []
    by_index = {IGNORE: IGNORE, **{line: ids[entry.name] for line, entry in enumerate(entries)}}
    # 0 and 255 (or 65535) with two classes and no `ignore`: a binary mask, in which 255 is the second class
    values = sorted(found)
    binary = values[0] == 0 and values[-1] in (255, 65535) and 1 not in found and len(kept) == len(entries)
    if binary and (len(kept) == 2 or (not entries and len(values) == 2)):
        white = values[-1]
        kept = kept or [("background", None), ("foreground", None)]
        table = value_table({IGNORE: IGNORE, 0: 0, white: 1})
        note = f"masks hold 0 and {white}: read as 0 = {kept[0][0]}, 1 = {kept[1][0]}"
        return with_colors(kept), table, [note]
    if entries:
        return with_colors(kept), value_table(by_index), []
    counted = [value for value in values if value != IGNORE]
    if counted != list(range(len(counted))) or not 2 <= len(counted) <= MOST_CLASSES:
        odd = next((value for id, value in enumerate(counted) if value != id), values[0])
        raise InputError(f"the masks hold the values {ranges(values)}, which are not 0..K-1 ({odd} first in "
                         f"{found[odd]}): repair them, or name them in classes.txt, one name per line")
    named = [(f"class {value}", None) for value in counted]
    note = f"no classes.txt: the masks hold {len(counted)} classes"
    return with_colors(named), index_table(len(named)), [note]


def with_colors(classes):
    """Return [(name, (R, G, B)), ...], colors made up where they are None."""
    return [(name, color or spare_color(id)) for id, (name, color) in enumerate(classes)]


def class_pixels(scans, table, num_classes):
    """Return (N, K) pixel counts of every class in every mask, from (values or colors, counts) of each."""
    pixels = np.zeros((len(scans), num_classes), np.int64)
    for row, (values, counts) in zip(pixels, scans, strict=True):
        ids = table[values]
        np.add.at(row, ids[ids != IGNORE], counts[ids != IGNORE])
    return pixels
