"""Compare finished runs of train.py: one Markdown table and one picture, best run first.

    python compare.py outputs/fcn outputs/segformer outputs/unet

Writes compare.md and compare.png to --out-dir. Runs are ranked by mIoU only where data, split, classes and
protocol are the same; otherwise it says what differs and ends with exit code 2. Latency is measured now, on
this machine, the models taking turns; GFLOPs count a multiplication and an addition as two.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

from config import add_run_flags, script_parser


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="--out-dir of a finished run")
    add_run_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import utils
import visualize
from checkpoint import load_model
from config import InputError, count_of
from metrics import best_row

MUST_AGREE = {"data_fingerprint": "the data files", "split_fingerprint": "the training / validation split",
              "class_names": "the classes", "protocol": "the protocol"}
OF_CONFIG = {*MUST_AGREE, "arch", "backbone", "head", "parameters", "imgsz", "epochs", "device", "dataset"}
OF_ROW = {"epoch", "seconds", "val_miou", "val_dice", "val_accuracy", "per_class_iou"}
ROUNDS = 12  # timed forward passes of each model, after two that are not


@dataclass
class Run:
    """One finished run: its folder, config.json, the rows of history.jsonl, its best row."""

    name: str
    folder: Path
    config: dict
    history: list

    @property
    def best(self):
        """The row of the epoch with the best validation mIoU."""
        return best_row(self.history)

    @property
    def model(self):
        """What was trained, in words."""
        if self.config["arch"] != "dinov2":
            return self.config["arch"]
        return f"{self.config['backbone']} + {self.config['head']}"


def read_run(folder):
    """Return the Run in a folder. Raises InputError where a file is missing or the run is not finished."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        history = [json.loads(line, object_hook=nan_for_null) for line in lines]
    except OSError as error:
        name = Path(error.filename).name
        raise InputError(f"{folder} is not a run of train.py ({name}: {error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{folder}: config.json or history.jsonl is damaged ({error})") from None
    for name, part, needed in (("config.json", config, OF_CONFIG), *(("history.jsonl", row, OF_ROW)
                                                                     for row in history)):
        missing = needed - part.keys() if isinstance(part, dict) else needed
        if missing:
            raise InputError(f"{folder / name} has no {', '.join(sorted(missing))}: train with this version")
    if len(history) < config["epochs"]:
        epochs = count_of(config["epochs"], "epoch")
        raise InputError(f"{folder} has {len(history)} of its {epochs}: finish it first "
                         f"(python train.py --resume --out-dir {folder})")
    return Run(folder.name, folder, config, history)


def nan_for_null(row):
    """Return a JSON object with NaN where it has null: numbers that were not finite when it was written."""
    return {key: math.nan if value is None else value for key, value in row.items()}


def check_comparable(runs):
    """Raise InputError that says which facts differ between the runs, and in which runs."""
    differences = []
    for key, what in MUST_AGREE.items():
        values = [run.config[key] for run in runs]
        other = next((run for run, value in zip(runs, values, strict=True) if value != values[0]), None)
        if other:
            shown = "" if key.endswith("fingerprint") else f": {values[0]} / {other.config[key]}"
            differences.append(f"{what} ({runs[0].folder} and {other.folder}{shown})")
    if differences:
        raise InputError(f"the runs cannot be ranked: {'; '.join(differences)} differ; train them alike")


@torch.inference_mode()
def measure(runs, device):
    """Return ([GFLOPs], [milliseconds]) of a forward pass on one image of each run's best model at its size.

    The models take turns, so that whatever else the machine does meets all of them; the median counts.
    """
    precision = utils.Precision("auto", device)
    models, images, flops = [], [], []
    for run in runs:
        model, _ = load_model(run.folder / "best_model_iou.pth")
        image = torch.zeros(1, 3, *run.config["imgsz"], dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter:
            model(image)
        flops.append(counter.get_total_flops() / 1e9)
        models.append(model.to(device))
        images.append(image.to(device))
    seconds = [[] for _ in runs]
    for _ in range(ROUNDS + 2):
        for model, image, times in zip(models, images, seconds, strict=True):
            start = time.perf_counter()
            with precision.autocast():
                model(image).max(1).indices.cpu()  # to the CPU, so that the GPU has finished
            times.append(time.perf_counter() - start)
    return flops, [1000 * statistics.median(times[2:]) for times in seconds]


def rows_of(runs, flops, latency):
    """Return the rows of the table: [(label, [value of each run], format, best = max, min or None)]."""
    rows = [("mIoU", [run.best["val_miou"] for run in runs], ".4f", max),
            ("mean Dice", [run.best["val_dice"] for run in runs], ".4f", max),
            ("pixel accuracy", [run.best["val_accuracy"] for run in runs], ".4f", max)]
    for id, name in enumerate(runs[0].config["class_names"]):
        ious = [run.best["per_class_iou"][id] for run in runs]
        rows.append((f"IoU {name}", [math.nan if iou is None else iou for iou in ious], ".3f", max))
    trained, total = zip(*(run.config["parameters"] for run in runs), strict=True)
    minutes = [sum(row["seconds"] for row in run.history) / 60 for run in runs]
    return rows + [("parameters trained, M", [count / 1e6 for count in trained], ".2f", None),
                   ("parameters, M", [count / 1e6 for count in total], ".2f", min),
                   ("GFLOPs, one image", flops, ".2f", min), ("latency, ms", latency, ".1f", min),
                   ("training, minutes", minutes, ".1f", min),
                   ("best epoch", [run.best["epoch"] for run in runs], "d", None),
                   ("trained on", [run.config["device"] for run in runs], "", None)]


def markdown(runs, rows):
    """Return the table as Markdown: a column for every run, the best value of a row in bold."""
    lines = ["| | " + " | ".join(f"{run.name} ({run.model})" for run in runs) + " |",
             "|---|" + "---:|" * len(runs)]
    for label, values, form, better in rows:
        known = [value for value in values if value == value]  # NaN: absent from truth and prediction
        cells = [("absent" if value != value else f"{value:{form}}") for value in values]
        if better and len(set(cells)) > 1:
            best = f"{better(known):{form}}"
            cells = [f"**{cell}**" if cell == best else cell for cell in cells]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(runs, path):
    """Draw validation mIoU over epochs, all runs on one axis, beside the IoU of every class."""
    names = runs[0].config["class_names"]
    figure, (curves, bars) = visualize.new_figure(13, max(5, 1.5 + 0.28 * len(names)), columns=2)
    for number, run in enumerate(runs):
        color = f"C{number % 10}"
        epochs, mious = zip(*((row["epoch"], row["val_miou"]) for row in run.history), strict=True)
        curves.plot(epochs, mious, "o-", ms=3, color=color, label=f"{run.name}: {run.best['val_miou']:.4f}")
        curves.plot(run.best["epoch"], run.best["val_miou"], "*", ms=13, color=color)
        ious = [math.nan if iou is None else iou for iou in run.best["per_class_iou"]]
        positions = [id + 0.7 * ((number + 0.5) / len(runs) - 0.5) for id in range(len(names))]
        bars.barh(positions, ious, height=0.7 / len(runs), color=color, label=run.name)
    curves.set(xlabel="epoch", ylabel="validation mIoU", ylim=(0, 1))
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.grid(alpha=0.3)
    curves.legend(title="best mIoU")
    bars.set_yticks(range(len(names)), map(visualize.short, names))
    bars.set(xlabel="IoU at the best epoch", xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
    bars.grid(alpha=0.3, axis="x")
    visualize.save_figure(figure, path)


def main():
    """Read, check, measure, rank, write."""
    args = parse_args()
    device = utils.pick_device(args.device)
    runs = [read_run(Path(folder)) for folder in args.runs]
    check_comparable(runs)
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = run.folder.as_posix()
    runs.sort(key=lambda run: -run.best["val_miou"] if math.isfinite(run.best["val_miou"]) else 1)
    utils.make_folder(args.out_dir)
    flops, latency = measure(runs, device)
    config = runs[0].config
    title = (f"{config['dataset']}, {len(config['class_names'])} classes, {config['protocol']}; latency and "
             f"GFLOPs of one image on {device} ({utils.Precision('auto', device)})\n\n")
    table = markdown(runs, rows_of(runs, flops, latency))
    out_dir = Path(args.out_dir)
    text = title + table
    utils.write_atomically(out_dir / "compare.md", lambda path: path.write_text(text, encoding="utf-8"))
    draw(runs, out_dir / "compare.png")
    print(f"{text}\nwritten: {out_dir / 'compare.md'}, {out_dir / 'compare.png'}")


if __name__ == "__main__":
    utils.run_main(main)
