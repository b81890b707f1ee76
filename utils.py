"""What scripts share: device, precision, errors, the run folder, history, plots, colour overlays.

    device = pick_device("auto")
    out = overlay(image, pred, colour_table(classes), alpha=0.5, keep=background_id(classes))
"""
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from config import IGNORE, InputError, fraction, positive_int
from processes import place

IGNORE_COLOUR = (224, 224, 192)  # as in Pascal VOC
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUN_FILES = ("config.json", "history.jsonl", "loss.png", "accuracy.png", "miou.png", "per_class_iou.png",
             "confusion_matrix.png", "best_model_iou.pth", "last.pth", "valid_preds")


# --- errors and stops -------------------------------------------------------------------------------------
class Stopped(Exception):
    """A script ends because a signal asked for it: Stopped(number of the signal, line for the user)."""


class StopOnSignal:
    """`with StopOnSignal() as stop`: stop.asked is the number of the first Ctrl-C or SIGTERM (0 = none), so
    that the work at hand is finished; a second signal interrupts as usual.
    """

    def __init__(self):
        self.asked, self.before = 0, {}

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, _):
        """Handle a signal."""
        self.asked = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_main(main, stopped="stopped"):
    """Run a script's main() and exit: 0 or what it returns, 2 with one line for bad input, 130 for Ctrl-C,
    143 for SIGTERM.
    """
    try:
        sys.exit(main() or 0)
    except Stopped as stop:
        print(f"\n{stop.args[1]}", file=sys.stderr)
        sys.exit(128 + stop.args[0])
    except InputError as error:
        # raised in a loader process, the message comes wrapped in that process's traceback
        process = f"[process {place()[0]}] " if place()[1] > 1 else ""
        print(f"error: {process}{str(error).strip().split('InputError: ')[-1]}", file=sys.stderr, flush=True)
        sys.exit(2)
    except FloatingPointError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory: lower --imgsz or --batch-size", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None and not error.strerror:
            raise
        name = f"{error.filename}: " if error.filename else ""
        print(f"error: {name}{error.strerror}; nothing that was written before is lost", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)


def is_out_of_memory(error):
    """Return whether an exception says so; torch has a class of its own for CUDA alone."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory", str(error)))


# --- device, precision, seed ------------------------------------------------------------------------------
def pick_device(name="auto"):
    """Return a torch.device: `auto` is CUDA, else Apple MPS, else CPU. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name} is unknown: give auto, cuda, cuda:N, mps or cpu") from None
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if device.type not in count or (device.index or 0) >= count[device.type]:
        raise InputError(f"--device {name} is not on this machine: give auto or cpu")
    return device


def best_dtype(device):
    """Return the autocast type a device is good at: bfloat16, float16 (older CUDA), or None = float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else None
    return None


class Precision:
    """Autocast and gradient scaler of a run; both do nothing where they are not needed."""

    def __init__(self, name, device):
        choices = {"auto": best_dtype(device), "bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
        self.dtype, self.device_type = choices[name], device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def autocast(self):
        """Context in which the forward pass runs."""
        return torch.autocast(self.device_type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def __str__(self):
        return f"{str(self.dtype).removeprefix('torch.')} autocast" if self.dtype else "float32"


def seed_everything(seed):
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def add_model_flag(parser):
    """Add --model, the same in every script that takes a trained model."""
    parser.add_argument("--model", default="outputs/best_model_iou.pth", metavar="FILE|NAME",
                        help="checkpoint of train.py, or an official DINOv2 head such as "
                        "dinov2_vits14_voc2012_linear (outputs/best_model_iou.pth)")


def add_engine_flag(parser):
    """Add --engine."""
    parser.add_argument("--engine", choices=["auto", "torch", "openvino", "onnxruntime"], default="auto",
                        help="what runs a .pth: auto = torch, or on a CPU OpenVINO where it is installed, "
                        "faster and worth its start; exported files run on their own")


def add_protocol_flags(parser):
    """Add --protocol and --tta."""
    parser.add_argument("--protocol", choices=["whole", "slide"], default="",
                        help="whole = the image resized to --imgsz, slide = windows of that size over "
                        "the image (default: whole; for official heads the official one)")
    parser.add_argument("--tta", choices=["flip", "ms", "ms,flip"], default="",
                        help="average over the mirrored image, over scales 0.5-1.75, or both")


def add_inference_flags(parser):
    """Add the flags that infer_image.py and infer_video.py share to an argparse parser."""
    parser.add_argument("--imgsz", nargs=2, type=positive_int, metavar=("H", "W"),
                        help="size the network runs at (default: as trained)")
    parser.add_argument("--alpha", type=fraction, default=0.5, help="weight of the colours (default: 0.5)")
    parser.add_argument("--device", default="auto", help="auto = cuda, else mps, else cpu; or a torch device")
    parser.add_argument("--show", action="store_true", help="open a window")
    parser.add_argument("--out-dir", default="outputs", metavar="DIR", help="where results go (outputs)")


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


# --- files ------------------------------------------------------------------------------------------------
def write_atomically(path, write):
    """Call write(temporary path) in the folder of `path`, then move the result there: whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)  # PIL's errors have a text alone
        raise OSError(error.errno, reason, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(checkpoint, path):
    """Write a dict of tensors and plain values as a .pth file, whole or not at all and on the disk."""
    def write(temporary):
        with open(temporary, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's, on top of the system's or of Ctrl-C
                known = isinstance(error.__context__, (OSError, KeyboardInterrupt))
                raise (error.__context__ if known else error) from None
            file.flush()
            os.fsync(file.fileno())

    write_atomically(path, write)


def save_image(pixels, path, **options):
    """Write (H, W, 3) uint8 RGB as the picture format of `path`'s ending, whole or not at all."""
    write_atomically(path, lambda temporary: Image.fromarray(pixels).save(temporary, **options))


def save_mask(pred, classes, path):
    """Write class ids (H, W) uint8 as a palette PNG: pixel values are ids, colours the classes'."""
    picture = Image.fromarray(pred)
    picture.putpalette(colour_table(classes).flatten().tolist())
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def save_json_lines(rows, path):
    """Write one JSON object a line, whole or not at all; NaN becomes null."""
    text = "".join(json.dumps(finite(row)) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def finite(value):
    """Return a copy of nested dicts and lists in which numbers that JSON cannot hold are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_folder(path):
    """Create a folder that must be writable and return its path. Raises InputError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out-dir: cannot create {path} ({error.strerror}); choose another one") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"--out-dir: {path} is not writable: choose another folder")
    return path


def lock_file(path, wait):
    """Return the file `path`, opened and locked for as long as it is open and this process lives.

    Returns None where another process has it, unless `wait`. Processes that this one starts do not keep the
    lock. On Windows and on file systems without locks, nothing is locked.
    """
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed by the caller
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:
        pass
    return file


def reserve_folder(out_dir):
    """Create the folder of a run, lock it against other runs and clear what a killed one half wrote.

    Returns the lock, a file to keep open. Raises InputError.
    """
    out_dir = Path(make_folder(out_dir))
    lock = lock_file(out_dir / ".lock", wait=False)
    if lock is None:
        raise InputError(f"another run is writing to {out_dir}: wait for it, or choose another --out-dir")
    for path in [*out_dir.glob(".[0-9]*.*"), *(out_dir / "valid_preds").glob(".[0-9]*.*")]:
        if path.name.split(".", 2)[2] in RUN_FILES or path.parent.name == "valid_preds":
            path.unlink(missing_ok=True)
    return lock


def set_aside(out_dir):
    """Move the files of an earlier run in `out_dir` to out_dir/previous/<time>/; return it or None."""
    old = [Path(out_dir) / name for name in RUN_FILES if (Path(out_dir) / name).exists()]
    if not old:
        return None
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(max(path.stat().st_mtime for path in old)))
    folder = Path(out_dir) / "previous" / stamp
    count = 1
    while folder.exists():
        count += 1
        folder = folder.with_name(f"{stamp}_{count}")
    folder.mkdir(parents=True)
    for path in old:
        path.rename(folder / path.name)
    return folder


def run_facts(device):
    """Return what a later reader wants to know about where a run was made: versions, device, git commit."""
    import timm
    import torchvision
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                            text=True)
    return dict(python=sys.version.split()[0], torch=torch.__version__, torchvision=torchvision.__version__,
                timm=timm.__version__, device=str(device), git_commit=commit.stdout.strip() or None,
                started=time.strftime("%Y-%m-%d %H:%M:%S"))


# --- colour -----------------------------------------------------------------------------------------------
def colour_table(classes):
    """Return (256, 3) uint8 RGB: the colour of every class id, IGNORE_COLOUR for 255, black elsewhere."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(classes)] = [colour for _, colour in classes]
    table[IGNORE] = IGNORE_COLOUR
    return table


def background_id(classes):
    """Return the id of the class called `background`, whose pixels an overlay leaves as they are, or None."""
    return next((id for id, (name, _) in enumerate(classes) if name.lower() == "background"), None)


def overlay(image, pred, table, alpha=0.5, keep=None):
    """Blend class colours over an image: (H, W, 3) uint8 RGB and (H, W) uint8 -> (H, W, 3) uint8.

    alpha: weight of the colours, 0..1; pixels of class `keep` stay as they are; table as from colour_table.
    """
    blended = cv2.addWeighted(image, 1 - alpha, table[pred], alpha, 0)
    if keep is not None:
        cv2.copyTo(image, (pred == keep).astype(np.uint8), blended)
    return blended


class Overlay:
    """overlay(frame, pred) blends class colours into frames (H, W, 3) uint8, in place, with one buffer."""

    def __init__(self, classes, alpha=0.5):
        self.table = np.ascontiguousarray(colour_table(classes)[:, None])  # (256, 1, 3)
        self.alpha, self.keep, self.colours = alpha, background_id(classes), None

    def __call__(self, frame, pred):
        """frame (H, W, 3) uint8 RGB, pred (H, W) uint8 class ids -> frame."""
        self.colours = cv2.applyColorMap(pred, self.table, self.colours)  # (H, W, 3), from the table
        if self.keep is not None:
            cv2.copyTo(frame, cv2.inRange(pred, self.keep, self.keep), self.colours)
        return cv2.addWeighted(frame, 1 - self.alpha, self.colours, self.alpha, 0, dst=frame)


def legend(classes):
    """Return a picture (H, W, 3) uint8 RGB with the colour and the name of every class."""
    rows = min(len(classes), 25)
    columns = math.ceil(len(classes) / rows)
    font = ImageFont.load_default(size=18)
    width = 60 + max(int(font.getlength(name)) for name, _ in classes)
    picture = Image.new("RGB", (columns * width, rows * 28 + 12), "white")
    draw = ImageDraw.Draw(picture)
    for id, (name, colour) in enumerate(classes):
        left, top = id // rows * width + 12, id % rows * 28 + 10
        draw.rectangle((left, top, left + 28, top + 20), fill=tuple(colour), outline=(90, 90, 90))
        draw.text((left + 38, top + 10), name, fill="black", font=font, anchor="lm")
    return np.array(picture)


def side_by_side(rows, classes, height=240):
    """Return one picture (H, W, 3) uint8: a row per (image, truth, prediction), the classes on the right.

    image (H, W, 3) uint8 RGB; truth and prediction (H, W) uint8 class ids of any size, laid over the image.
    """
    table, keep, names = colour_table(classes), background_id(classes), legend(classes)
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


# --- plots ------------------------------------------------------------------------------------------------
def new_figure(width, height, columns=1):
    """Return a matplotlib (figure, axes; several where columns > 1), in inches, without global state."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def save_figure(figure, path):
    """Write a matplotlib figure as PNG, whole or not at all."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def best_row(history):
    """Return the row of a history with the best val_miou, the first of equals; NaN counts as worst."""
    return max(history, key=lambda row: row["val_miou"] if math.isfinite(row["val_miou"]) else -1.0)


def plot_history(history, out_dir):
    """Draw loss.png, accuracy.png and miou.png: training and validation over epochs, the best epoch marked.

    history: list of dicts with epoch, train_loss, val_loss, train_accuracy, ... as in history.jsonl.
    """
    epochs = [row["epoch"] for row in history]
    best = best_row(history)
    for name, label in (("loss", "loss"), ("accuracy", "pixel accuracy"), ("miou", "mean IoU")):
        figure, axes = new_figure(7, 4.5)
        for part, colour in (("train", "tab:blue"), ("val", "tab:orange")):
            axes.plot(epochs, [row[f"{part}_{name}"] for row in history], "o-", ms=3, color=colour,
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


def plot_per_class_iou(ious, classes, path):
    """Draw one bar a class. ious: (K,) floats, NaN = absent from truth and prediction (said in the label)."""
    figure, axes = new_figure(7, 1 + 0.3 * len(classes))
    values = [value if math.isfinite(value) else 0.0 for value in ious]
    axes.barh(range(len(classes)), values, color=[np.array(colour) / 255 for _, colour in classes],
              edgecolor="grey", linewidth=0.8)
    for row, value in enumerate(ious):
        axes.text(values[row] + 0.01, row, f"{value:.3f}" if math.isfinite(value) else "absent", va="center")
    axes.set_yticks(range(len(classes)), [name for name, _ in classes])
    axes.set(xlim=(0, 1.1), xlabel="IoU", ylim=(len(classes) - 0.5, -0.5))
    save_figure(figure, path)


def plot_confusion(counts, classes, path):
    """Draw a confusion matrix: counts (K, K) int64, truth in rows; colour and number = row share."""
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = max(5, 2 + 0.45 * len(classes))
    figure, axes = new_figure(side + 1, side)
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if share > 0.5 else "black")
    names = [name for name, _ in classes]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="prediction", ylabel="truth (row = 100 %)")
    save_figure(figure, path)
