"""Check a data set before training: pairs, sizes, mask values, duplicates, leaks; ends with a verdict.

    python check_data.py --data-root my_photos                 # a folder of your own
    python check_data.py --dataset voc --data-root data

Reads every file once and writes OUT_DIR/check.png (overlays and the classes' shares). The exit code is 0
where training can start, 1 where something must be repaired first, 2 where the data are not found or their
lists are incomplete.
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
    parser.add_argument("--out-dir", default="outputs", metavar="DIR", help="where check.png goes (outputs)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import dataclasses
import time
from pathlib import Path
from shlex import quote

import cv2
import numpy as np

import utils
import visualize
from config import IGNORE, DataOptions, InputError
from dataio.folder import MOST_CLASSES, check_root, class_pixels, decode_masks, find_layout, stored
from dataio.readers import OUTSIDE, match_files, outside_message, ranges, read_pair
from dataio.scan import fits, in_parallel, scan_image, scan_mask
from dataio.stratify import share_table, split_samples
from datasets import find_data

ALIKE = 10  # bits of 256 in which the difference hashes of near duplicates may differ
STRAY = 1e-3  # share of the pixels below which a mask value looks like an accident
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
    """Return [text] where paths is None, else [their number, text and the first few], [] without any."""
    if paths is None:
        return [text]
    if not paths:
        return []
    named = "".join(f"\n      {path}" for path in paths[:SHOWN])
    more = f"\n      and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return [f"{len(paths)} {text}{named}{more}"]


# --- finding the files ------------------------------------------------------------------------------------
def find_folder_samples(root, report):
    """Return {split: [Sample]} of a folder in any layout; what is unpaired goes into the report."""
    splits = {}
    for split, (images, masks) in find_layout(root).items():
        splits[split], no_mask, no_image = match_files(images, masks)
        report.problem(f"{split} images have no mask: add masks or move them", no_mask)
        report.problem(f"{split} masks have no image: add images or move them", no_image)
    return splits


def find_samples(name, root, report):
    """Return ({split: [Sample]}, DataSource or None for a folder). Raises InputError without any data."""
    source = None
    if name == "folder":
        check_root(root)
        splits = find_folder_samples(root, report)
    else:
        source = find_data(DataOptions(dataset=name, data_root=str(root)))
        splits = source.splits
    if not any(splits.values()):
        raise InputError(f"{root} holds no image with a mask of the same name")
    train, val = set(splits.get("train", [])), splits.get("val", [])
    leaks = [sample.image for sample in val if sample in train]
    report.problem("validation images are in the training list too: scores would be too good", leaks)
    return splits, source


# --- checks -----------------------------------------------------------------------------------------------
def readable(splits, images, masks, report):
    """Return {split: [Sample]} without the samples that cannot be read; those go into the report."""
    broken = [error for facts in (images, masks) for error in facts.values() if isinstance(error, InputError)]
    report.problem("files cannot be read", broken)
    return {split: [sample for sample in samples if not isinstance(images[sample], InputError)
                    and not isinstance(masks[sample], InputError)] for split, samples in splits.items()}


def check_images(samples, images, masks, report):
    """Report kinds of images, rotations, and masks of another size than their image."""
    modes = {}
    for sample in samples:
        modes.setdefault(images[sample].mode, []).append(sample.image)
    report.facts.append("images: " + ", ".join(f"{len(paths)} {mode}" for mode, paths in modes.items()))
    odd = [path for mode, paths in modes.items() if mode != "RGB" for path in paths]
    report.warn("images are not RGB (grayscale, transparent or 16 bit): read as RGB", odd)
    turned = [sample for sample in samples if images[sample].orientation != 1]
    follows = [sample for sample in turned if images[sample].orientation >= 5
               and images[sample].size != images[sample].size[::-1]]
    report.warn("images are turned upright by EXIF, and masks of the size as stored with them",
                [sample.image for sample in follows])
    report.warn("images are turned upright by EXIF, but their masks stay as stored: look at check.png",
                [sample.image for sample in turned if sample not in follows])
    differs = [sample.mask for sample in samples
               if not fits(masks[sample].size, images[sample].size, images[sample].orientation)]
    report.warn("masks differ in size from their image: resized (nearest)", differs)
    shapes = {images[sample].size for sample in samples}
    smallest, largest = min(shapes, key=np.prod), max(shapes, key=np.prod)
    report.facts.append(f"sizes: {len(shapes)} different ones, {smallest[0]}x{smallest[1]} to "
                        f"{largest[0]}x{largest[1]}")


def describe_masks(samples, masks, report):
    """Report how the masks are stored: mode, kind, values, lossy files."""
    kinds, values = {}, set()
    for sample in samples:
        mask = masks[sample]
        kinds.setdefault(f"{mask.mode} {mask.kind}", []).append(sample.mask)
        values |= set(mask.values.tolist()) if mask.values is not None else set()
    report.facts.append("masks: " + ", ".join(f"{len(paths)} {kind}" for kind, paths in kinds.items()))
    if values:
        text = ranges(sorted(values))
        report.facts.append(f"mask values: {text if len(text) < 200 else text[:200] + ' ...'}")
    lossy = [path for kind, paths in kinds.items() if kind.endswith("JPEG") for path in paths]
    report.problem("masks are JPEG files, which blur class borders into other classes: export PNG", lossy)


def suggest_classes(root, samples, masks, report):
    """Add to the report a classes.txt that the masks at hand would fit, where one can be made up."""
    pixels, files = {}, {}
    painted = any(masks[sample].values is None for sample in samples)
    for sample in samples:
        mask = masks[sample]
        codes = mask.colors if painted and mask.colors is not None else mask.values
        for code, count in zip(codes.tolist(), mask.counts.tolist(), strict=True):
            pixels[code] = pixels.get(code, 0) + count
            files.setdefault(code, []).append(sample.mask)
    if len(pixels) < 2:
        report.hints.append("all masks hold one single value: there is nothing to learn, export them again")
        return
    if len(pixels) > MOST_CLASSES:
        report.hints.append(
            f"the masks hold {len(pixels)} different {'colors' if painted else 'values'}: "
            "they are not class masks, or were blurred by a lossy format; export them again as PNG"
        )
        return
    total, few = sum(pixels.values()), max(1, len(samples) // 20)
    shown = {
        code: f"({code >> 16}, {code >> 8 & 255}, {code & 255})" if painted else str(code) for code in pixels
    }
    stray = [code for code in sorted(pixels)
             if pixels[code] < STRAY * total and len(files[code]) <= few and len(pixels) > 2]
    for code in stray:
        report.warn(f"masks hold the {'color' if painted else 'value'} {shown[code]}, {pixels[code]} "
                    "pixels in all: an accident?", files[code])
    kept = [code for code in sorted(pixels) if code not in stray]
    void = IGNORE if not painted and len(kept) > 2 else None
    lines, number = [], 0
    for code in [*kept, *stray]:
        name = "ignore" if code in stray or code == void else f"class {number}"
        number += name != "ignore"
        lines.append(f"{name} {code >> 16} {code >> 8 & 255} {code & 255}" if painted else f"{name} = {code}")
    report.hints.append(
        f"write this to {root / 'classes.txt'}, with names of your own (equal names are one class):\n"
        + "\n".join(f"      {line}" for line in lines)
    )


def decode(name, root, source, samples, masks, report):
    """Return (classes, value table), or (None, None) where the masks do not fit; the report says why."""
    facts = [masks[sample] for sample in samples]
    if source is None:
        try:
            classes, table, notes = decode_masks(root, samples, facts)
        except InputError as error:
            report.problem(str(error))
            suggest_classes(root, samples, masks, report)
            return None, None
        report.facts += notes
        return classes, table
    wrong = [(sample, mask) for sample, mask in zip(samples, facts, strict=True)
             if mask.values is None or (source.table[mask.values] == OUTSIDE).any()]
    if not wrong:
        return source.classes, source.table
    sample, mask = wrong[0]
    if mask.values is None:
        text = f"{sample.mask} is painted in colors, {name} has index masks"
    else:
        outside = source.table[mask.values] == OUTSIDE
        text = outside_message(sample.mask, mask.values[outside], mask.counts[outside], source.table)
    report.problem(f"masks hold values that are no class: {text}", [sample.mask for sample, _ in wrong])
    return None, None


def check_classes(splits, pixels, classes, report):
    """Report shares of the classes in every part, classes that are missing, masks with one class or none."""
    parts = {split: samples for split, samples in splits.items() if samples}
    report.facts += ["classes:", *share_table(pixels, parts, classes)]
    for split, samples in parts.items():
        counts = np.stack([pixels[sample] for sample in samples])
        missing = [name for id, (name, _) in enumerate(classes) if not counts[:, id].any()]
        if len(missing) == len(classes):
            report.problem(f"the masks of {split} hold nothing but ignored pixels: there is nothing to learn")
        elif missing:
            more = f" and {len(missing) - SHOWN} more classes" if len(missing) > SHOWN else ""
            report.warn(f"no pixel of {', '.join(missing[:SHOWN])}{more} in {split}")
        nothing = [sample.mask for sample, row in zip(samples, counts, strict=True) if not row.any()]
        report.warn(f"masks of {split} hold nothing but ignored pixels", nothing)
        single = [sample.mask for sample, row in zip(samples, counts, strict=True) if (row > 0).sum() == 1]
        report.warn(f"masks of {split} hold a single class (empty?)", single)


def check_duplicates(splits, images, report):
    """Report images of validation that are in training too, byte by byte or nearly (difference hash)."""
    train, val = splits.get("train", []), splits.get("val", [])
    digests = {images[sample].digest: sample.image for sample in train}
    same = [f"{sample.image} = {digests[images[sample].digest]}" for sample in val
            if digests.get(images[sample].digest, sample.image) != sample.image]
    report.problem("validation images are copies of training images: remove one of each", same)
    if not train or not val:
        return
    looks = np.stack([images[sample].look for sample in train])  # (N, 4)
    near = []
    for sample in val:
        distance = np.bitwise_count(looks ^ images[sample].look).sum(1)
        closest = int(distance.argmin())
        copy = images[sample].digest == images[train[closest]].digest
        if distance[closest] <= ALIKE and not copy and images[sample].look.any():
            near.append(f"{sample.image} ~ {train[closest].image}")
    report.warn("validation images look like training images (neighboring frames?)", near)


# --- output -----------------------------------------------------------------------------------------------
def draw(samples, classes, table, pixels, path):
    """Write check.png: overlays of a few masks, the legend, and every class's share of the pixels."""
    from matplotlib.figure import Figure
    columns = SHOWN // 2
    figure = Figure(figsize=(4 * columns, 6 + 1 + 0.28 * len(classes)), layout="constrained")
    grid = figure.add_gridspec(3, columns, height_ratios=[3, 3, 1 + 0.28 * len(classes)])
    colors = visualize.color_table(classes)
    chosen = np.linspace(0, len(samples) - 1, min(SHOWN, len(samples))).round().astype(int)
    for position, index in enumerate(chosen.tolist()):
        image, mask = (part.numpy() for part in read_pair(samples[index], table))
        image = image.transpose(1, 2, 0)
        image = cv2.resize(image, mask.shape[::-1], interpolation=cv2.INTER_AREA)
        axes = figure.add_subplot(grid[position // columns, position % columns])
        axes.imshow(visualize.overlay(image, mask, colors, 0.6, visualize.background_id(classes)))
        axes.set_title(samples[index].image.name, fontsize=9)
        axes.axis("off")
    total = np.stack(list(pixels.values())).sum(0)
    shares = 100 * total / max(1, total.sum())
    axes = figure.add_subplot(grid[2, :])
    axes.barh(
        range(len(classes)), shares, color=[np.array(color) / 255 for _, color in classes], edgecolor="gray"
    )
    for row, share in enumerate(shares):
        axes.text(share, row, f" {share:.2f} %", va="center")
    axes.set_yticks(range(len(classes)), [name for name, _ in classes])
    axes.set(xlabel="share of all counted pixels, %", ylim=(len(classes) - 0.5, -0.5))
    visualize.save_figure(figure, path)


def print_report(report, command):
    """Print facts, warnings, problems and the verdict."""
    print("\n".join(report.facts))
    for title, items in (("warning", report.warnings), ("problem", report.problems), ("to do", report.hints)):
        for item in items:
            print(f"{title}: {item}")
    if report.problems:
        print(f"verdict: not ready, {len(report.problems)} problem(s) to solve first")
    else:
        print(f"verdict: ready, with {len(report.warnings)} warning(s). Train with:\n  {command}")


def main():
    """Scan, report, draw; return 1 where something must be repaired."""
    args = parse_args()
    root, report, start = Path(args.data_root), Report(), time.perf_counter()
    splits, source = find_samples(args.dataset, root, report)
    samples = list(dict.fromkeys(sample for part in splits.values() for sample in part))
    images = dict(
        zip(samples, in_parallel(lambda sample: scan_image(sample.image), samples, "images"), strict=True)
    )
    masks = dict(
        zip(samples, in_parallel(lambda sample: scan_mask(sample.mask), samples, "masks"), strict=True)
    )
    count = len(samples)
    splits = readable(splits, images, masks, report)
    samples = [sample for sample in samples if any(sample in part for part in map(set, splits.values()))]
    report.facts.append(f"{args.dataset} under {root}: {count} pairs ("
                        + ", ".join(f"{len(part)} {split}" for split, part in splits.items())
                        + f") read in {time.perf_counter() - start:.1f} s")
    if not splits.get("train"):
        report.problem("there is no training image that can be read: this part is only good to evaluate on")
    if samples:
        check_images(samples, images, masks, report)
        describe_masks(samples, masks, report)
        classes, table = decode(args.dataset, root, source, samples, masks, report)
        if classes:
            scans = [(stored(masks[sample], table), masks[sample].counts) for sample in samples]
            pixels = dict(zip(samples, class_pixels(scans, table, len(classes)), strict=True))
            if "val" not in splits and len(splits["train"]) > 1:
                train = splits["train"]
                splits.update(split_samples(train, np.stack([pixels[sample] for sample in train]), 0.2))
            check_classes(splits, pixels, classes, report)
            utils.make_folder(args.out_dir)
            draw(samples, classes, table, pixels, Path(args.out_dir) / "check.png")
            report.facts.append(f"picture: {Path(args.out_dir) / 'check.png'}")
        check_duplicates(splits, images, report)
    print_report(report, f"python train.py --dataset {args.dataset} --data-root {quote(str(root))}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    utils.run_main(main)
