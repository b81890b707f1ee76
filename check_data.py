"""Check a data set before training: pairs, sizes, mask values, duplicates, leaks; ends with a verdict.

    python check_data.py --data-root my_photos                 # a folder of your own
    python check_data.py --dataset voc --data-root data
    python check_data.py --data-root my_photos --fix clean_photos

Reads every file and writes OUT_DIR/check.png (overlays and the classes' shares). The exit code is 0 where
training can start, or where --fix wrote its copy; 1 where something must be repaired first; 2 where the data
are not found, their lists are incomplete, or --fix has written nothing.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

from config import names, script_parser


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__)
    parser.add_argument("--dataset", choices=names("dataset"), default="folder",
                        help="data set (default: folder)")
    parser.add_argument("--data-root", default="data", metavar="DIR",
                        help="folder that holds it (default: data)")
    parser.add_argument("--unlabelled", choices=("background", "ignore"), default="background",
                        help="folder with annotation files: what has no label, as in train.py")
    parser.add_argument("--fix", metavar="OUT",
                        help="write a clean copy: images, PNG masks of class ids, classes.txt, split lists")
    parser.add_argument("--out-dir", default="outputs", metavar="DIR", help="where check.png goes (outputs)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import dataclasses
import math
import re
import time
from pathlib import Path
from shlex import quote

import cv2
import numpy as np

import utils
import visualize
from config import IGNORE, DataOptions, InputError, TrainConfig, count_of
from dataio.advice import advise, either_way, kind_of_255, value_facts
from dataio.annotations import find_masks
from dataio.folder import MUCH_IGNORED, check_root, ignore_unlabelled, ignored_share
from dataio.labels import class_file, class_pixels, decode_masks, read_classes, says, stored
from dataio.layout import some
from dataio.readers import OUTSIDE, decode_mask, outside_message, ranges, read_sample
from dataio.repair import check_target, fix
from dataio.scan import ScannedData, fits, in_parallel, scan_image, scan_mask
from dataio.stratify import ALIKE, share_table, split_samples
from datasets import find_data

COPY = 10  # bits of 256 in which the looks of two versions of one image may differ
MUCH_ALIKE = 0.2  # share of validation images with a near neighbor in training, above which to warn
MUCH_LARGER = 3  # times --imgsz, from which images are large
SAME = 0.9  # share of the pixels of shapes that agree, above which masks are one picture
SHOWN = 8  # overlays in check.png, problems of one kind that are listed


@dataclasses.dataclass
class Report:
    """What was found: problems spoil a training or its scores, warnings may be meant; hints say what to do.
    """

    problems: list = dataclasses.field(default_factory=list)
    warnings: list = dataclasses.field(default_factory=list)
    hints: list = dataclasses.field(default_factory=list)
    facts: list = dataclasses.field(default_factory=list)

    def problem(self, text, paths=None):
        """Note what stops a training; with `paths` their number and the first few follow, none = no problem.
        """
        self.problems += listed(text, paths)

    def warn(self, text, paths=None):
        """Note what does not stop a training; paths as in problem()."""
        self.warnings += listed(text, paths)


def listed(text, paths):
    """Return [text] where paths is None, else [their number, text and the first few], [] without any.

    {one|several} in the text stands for the words that go with their number.
    """
    if paths is None:
        return [text]
    if not paths:
        return []
    text = re.sub(r"\{(.*?)\|(.*?)\}", lambda words: words[1 if len(paths) == 1 else 2], text)
    named = "".join(f"\n      {path}" for path in paths[:SHOWN])
    more = f"\n      and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return [f"{len(paths)} {text}{named}{more}"]


# --- reading the files ------------------------------------------------------------------------------------
def find_samples(name, root, unlabelled, report):
    """Return ({split: [Sample]}, the classes [Entry] that annotation files name or None, DataSource or None
    for a folder). Raises InputError without any data.

    What is unpaired in a folder goes into the report.
    """
    source = entries = None
    if name == "folder":
        check_root(root)
        found = find_masks(root)
        splits = found.splits
        entries = ignore_unlabelled(found, root) if unlabelled == "ignore" else found.entries
        report.facts += found.notes
        report.warnings += found.doubts
        for lonely, text in ((found.no_mask, "{image has|images have} no mask: add masks or move them"),
                             (found.no_image, "{mask has|masks have} no image: add images or move them")):
            for split, paths in lonely.items():
                report.problem(f"{split} {text}", paths)
    else:
        source = find_data(DataOptions(dataset=name, data_root=str(root)))
        splits = source.splits
    train, val = set(splits.get("train", [])), splits.get("val", [])
    leaks = [sample.image for sample in val if sample in train]
    report.problem("validation {image is|images are} in the training list too: scores would be too good",
                   leaks)
    return splits, entries, source


def read_all(name, root, unlabelled, report):
    """Return (ScannedData, DataSource or None for a folder); unreadable files go into the report."""
    start = time.perf_counter()
    splits, entries, source = find_samples(name, root, unlabelled, report)
    data = ScannedData(name, root, splits, {}, {}, entries)
    samples = data.samples
    for facts, scan, part in ((data.images, scan_image, "image"), (data.masks, scan_mask, "mask")):
        found = in_parallel(lambda sample, scan=scan, part=part: scan(getattr(sample, part)), samples, part)
        facts.update(zip(samples, found, strict=True))
    broken = [error for facts in (data.images, data.masks) for error in facts.values()
              if isinstance(error, InputError)]
    report.problem("{file|files} cannot be read", broken)
    data.splits = {split: [sample for sample in part if not isinstance(data.images[sample], InputError)
                           and not isinstance(data.masks[sample], InputError)]
                   for split, part in splits.items()}
    parts = ", ".join(f"{len(part)} {split}" for split, part in data.splits.items())
    report.facts.insert(0, f"{name} under {root}: {count_of(len(samples), 'pair')} ({parts}) read in "
                           f"{time.perf_counter() - start:.1f} s")
    if not data.splits.get("train"):
        report.problem("there is no training image that can be read: this part is only good to evaluate on")
    return data, source


# --- checks -----------------------------------------------------------------------------------------------
def check_images(data, report):
    """Report kinds of images, rotations, and masks of another size than their image."""
    modes, images = {}, data.images
    for sample in data.samples:
        modes.setdefault(images[sample].mode, []).append(sample.image)
    report.facts.append("images: " + ", ".join(f"{len(paths)} {mode}" for mode, paths in modes.items()))
    odd = [path for mode, paths in modes.items() if mode != "RGB" for path in paths]
    report.warn("{image is|images are} not RGB (grayscale, transparent or 16 bit): read as RGB", odd)
    deep = [images[sample].depth for sample in data.samples if images[sample].depth > 8]
    if deep:
        report.facts.append(f"{count_of(len(deep), 'image')} deeper than 8 bit: scaled to 8 by the depth of "
                            f"the values, {' or '.join(map(str, sorted(set(deep))))} bit")
    turned = [sample for sample in data.samples if images[sample].orientation != 1]
    follows = [sample for sample in turned if images[sample].orientation >= 5
               and images[sample].size != images[sample].size[::-1]]
    report.warn("{image is|images are} turned upright by EXIF, and masks of the size as stored with them",
                [sample.image for sample in follows])
    report.warn("{image is|images are} turned upright by EXIF, but their masks stay as stored: look at "
                "check.png", [sample.image for sample in turned if sample not in follows])
    differs = [sample.mask for sample in data.samples
               if not fits(data.masks[sample].size, images[sample].size, images[sample].orientation)]
    report.warn("{mask differs|masks differ} in size from {its|their} image: resized (nearest)", differs)
    shapes = {images[sample].size for sample in data.samples}
    smallest, largest = min(shapes, key=np.prod), max(shapes, key=np.prod)
    report.facts.append(f"size: {smallest[0]}x{smallest[1]}" if len(shapes) == 1 else
                        f"sizes: {len(shapes)} different ones, {smallest[0]}x{smallest[1]} to "
                        f"{largest[0]}x{largest[1]}")
    trained = TrainConfig().imgsz
    times = float(np.median([math.sqrt(math.prod(size) / math.prod(trained)) for size in
                             (images[sample].size for sample in data.samples)]))
    if times >= MUCH_LARGER:
        report.facts.append(
            f"large images: {times:.1f} times as long and wide as --imgsz {trained[0]} {trained[1]}, to "
            "which training shrinks them. Where things are small (drones, maps, scans), add --train-scale "
            "native, and --cache-images unless they are tiled TIFFs; where they fill the image, neither")


def describe_masks(data, report):
    """Report how the masks are stored: mode, kind, values, lossy files."""
    kinds, values = {}, set()
    for sample in data.samples:
        mask = data.masks[sample]
        kinds.setdefault(f"{'1-bit' if mask.mode == '1' else mask.mode} {mask.kind}", []).append(sample.mask)
        values |= set(mask.values.tolist()) if mask.values is not None else set()
    report.facts.append("masks: " + ", ".join(f"{len(paths)} {kind}" for kind, paths in kinds.items()))
    if values:
        text = ranges(sorted(values))
        report.facts.append(f"mask values: {text if len(text) < 200 else text[:200] + ' ...'}")
    if are_alike([sample.mask for sample in some(data.samples)]):
        report.warn("the masks look all alike: are these the classes, or the camera's field of view?")
    lossy = [path for kind, paths in kinds.items() if kind.endswith("JPEG") for path in paths]
    report.warn("{mask is a JPEG file, and JPEG blurs|masks are JPEG files, which blur} class borders: "
                "export PNG, or see --fix", lossy)


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
    """
    if source is not None:
        data.classes, data.table = source.classes, source.table
        check_registered(data, report)
    else:
        try:
            data.classes, data.table, notes = decode_masks(data.root, data.samples, data.mask_facts(),
                                                           listed=data.entries)
            report.facts += notes
        except InputError as error:
            report.problem(str(error).removesuffix(says(data.root)))
            suggest_classes(data, report)
    if data.classes:
        scans = [(stored(mask, data.table), mask.counts) for mask in data.mask_facts()]
        pixels = class_pixels(scans, data.table, len(data.classes))
        data.pixels = dict(zip(data.samples, pixels, strict=True))
        share = ignored_share(scans, data.table)
        report.facts.append(f"ignored: {100 * share:.1f} % of the pixels")
        if source is None:
            check_ignored(data, share, report)


def check_registered(data, report):
    """Report masks that are not as those of a registered data set; `data` has no classes then."""
    values = {sample: stored(data.masks[sample], data.table) for sample in data.samples}
    wrong = [sample for sample, found in values.items()
             if found is None or (data.table[found] == OUTSIDE).any()]
    if not wrong:
        return
    path, mask, found = wrong[0].mask, data.masks[wrong[0]], values[wrong[0]]
    if found is None and len(data.table) > 65536:
        text = f"{path} holds class numbers, {data.name} has masks painted in colors"
    elif found is None:
        text = (f"{path} is painted in colors, {data.name} has masks of class numbers; for masks in colors "
                "of your own, give --dataset folder")
    else:
        outside = data.table[found] == OUTSIDE
        text = outside_message(path, found[outside], mask.counts[outside], data.table)
    report.problem(f"{{mask holds|masks hold}} values that are no class: {text}",
                   [sample.mask for sample in wrong])
    data.classes = data.table = None


def check_ignored(data, share, report):
    """Report what is doubtful about the ignored `share` of a folder's pixels, and a folder of one class."""
    if share > MUCH_IGNORED:
        report.warn(f"{100 * share:.1f} % of the pixels are ignored: is one of the ignored values a class?")
    path = class_file(data.root)
    explicit = data.entries or path and any(entry.name == "ignore" or entry.value is not None or entry.color
                                            for entry in read_classes(path))
    white = [sample for sample in data.samples if data.masks[sample].values is not None
             and IGNORE in data.masks[sample].values]
    if (sum(data.pixels.values()) > 0).sum() == 1:
        suggest_classes(data, report)
    elif white and not explicit and len(data.table) <= 65536 and data.table[IGNORE] == IGNORE:
        facts = value_facts(white, painted=False)[IGNORE]
        if kind_of_255(facts, len(data.samples)) != "void":
            report.warn("255 is read as not labeled, and does not lie between other values as a border does")
            data.advice = either_way([name for name, _ in data.classes])
            show_files(data, report)


def suggest_classes(data, report):
    """Note in `data` the advice on what the masks could mean, and add it to the report."""
    advice = data.advice = advise(data.samples, data.mask_facts())
    for what, paths in advice.accidents.items():
        report.warn(f"{{mask holds|masks hold}} {what}: an accident?", paths)
    report.hints += advice.notes
    show_files(data, report)


def show_files(data, report):
    """Add what to do with the classes.txt of an Advice to the hints of the report."""
    files, path = data.advice.files, data.root / "classes.txt"
    if len(files) > 1:
        report.hints.append("choose between these, the masks do not tell:")
    for title, text in files.items():
        lines = "\n".join(f"      {line}" for line in text.splitlines())
        if data.advice.blurred:
            report.hints.append("the values between these come from resizing or a lossy format; write clean "
                                f"masks: python check_data.py --data-root {quote(str(data.root))} --fix OUT\n"
                                f"{lines}")
        else:
            report.hints.append(f"{f'if {title}, ' if title else ''}write this to {path}, with names of your "
                                f"own (equal names are one class):\n{lines}")


def check_classes(data, report):
    """Report shares of the classes in every part, classes that are missing, masks with one class or none.

    The validation part is drawn as a training would, where there is none.
    """
    if "val" not in data.splits and len(data.splits["train"]) > 1:
        train, fraction = data.splits["train"], DataOptions().val_fraction
        parts, said = split_samples(train, np.stack([data.pixels[sample] for sample in train]), fraction)
        report.facts.append(f"no validation part: {len(parts['val'])} of {len(train)} images would validate, "
                            f"{said}")
        data.splits.update(parts)
    parts = {split: samples for split, samples in data.splits.items() if samples}
    report.facts += ["classes:", *share_table(data.pixels, parts, data.classes)]
    for split, samples in parts.items():
        counts = np.stack([data.pixels[sample] for sample in samples])
        missing = [name for id, (name, _) in enumerate(data.classes) if not counts[:, id].any()]
        if len(missing) == len(data.classes):
            report.problem(f"the masks of {split} hold nothing but ignored pixels: there is nothing to learn")
        elif len(missing) == len(data.classes) - 1 and split == "train":
            name = next(name for name, _ in data.classes if name not in missing)
            report.problem(f"only one class, {name}, has pixels in {split}: there is nothing to learn")
        elif missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            report.warn(f"no pixel of {', '.join(missing[:SHOWN])}{more} in {split}")
        nothing = [sample.mask for sample, row in zip(samples, counts, strict=True) if not row.any()]
        report.warn(f"{{mask|masks}} of {split} {{holds|hold}} nothing but ignored pixels", nothing)
        single = [sample.mask for sample, row in zip(samples, counts, strict=True) if (row > 0).sum() == 1]
        report.warn(f"{{mask|masks}} of {split} {{holds|hold}} a single class (empty?)", single)


def check_duplicates(data, report):
    """Report images of validation that are in training too, byte by byte or nearly (difference hash)."""
    train, val, images = data.splits.get("train", []), data.splits.get("val", []), data.images
    digests = {images[sample].digest: sample.image for sample in train}
    same = [f"{sample.image} = {digests[images[sample].digest]}" for sample in val
            if digests.get(images[sample].digest, sample.image) != sample.image]
    report.problem("validation {image is a copy of a training image|images are copies of training images}: "
                   "remove one of each", same)
    if not train or not val:
        return
    looks = np.stack([images[sample].look for sample in train])  # (N, 4)
    near, neighbors = [], 0
    for sample in val:
        distance = np.bitwise_count(looks ^ images[sample].look).sum(1)
        closest = int(distance.argmin())
        copy = images[sample].digest == images[train[closest]].digest
        if distance[closest] <= COPY and not copy and images[sample].look.any():
            near.append(f"{sample.image} ~ {train[closest].image}")
        neighbors += int(distance[closest]) <= ALIKE
    report.warn("validation {image looks|images look} like training images (neighboring frames?)", near)
    if neighbors > MUCH_ALIKE * len(val):
        share = f"{neighbors} of {count_of(len(val), 'validation image')} ({neighbors / len(val):.0%})"
        report.warn(f"{share} have a near neighbor in training, as frames of one clip do: their score says "
                    "little about other scenes; validate on other clips (val/ or val.txt)")


# --- output -----------------------------------------------------------------------------------------------
def draw(data, path):
    """Write check.png: overlays of a few masks, the legend, and every class's share of the pixels."""
    columns, samples, classes = SHOWN // 2, data.samples, data.classes
    bars = 1 + min(0.28 * len(classes), visualize.LARGEST_PLOT)  # inches
    figure = visualize.plain_figure(4 * columns, 6 + bars)
    grid = figure.add_gridspec(3, columns, height_ratios=[3, 3, bars])
    colors = visualize.color_table(classes)
    for position, sample in enumerate(utils.evenly_sampled(samples, SHOWN)):
        image, targets = read_sample(sample, data.table)
        image, mask = image.numpy(), targets["mask"].numpy()
        image = image.transpose(1, 2, 0)
        image = cv2.resize(image, mask.shape[::-1], interpolation=cv2.INTER_AREA)
        axes = figure.add_subplot(grid[position // columns, position % columns])
        axes.imshow(visualize.overlay(image, mask, colors, 0.6, visualize.background_id(classes)))
        axes.set_title(visualize.short(sample.image.name), fontsize=9)
        axes.axis("off")
    total = sum(data.pixels.values())
    shares = 100 * total / max(1, total.sum())
    axes = figure.add_subplot(grid[2, :])
    axes.barh(
        range(len(classes)), shares, color=[np.array(color) / 255 for _, color in classes], edgecolor="gray"
    )
    for row, share in enumerate(shares):
        axes.text(share, row, f" {share:.2f} %", va="center")
    visualize.name_ticks(axes.yaxis, classes, min(10, 60 * bars / len(classes)))
    axes.set(xlabel="share of all counted pixels, %", ylim=(len(classes) - 0.5, -0.5))
    visualize.save_figure(figure, path)


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
    if args.unlabelled == "ignore" and args.dataset != "folder":
        raise InputError(f"--unlabelled is for annotation files in a folder, and --dataset {args.dataset} "
                         "has masks: leave it out")
    if args.fix:
        check_target(Path(args.fix), root)
    data, source = read_all(args.dataset, root, args.unlabelled, report)
    if data.samples:
        check_images(data, report)
        describe_masks(data, report)
        decode(data, source, report)
        if data.classes:
            check_classes(data, report)
            picture = Path(utils.make_folder(args.out_dir)) / "check.png"
            draw(data, picture)
            report.facts.append(f"picture: {picture}")
        check_duplicates(data, report)
    fixable = data.classes or data.advice and len(data.advice.files) == 1 and not data.advice.blurred
    if report.problems and fixable and not args.fix:
        report.hints.append(f"or write a clean copy of what can be used: python check_data.py --dataset "
                            f"{args.dataset} --data-root {quote(str(root))} --fix OUT")
    more = " --unlabelled ignore" if args.unlabelled == "ignore" else ""
    print_report(report, f"python train.py --dataset {args.dataset} --data-root {quote(str(root))}{more}")
    if args.fix:
        fix(data, Path(args.fix))
        return 0
    return 1 if report.problems else 0


if __name__ == "__main__":
    utils.run_main(main)
