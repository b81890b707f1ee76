"""A folder of the user's own as a data set: finds the layout, the classes and a validation part.

    python train.py --dataset folder --data-root my_photos      # images/ + masks/, or any layout

dataio/layout.py says which layouts are known, dataio/labels.py how classes are named and masks are read.
"""
import numpy as np

from config import IGNORE, DataOptions, InputError, count_of
from dataio.annotations import find_masks
from dataio.labels import class_pixels, decode_masks, in_order, says, stored
from dataio.pairs import refuse_lonely
from dataio.readers import DataSource, read_orientation
from dataio.scan import fits, in_parallel, scan_mask
from dataio.stratify import share_table, split_samples

MUCH_IGNORED = 0.1  # share of the pixels above which ignoring is likely to be a mistake


def folder(root, options, download=False):
    """Return the DataSource of a folder in any layout of dataio/layout.py; every mask is read once.

    options: config.DataOptions, of which val_fraction (0: no validation part is drawn), fold,
    classes (names) and unlabelled count. Raises InputError.
    """
    check_root(root)
    found = find_masks(root)
    for split in {**found.no_mask, **found.no_image}:
        refuse_lonely(found.no_mask.get(split, []), found.no_image.get(split, []))
    splits = found.splits
    samples = list(dict.fromkeys(sample for part in splits.values() for sample in part))
    facts = in_parallel(scan_pair, samples, "reading masks")
    damaged = next((error for error in facts if isinstance(error, InputError)), None)
    if damaged:
        raise damaged
    masks = [mask for mask, _ in facts]
    entries, names = found.entries, options.classes
    if options.unlabelled == "ignore":
        entries = ignore_unlabelled(found, root)
    if entries and names:
        entries, names = in_order(entries, names), ()
    classes, table, notes = decode_masks(root, samples, masks, names, entries)
    different = sum(differs for _, differs in facts)
    if different:
        notes.append(f"{different} of {count_of(len(samples), 'mask')} differ in size from their image: "
                     "resized (nearest) to it")
    scans = [(stored(mask, table), mask.counts) for mask in masks]
    pixels = dict(zip(samples, class_pixels(scans, table, len(classes)), strict=True))
    ignored = ignored_share(scans, table)
    more = says(root) if ignored > MUCH_IGNORED else ""
    notes.append(f"{100 * ignored:.1f} % of the pixels are ignored{more}")
    if "val" in splits and options.fold and not options.resplit:
        raise InputError(f"--fold has no effect, {root} has a validation part: add --resplit to split all "
                         "images anew")
    if "val" in splits and not options.resplit and options.val_fraction not in (0, DataOptions.val_fraction):
        notes.append(f"warning: --val-fraction has no effect, {root} has a validation part: add --resplit to "
                     "split all images anew")
    if "val" not in splits and options.val_fraction and splits["train"]:
        train = splits["train"]
        counts = np.stack([pixels[sample] for sample in train])
        parts, said = split_samples(train, counts, options.val_fraction, options.fold)
        notes.append(f"no validation part: {len(parts['val'])} of {len(train)} images validate, {said}")
        notes += share_table(pixels, parts, classes)
        splits.update(parts)
    notes = [*found.notes, *(f"warning: {doubt}" for doubt in found.doubts), *notes]
    return DataSource("folder", classes, splits, table, notes, annotated=bool(found.entries))


def ignore_unlabelled(found, root):
    """Return the [Entry] of what was Found with what has no label ignored. Raises InputError; a doubt of
    `found` says where that means nothing.
    """
    if not found.entries:
        found.doubts.append("--unlabelled ignore has no effect: masks have a value everywhere")
        return found.entries
    entries = [entry._replace(name="ignore") if entry.value == 0 else entry for entry in found.entries]
    if len({entry.name for entry in entries} - {"ignore"}) < 2:
        raise InputError(f"--unlabelled ignore leaves a single class of {root}: leave it out")
    return entries


def ignored_share(scans, table):
    """Return the share of all pixels that a value table ignores; scans: (values or colors, counts) of each
    mask.
    """
    ignored = sum(counts[table[values] == IGNORE].sum() for values, counts in scans)
    return ignored / max(1, sum(counts.sum() for _, counts in scans))


def refuse_file(root):
    """Raise InputError where --data-root is a file."""
    if root.is_file():
        raise InputError(f"--data-root {root} is a file: give the folder that holds the data set (unpack "
                         "archives)")


def check_root(root):
    """Raise InputError where --data-root is no folder."""
    refuse_file(root)
    if not root.is_dir():
        raise InputError(f"--data-root {root} does not exist: give the folder that holds the data set")


def scan_pair(sample):
    """Return (MaskFacts of the mask, whether its size differs from the image's). Raises InputError."""
    mask = scan_mask(sample.mask)
    return mask, not fits(mask.size, *read_orientation(sample.image))
