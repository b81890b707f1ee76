"""A folder of the user's own as a data set: finds the layout, the classes and a validation part.

    python train.py --dataset folder --data-root my_photos      # images/ + masks/, or any layout below

classes.txt in the folder names the classes, one a line in the order of the mask values, as `name` or
`name R G B`; the name `ignore` is not counted. Without it, --classes or the masks decide; the run says so.
"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from config import IGNORE, InputError, spare_colour
from readers import (OUTSIDE, DataSource, index_table, open_image, outside_message, pack_colour, pair_files,
                     ranges, read_mask_values, value_table)
from stratify import share_table, split_samples

# (images, masks) of one split, tried in this order; names match in any case, `|` separates spellings.
LAYOUTS = [
    ("{split}_images|{split}_imgs", "{split}_labels|{split}_masks"),
    ("{split}/images|{split}/imgs|{split}/img", "{split}/masks|{split}/labels|{split}/annotations"),
    ("images/{split}|imgs/{split}|img/{split}", "masks/{split}|labels/{split}|annotations/{split}"),
]
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
UNSPLIT = ("images|imgs|img|JPEGImages", "masks|labels|annotations|SegmentationClass")
MOST_CLASSES = 250


def folder(root, val_fraction=0.2, class_names=()):
    """Return the DataSource of a folder in any of LAYOUTS; every mask is read. Raises InputError."""
    splits = {split: pair_files(*pair) for split, pair in find_layout(root).items()}
    samples = [sample for part in splits.values() for sample in part]
    listed = read_classes(root / "classes.txt") if (root / "classes.txt").is_file() else []
    if listed and class_names:
        raise InputError(f"--classes has no effect, {root / 'classes.txt'} names the classes: leave it out")
    colours = bool(listed) and all(colour for _, colour in listed) and any(
        is_painted(sample.mask, listed) for sample in samples)
    scans, different = scan_masks(samples, colours)
    found = {}  # every value, and the first mask that has it
    for sample, (values, _) in zip(samples, scans, strict=True):
        for value in values.tolist():
            found.setdefault(value, sample.mask)
    classes, table, notes = decide_classes(found, listed or [(name, None) for name in class_names], colours)
    for sample, (values, counts) in zip(samples, scans, strict=True):
        wrong = table[values] == OUTSIDE
        if wrong.any():
            raise InputError(outside_message(sample.mask, np.repeat(values[wrong], counts[wrong]), table))
    if different:
        notes.append(f"{different} of {len(samples)} masks differ in size from their image: resized "
                     "(nearest) to it")
    if "val" not in splits:
        pixels = class_pixels(scans, table, len(classes))
        splits = split_samples(samples, pixels, val_fraction)
        notes.append(f"no validation folder: {len(splits['val'])} of {len(samples)} images validate "
                     "(stratified)")
        notes += share_table(dict(zip(samples, pixels, strict=True)), splits, classes)
    return DataSource("folder", classes, splits, table, notes)


# --- layout -----------------------------------------------------------------------------------------------
def find_folder(root, spellings, split=""):
    """Return the first folder below `root` that matches one of `a|b|c` in any case, or None."""
    for spelling in spellings.format(split=split).split("|"):
        place = root
        for part in spelling.split("/"):
            children = sorted(place.iterdir()) if place and place.is_dir() else []
            place = next((child for child in children if child.name.lower() == part.lower()), None)
        if place and place.is_dir():
            return place
    return None


def find_layout(root):
    """Return {"train": (image folder, mask folder), "val": ...}; "val" only where there is one.

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
    """Read classes.txt. Return [(name, (R, G, B) or None), ...] by mask value. Raises InputError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: write `name` or `name R G B`, a class a line") from None
    classes = []
    for number, words in enumerate(map(str.split, lines), 1):
        if words and words[0].startswith("#"):
            continue
        colour = None
        if len(words) > 3 and all(word.isdecimal() for word in words[-3:]):
            *words, red, green, blue = words
            colour = int(red), int(green), int(blue)
            if max(colour) > 255:
                raise InputError(f"{path} line {number}: {colour} is no colour, three numbers 0..255 are")
        if words:
            name = " ".join(words)
            classes.append(("ignore" if name.lower() == "ignore" else name, colour))
    for kind, used in (("name", [name for name, _ in classes if name != "ignore"]),
                       ("colour", [colour for _, colour in classes if colour])):
        twice = [item for item in used if used.count(item) > 1]
        if twice:
            raise InputError(f"{path} has the {kind} {twice[0]} twice; every class needs its own")
    if len(classes) > MOST_CLASSES or sum(name != "ignore" for name, _ in classes) < 2:
        raise InputError(f"{path} names {len(classes)} classes; it needs two to {MOST_CLASSES}, one a line")
    return classes


def is_painted(path, listed):
    """Return whether a mask is painted in the `listed` colours [(name, (R, G, B))] rather than an index mask.

    RGB masks are, unless they are grey in values that are not listed. Palette masks are where their colours
    are listed, but stand for other entries of the list than their indices do.
    """
    with open_image(path) as mask:
        mode = mask.mode
    if mode not in ("RGB", "RGBA", "P"):
        return False
    codes = [pack_colour(*colour) for _, colour in listed]
    painted = read_mask_values(path, colours=True)
    all_listed = np.isin(painted, codes).all()
    if mode == "P":
        by_index = np.array([*codes, *[-1] * (256 - len(codes))])[read_mask_values(path)]
        return all_listed and bool((by_index != painted).any())
    grey = (painted >> 16 == painted & 255) & (painted >> 8 & 255 == painted & 255)
    return bool(all_listed or not grey.all())


def scan_masks(samples, colours):
    """Read every mask once. Return [(values, counts), ...] and how many differ in size from their image."""
    def scan(sample):
        values = read_mask_values(sample.mask, colours)
        with open_image(sample.image) as image:
            differs = values.shape not in (image.size, image.size[::-1])
        return *np.unique(values, return_counts=True), differs

    with ThreadPoolExecutor() as pool:
        bar = tqdm(pool.map(scan, samples), "reading masks", len(samples), leave=False, disable=None)
        rows = list(bar)
    return [(values, counts) for values, counts, _ in rows], sum(differs for *_, differs in rows)


def decide_classes(found, named, colours):
    """Decide the classes of a folder: `found` = {mask value: first mask with it}, `named` = [(name, colour)].

    Returns (classes, value table, notes). Raises InputError where values and names make no sense together.
    """
    kept, ids = [item for item in named if item[0] != "ignore"], class_ids(named)
    if named and len(kept) < 2:
        raise InputError("--classes needs at least two names, in the order of the mask values")
    if colours:
        codes = [pack_colour(*colour) for _, colour in named]
        return with_colours(kept), value_table(dict(zip(codes, ids, strict=True)), size=1 << 24), []
    by_index = {IGNORE: IGNORE, **dict(enumerate(ids))}
    # 0 and 255 (or 65535) with two classes and no `ignore`: a binary mask, in which 255 is the second class
    values = sorted(found)
    binary = values[0] == 0 and values[-1] in (255, 65535) and 1 not in found and len(kept) == len(named)
    if binary and (len(kept) == 2 or (not named and len(values) == 2)):
        white = values[-1]
        kept = kept or [("background", None), ("foreground", None)]
        table = value_table({IGNORE: IGNORE, 0: 0, white: 1})
        note = f"masks hold 0 and {white}: read as 0 = {kept[0][0]}, 1 = {kept[1][0]}"
        return with_colours(kept), table, [note]
    if named:
        return with_colours(kept), value_table(by_index), []
    counted = [value for value in values if value != IGNORE]
    if counted != list(range(len(counted))) or not 2 <= len(counted) <= MOST_CLASSES:
        odd = next((value for id, value in enumerate(counted) if value != id), values[0])
        raise InputError(f"the masks hold the values {ranges(values)}, which are not 0..K-1 ({odd} first in "
                         f"{found[odd]}): repair them, or say what they mean in classes.txt, a name a line")
    named = [(f"class {value}", None) for value in counted]
    note = f"no classes.txt: the masks hold {len(counted)} classes"
    return with_colours(named), index_table(len(named)), [note]


def with_colours(classes):
    """Return [(name, (R, G, B)), ...], colours made up where they are None."""
    return [(name, colour or spare_colour(id)) for id, (name, colour) in enumerate(classes)]


def class_ids(named):
    """Return the class id of every entry of `named`, IGNORE for those called `ignore`."""
    ids = iter(range(len(named)))
    return [IGNORE if name == "ignore" else next(ids) for name, _ in named]


def class_pixels(scans, table, num_classes):
    """Return (N, K) pixel counts of every class in every mask, from the scans of scan_masks."""
    pixels = np.zeros((len(scans), num_classes), np.int64)
    for row, (values, counts) in zip(pixels, scans, strict=True):
        ids = table[values]
        np.add.at(row, ids[ids != IGNORE], counts[ids != IGNORE])
    return pixels
