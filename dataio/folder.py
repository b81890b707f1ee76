"""A folder of the user's own as a data set: finds the layout, the classes and a validation part.

    python train.py --dataset folder --data-root my_photos      # images/ + masks/, or any layout

dataio/layout.py tells which layouts are known, dataio/labels.py how classes are named and masks are read.
"""
from shlex import quote

import numpy as np

from config import DataOptions, InputError, count_of
from dataio.annotations.tools import find_masks
from dataio.annotations.importer import describe_bad, report
from dataio.labels import class_pixels, decode_masks, ignored_share, known_classes
from dataio.layout import refuse_unpaired
from dataio.images import read_orientation, upright_size
from dataio.readers import DataSource
from dataio.scan import fits, scan_mask
from dataio.shards import is_listed, training_folder
from dataio.stratify import share_table, split_samples
from utils import in_parallel

MUCH_IGNORED = 0.1  # share of the pixels above which ignoring is likely to be a mistake


def folder(root, options, download=False, check=""):
    """Return the DataSource of a folder in any layout of dataio/layout.py; every mask is read once.

    options: config.DataOptions, of which val_fraction (0: no validation part is drawn), fold,
    classes (names), unlabelled, skip_bad_labels and shards_per_epoch (0: all shards are unpacked) count;
    check: the flags that check_data.py takes for it, where these are others than --data-root. Raises
    InputError.
    """
    check_root(root)
    root, shards = training_folder(root, first_only=options.shards_per_epoch)
    content = find_masks(root, options.skip_bad_labels)
    if any(content.bad_labels.values()) and not options.skip_bad_labels:  # on lists: the others are refused
        raise InputError(report(content.bad_labels, root))
    if options.unlabelled == "ignore":
        ignore_unlabelled(content, root)
    entries, class_notes = known_classes(root, options.classes, content.entries)
    if options.shards_per_epoch and shards and not entries:
        raise InputError("--shards-per-epoch needs the names of the classes before all masks are read: put a "
                         "classes.txt beside the shards, or give --classes")
    facts = read_facts(content, options.skip_bad_labels)
    samples = content.samples
    masks = [facts[sample][0] for sample in samples]
    more = f"; python check_data.py {check or f'--data-root {quote(str(root))}'} says more"
    try:
        meaning = decode_masks(samples, masks, entries)
    except InputError as error:
        raise InputError(f"{error}{more}") from None
    notes = [*content.notes, *(f"warning: {doubt}" for doubt in content.doubts), *meaning.notes, *class_notes]
    different = sum(facts[sample][1] for sample in samples)
    if different:
        notes.append(f"{different} of {count_of(len(samples), 'mask')} differ in size from their image: "
                     "resized (nearest) to it")
    turned = [] if content.entries else [sample.image for sample in samples if facts[sample][2]]
    if turned:  # masks drawn from annotations are upright
        notes.append(f"warning: {count_of(len(turned), 'image')} turned by EXIF to the same size (upside "
                     f"down, mirrored, or square): masks are taken as upright; is that of {turned[0]}?")
    rows = class_pixels(masks, meaning.table, len(meaning.classes))
    ignored = ignored_share(masks, rows)
    notes.append(f"{100 * ignored:.1f} % of the pixels are ignored{more if ignored > MUCH_IGNORED else ''}")
    pixels = dict(zip(samples, rows, strict=True))
    if not (options.shards_per_epoch and shards):
        shards = {}
        notes += add_validation(content.splits, pixels, meaning.classes, options, root)
    elif "val" not in content.splits:
        raise InputError(f"{options.data_root} has no shard of a validation part: call one val-000.tar")
    return DataSource("folder", meaning.classes, content.splits, meaning.table, notes,
                      annotated=bool(content.entries), shards=shards)


def read_facts(content, skip_bad_labels):
    """Return {Sample: what scan_pair says} of a FolderContent.

    What has no partner or cannot be read leaves it with a doubt where skip_bad_labels, else raises
    InputError.
    """
    unpaired = content.images_without_mask, content.masks_without_image
    if not skip_bad_labels:
        for paths, partner in zip(unpaired, ("mask", "image"), strict=True):
            refuse_unpaired(paths, partner)
    facts = dict(zip(content.samples, in_parallel(scan_pair, content.samples, "reading masks"), strict=True))
    errors = [fact for fact in facts.values() if isinstance(fact, InputError)]
    if errors and not skip_bad_labels:
        raise errors[0]
    facts = {sample: fact for sample, fact in facts.items() if not isinstance(fact, InputError)}
    splits = {split: [sample for sample in samples if sample in facts]
              for split, samples in content.splits.items()}
    content.splits = {split: samples for split, samples in splits.items() if samples or split == "train"}
    bad = dict(zip(("image without mask", "mask without image", "file not readable"), (*unpaired, errors),
                   strict=True)) | content.bad_labels
    content.doubts += [f"left out: {line}" for line in describe_bad(bad)]
    if any(bad.values()) and not content.splits["train"]:
        raise InputError("--skip-bad-labels leaves no image to train on")
    return facts


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
    """Raise InputError where --data-root is neither a folder nor a list of shards."""
    refuse_file(root)
    if not root.is_dir() and not is_listed(root):
        raise InputError(f"--data-root {root} does not exist: give the folder that holds the data set")


def refuse_file(root):
    """Raise InputError where --data-root is a file."""
    if root.is_file():
        raise InputError(f"--data-root {root} is a file: give the folder that holds the data set (unpack "
                         "archives)")


def scan_pair(sample):
    """Return (MaskFacts of the mask, whether its size differs from the image's, whether EXIF turns the image
    to the same size, so that the mask's does not tell whether it is turned too). Raises InputError.
    """
    mask, (size, orientation) = scan_mask(sample.mask), read_orientation(sample.image)
    keeps_size = orientation != 1 and upright_size(size, orientation) == size
    return mask, not fits(mask.size, size, orientation), keeps_size
