"""A folder of the user's own as a data set: finds the layout, the classes and a validation part.

    python train.py --dataset folder --data-root my_photos      # images/ + masks/, or any layout

dataio/layout.py tells which layouts are known, dataio/labels.py how classes are named and masks are read.
"""
from shlex import quote

import numpy as np

from config import DataOptions, InputError, count_of
from dataio.annotations import find_masks
from dataio.labels import class_pixels, decode_masks, ignored_share, known_classes
from dataio.layout import refuse_unpaired
from dataio.images import read_orientation
from dataio.readers import DataSource
from dataio.scan import fits, scan_mask
from dataio.stratify import share_table, split_samples
from utils import all_in_parallel

MUCH_IGNORED = 0.1  # share of the pixels above which ignoring is likely to be a mistake


def folder(root, options, download=False):
    """Return the DataSource of a folder in any layout of dataio/layout.py; every mask is read once.

    options: config.DataOptions, of which val_fraction (0: no validation part is drawn), fold,
    classes (names) and unlabelled count. Raises InputError.
    """
    check_root(root)
    content = find_masks(root)
    refuse_unpaired(content.images_without_mask, "mask")
    refuse_unpaired(content.masks_without_image, "image")
    samples = content.samples
    facts = all_in_parallel(scan_pair, samples, "reading masks")
    masks = [mask for mask, _ in facts]
    if options.unlabelled == "ignore":
        ignore_unlabelled(content, root)
    entries, class_notes = known_classes(root, options.classes, content.entries)
    more = f"; python check_data.py --data-root {quote(str(root))} says more"
    try:
        meaning = decode_masks(samples, masks, entries)
    except InputError as error:
        raise InputError(f"{error}{more}") from None
    notes = [*content.notes, *(f"warning: {doubt}" for doubt in content.doubts), *meaning.notes, *class_notes]
    different = sum(differs for _, differs in facts)
    if different:
        notes.append(f"{different} of {count_of(len(samples), 'mask')} differ in size from their image: "
                     "resized (nearest) to it")
    rows = class_pixels(masks, meaning.table, len(meaning.classes))
    ignored = ignored_share(masks, rows)
    notes.append(f"{100 * ignored:.1f} % of the pixels are ignored{more if ignored > MUCH_IGNORED else ''}")
    pixels = dict(zip(samples, rows, strict=True))
    notes += add_validation(content.splits, pixels, meaning.classes, options, root)
    return DataSource("folder", meaning.classes, content.splits, meaning.table, notes,
                      annotated=bool(content.entries))


def add_validation(splits, pixels, classes, options, root):
    """Split the training Samples of {split: [Sample]} where there is no validation part; return notes.

    pixels: {sample: (K,) pixels of each class}. Raises InputError for a --fold that has no effect.
    """
    if "val" in splits:
        has_validation = f"{root} has a validation part: add --resplit to split all images anew"
        if options.fold and not options.resplit:
            raise InputError(f"--fold has no effect, {has_validation}")
        if options.resplit or options.val_fraction in (0, DataOptions.val_fraction):
            return []
        return [f"warning: --val-fraction has no effect, {has_validation}"]
    train = splits["train"]
    if not options.val_fraction or not train:
        return []
    counts = np.stack([pixels[sample] for sample in train])
    drawn, method = split_samples(train, counts, options.val_fraction, options.fold)
    splits.update(drawn)
    return [f"no validation part: {len(drawn['val'])} of {len(train)} images validate, {method}",
            *share_table(pixels, drawn, classes)]


def ignore_unlabelled(content, root):
    """Make a FolderContent ignore what has no label, or add a doubt. Raises InputError."""
    if not content.entries:
        content.doubts.append("--unlabelled ignore has no effect: masks have a value everywhere")
        return
    content.entries = [entry._replace(name="ignore") if entry.value == 0 else entry
                       for entry in content.entries]
    if len({entry.name for entry in content.entries} - {"ignore"}) < 2:
        raise InputError(f"--unlabelled ignore leaves a single class of {root}: leave it out")


def check_root(root):
    """Raise InputError where --data-root is not a folder."""
    refuse_file(root)
    if not root.is_dir():
        raise InputError(f"--data-root {root} does not exist: give the folder that holds the data set")


def refuse_file(root):
    """Raise InputError where --data-root is a file."""
    if root.is_file():
        raise InputError(f"--data-root {root} is a file: give the folder that holds the data set (unpack "
                         "archives)")


def scan_pair(sample):
    """Return (MaskFacts of the mask, whether its size differs from the image's). Raises InputError."""
    mask = scan_mask(sample.mask)
    return mask, not fits(mask.size, *read_orientation(sample.image))
