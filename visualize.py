"""Overlays, legends, masks with a palette, windows, and the plots of a run.

    drawn = overlay(image, pred, color_table(classes), alpha=0.5, keep=background_id(classes))
    plot_history(rows, "outputs")
"""
import math
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from config import IGNORE, InputError, one_line
from metrics import best_row
from utils import write_atomically, write_lines

IGNORE_COLOR = (224, 224, 192)  # as in Pascal VOC
LONGEST_NAME = 32  # characters of a class name that pictures show
LARGEST_PLOT = 25  # inches that the rows of a plot may take: with many classes they get smaller


# --- color -----------------------------------------------------------------------------------------------
def color_table(classes):
    """Return (256, 3) uint8 RGB: the color of every class id, IGNORE_COLOR for 255, black elsewhere."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(classes)] = [color for _, color in classes]
    table[IGNORE] = IGNORE_COLOR
    return table


def background_id(classes):
    """Return the id of the class called `background`, whose pixels an overlay leaves as they are, or None."""
    return next((id for id, (name, _) in enumerate(classes) if name.lower() == "background"), None)


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


def save_classes(classes, folder):
    """Write the classes.txt of a folder with masks of class ids: a line per class, name and color."""
    lines = [f"{name.replace('=', '-')} {red} {green} {blue}" for name, (red, green, blue) in classes]
    write_lines(folder / "classes.txt", lines)


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
        print(f"warning: {what} could not be drawn ({one_line(str(error) or type(error).__name__)})",
              file=sys.stderr, flush=True)


def save_figure(figure, path):
    """Write a matplotlib figure as PNG, whole or not at all."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def plot_history(history, out_dir):
    """Draw loss.png, accuracy.png and miou.png: training and validation over epochs, the best epoch marked.

    history: list of dicts with epoch, train_loss, val_loss, train_accuracy, ... as in history.jsonl.
    """
    epochs = [row["epoch"] for row in history]
    best = best_row(history)
    for name, label in (("loss", "loss"), ("accuracy", "pixel accuracy"), ("miou", "mean IoU")):
        figure, axes = new_figure(7, 4.5)
        for part, color in (("train", "tab:blue"), ("val", "tab:orange")):
            axes.plot(epochs, [row[f"{part}_{name}"] for row in history], "o-", ms=3, color=color,
                      label={"train": "training", "val": "validation"}[part])
        value = best[f"val_{name}"]
        axes.plot(best["epoch"], value, "*", ms=14, color="tab:red",
                  label=f"best mIoU: epoch {best['epoch']}, {label} {value:.4f}")
        axes.set(xlabel="epoch", ylabel=label)
        if name != "loss":
            axes.set_ylim(0, 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
        save_figure(figure, Path(out_dir) / f"{name}.png")


def plot_run(history, counts, classes, out_dir):
    """Draw all plots of a run: curves, and of the latest epoch per-class IoU and confusion counts (K, K)."""
    plot_history(history, out_dir)
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
