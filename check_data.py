"""Check a data set before training: pairs, sizes, mask values, duplicates, leaks; ends with a verdict.

    python check_data.py --data-root my_photos                 # a folder of your own
    python check_data.py --dataset voc --data-root data
    python check_data.py --dataset hf --data-root OWNER/NAME
    python check_data.py --data-root my_photos --fix clean_photos

Reads every file and writes OUT_DIR/check.png (overlays and the classes' shares). The exit code is 0 where
training can start, or where --fix wrote its copy; 1 where something must be repaired first; 2 where the data
are not found, their lists are incomplete, or --fix has written nothing.
"""
from config import add_image_flags, names, script_parser


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__)
    parser.add_argument("--dataset", choices=names("dataset"), default="folder",
                        help="data set (default: folder)")
    parser.add_argument("--data-root", default="data", metavar="DIR",
                        help="folder that holds it (default: data); hf: or OWNER/NAME; folder: or @LIST of "
                        "tar files")
    parser.add_argument("--unlabelled", choices=("background", "ignore"), default="background",
                        help="folder with annotation files: what has no label, as in train.py")
    add_image_flags(parser, "as train.py")
    parser.add_argument("--fix", metavar="OUT",
                        help="write a clean copy: images, PNG masks of class ids, classes.txt, split lists")
    parser.add_argument("--out-dir", default="outputs", metavar="DIR", help="where check.png goes (outputs)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

import cv2
import numpy as np

import utils
import visualize
from config import IGNORE, OWN_DATA, DataOptions, InputError, TrainConfig, check_image_flags, count_of
from dataio import huggingface
from dataio.advice import Advice, advise, either_way, kind_of_255, value_facts
from dataio.annotations.tools import find_masks
from dataio.folder import MUCH_IGNORED, add_validation, check_root, ignore_unlabelled
from dataio.labels import (class_pixels, codes_of, decode_masks, ignored_share, known_classes, line_entries,
                           save_classes)
from dataio.image_rule import ImageRule, decide_rule, sample_values
from dataio.images import copy_image, stored_of
from dataio.readers import COLORS, OUTSIDE, decode_mask, outside_message, ranges, read_mask, read_sample
from dataio.scan import fits, scan_image, scan_mask
from dataio.shards import place_of, training_folder
from dataio.stratify import ALIKE, share_table
from datasets import find_data
from utils import all_in_parallel, evenly_sampled, grouped, in_parallel

COPY = 10  # bits of 256 in which the looks of two versions of an image may differ
MUCH_ALIKE = 0.2  # share of validation images with a near neighbor in training, above which to warn
MUCH_LARGER = 3  # times --imgsz, from which images are large
SAME = 0.9  # share of the pixels of shapes that agree, above which masks are the same picture
COMPARED = 4  # masks that are compared to see whether all are the same picture
LISTED = 8  # overlays in check.png, files of a problem that are listed
NO_DATA = (-9999.0, -999.0, -32768.0, -99999.0)  # what people write for it
LINE = "\n      "  # begins a line that belongs to the one above it


@dataclass
class ScannedData:
    """A data set all of whose files were read once, without those that cannot be read.

    splits: {split: [Sample]}; images, masks: {sample: ImageFacts}, {sample: MaskFacts}; entries: the classes
    [labels.Entry] that files of a folder name. What the masks mean: classes and table as in DataSource, and
    pixels {sample: (K,)}, all None where they do not fit; advice: what to decide first. rule: the ImageRule
    by which training would read the images, not strict, None where none can be decided. names: {mask value:
    class} that a data set of Hugging Face says; class_list: where a classes.txt is read from.
    """

    name: str
    root: Path
    splits: dict
    entries: list = None
    images: dict = field(default_factory=dict)
    masks: dict = field(default_factory=dict)
    classes: list = None
    table: np.ndarray = None
    pixels: dict = None
    advice: Advice = field(default_factory=Advice)
    rule: ImageRule = None
    names: dict = None
    class_list: Path = None

    @property
    def samples(self):
        """All samples, each once."""
        return list(dict.fromkeys(sample for samples in self.splits.values() for sample in samples))

    def mask_facts(self):
        """Return the MaskFacts of all samples."""
        return [self.masks[sample] for sample in self.samples]


@dataclass
class Report:
    """Problems spoil a training or its scores, warnings may be meant; hints say what to do.

    skippable: those of the problems that train.py --skip-bad-labels leaves out.
    """

    problems: list = field(default_factory=list)
    warnings: list = field(default_factory=list)
    hints: list = field(default_factory=list)
    facts: list = field(default_factory=list)
    skippable: list = field(default_factory=list)


def with_files(noun, text, paths):
    """Return [a line such as '3 masks TEXT' with the first few files below it], [] where there are none."""
    if not paths:
        return []
    lines = [f"{count_of(len(paths), noun)} {text}", *paths[:LISTED]]
    if len(paths) > LISTED:
        lines.append(f"and {len(paths) - LISTED} more")
    return [LINE.join(map(str, lines))]


# --- reading the files ------------------------------------------------------------------------------------
def find_samples(name, root, unlabelled, report):
    """Return (ScannedData of which no file has been read yet, DataSource or None for a folder).

    What is unpaired in a folder goes into the report. Raises InputError without any data.
    """
    if name in OWN_DATA:
        names, class_list = None, place_of(root) / "classes.txt"  # of one's own
        if name == "hf":
            root, source, names, notes = huggingface.unpack(root)
            class_list = source / "classes.txt"
            report.facts += notes
        check_root(root)
        root, _ = training_folder(root)
        content, source = find_masks(root, skip_bad_labels=True), None
        if unlabelled == "ignore":
            ignore_unlabelled(content, root)
        report.facts += content.notes
        report.warnings += content.doubts
        bad = {"image without mask: add masks or move them": content.images_without_mask,
               "mask without image: add images or move them": content.masks_without_image}
        for problem, entries in (bad | content.bad_labels).items():
            report.skippable += with_files(*problem.split(" ", 1), entries)
        data = ScannedData(name, root, content.splits, content.entries, names=names, class_list=class_list)
    else:
        source = find_data(DataOptions(dataset=name, data_root=str(root)))
        data = ScannedData(name, root, source.splits)
    train = set(data.splits.get("train", []))
    report.problems += with_files(
        "validation image", "in the training list too: scores would be too good",
        [sample.image for sample in data.splits.get("val", []) if sample in train])
    return data, source


def read_files(data, report):
    """Read all files of a ScannedData; those that cannot be read go into the report and out of its splits."""
    samples = data.samples
    images = in_parallel(scan_image, [sample.image for sample in samples], "image")
    masks = in_parallel(scan_mask, [sample.mask for sample in samples], "mask")
    report.skippable += with_files("file", "cannot be read", [facts for facts in [*images, *masks]
                                                              if isinstance(facts, InputError)])
    report.problems += report.skippable
    for sample, image, mask in zip(samples, images, masks, strict=True):
        if not isinstance(image, InputError) and not isinstance(mask, InputError):
            data.images[sample], data.masks[sample] = image, mask
    data.splits = {split: [sample for sample in listed if sample in data.images]
                   for split, listed in data.splits.items()}
    counts = ", ".join(f"{len(readable)} {split}" for split, readable in data.splits.items())
    report.facts.insert(0, f"{data.name} under {data.root}: {count_of(len(samples), 'pair')} ({counts})")
    if not data.splits.get("train"):
        report.problems.append("there is no training image that can be read: these images are only good to "
                               "evaluate on")


# --- images -----------------------------------------------------------------------------------------------
def check_images(data, report):
    """Report kinds of images, rotations, and masks of another size than their image."""
    samples, images = data.samples, data.images
    modes = grouped(samples, lambda sample: images[sample].mode)
    report.facts.append("images: " + ", ".join(f"{mode} ({len(alike)})" for mode, alike in modes.items()))
    report.warnings += with_files("image", "not in RGB (grayscale or transparent): read as RGB",
                                  [sample.image for sample in samples if images[sample].stored.is_picture
                                   and images[sample].mode != "RGB"])
    report.warnings += with_files(
        "image", "turned upright by EXIF, and masks of the size as stored with them, others not: look at "
        "check.png", [sample.image for sample in samples if images[sample].orientation != 1
                      and not data.entries])  # masks drawn from annotations are upright
    report.warnings += with_files(
        "mask", "of another size than the image: resized (nearest)",
        [sample.mask for sample in samples
         if not fits(data.masks[sample].size, images[sample].size, images[sample].orientation)])
    sizes = [images[sample].size for sample in samples]
    texts = [f"{height}x{width}" for height, width in sorted(set(sizes), key=math.prod)]
    largest = f" to {texts[-1]}" if len(texts) > 1 else ""
    report.facts.append(f"{count_of(len(texts), 'image size')}: {texts[0]}{largest}")
    height, width = TrainConfig().imgsz
    times = float(np.median([math.sqrt(math.prod(size) / (height * width)) for size in sizes]))
    if times >= MUCH_LARGER:
        report.facts.append(
            f"large images: {times:.1f} times as long and wide as --imgsz {height} {width}, to which "
            "training shrinks them. Where things are small (drones, maps, scans), add --train-scale native, "
            "and --cache-images unless they are tiled TIFFs; where they fill the image, neither")


def check_rule(data, report, bands, value_range):
    """Decide the ImageRule as training would; report it, what the files hold, and which do not fit."""
    paths = [sample.image for sample in data.splits.get("train") or data.samples]
    try:
        rule = decide_rule(paths, bands, value_range)
    except InputError as error:
        report.problems.append(str(error))
        return
    data.rule = dataclasses.replace(rule, strict=False)
    report.facts.append(f"images are read as: {rule} (decided from {rule.looked_at[0]} of "
                        f"{count_of(rule.looked_at[1], 'training image')})")
    facts = [data.images[sample] for sample in data.samples if data.images[sample].quantiles is not None]
    for kind, alike in grouped(facts, lambda item: str(item.stored)).items():
        report.facts += describe_bands(kind, alike, rule)
    report.warnings += [rule.note] * bool(rule.note)
    marked = [item.stored.alpha for item in facts if item.stored.alpha]
    if marked and rule.transparency is False and marked[0] not in rule.bands:
        report.warnings.append(f"band {marked[0]} is marked as transparency, and its values are not: it is "
                               "not read (--bands all reads it)")
    doubts = all_in_parallel(lambda sample: doubt_of(sample.image, data.images[sample].stored, data.rule),
                             data.samples, "values")
    report.problems += with_files("image", "not as the others, which training refuses",
                                  list(filter(None, doubts)))


def doubt_of(path, stored, rule):
    """Return why training would refuse an image, "" = it does not."""
    try:
        rule.fitted(path, stored)
        return rule.doubt(path, stored)
    except InputError as error:
        return str(error)


def describe_bands(kind, facts, rule):
    """Return lines on what the bands of files of a kind hold. facts: their ImageFacts."""
    lines, ends = [], np.stack([item.quantiles for item in facts])  # (N, C, 3)
    for number, (low, middle, high) in enumerate(ends.transpose(1, 2, 0), start=1):  # (N,) each
        if not np.isfinite(low).any():
            continue
        unread = " (not read)" * bool(rule.bands and number not in rule.bands)
        hint = ", as if that meant no data: gdal_edit.py -a_nodata writes it into files" * (
            float(np.nanmin(low)) in NO_DATA)
        lines.append(f"  band {number}: {np.nanmin(low):.6g} to {np.nanmax(high):.6g}, median "
                     f"{np.nanmedian(middle):.6g}{unread}{hint}")
    empty = np.mean([item.empty for item in facts])
    return [f"  {kind} ({len(facts)}), {100 * empty:.1f} % of the pixels without data, which masks ignore:",
            *lines]


# --- masks ------------------------------------------------------------------------------------------------
def describe_masks(data, report):
    """Report how the masks are stored: mode, kind, values, lossy files."""
    masks = data.masks
    kinds = grouped(data.samples, lambda sample: f"{masks[sample].mode} {masks[sample].kind}")
    report.facts.append("masks: " + ", ".join(f"{kind} ({len(alike)})" for kind, alike in kinds.items()))
    values = [facts.values.tolist() for facts in masks.values() if facts.values is not None]
    if values:
        text = ranges(sorted(set().union(*values)))
        report.facts.append(f"mask values: {text if len(text) < 200 else text[:200] + ' ...'}")
    if are_alike([sample.mask for sample in evenly_sampled(data.samples, COMPARED)]):
        report.warnings.append("the masks all look alike: are these the classes, or the camera's field of "
                               "view?")
    report.warnings += with_files("mask", "in JPEG files, which blur class borders: export PNG, or see --fix",
                                  [sample.mask for sample in data.samples if masks[sample].kind == "JPEG"])


def are_alike(paths):
    """Return whether mask files hold the same shapes: what is not the commonest value agrees."""
    first, *others = [decode_mask(path).codes for path in paths]
    values, counts = np.unique(first, return_counts=True)
    common = values[counts.argmax()]
    if len(values) < 2 or not others or any(mask.shape != first.shape for mask in others):
        return False
    shapes = [(first != common) | (mask != common) for mask in others]
    return all((first == mask)[shape].mean() > SAME for mask, shape in zip(others, shapes, strict=True))


def decode(data, source, report):
    """Note in `data` the classes, the value table and the pixels of each class, or the advice where the masks
    do not fit; the report says why.

    source: the DataSource of a registered data set, None for a folder.
    """
    if source is None:
        decode_folder(data, report)
    else:
        decode_registered(data, source, report)
    if data.classes:
        masks = data.mask_facts()
        pixels = class_pixels(masks, data.table, len(data.classes))
        data.pixels = dict(zip(data.samples, pixels, strict=True))
        share = ignored_share(masks, pixels)
        report.facts.append(f"ignored: {100 * share:.1f} % of the pixels")
        if source is None:
            check_ignored(data, share, report)


def decode_folder(data, report):
    """Decode the masks of a folder as training would, or give advice."""
    try:
        data.entries, notes = known_classes(data.root, annotated=data.entries)
        meaning = decode_masks(data.samples, data.mask_facts(), data.entries)
    except InputError as error:
        report.problems.append(str(error))
        suggest_classes(data, report)
        return
    data.classes, data.table = meaning.classes, meaning.table
    report.facts += meaning.notes + notes


def decode_registered(data, source, report):
    """Decode the masks of a registered data set; a mask that is not as its masks are is a problem."""
    reasons = {}
    for sample in data.samples:
        mask, path = data.masks[sample], sample.mask
        codes = codes_of(mask, source.table)
        if codes is None:
            kind = "is painted in colors" if mask.values is None else "holds class numbers"
            reasons[path] = (f"{path} {kind}, unlike the masks of {source.name}; for masks of your own, give "
                             "--dataset folder")
        elif OUTSIDE in source.table[codes]:
            wrong = source.table[codes] == OUTSIDE
            reasons[path] = outside_message(path, codes[wrong], mask.counts[wrong], source.table)
    if reasons:
        first = next(iter(reasons.values()))
        report.problems += with_files("mask", f"with values that are not a class: {first}", list(reasons))
    else:
        data.classes, data.table = source.classes, source.table


def check_ignored(data, share, report):
    """Report what is doubtful about the ignored `share` of a folder's pixels, and a folder of one class."""
    if share > MUCH_IGNORED:
        report.warnings.append(f"{100 * share:.1f} % of the pixels are ignored: is one of the ignored values "
                               "a class?")
    explicit = any(entry.name == "ignore" or entry.value is not None or entry.color for entry in data.entries)
    white = [sample for sample in data.samples if data.masks[sample].values is not None
             and IGNORE in data.masks[sample].values]
    if (sum(data.pixels.values()) > 0).sum() == 1:
        suggest_classes(data, report)
    elif white and not explicit and len(data.table) != COLORS and data.table[IGNORE] == IGNORE:
        facts = value_facts(white, painted=False)[IGNORE]
        if kind_of_255(facts, len(data.samples)) != "void":
            report.warnings.append("255 is read as not labeled, and does not lie between other values as a "
                                   "border does")
            data.advice = either_way([name for name, _ in data.classes])
            show_files(data, report)


def suggest_classes(data, report):
    """Note in `data` the advice on what the masks could mean, and add it to the report."""
    data.advice = advise(data.samples, data.mask_facts())
    if data.names:
        known = [facts.values.tolist() for facts in data.mask_facts() if facts.values is not None]
        files = huggingface.readings(data.names, set().union(*known))
        data.advice = Advice(files) if files else data.advice
    for value, paths in data.advice.accidents.items():
        report.warnings += with_files("mask", f"with {value}: an accident?", paths)
    report.hints += data.advice.notes
    show_files(data, report)


def show_files(data, report):
    """Add what to do with the classes.txt of an Advice to the hints of the report."""
    files, path = data.advice.files, data.class_list
    if len(files) > 1:
        report.hints.append("choose between these, the masks do not tell:")
    for title, text in files.items():
        if data.advice.blurred:
            hint = ("the values between these come from resizing or a lossy format; write clean masks: "
                    f"python check_data.py --data-root {quote(str(data.root))} --fix OUT")
        else:
            hint = (f"{f'if {title}, ' if title else ''}write this to {path}, with names of your own (equal "
                    "names are one class):")
        report.hints.append(LINE.join([hint, *text.splitlines()]))


# --- classes and splits -----------------------------------------------------------------------------------
def check_classes(data, report):
    """Report shares of the classes, missing ones and masks of a single one in every split."""
    if len(data.splits["train"]) > 1:
        notes = add_validation(data.splits, data.pixels, data.classes, DataOptions(), data.root)
        report.facts += notes[:1]  # all splits have a table below
    splits = {split: samples for split, samples in data.splits.items() if samples}
    report.facts += ["classes:", *share_table(data.pixels, splits, data.classes)]
    for split, samples in splits.items():
        counts = np.stack([data.pixels[sample] for sample in samples])  # (N, K)
        check_missing(split, [name for name, _ in data.classes], counts.any(0), report)
        classes_per_mask = (counts > 0).sum(1)
        for number, text in ((0, "nothing but ignored pixels"), (1, "a single class (empty?)")):
            paths = [sample.mask for sample, count in zip(samples, classes_per_mask, strict=True)
                     if count == number]
            report.warnings += with_files("mask", f"of {split} with {text}", paths)


def check_missing(split, names, present, report):
    """Report classes without a pixel in a split; present: (K,) bool."""
    missing = [name for name, has_pixels in zip(names, present, strict=True) if not has_pixels]
    if not present.any():
        report.problems.append(f"the masks of {split} hold nothing but ignored pixels: there is nothing to "
                               "learn")
    elif present.sum() == 1 and split == "train":
        report.problems.append(f"only one class, {names[present.argmax()]}, has pixels in {split}: there is "
                               "nothing to learn")
    elif missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        report.warnings.append(f"no pixel of {', '.join(missing[:LISTED])}{more} in {split}")


def check_duplicates(data, report):
    """Report images of validation that are in training too, byte by byte or nearly (difference hash)."""
    train, val, images = data.splits.get("train", []), data.splits.get("val", []), data.images
    digests = {images[sample].digest: sample.image for sample in train}
    copies = [f"{sample.image} = {digests[images[sample].digest]}" for sample in val
              if digests.get(images[sample].digest, sample.image) != sample.image]
    report.problems += with_files("validation image", "equal to a training image: remove one of each", copies)
    if not train or not val:
        return
    looks = np.stack([images[sample].look for sample in train])  # (N, 4)
    alike, neighbors = [], 0
    for sample in val:
        distance = np.bitwise_count(looks ^ images[sample].look).sum(1)
        closest = int(distance.argmin())
        copy = images[sample].digest == images[train[closest]].digest
        if distance[closest] <= COPY and not copy and images[sample].look.any():
            alike.append(f"{sample.image} ~ {train[closest].image}")
        neighbors += int(distance[closest]) <= ALIKE
    report.warnings += with_files("validation image", "like a training image (neighboring frames?)", alike)
    if neighbors > MUCH_ALIKE * len(val):
        share = f"{neighbors} of {count_of(len(val), 'validation image')} ({neighbors / len(val):.0%})"
        report.warnings.append(
            f"{share} have a near neighbor in training, as frames of one clip do: their score says little "
            "about other scenes; validate on other clips (val/ or val.txt)")


# --- a clean copy ---------------------------------------------------------------------------------------
def check_target(out, root):
    """Raise InputError where a clean copy of `root` must not be written to the folder `out`."""
    if out.resolve() == root.resolve() or root.resolve() in out.resolve().parents:
        raise InputError(f"--fix {out} lies in the data set itself: choose a folder outside of it")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"--fix {out} is not empty: choose a new folder")


def write_clean_copy(data, out):
    """Write images as they are, masks as PNG files of class ids, classes.txt and lists to the folder `out`.

    Training images that are copies of others are on no list. Raises InputError as clean_meaning().
    """
    classes, table = clean_meaning(data, out)
    names = clean_names(data.samples, data.root)
    utils.make_folder(out)

    def copy_pair(sample):
        mask = read_mask(sample.mask, table)  # turned or not, as it was: it is read again with the same image
        visualize.save_mask(mask, classes, out / "masks" / f"{names[sample]}.png")
        copy_image(sample.image, out / "images" / f"{names[sample]}{sample.image.suffix}")
        return float((mask == IGNORE).mean())

    ignored = all_in_parallel(copy_pair, data.samples, "copying")
    save_classes(classes, out)
    digests = {data.images[sample].digest
               for split, samples in data.splits.items() if split != "train" for sample in samples}
    counts, copies = [], 0
    for split, samples in data.splits.items():
        listed = [names[sample] for sample in samples
                  if split != "train" or data.images[sample].digest not in digests]
        if listed:
            utils.write_lines(out / f"{split}.txt", listed)
        counts.append(f"{len(listed)} {split}")
        copies += len(samples) - len(listed)
    unlisted = f"; {count_of(copies, 'training image')} also in another split: on no list" if copies else ""
    print(f"clean copy: {out}, {count_of(len(ignored), 'pair')}, {', '.join(counts)}{unlisted}; "
          f"{100 * sum(ignored) / max(1, len(ignored)):.1f} % of the pixels are ignored")


def clean_meaning(data, out):
    """Return (classes, value table) of a ScannedData, by its advice where there is one. Raises InputError."""
    files = list(data.advice.files.values())
    if len(files) > 1:
        raise InputError(f"--fix {out}: nothing is written. Choose one of the classes.txt above and write it "
                         f"to {data.root} first")
    if files:
        entries = [entry for line in files[0].splitlines() for entry in line_entries(line)]
        meaning = decode_masks(data.samples, data.mask_facts(), entries, data.advice.blurred)
        print("\n".join(meaning.notes))
        return meaning.classes, meaning.table
    if data.classes is None:
        raise InputError(f"--fix {out}: nothing is written. Solve the problems above first: nothing tells "
                         "what the masks mean")
    return data.classes, data.table


def clean_names(samples, root):
    """Return {sample: a name without ending, different for all}: the image's, else with its folders; "_" for
    characters that a list of names cannot hold.
    """
    names, used = {}, set()
    for sample in samples:
        path = ["".join(char if char.isprintable() else "_" for char in name)
                for name in sample.image.relative_to(root).with_suffix("").parts]
        options = ["_".join(path[start:]) for start in range(len(path) - 1, -1, -1)]
        options += [f"{options[-1]}_{number}" for number in range(2, len(samples) + 2)]
        names[sample] = next(name for name in options if name.lower() not in used)
        used.add(names[sample].lower())
    return names


# --- output -----------------------------------------------------------------------------------------------
def draw(data, path):
    """Write check.png: overlays of a few masks, the legend, and every class's share of the pixels."""
    columns, classes = LISTED // 2, data.classes
    bars = 1 + min(0.28 * len(classes), visualize.LARGEST_PLOT)  # inches
    values = [] if data.rule.is_plain else [3]
    figure = visualize.plain_figure(4 * columns, 6 + bars + sum(values))
    grid = figure.add_gridspec(3 + len(values), columns, height_ratios=[3, 3, bars, *values])
    if values:
        draw_values(figure.add_subplot(grid[3, :]), data)
    colors = visualize.color_table(classes)
    for position, sample in enumerate(evenly_sampled(data.samples, LISTED)):
        image, targets = read_sample(sample, data.table, rule=data.rule)
        image, mask = data.rule.picture(image).numpy(), targets["mask"].numpy()
        image = cv2.resize(image.transpose(1, 2, 0), mask.shape[::-1], interpolation=cv2.INTER_AREA)
        axes = figure.add_subplot(grid[position // columns, position % columns])
        axes.imshow(visualize.overlay(image, mask, colors, 0.6, visualize.background_id(classes)))
        axes.set_title(visualize.short(sample.image.name), fontsize=9)
        axes.axis("off")
    total = sum(data.pixels.values())
    shares = 100 * total / max(1, total.sum())
    axes = figure.add_subplot(grid[2, :])
    axes.barh(range(len(classes)), shares, color=[np.array(color) / 255 for _, color in classes],
              edgecolor="gray")
    for row, share in enumerate(shares):
        axes.text(share, row, f" {share:.2f} %", va="center")
    visualize.name_ticks(axes.yaxis, classes, min(10, 60 * bars / len(classes)))
    axes.set(xlabel="share of all counted pixels, %", ylim=(len(classes) - 0.5, -0.5))
    visualize.save_figure(figure, path)


def draw_values(axes, data):
    """Draw what values each band of the training images holds, and which of them become black and white."""
    rule = data.rule
    paths = evenly_sampled([sample.image for sample in data.splits.get("train") or data.samples], COMPARED)
    stored = {path: stored_of(path) for path in paths}
    paths = [path for path in paths if not rule.misfit(path, stored[path])]
    names = [f"band {number}" for number in rule.bands] or ["red", "green", "blue"]
    bands = sample_values(paths, stored, rule) if paths else []
    for name, values, (low, high) in zip(names, bands, rule.ranges or [(0, 255)] * len(names), strict=False):
        margin = (high - low) / 4
        _, _, (line, *_) = axes.hist(np.concatenate(values), 128, range=(low - margin, high + margin),
                                     histtype="step", label=f"{name}: {low:.6g}..{high:.6g}")
        for end in (low, high):
            axes.axvline(end, color=line.get_edgecolor(), linestyle=":")
    axes.set(xlabel="value in the file; dotted: what becomes black and white", ylabel="pixels")
    if bands:
        axes.legend(ncols=1 + rule.channels // 8, fontsize=8)


def print_report(report, command):
    """Print facts, warnings, problems and the verdict."""
    print("\n".join(report.facts))
    for title, items in (("warning", report.warnings), ("problem", report.problems), ("to do", report.hints)):
        for item in items:
            print(f"{title}: {item}")
    if report.problems:
        print(f"verdict: not ready, {count_of(len(report.problems), 'problem')} to solve first")
    else:
        print(f"verdict: ready, with {count_of(len(report.warnings), 'warning')}. Train with:\n  {command}")


def main():
    """Read, report, draw, maybe write a clean copy; return 1 where something must be repaired."""
    args = parse_args()
    root, report = Path(args.data_root), Report()
    flags = f"--dataset {args.dataset} --data-root {quote(str(root))}"
    if args.unlabelled == "ignore" and args.dataset != "folder":
        raise InputError(f"--unlabelled is for annotation files in a folder, and --dataset {args.dataset} "
                         "has masks: leave it out")
    bands, value_range = tuple(args.bands), tuple(args.value_range)
    check_image_flags(bands, value_range)
    if args.fix:
        check_target(Path(args.fix), root)
    data, source = find_samples(args.dataset, root, args.unlabelled, report)
    read_files(data, report)
    if data.samples:
        check_images(data, report)
        describe_masks(data, report)
        decode(data, source, report)
        if data.classes:
            check_classes(data, report)
        check_rule(data, report, bands, value_range)
        if data.classes and data.rule:
            picture = Path(utils.make_folder(args.out_dir)) / "check.png"
            draw(data, picture)
            report.facts.append(f"picture: {picture}")
        check_duplicates(data, report)
    image_flags = "".join(f" {name} {' '.join(map(str, values))}" for name, values in
                          (("--bands", bands), ("--value-range", value_range)) if values)
    fixable = data.classes or len(data.advice.files) == 1 and not data.advice.blurred
    if report.problems and fixable and not args.fix:
        report.hints.append("or write a clean copy of what can be used: "
                            f"python check_data.py {flags} --fix OUT")
    if report.skippable and args.dataset in OWN_DATA:
        report.hints.append("or train on what can be used, without a copy: train.py --skip-bad-labels")
    print_report(report, f"python train.py {flags}"
                         + " --unlabelled ignore" * (args.unlabelled == "ignore") + image_flags)
    if args.fix:
        write_clean_copy(data, Path(args.fix))
        return 0
    return 1 if report.problems else 0


if __name__ == "__main__":
    utils.run_main(main)
