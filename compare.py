"""Compare trained models on equal terms: one Markdown table and one picture, the best first.

    for run in outputs/fcn outputs/unet; do python evaluate.py --model $run/last.pth --out-dir $run; done
    python compare.py outputs/fcn outputs/unet
    python compare.py outputs/bn-0 outputs/bn-1 outputs/bn-2 outputs/fcn     # seeds of one model: one column
    python compare.py outputs/fcn outputs/unet --group-by '([a-z]+_[0-9]+)_' # intervals over sequences

Reads what evaluate.py left in RUN_DIR/evaluation, and what train.py left in RUN_DIR where it did. Runs whose
settings differ in --seed or in the number of --fold alone are one model: the mean over the seeds, the folds
together. Models are ranked only where the same images were scored; the one with the best mIoU is compared
with every other by a paired bootstrap, and where the 95 % interval of the difference holds 0, the two tie.

Writes compare.md and compare.png to --out-dir. Latency is measured now, on this machine, the models taking
turns; GFLOPs count a multiplication and an addition as two; both are of one forward pass.
"""
from config import add_group_flag, add_run_flags, script_parser


def parse_args():
    """Return the flags."""
    parser = script_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="--out-dir of evaluate.py (and train.py)")
    add_group_flag(parser)
    add_run_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import json
import math
import os
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dataio import schema
from dataio.readers import may_be_equal
import utils
import visualize
from checkpoint import load_model
from config import FIELDS, InputError, count_of, fields_affecting
from metrics import (FEW, ConfusionMatrix, best_row, bootstrap_interval, counts_per_image, group_images,
                     has_stalled, nan_mean, nan_mean_per_class, paired_bootstrap, sum_groups)
from models.weights import hash_model_file

SETTINGS_OF_REPEATS = {"seed", "fold"}  # in which the runs of one model differ
TIMED_PASSES, WARM_UP_PASSES = 12, 2  # forward passes of each model


# --- runs -------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """One scored model: its folder, metrics.json, the file that was scored; of its training config.json and
    the rows of history.jsonl, both empty where the folder holds no run of train.py.
    """

    folder: Path
    metrics: dict
    model: Path
    config: dict
    history: list

    @property
    def scored_epoch(self):
        """The epoch that was scored and how it was chosen, as text; empty where that is not known."""
        if not self.history:
            return ""
        if self.model.stem == "last":
            return f"{len(self.history)}, the last"
        return f"{best_row(self.history)['epoch']}, the best of {len(self.history)} on validation"

    @property
    def train_images(self):
        """The number of training images, None where it is not known."""
        return self.config.get("images", {}).get("train")

    @property
    def model_title(self):
        """What was trained, as text."""
        if not self.config:
            return self.model.name
        start = ", random weights" if self.config["weights"] == "none" else ""
        if self.config["arch"] != "dinov2":
            return self.config["arch"] + start
        return f"{self.config['backbone']} + {self.config['head']}{start}"

    @property
    def is_scored_on_its_data(self):
        """Whether the data set that was scored is the one of the training, of which it may be a split."""
        fingerprint = self.metrics["protocol"].get("data_fingerprint")
        return bool(self.config) and may_be_equal(self.config.get("data_fingerprint"), fingerprint)

    def key_without(self, ignored):
        """Return a text that is equal for runs that differ in `ignored` settings at most."""
        if not self.config:
            return str(self.folder)
        protocol, config = self.metrics["protocol"], self.config
        settings = {name: config.get(name, utils.finite(field.default)) for name, field in FIELDS.items()
                    if name not in {*ignored, *fields_affecting("nothing")}}
        scored = [protocol[name] for name in ("views", "split", "dataset")]
        trained = [config.get(name) for name in ("processes", "data_fingerprint", "extra_fingerprint",
                                                 "teacher_sha256")]
        number_of_folds = config.get("fold", ())[1:]
        return repr((settings, self.model.name, scored, trained, number_of_folds))


def read_run(folder):
    """Return the Run in a folder. Raises InputError where it was not scored, or trained on since, and where
    a file of it is damaged.
    """
    path, metrics = folder / "evaluation/metrics.json", read_metrics(folder)
    model, scored_hash = Path(metrics["protocol"]["model"]), metrics["protocol"]["weights_sha256"]
    if not (folder / "config.json").is_file():
        if model.is_file() and not hash_model_file(model).startswith(scored_hash):
            raise InputError(f"{path} is not of {model} as it is now: score it again")
        return Run(folder, metrics, model, {}, [])
    config = read_json(folder / "config.json", schema.RunConfig)
    history = read_json(folder / "history.jsonl", list[schema.LoggedRow], lines=True)
    for row in history:
        row["val_miou"] = math.nan if row["val_miou"] is None else row["val_miou"]
    if len(history) < config["epochs"] and not has_stalled(history, config.get("patience", 0)):
        epochs = count_of(config["epochs"], "epoch")
        raise InputError(f"{folder} has {len(history)} of its {epochs}: finish it first "
                         f"(python train.py --resume --out-dir {folder})")
    for name in ("last.pth", "best_model_iou.pth", model.name):  # the last: an exported file
        if (folder / name).is_file() and hash_model_file(folder / name).startswith(scored_hash):
            return Run(folder, metrics, folder / name, config, history)
    raise InputError(f"{path} is not of a model in {folder}: it was trained again, or another model was "
                     f"scored (python evaluate.py --model {folder / 'last.pth'} --out-dir {folder})")


def read_metrics(folder):
    """Return a folder's evaluation/metrics.json. Raises InputError where it is missing, empty or damaged."""
    path = folder / "evaluation/metrics.json"
    if not path.is_file():
        models = [folder / name for name in ("last.pth", "best_model_iou.pth") if (folder / name).is_file()]
        raise InputError(f"{folder} has no evaluation/metrics.json: score it first (python evaluate.py "
                         f"--model {models[0] if models else 'MODEL'} --out-dir {folder})")
    metrics = read_json(path, schema.Metrics)
    if not metrics["records"]:
        raise InputError(f"{path} has no image: score at least one")
    classes = len(metrics["per_class"])
    for record in metrics["records"]:
        if len(record["boundary"]) != classes or any(max(cell[:2]) >= classes for cell in record["cells"]):
            raise InputError(f"{path} was edited or is damaged: {schema.describe(record['name'])} has "
                             f"other classes than the {classes} of per_class")
    return metrics


def read_json(path, form, lines=False):
    """Return a JSON file, or the list of its `lines`, as schema.check does. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
        content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is missing or damaged ({error})") from None
    return schema.check(form, content, path)


# --- the columns: runs that are repeats of one model ------------------------------------------------------
class SeedScores(NamedTuple):
    """Scores of one seed, its folds together.

    images: names of the N images, sorted; contents: of metrics.json, "" where not known; counts: (N, 3, K)
    correct, true and predicted pixels; matrix: the ConfusionMatrix of all images; boundary: (K,) boundary F1,
    the mean over the images.
    """

    images: list
    contents: list
    counts: np.ndarray
    matrix: ConfusionMatrix
    boundary: np.ndarray


@dataclass
class Column:
    """One model of the table: its heading, the names of its classes, its Runs, SeedScores of each seed."""

    name: str
    classes: list
    runs: list
    seeds: list

    @property
    def mious(self):
        """The mIoU of every seed."""
        return [seed.matrix.miou() for seed in self.seeds]

    @property
    def miou(self):
        """The mean of the mIoU over the seeds."""
        return float(np.mean(self.mious))

    @property
    def class_ious(self):
        """The mean of the IoU of every class over the seeds, (K,)."""
        return nan_mean_per_class([seed.matrix.per_class_iou().tolist() for seed in self.seeds])


def make_columns(runs):
    """Return the Columns of the runs, the best mIoU first. Raises InputError where they cannot be ranked."""
    columns = [make_column(repeats) for repeats
               in group_by(runs, lambda run: run.key_without(SETTINGS_OF_REPEATS))]
    for column in columns[1:]:
        check_comparable(columns[0], column)
    if len({column.name for column in columns}) < len(columns):
        for column in columns:
            column.name = column.runs[0].folder.as_posix()
    return sorted(columns, key=lambda column: -column.miou if math.isfinite(column.miou) else 1)


def group_by(items, key):
    """Return lists of the items with equal key(item), in the order in which the keys come."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def make_column(runs):
    """Return the Column of the runs of one model. Raises InputError where its seeds cannot be averaged."""
    classes = [row["name"] for row in runs[0].metrics["per_class"]]
    folders = ", ".join(str(run.folder) for run in runs)
    if len({run.config.get("code") for run in runs} - {None}) > 1:
        print(f"note: {folders} count as one model, but the code was changed between them")
    seeds = []
    for folds in group_by(runs, lambda run: run.config.get("seed")):
        records = [record for run in folds for record in run.metrics["records"]]
        if len({record["name"] for record in records}) < len(records):
            raise InputError(f"{folders} scored the same images and differ in --fold at most: give only one "
                             "of them, or score folds on the images that validated them")
        seeds.append(score_seed(records, len(classes)))
    for seed in seeds[1:]:
        if seed.images != seeds[0].images or not same_pixels(seed, seeds[0]):
            raise InputError(f"{folders} differ in --seed alone, but were not scored on the same images: "
                             "give every seed the same folds")
    return Column(column_name([run.folder.name for run in runs]), classes, runs, seeds)


def score_seed(records, num_classes):
    """Return the SeedScores of the records of metrics.json."""
    records = sorted(records, key=lambda record: record["name"])
    matrix = ConfusionMatrix(num_classes)
    for record in records:
        truth, pred, pixels = torch.tensor(record["cells"], dtype=torch.int64).view(-1, 3).T
        matrix.counts[truth, pred] += pixels
    boundaries = np.array([record["boundary"] for record in records], float)  # null -> NaN
    images, contents = zip(*((record["name"], record.get("content", "")) for record in records), strict=True)
    return SeedScores([*images], [*contents], counts_per_image(records, num_classes), matrix,
                      nan_mean_per_class(boundaries))


def same_pixels(seed, other):
    """Return whether the images and masks of two SeedScores are the same, image by image: as many pixels of
    every class and, as far as they are known, the same contents.
    """
    pairs = zip(seed.contents, other.contents, strict=True)
    return np.array_equal(seed.counts[:, 1], other.counts[:, 1]) and \
        all(content == another for content, another in pairs if content and another)


def column_name(folder_names):
    """Return what the names of folders share but for a number: bn of bn-10, bn-11; bn518 of bn518-0."""
    prefix = os.path.commonprefix(folder_names)
    if len(folder_names) > 1:
        prefix = re.sub(r"([-_. ])[^-_. ]*$", r"\1", prefix)
    return prefix.rstrip("-_. ") or folder_names[0]


def check_comparable(first, other):
    """Raise InputError where two Columns were not scored on the same images, masks and classes."""
    seed, other_seed = first.seeds[0], other.seeds[0]
    if other.classes != first.classes:
        what = f"the classes ({', '.join(first.classes[:5])} / {', '.join(other.classes[:5])})"
    elif [Path(name).name for name in seed.images] != [Path(name).name for name in other_seed.images]:
        what = f"the images that were scored ({len(seed.images)} / {len(other_seed.images)})"
    elif not same_pixels(seed, other_seed):
        what = "the contents of the images or masks that were scored"
    else:
        return
    raise InputError(f"{first.runs[0].folder} and {other.runs[0].folder} cannot be ranked: {what} differ")


# --- measuring --------------------------------------------------------------------------------------------
def gflops(model, image):
    """Return the billions of operations, two per multiply-add, of a forward pass on an image (1, C, H, W)."""
    # torch does not count the fused attention of CPUs; as matrix products it does
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(image)
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def measure(columns, device):
    """Return ([GFLOPs], [milliseconds], [million parameters]) of a forward pass of each model on one image at
    the size it was scored at.

    The models take turns, so that whatever else the machine does affects all of them; the median counts.
    """
    precision = utils.Precision("auto", device)
    models, images, flops, sizes = [], [], [], []
    for column in columns:
        run = column.runs[0]
        model, _ = load_model(run.model)
        image = torch.zeros(1, 3, *run.metrics["protocol"]["imgsz"], dtype=torch.uint8)
        flops.append(gflops(model, image))
        sizes.append(sum(parameter.numel() for parameter in model.parameters()) / 1e6)
        models.append(model.to(device))
        images.append(image.to(device))
    seconds = [[] for _ in columns]
    for _ in range(WARM_UP_PASSES + TIMED_PASSES):
        for model, image, times in zip(models, images, seconds, strict=True):
            start = time.perf_counter()
            with precision.autocast():
                model(image).max(1).indices.cpu()  # to the CPU, so that the GPU has finished
            times.append(time.perf_counter() - start)
    return flops, [1000 * statistics.median(times[WARM_UP_PASSES:]) for times in seconds], sizes


# --- the table --------------------------------------------------------------------------------------------
def score_rows(columns, groups):
    """Return the rows [(label, [cell of each column])] of what was scored, the best in bold.

    groups: the group of each image, as group_images returns.
    """
    counts = [[sum_groups(seed.counts, groups) for seed in column.seeds] for column in columns]
    differences = [paired_bootstrap(counts[0], other) for other in counts]  # from the best
    enough = len(set(groups)) >= FEW  # else nothing is claimed
    ties = [enough and difference["low"] <= 0 <= difference["high"] for difference in differences]
    mious, intervals, against_best = [], [], []
    for column, column_counts, difference, tie in zip(columns, counts, differences, ties, strict=True):
        spread = f" ± {statistics.stdev(column.mious):.3f}" if len(column.seeds) > 1 else ""
        mious.append(f"**{column.miou:.3f}{spread}**" if tie else f"{column.miou:.3f}{spread}")
        intervals.append("{:.3f} to {:.3f}".format(*bootstrap_interval(column_counts)))
        text = "{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**difference)
        against_best.append(f"tie, {text}" if tie else text)
    against_best[0] = "best"

    def means(value):
        return score_cells([nan_mean([value(seed) for seed in column.seeds]) for column in columns])

    rows = [("mIoU", mious), ("seeds", [str(len(column.seeds)) for column in columns]),
            ("95 % interval", intervals), ("against the best", against_best),
            ("boundary F1", means(lambda seed: nan_mean(seed.boundary))),
            ("mean Dice", means(lambda seed: seed.matrix.mean_dice())),
            ("pixel accuracy", means(lambda seed: seed.matrix.pixel_accuracy()))]
    for id, name in enumerate(columns[0].classes):
        rows.append((f"IoU {name}", score_cells([column.class_ious[id] for column in columns])))
    return rows


def cost_rows(columns, flops, latency, parameters):
    """Return the rows [(label, [cell of each column])] of what the models are and cost, as measure returns
    it.
    """
    trained, minutes = [], []
    for column in columns:
        runs = [run for run in column.runs if run.config]
        trained.append(runs[0].config["parameters"][0] / 1e6 if runs else math.nan)
        seconds = [sum(row["seconds"] for row in run.history) for run in runs]
        minutes.append(statistics.mean(seconds) / 60 if runs else math.nan)

    def texts(value):
        return [distinct([value(run) for run in column.runs]) for column in columns]

    return [("parameters trained, M", number_cells(trained, ".3f")),
            ("parameters, M", number_cells(parameters, ".2f")),
            ("GFLOPs, one pass", number_cells(flops, ".2f")),
            ("latency of a pass, ms", number_cells(latency, ".1f")),
            ("training, minutes", number_cells(minutes, ".1f")),
            ("training images", texts(lambda run: run.train_images)),
            ("epoch that was scored", texts(lambda run: run.scored_epoch)),
            ("scored as", texts(lambda run: run.metrics["protocol"]["views"])),
            ("trained on", texts(lambda run: run.config.get("device")))]


def number_cells(values, form):
    """Return numbers as cells: `-` for NaN and for 0, which are not known."""
    return [f"{value:{form}}" if value and math.isfinite(value) else "-" for value in values]


def distinct(values):
    """Return the different values as one cell, `-` where none is known."""
    return " / ".join(dict.fromkeys(str(value) for value in values if value not in (None, ""))) or "-"


def score_cells(values):
    """Return scores as cells, `absent` for NaN, the highest in bold where they are not all the same."""
    cells = ["absent" if math.isnan(value) else f"{value:.3f}" for value in values]
    best = max((cell for cell in cells if cell != "absent"), default="")
    return [f"**{cell}**" if cell == best and len(set(cells)) > 1 else cell for cell in cells]


def markdown(columns, rows):
    """Return the table as Markdown: a column for every model."""
    titles = [f"{column.name} ({column.runs[0].model_title})" for column in columns]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in rows]
    return "\n".join(lines) + "\n"


def heading(columns, groups, pattern, device):
    """Return the lines above the table: what was scored, how to read it, warnings."""
    protocol, units = columns[0].runs[0].metrics["protocol"], len(set(groups))
    unit = f"{units} groups by {pattern}" if pattern else f"{units} images, taken as independent"
    lines = [f"{protocol['dataset']}, {protocol['split']}, {count_of(len(groups), 'image')}, each mask at "
             "its own size",
             f"± is the standard deviation over seeds; intervals (95 %, bootstrap) are over {unit}, and do "
             "not cover other seeds; bold: the best and what ties with it",
             f"latency and GFLOPs (two per multiply-add) of one forward pass of an image on {device} "
             f"({utils.Precision('auto', device)})"]
    if units < FEW:
        lines.append(f"{units} images or groups are too few: the intervals are much too narrow to tell a tie "
                     "from a difference")
    if not pattern and any(run.metrics.get("sequences") for run in columns[0].runs):
        lines.append("frames of a clip are alike, and these intervals are too narrow: --group-by REGEX takes "
                     "them over drives or clips")
    on_own_data = [run for column in columns for run in column.runs if run.is_scored_on_its_data]
    if any("best" in run.scored_epoch and run.metrics["protocol"]["split"] == "val" for run in on_own_data):
        lines.append("an epoch that was chosen on the images it is scored on scores a little too high: score "
                     "last.pth instead")
    if any(run.metrics["protocol"]["split"] in ("train", "all") for run in on_own_data):
        lines.append("warning: models are scored on images that they were trained on")
    return "\n".join(f"{line}.  " for line in lines) + "\n\n"


# --- the picture ------------------------------------------------------------------------------------------
def draw(columns, path):
    """Draw validation mIoU over epochs, all runs on one axis, beside the IoU of every class.

    Where models differ in --train-images alone: mIoU over that number, beside the classes of the largest.
    """
    by_images = sorted(columns, key=lambda column: column.runs[0].train_images or 0)
    models = group_by(by_images, lambda column: column.runs[0].key_without({*SETTINGS_OF_REPEATS,
                                                                            "train_images"}))
    names = columns[0].classes
    figure, (curves, bars) = visualize.new_figure(13, max(5, 1.5 + 0.28 * len(names)), columns=2)
    if len(models) < len(columns):
        draw_over_images(models, curves)
        columns = [model[-1] for model in models]
    else:
        draw_over_epochs(columns, curves)
    curves.grid(alpha=0.3)
    height = 0.7 / len(columns)
    for index, column in enumerate(columns):
        positions = [id - 0.35 + height * (index + 0.5) for id in range(len(names))]
        bars.barh(positions, column.class_ious, height=height, color=f"C{index % 10}")
    bars.set_yticks(range(len(names)), map(visualize.short, names))
    bars.set(xlabel="IoU as scored", xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
    bars.grid(alpha=0.3, axis="x")
    visualize.save_figure(figure, path)


def draw_over_epochs(columns, axis):
    """Plot the validation mIoU of every run over its epochs."""
    for index, column in enumerate(columns):
        label = f"{column.name}: {column.miou:.3f}"
        for run in column.runs:
            epochs, mious = [row["epoch"] for row in run.history], [row["val_miou"] for row in run.history]
            axis.plot(epochs, mious, "o-", ms=3, color=f"C{index % 10}", label=label)
            label = None
    axis.set(xlabel="epoch", ylabel="validation mIoU while training", ylim=(0, 1))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(title="mIoU as scored")


def draw_over_images(models, axis):
    """Plot mIoU over the number of training images; models: [[Column of each number, smallest first]]."""
    ticks = set()
    for index, columns in enumerate(models):
        images = [column.runs[0].train_images for column in columns]
        if not images[0]:  # not known
            continue
        mious = [column.miou for column in columns]
        spreads = [statistics.stdev(column.mious) if len(column.seeds) > 1 else 0 for column in columns]
        label = f"{columns[-1].runs[0].model_title}: {mious[-1]:.3f}"
        axis.errorbar(images, mious, spreads, fmt="o-", capsize=3, color=f"C{index % 10}", label=label)
        ticks.update(images)
    axis.set(xlabel="training images", ylabel="mIoU as scored, ± standard deviation over seeds", ylim=(0, 1),
             xscale="log")
    axis.set_xticks(sorted(ticks), map(str, sorted(ticks)))
    axis.minorticks_off()
    axis.legend()


def main():
    """Read, check, measure, rank, write."""
    args = parse_args()
    device = utils.pick_device(args.device)
    columns = make_columns([read_run(Path(folder)) for folder in args.runs])
    groups = group_images(columns[0].seeds[0].images, args.group_by)
    out_dir = Path(utils.make_folder(args.out_dir))
    rows = score_rows(columns, groups) + cost_rows(columns, *measure(columns, device))
    text = heading(columns, groups, args.group_by, device) + markdown(columns, rows)
    utils.write_text(out_dir / "compare.md", text)
    with visualize.drawing(out_dir / "compare.png"):
        draw(columns, out_dir / "compare.png")
    print(f"{text}\nwritten: {out_dir / 'compare.md'}, {out_dir / 'compare.png'}")


if __name__ == "__main__":
    utils.run_main(main)
