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
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

from config import add_group_flag, add_run_flags, script_parser


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="--out-dir of evaluate.py (and train.py)")
    add_group_flag(parser)
    add_run_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import json
import math
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from dataio import schema
import utils
import visualize
from checkpoint import load_model
from config import FIELDS, InputError, count_of, fields_affecting
from metrics import (FEW, best_row, bootstrap_interval, counts_of, group_images, has_stalled, mean_of_known,
                     mean_over_images, miou_of_counts, paired_bootstrap, scores_of_counts, sum_groups)
from models.weights import hash_model_file

REPEATS = {"seed", "fold"}  # settings in which the runs of one model differ
ROUNDS = 12  # timed forward passes of each model, after two that are not


# --- what is compared -------------------------------------------------------------------------------------
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
    def epoch(self):
        """The epoch that was scored, and how it was chosen, in words."""
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
    def name(self):
        """What was trained, in words."""
        if not self.config:
            return self.model.name
        config, start = self.config, ", random weights" if self.config["weights"] == "none" else ""
        if config["arch"] != "dinov2":
            return config["arch"] + start
        return f"{config['backbone']} + {config['head']}{start}"

    def settings(self, but=REPEATS):
        """Return all settings `but` some as text, equal for the runs of one model."""
        if not self.config:
            return str(self.folder)
        protocol, config = self.metrics["protocol"], self.config
        shared = {name: config.get(name, utils.finite(field.default)) for name, field in FIELDS.items()
                  if name not in {*but, *fields_affecting("nothing")}}
        scored = [protocol[name] for name in ("views", "split", "dataset")]
        trained = [config.get(name) for name in ("processes", "data_fingerprint", "extra_fingerprint")]
        return repr((shared, self.model.name, scored, trained, config.get("fold", ())[1:]))


class Column:
    """One model of the table: its runs, and what they scored on every image.

    names: of the N images; counts: one (N, 3, K) array for every seed, pixels right, of truth, of prediction,
    in the same order; boundaries: the boundary F1 of each class, (K,), for every seed.
    """

    def __init__(self, runs):
        self.runs = runs
        names = [run.folder.name for run in runs]
        prefix = os.path.commonprefix(names)
        if len(runs) > 1:  # what the names share but for a number: bn of bn-10 and bn-11, bn518 of bn518-0
            prefix = re.sub(r"([-_. ])[^-_. ]*$", r"\1", prefix)
        self.name = prefix.rstrip("-_. ") or names[0]
        self.classes = [row["name"] for row in runs[0].metrics["per_class"]]
        seeds = {}
        for run in runs:
            seeds.setdefault(run.config.get("seed"), []).append(run)
        if len({run.config.get("code") for run in runs} - {None}) > 1:
            print(f"note: {self.folders()} count as one model, but the code was changed between them")
        tables = [self.one_seed(part) for part in seeds.values()]
        self.names = tables[0][0]
        for names, counts, _ in tables:
            if names != self.names or not np.array_equal(counts[:, 1], tables[0][1][:, 1]):
                raise InputError(f"{self.folders()} differ in --seed alone, but were not scored on the same "
                                 "images: give every seed the same folds")
        self.counts = [counts for _, counts, _ in tables]
        self.boundaries = [mean_over_images(boundaries) for *_, boundaries in tables]

    def one_seed(self, runs):
        """Return (names, counts (N, 3, K), boundaries (N, K)) of the folds of a seed together."""
        records = [record for run in runs for record in run.metrics["records"]]
        if len({record["name"] for record in records}) < len(records):
            raise InputError(f"{self.folders()} scored the same images and differ in --fold at most: name "
                             "one of them, or score folds on the images that validated them")
        records.sort(key=lambda record: record["name"])
        counts = counts_of(records, len(self.classes))
        boundaries = np.array([record["boundary"] for record in records], float)  # null -> NaN
        return [record["name"] for record in records], counts, boundaries

    def folders(self):
        """Return the folders of the runs as text."""
        return ", ".join(str(run.folder) for run in self.runs)

    def mean(self, score):
        """Return the mean over the seeds of score(counts summed over the images), of those that are known."""
        return mean_over_images(np.array([np.atleast_1d(score(counts.sum(0))) for counts in self.counts]))

    @property
    def mious(self):
        """The mIoU of every seed."""
        return miou_of_counts(np.sum(self.counts, axis=1)).tolist()

    @property
    def miou(self):
        """The mean of the mIoU over the seeds."""
        return float(np.mean(self.mious))


def read_json(path):
    """Return the content of a JSON file. Raises InputError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error})") from None


def read_run(folder):
    """Return the Run in a folder. Raises InputError where it was not scored, or trained on since, and where
    a file of it is damaged.
    """
    path, models = folder / "evaluation/metrics.json", [folder / "last.pth", folder / "best_model_iou.pth"]
    if not path.is_file():
        known = next((model for model in models if model.is_file()), "MODEL")
        raise InputError(f"{folder} has no evaluation/metrics.json: score it first (python evaluate.py "
                         f"--model {known} --out-dir {folder})")
    metrics = schema.check(schema.Metrics, read_json(path), path)
    protocol, classes = metrics["protocol"], len(metrics["per_class"])
    if not metrics["records"]:
        raise InputError(f"{path} has no image: score some")
    for record in metrics["records"]:
        if len(record["boundary"]) != classes or any(max(cell[:2]) >= classes for cell in record["cells"]):
            raise InputError(f"{path} was made by hand or is damaged: {schema.describe(record['name'])} has "
                             f"other classes than the {classes} of per_class")
    if not (folder / "config.json").is_file():
        model = Path(protocol["model"])
        if model.is_file() and not hash_model_file(model).startswith(protocol["weights_sha256"]):
            raise InputError(f"{path} is not of {model} as it is now: score it again")
        return Run(folder, metrics, model, {}, [])
    config = schema.check(schema.RunConfig, read_json(folder / "config.json"), folder / "config.json")
    history = read_history(folder / "history.jsonl")
    if len(history) < config["epochs"] and not has_stalled(history, config.get("patience", 0)):
        epochs = count_of(config["epochs"], "epoch")
        raise InputError(f"{folder} has {len(history)} of its {epochs}: finish it first "
                         f"(python train.py --resume --out-dir {folder})")
    models.append(folder / Path(protocol["model"]).name)  # an exported file
    scored = [model for model in models if model.is_file()
              and hash_model_file(model).startswith(protocol["weights_sha256"])]
    if not scored:
        raise InputError(f"{path} is not of a model in {folder}: it was trained again, or another model was "
                         f"scored (python evaluate.py --model {models[0]} --out-dir {folder})")
    return Run(folder, metrics, scored[0], config, history)


def read_history(path):
    """Return the rows of history.jsonl. Raises InputError where it is missing or damaged."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line, object_hook=nan_for_null) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged or missing ({error})") from None
    return schema.check(schema.LoggedHistory, rows, path)


def nan_for_null(row):
    """Return a JSON object with NaN where it has null: numbers that were not finite when it was written."""
    return {key: math.nan if value is None else value for key, value in row.items()}


def columns_of(runs):
    """Return the Columns of the runs, the best mIoU first. Raises InputError where they cannot be ranked."""
    models = {}
    for run in runs:
        models.setdefault(run.settings(), []).append(run)
    columns = [Column(part) for part in models.values()]
    first = columns[0]
    for column in columns[1:]:
        if column.classes != first.classes:
            what = f"the classes ({', '.join(first.classes[:5])} / {', '.join(column.classes[:5])})"
        elif [Path(name).name for name in column.names] != [Path(name).name for name in first.names]:
            what = f"the images that were scored ({len(first.names)} / {len(column.names)})"
        elif not np.array_equal(column.counts[0][:, 1], first.counts[0][:, 1]):
            what = "the masks that were scored"
        else:
            continue
        raise InputError(f"{first.runs[0].folder} and {column.runs[0].folder} cannot be ranked: {what} "
                         "differ")
    if len({column.name for column in columns}) < len(columns):
        for column in columns:
            column.name = column.runs[0].folder.as_posix()
    return sorted(columns, key=lambda column: -column.miou if math.isfinite(column.miou) else 1)


# --- measuring --------------------------------------------------------------------------------------------
@torch.inference_mode()
def measure(columns, device):
    """Return ([GFLOPs], [milliseconds], [million parameters]) of a forward pass of each model on one image at
    the size it was scored at.

    The models take turns, so that whatever else the machine does meets all of them; the median counts.
    """
    precision = utils.Precision("auto", device)
    models, images, flops, sizes = [], [], [], []
    for column in columns:
        run = column.runs[0]
        model, _ = load_model(run.model)
        image = torch.zeros(1, 3, *run.metrics["protocol"]["imgsz"], dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter:
            model(image)
        flops.append(counter.get_total_flops() / 1e9)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()) / 1e6)
        models.append(model.to(device))
        images.append(image.to(device))
    seconds = [[] for _ in columns]
    for _ in range(ROUNDS + 2):
        for model, image, times in zip(models, images, seconds, strict=True):
            start = time.perf_counter()
            with precision.autocast():
                model(image).max(1).indices.cpu()  # to the CPU, so that the GPU has finished
            times.append(time.perf_counter() - start)
    return flops, [1000 * statistics.median(times[2:]) for times in seconds], sizes


# --- the table --------------------------------------------------------------------------------------------
def score_rows(columns, groups):
    """Return the rows [(label, [cell of each column])] of what was scored, the best in bold.

    groups: the group of each image, as group_images returns.
    """
    tables = [[sum_groups(counts, groups) for counts in column.counts] for column in columns]
    intervals = ["{:.3f} to {:.3f}".format(*bootstrap_interval(counts)) for counts in tables]
    found = [paired_bootstrap(tables[0], counts) for counts in tables]
    enough = len(tables[0][0]) >= FEW  # else nothing is claimed
    ties = [enough and row["low"] <= 0 <= row["high"] for row in found]
    against = ["best", *("tie, " * tie + "{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**row)
                         for row, tie in zip(found[1:], ties[1:], strict=True))]
    spreads = [f" ± {statistics.stdev(column.mious):.3f}" if len(column.mious) > 1 else ""
               for column in columns]
    mious = [f"{column.miou:.3f}{spread}" for column, spread in zip(columns, spreads, strict=True)]
    mious = [f"**{text}**" if tie else text for text, tie in zip(mious, ties, strict=True)]
    scores = {key: np.array([column.mean(lambda counts, key=key: scores_of_counts(counts)[key])
                             for column in columns]) for key in ("dice", "accuracy", "iou")}
    boundaries = [mean_of_known([mean_of_known(seed) for seed in column.boundaries]) for column in columns]
    return [("mIoU", mious), ("seeds", [str(len(column.counts)) for column in columns]),
            ("95 % interval", intervals), ("against the best", against), ("boundary F1", highest(boundaries)),
            ("mean Dice", highest(scores["dice"][:, 0])),
            ("pixel accuracy", highest(scores["accuracy"][:, 0])),
            *((f"IoU {name}", highest(scores["iou"][:, id])) for id, name in enumerate(columns[0].classes))]


def cost_rows(columns, flops, latency, parameters):
    """Return the rows [(label, [cell of each column])] of what the models are and cost, as measure says."""
    of_runs = [[run for run in column.runs if run.config] for column in columns]
    trained = [runs[0].config["parameters"][0] / 1e6 if runs else math.nan for runs in of_runs]
    seconds = [[sum(row["seconds"] for row in run.history) for run in runs] for runs in of_runs]
    minutes = [statistics.mean(each) / 60 if each else math.nan for each in seconds]
    views = [[run.metrics["protocol"]["views"] for run in column.runs] for column in columns]
    return [("parameters trained, M", [number(value, ".3f") for value in trained]),
            ("parameters, M", [number(value, ".2f") for value in parameters]),
            ("GFLOPs, one pass", [number(value, ".2f") for value in flops]),
            ("latency of a pass, ms", [number(value, ".1f") for value in latency]),
            ("training, minutes", [number(value, ".1f") for value in minutes]),
            ("training images", [joined(run.train_images for run in runs) for runs in of_runs]),
            ("epoch that was scored", [joined(run.epoch for run in column.runs) for column in columns]),
            ("scored as", list(map(joined, views))),
            ("trained on", [joined(run.config["device"] for run in runs) for runs in of_runs])]


def number(value, form):
    """Return a number as a cell: `-` for NaN and for 0, which are not known."""
    return f"{value:{form}}" if value and value == value else "-"


def joined(values):
    """Return the different values as one cell."""
    return " / ".join(dict.fromkeys(str(value) for value in values if value not in (None, ""))) or "-"


def highest(values):
    """Return scores as cells, `absent` for NaN, the highest in bold where they are not all the same."""
    cells = ["absent" if math.isnan(value) else f"{value:.3f}" for value in values]
    best = max((cell for cell in cells if cell != "absent"), default="")
    return [f"**{cell}**" if cell == best and len(set(cells)) > 1 else cell for cell in cells]


def markdown(columns, rows):
    """Return the table as Markdown: a column for every model."""
    lines = ["| | " + " | ".join(f"{column.name} ({column.runs[0].name})" for column in columns) + " |",
             "|---|" + "---:|" * len(columns)]
    return "\n".join(lines + [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows]) + "\n"


def heading(columns, groups, pattern, device):
    """Return what the table has to say about itself, a few lines."""
    protocol = columns[0].runs[0].metrics["protocol"]
    units = len(set(groups))
    over = f"{units} groups by {pattern}" if pattern else f"{units} images, taken as independent"
    lines = [f"{protocol['dataset']}, {protocol['split']}, {count_of(len(groups), 'image')}, each mask at "
             "its own size",
             f"± is the standard deviation over seeds; intervals (95 %, bootstrap) are over {over}, and say "
             "nothing of other seeds; bold: the best and what ties with it",
             f"latency and GFLOPs (two per multiply-add) of one forward pass of an image on {device} "
             f"({utils.Precision('auto', device)})"]
    if units < FEW:
        lines.append(f"{units} images or groups are too few: the intervals are much too narrow to tell a tie "
                     "from a difference")
    if not pattern and any(run.metrics.get("sequences") for run in columns[0].runs):
        lines.append("frames of a clip are alike, and these intervals are too narrow: --group-by REGEX takes "
                     "them over drives or clips")
    of_own_data = [run for column in columns for run in column.runs if run.config
                   and run.config.get("data_fingerprint") == run.metrics["protocol"].get("data_fingerprint")]
    if any("best" in run.epoch and run.metrics["protocol"]["split"] == "val" for run in of_own_data):
        lines.append("an epoch that was chosen on the images it is scored on scores a little too high: score "
                     "last.pth instead")
    if any(run.metrics["protocol"]["split"] in ("train", "all") for run in of_own_data):
        lines.append("warning: models are scored on images that they were trained on")
    return "\n".join(f"{line}.  " for line in lines) + "\n\n"


def draw(columns, path):
    """Draw validation mIoU over epochs, all runs on one axis, beside the IoU of every class.

    Where models differ in --train-images alone: mIoU over that number, beside the classes of the largest.
    """
    names, lines = columns[0].classes, {}
    for column in sorted(columns, key=lambda column: column.runs[0].train_images or 0):
        lines.setdefault(column.runs[0].settings(but={*REPEATS, "train_images"}), []).append(column)
    figure, (curves, bars) = visualize.new_figure(13, max(5, 1.5 + 0.28 * len(names)), columns=2)
    if len(lines) < len(columns):
        draw_over_images(list(lines.values()), curves)
        columns = [line[-1] for line in lines.values()]
    else:
        draw_over_epochs(columns, curves)
    curves.grid(alpha=0.3)
    for place, column in enumerate(columns):
        ious = column.mean(lambda counts: scores_of_counts(counts)["iou"])
        positions = [id + 0.7 * ((place + 0.5) / len(columns) - 0.5) for id in range(len(names))]
        bars.barh(positions, ious, height=0.7 / len(columns), color=f"C{place % 10}")
    bars.set_yticks(range(len(names)), map(visualize.short, names))
    bars.set(xlabel="IoU as scored", xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
    bars.grid(alpha=0.3, axis="x")
    visualize.save_figure(figure, path)


def draw_over_epochs(columns, axis):
    """Plot the validation mIoU of every run over its epochs."""
    for place, column in enumerate(columns):
        label = f"{column.name}: {column.miou:.3f}"
        for run in column.runs:
            epochs, mious = [row["epoch"] for row in run.history], [row["val_miou"] for row in run.history]
            axis.plot(epochs, mious, "o-", ms=3, color=f"C{place % 10}", label=label)
            label = None
    axis.set(xlabel="epoch", ylabel="validation mIoU while training", ylim=(0, 1))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(title="mIoU as scored")


def draw_over_images(lines, axis):
    """Plot mIoU over the number of training images; lines: [[Column of each number, smallest first], ...]."""
    for place, line in enumerate(lines):
        images, mious = [column.runs[0].train_images for column in line], [column.miou for column in line]
        spreads = [statistics.stdev(column.mious) if len(column.mious) > 1 else 0 for column in line]
        label = f"{line[-1].runs[0].name}: {line[-1].miou:.3f}"
        if images[0]:  # known
            axis.errorbar(images, mious, spreads, fmt="o-", capsize=3, color=f"C{place % 10}", label=label)
    numbers = sorted({column.runs[0].train_images or 0 for line in lines for column in line} - {0})
    axis.set(xlabel="training images", ylabel="mIoU as scored, ± standard deviation over seeds", ylim=(0, 1),
             xscale="log")
    axis.set_xticks(numbers, map(str, numbers))
    axis.minorticks_off()
    axis.legend()


def main():
    """Read, check, measure, rank, write."""
    args = parse_args()
    device = utils.pick_device(args.device)
    columns = columns_of([read_run(Path(folder)) for folder in args.runs])
    groups = group_images(columns[0].names, args.group_by)
    utils.make_folder(args.out_dir)
    rows = score_rows(columns, groups) + cost_rows(columns, *measure(columns, device))
    text = heading(columns, groups, args.group_by, device) + markdown(columns, rows)
    out_dir = Path(args.out_dir)
    utils.write_atomically(out_dir / "compare.md", lambda path: path.write_text(
        text, encoding="utf-8", errors="backslashreplace"))
    with visualize.drawing(out_dir / "compare.png"):
        draw(columns, out_dir / "compare.png")
    print(f"{text}\nwritten: {out_dir / 'compare.md'}, {out_dir / 'compare.png'}")


if __name__ == "__main__":
    utils.run_main(main)
