"""Overlays, legends, masks with a palette, windows, the plots of a run, and the trackers of --log.

    drawn = overlay(image, pred, color_table(classes), alpha=0.5, keep=background_id(classes))
    plot_history(rows, "outputs")
    with Trackers(["tensorboard", "wandb"], "outputs", settings, classes) as trackers:
        trackers.follow(history)                     # the rows that they do not have yet, and the pictures
"""
import importlib.util
import json
import math
import os
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from config import IGNORE, InputError, one_line
from metrics import best_row
from utils import is_background, write_atomically

IGNORE_COLOR = (224, 224, 192)  # as in Pascal VOC
LONGEST_NAME = 32  # characters of a class name that pictures show
LARGEST_PLOT = 25  # inches that the rows of a plot may take: with many classes they get smaller
VAL_SCORES = ("val_accuracy", "val_miou", "val_dice")  # of every model; a head may have more
PLOTS = ("loss", "accuracy", "miou", "head_scores", "per_class_iou", "confusion_matrix")  # PNGs of plot_run


# --- color -----------------------------------------------------------------------------------------------
def color_table(classes):
    """Return (256, 3) uint8 RGB: the color of every class id, IGNORE_COLOR for 255, black elsewhere."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(classes)] = [color for _, color in classes]
    table[IGNORE] = IGNORE_COLOR
    return table


def background_id(classes):
    """Return the id of the class called background, whose pixels an overlay leaves as they are, or None."""
    return next((id for id, (name, _) in enumerate(classes) if is_background(name)), None)


def overlay(image, pred, table, alpha=0.5, keep=None, out=None):
    """Blend class colors over an image: (H, W, 3) uint8 RGB and (H, W) uint8 -> (H, W, 3) uint8.

    alpha: weight of the colors, 0..1; pixels of class `keep` stay as they are; table as from color_table;
    out: where the result goes, may be `image` itself.
    """
    colors = cv2.applyColorMap(pred, table[:, None])  # (H, W, 3), from the table
    if keep is not None:
        cv2.copyTo(image, cv2.inRange(pred, keep, keep), colors)
    return cv2.addWeighted(image, 1 - alpha, colors, alpha, 0, dst=out)


def save_mask(pred, classes, path):
    """Write class ids (H, W) uint8 as a palette PNG: pixel values are ids, colors the classes'."""
    picture = Image.fromarray(pred)
    picture.putpalette(color_table(classes).flatten().tolist())
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def short(name):
    """Return a class name as pictures show it: one line, the middle of a long one left out (beginnings are
    often alike).
    """
    name = " ".join(name.encode("utf-8", "replace").decode().split())  # of files, it may be no UTF-8
    head = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:head]}…{name[head + 1 - LONGEST_NAME:]}"


def legend(classes):
    """Return a picture (H, W, 3) uint8 RGB with the color and the short name of every class, in up to four
    columns.
    """
    rows = min(len(classes), max(25, math.ceil(len(classes) / 4)))
    columns = math.ceil(len(classes) / rows)
    font = ImageFont.load_default(size=18)
    names = [short(name) for name, _ in classes]
    width = 60 + max(math.ceil(font.getlength(name)) for name in names)
    picture = Image.new("RGB", (columns * width, rows * 28 + 12), "white")
    draw = ImageDraw.Draw(picture)
    for id, (name, (_, color)) in enumerate(zip(names, classes, strict=True)):
        left, top = id // rows * width + 12, id % rows * 28 + 10
        draw.rectangle((left, top, left + 28, top + 20), fill=tuple(color), outline=(90, 90, 90))
        draw.text((left + 38, top + 10), name, fill="black", font=font, anchor="lm")
    return np.array(picture)


def side_by_side(rows, classes, height=240):
    """Return one picture (H, W, 3) uint8: a row per (image, truth, prediction), the classes on the right.

    image (H, W, 3) uint8 RGB; truth and prediction (H, W) uint8 class ids of any size, laid over the image.
    """
    table, keep, names = color_table(classes), background_id(classes), legend(classes)
    widths = [min(4 * height, max(1, round(image.shape[1] * height / image.shape[0]))) for image, *_ in rows]
    column, gap, head = max(widths) + 4, 4, 26
    tall = max(len(rows) * (height + gap) + head, names.shape[0])
    canvas = np.full((tall, 3 * column + names.shape[1], 3), 255, np.uint8)
    canvas[:names.shape[0], 3 * column:] = names
    for row, ((image, *masks), width) in enumerate(zip(rows, widths, strict=True)):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        masks = [cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST) for mask in masks]
        top = head + row * (height + gap)
        for left, panel in enumerate([image, *[overlay(image, mask, table, 0.65, keep) for mask in masks]]):
            canvas[top:top + height, left * column:left * column + width] = panel
    picture = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=16)
    for left, title in enumerate(("image", "truth", "prediction")):
        draw.text((left * column + 6, head // 2), title, fill="black", font=font, anchor="lm")
    return np.array(picture)


# --- windows ----------------------------------------------------------------------------------------------
def require_display():
    """Raise InputError where no window can open: Qt would abort the whole process."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise InputError("--show needs a display, and this machine has none: leave it out")


def show_window(pixels, title, milliseconds):
    """Show (H, W, 3) uint8 RGB; return the key pressed within `milliseconds` (0 = wait for one), or ""."""
    try:
        cv2.imshow(title, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
        key = cv2.waitKey(milliseconds)
    except cv2.error:
        raise InputError("--show needs opencv-python, not opencv-python-headless: leave it out") from None
    return chr(key & 0xFF) if key >= 0 else ""


# --- plots ------------------------------------------------------------------------------------------------
def new_figure(width, height, columns=1):
    """Return a matplotlib (figure, axes; several where columns > 1), in inches, without global state."""
    figure = plain_figure(width, height)
    return figure, figure.subplots(1, columns)


def plain_figure(width, height):
    """Return a matplotlib figure, in inches, that takes names as they are, dollar signs too."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams["text.parse_math"] = False
    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def drawing(what):
    """Context in which pictures are drawn: where that fails, it is one warning line, and the work goes on."""
    try:
        yield
    except Exception as error:  # of matplotlib, PIL, fonts, the disk: no picture is worth a run
        print(f"warning: {what} could not be drawn ({error_text(error)})", file=sys.stderr, flush=True)


def error_text(error):
    """Return what an exception says, in one line."""
    return one_line(str(error) or type(error).__name__)


def save_figure(figure, path):
    """Write a matplotlib figure as PNG, whole or not at all."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def save_curves(figure, axes, path):
    """Label the axes of curves over epochs and write their figure."""
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def plot_history(history, out_dir):
    """Draw loss.png, accuracy.png and miou.png: training and validation over epochs, the best epoch marked.

    history: list of dicts with epoch, train_loss, val_loss, train_accuracy, ... as in history.jsonl.
    """
    epochs = [row["epoch"] for row in history]
    best = best_row(history)
    for name, label in (("loss", "loss"), ("accuracy", "pixel accuracy"), ("miou", "mean IoU")):
        figure, axes = new_figure(7, 4.5)
        for split, title, color in (("train", "training", "tab:blue"), ("val", "validation", "tab:orange")):
            values = [row[f"{split}_{name}"] for row in history]
            axes.plot(epochs, values, "o-", ms=3, color=color, label=title)
        best_value = best[f"val_{name}"]
        axes.plot(best["epoch"], best_value, "*", ms=14, color="tab:red",
                  label=f"best mIoU: epoch {best['epoch']}, {label} {best_value:.4f}")
        axes.set_ylabel(label)
        if name != "loss":
            axes.set_ylim(0, 1)
        save_curves(figure, axes, Path(out_dir) / f"{name}.png")


def plot_head_scores(history, out_dir):
    """Draw head_scores.png: the scores of validation that the head itself reports, over epochs, if any."""
    names = [name for name in history[-1] if name.startswith("val_") and name not in VAL_SCORES
             and not name.startswith("val_loss")]
    if not names:
        return
    figure, axes = new_figure(7, 4.5)
    for name in names:
        axes.plot([row["epoch"] for row in history], [row.get(name) for row in history], "o-", ms=3,
                  label=name.removeprefix("val_"))
    axes.set_ylabel("validation")
    save_curves(figure, axes, Path(out_dir) / "head_scores.png")


def plot_run(history, counts, classes, out_dir):
    """Draw all plots of a run: curves, and of the latest epoch per-class IoU and confusion counts (K, K)."""
    plot_history(history, out_dir)
    plot_head_scores(history, out_dir)
    ious = [math.nan if iou is None else iou for iou in history[-1]["per_class_iou"]]
    plot_per_class_iou(ious, classes, Path(out_dir) / "per_class_iou.png")
    plot_confusion(counts.numpy(), classes, Path(out_dir) / "confusion_matrix.png")


def name_ticks(axis, classes, size, **style):
    """Write the short class names along an axis of a matplotlib plot, `size` points high."""
    axis.set_ticks(range(len(classes)), [short(name) for name, _ in classes], fontsize=size, **style)


def name_inches(classes, size):
    """Return about how many inches wide the longest short name is, `size` points high."""
    font = ImageFont.load_default(size=size)  # narrower than matplotlib's
    return 1.15 * max(font.getlength(short(name)) for name, _ in classes) / 72


def plot_per_class_iou(ious, classes, path):
    """Draw one bar per class. ious: (K,) floats, NaN = absent from truth and prediction."""
    row = min(0.3, LARGEST_PLOT / len(classes))
    size = min(10, 60 * row)
    figure, axes = new_figure(6 + name_inches(classes, size), 1 + row * len(classes))
    values = [value if math.isfinite(value) else 0.0 for value in ious]
    axes.barh(range(len(classes)), values, color=[np.array(color) / 255 for _, color in classes],
              edgecolor="gray", linewidth=0.8)
    for id, value in enumerate(ious):
        axes.text(values[id] + 0.01, id, f"{value:.3f}" if math.isfinite(value) else "absent", va="center",
                  fontsize=size)
    name_ticks(axes.yaxis, classes, size)
    axes.set(xlim=(0, 1.1), xlabel="IoU", ylim=(len(classes) - 0.5, -0.5))
    save_figure(figure, path)


def plot_confusion(counts, classes, path):
    """Draw a confusion matrix: counts (K, K) int64, truth in rows; color and, up to 64 classes, number = row
    share.
    """
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    cell = min(0.45, LARGEST_PLOT / len(classes))
    size = min(10, 60 * cell)
    side = 1.2 + max(3, cell * len(classes)) + name_inches(classes, size)
    figure, axes = new_figure(side + 0.5, side)
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005 and len(classes) <= 64:
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if share > 0.5 else "black", in_layout=False)
    name_ticks(axes.xaxis, classes, size, rotation=90)
    name_ticks(axes.yaxis, classes, size)
    axes.set(xlabel="prediction", ylabel="truth (row = 100 %)")
    save_figure(figure, path)


# --- trackers ---------------------------------------------------------------------------------------------
# Each takes everything through its own library, whose environment variables say where to.
class TensorBoard:
    """Event files in OUT_DIR/tensorboard, for `tensorboard --logdir OUT_DIR`."""

    def __init__(self, folder, settings):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(folder / "tensorboard" / time.strftime("%Y-%m-%d_%H-%M-%S"))
        self.writer.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```")

    def add(self, epoch, numbers, pictures):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, epoch)
        for name, path in pictures.items():
            pixels = np.array(Image.open(path).convert("RGB"))
            self.writer.add_image(name, pixels, epoch, dataformats="HWC")
        self.writer.flush()

    def close(self, failed):
        self.writer.close()


class WandB:
    """Weights & Biases, project WANDB_PROJECT or dinoseg; WANDB_MODE=offline keeps all in OUT_DIR/wandb."""

    def __init__(self, folder, settings):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb
        self.picture = wandb.Image
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "dinoseg"), dir=str(folder),
                              name=folder.resolve().name, config=settings)

    def add(self, epoch, numbers, pictures):
        pictures = {name: self.picture(str(path)) for name, path in pictures.items()}
        self.run.log({**numbers, **pictures}, step=epoch)

    def close(self, failed):
        self.run.finish(exit_code=int(failed))


class MLflow:
    """MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where to, else MLflow's own default."""

    def __init__(self, folder, settings):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        import mlflow
        self.mlflow = mlflow
        mlflow.start_run(run_name=folder.resolve().name)
        mlflow.log_params({name: str(value)[:500] for name, value in settings.items()})

    def add(self, epoch, numbers, pictures):  # class names lose what MLflow does not allow
        allowed = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in numbers.items()}
        self.mlflow.log_metrics(allowed, step=epoch)
        for name, path in pictures.items():
            self.mlflow.log_artifact(str(path), name)

    def close(self, failed):
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


# A new tracker is one class above and one line here, under the name of its package.
TRACKERS = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def require_trackers(names):
    """Raise InputError where the package of a tracker is missing."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # wandb leaves an empty folder of its name where it ran
            raise InputError(f"--log {name} needs the package {name}: pip install {name}, or leave it out")


def numbers_of(row, classes):
    """Return {name: number} of a row of the history: train/loss, val/miou, iou/<class> ..., without None."""
    numbers = {re.sub(r"^(train|val)_", r"\1/", name): value for name, value in row.items()}
    ious = numbers.pop("per_class_iou")
    numbers |= {f"iou/{name}": iou for (name, _), iou in zip(classes, ious, strict=True)}
    del numbers["epoch"]
    return {name: value for name, value in numbers.items() if value is not None}


class Trackers:
    """The trackers called `names` of a run that writes to `folder`; settings: {setting: value}.

    A resumed run is a new run of each tracker and hands it the whole history. Raises InputError for a tracker
    that does not start, unless the run is resumed; one that fails later is left out with a warning.
    """

    def __init__(self, names, folder, settings, classes, resumed=False):
        self.folder, self.classes, self.rows_logged, self.running = Path(folder), classes, 0, {}
        for name in dict.fromkeys(names):
            try:
                self.running[name] = TRACKERS[name](self.folder, settings)
            except Exception as error:  # of another library: it could be any
                message = f"--log {name} does not start: {error_text(error)}"
                if not resumed:
                    self.close(failed=True)
                    raise InputError(message) from None
                print(f"warning: {message}; it is left out")
        if resumed and self.running:
            print(f"the resumed run is a new run in {', '.join(self.running)}, with all of its epochs")

    def follow(self, history):
        """Hand over the rows of the history that are new, and the pictures with the last."""
        for row in history[self.rows_logged:]:
            pictures = self.pictures(row["epoch"]) if row is history[-1] else {}
            self.call_each("add", row["epoch"], numbers_of(row, self.classes), pictures)
        self.rows_logged = len(history)

    def pictures(self, epoch):
        """Return {name: path} of the pictures that the run has drawn after an epoch."""
        paths = {"predictions": self.folder / f"valid_preds/epoch_{epoch:03d}.png",
                 **{name: self.folder / f"{name}.png" for name in PLOTS}}
        return {name: path for name, path in paths.items() if path.exists()}

    def close(self, failed=False):
        """End all; failed: the run did not come to its end."""
        self.call_each("close", failed)

    def call_each(self, method, *args):
        """Call a method of every tracker; an error costs that tracker, and no more."""
        for name, tracker in list(self.running.items()):
            try:
                getattr(tracker, method)(*args)
            except Exception as error:  # of another library: it could be any
                del self.running[name]
                print(f"warning: --log {name} failed and is left out from here on: {error_text(error)}")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close(failed=kind is not None)
