"""Settings as dataclasses, one field a flag; the recipes; flags that scripts share. Nothing here needs torch.

    python train.py --help                  # every setting below, as a flag
    python train.py --recipe demo           # a recipe is only a set of defaults; explicit flags beat it
"""
import argparse
import ast
import dataclasses
import json
import math
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch, which scripts import after this
LONGEST_LINE = 1200  # characters of an error
IGNORE = 255  # mask value that no loss and no metric counts, whatever the data set stores
OWN_DATA = ("folder", "hf")  # data sets whose files say what they hold
PROTOCOLS = ("whole", "slide", "tile")
TTA = ("flip", "ms", "ms,flip")
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow")  # of x264


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: what, which file or flag, what to do."""


def count_of(number, noun):
    """Return a count as text: '1 mask', '0 masks', '3 masks'."""
    return f"{number} {noun}{'s' * (number != 1)}"


# --- names ------------------------------------------------------------------------------------------------
@lru_cache
def registered(file, registry):
    """Return {name: first line of its docstring} of a registry: a dict literal in a source file.

    Read from the source, because importing the file would import torch, which --help has no need of.
    """
    tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    docs = {node.name: (ast.get_docstring(node) or "").split("\n")[0]
            for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    entries = next(node.value for node in tree.body
                   if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == registry)

    def described(value):  # a class or function, a call of one, or a tuple that begins with one
        value = value.elts[0] if isinstance(value, ast.Tuple) else value
        value = value.func if isinstance(value, ast.Call) else value
        return docs.get(getattr(value, "id", None), "")

    return {key.value: described(value) for key, value in zip(entries.keys, entries.values, strict=True)}


# Where a name on the command line is registered: one entry there is all that it needs.
REGISTRIES = {"dataset": ("datasets.py", "DATASETS"), "augment": ("dataio/transforms.py", "AUGMENTS"),
              "backbone": ("models/backbones.py", "BACKBONES"), "head": ("models/heads.py", "HEADS"),
              "baseline": ("models/baselines.py", "BASELINES"), "loss": ("losses.py", "LOSSES"),
              "class_weights": ("losses.py", "CLASS_WEIGHTS"), "optimizer": ("engine.py", "OPTIMIZERS"),
              "scheduler": ("engine.py", "SCHEDULERS"), "amp": ("utils.py", "PRECISIONS"),
              "tracker": ("visualize.py", "TRACKERS"), "format": ("inference/backends.py", "FORMATS"),
              "backend": ("inference/backends.py", "BACKENDS")}


def names(kind):
    """Return the registered names of a kind of REGISTRIES, in their order."""
    return list(registered(*REGISTRIES[kind]))


# --- errors -----------------------------------------------------------------------------------------------
def one_line(text):
    """Return a text in one line that a terminal shows as it is, the middle of a very long one left out."""
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE // 2]}…{text[-LONGEST_LINE // 2:]}"


def report_error(message):
    """Print an error for the user as one line, also in the report that torchrun itself prints last."""
    line = one_line(message)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            content = dict(message=line, extraInfo=dict(timestamp=str(int(time.time()))))
            Path(file).write_text(json.dumps(dict(message=content)), encoding="utf-8")
    print(line, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; of the processes of torchrun, one prints it."""

    def error(self, message):
        """Print what is wrong and exit with code 2."""
        if os.environ.get("RANK", "0") == "0":
            self.print_usage(sys.stderr)
            report_error(f"{self.prog}: error: {message}")
        sys.exit(2)


def end_at_interrupts():
    """Let Ctrl-C end a script of this folder while it imports, without a traceback, until utils.run_main."""
    folder, main = Path(__file__).resolve().parent, getattr(sys.modules["__main__"], "__file__", None)
    is_script = main is not None and Path(main).resolve().parent in (folder, folder / "tools")
    if is_script and "torch" not in sys.modules and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def safe_streams():
    """Let stdout and stderr print what they cannot encode as escapes, and be there where they are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, or a window without console
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the end
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


# --- argparse types ---------------------------------------------------------------------------------------
def integer_between(lowest, highest):
    """Return the argparse type of an integer from `lowest` to `highest`."""
    def parse(text):
        if not text.isdecimal() or len(text) > 20 or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {lowest} to {highest:,}")
        return int(text)

    return parse


positive_int = integer_between(1, 2 ** 31 - 1)
non_negative_int = integer_between(0, 2 ** 32 - 1)
step_count = integer_between(0, 10 ** 7)
band_index = integer_between(1, 2 ** 16 - 1)
image_side = batch_images = port_number = integer_between(1, 2 ** 16 - 1)
any_batch = integer_between(0, 2 ** 16 - 1)  # 0 = any number of images


def number_where(is_valid, expected):
    """Return the argparse type of a float for which is_valid(float) holds; expected: it in words."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


fraction = number_where(lambda value: 0.0 < value < 1.0, "a number between 0 and 1")
share = number_where(lambda value: 0.0 < value <= 1.0, "a number above 0 and at most 1")
probability = number_where(lambda value: 0.0 <= value <= 1.0, "a number from 0 to 1")
finite_number = number_where(math.isfinite, "a number")
positive_float = number_where(lambda value: 0.0 < value < math.inf, "a number above 0")
non_negative_float = number_where(lambda value: 0.0 <= value < math.inf, "a number of at least 0")


def fold_of(text):
    """argparse type of --fold: I/N, 1 <= I <= N, N at least 2 -> (I, N)."""
    number, slash, folds = text.partition("/")
    if not (number.isdecimal() and folds.isdecimal() and 1 <= int(number) <= int(folds) > 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 1/5")
    return int(number), int(folds)


def band_number(text):
    """argparse type of --bands: a number from 1, or `all`."""
    return text if text == "all" else band_index(text)


def range_end(text):
    """argparse type of --value-range: a number, or `auto`."""
    return text if text == "auto" else finite_number(text)


def layer_index(text):
    """argparse type of --layers: the index of a block, or `quarters`."""
    try:
        return text if text == "quarters" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor quarters") from None


def block_count(text):
    """argparse type of --unfreeze: a number of blocks, or `all`."""
    return text if text == "all" else non_negative_int(text)


def backbone_name(text):
    """argparse type of --backbone: a registered name or `timm/<model name>`."""
    known = names("backbone")
    if text in known or (text.startswith("timm/") and len(text) > 5):
        return text
    raise argparse.ArgumentTypeError(f"unknown backbone {text!r} (known: {', '.join(known)}, "
                                     "timm/<any timm model name>)")


def budget_minutes(text):
    """argparse type of --budget: minutes of BUDGETS."""
    if text.isdecimal() and int(text) in BUDGETS:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(str, BUDGETS))}")


def loss_name(text):
    """argparse type of --loss: a registered loss, or several joined by `+`."""
    terms, known = text.split("+"), names("loss")
    if set(terms) <= set(known) and len(set(terms)) == len(terms):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not a loss: give {', '.join(known)}, or a sum of "
                                     "different ones such as focal+dice")


# --- settings ---------------------------------------------------------------------------------------------
def setting(default, group, help, *, affects, **options):
    """One field of TrainConfig: its default, the heading it stands under in --help, its help line.

    affects: what depends on the value: "features" (what a backbone computes of an image), "head" (what the
    head is), "run" (the numbers of a run in any other way), or "nothing": such a setting may differ between a
    run and its --resume, and between runs that are compared.
    options: of argparse's add_argument; besides, kind = the registry of REGISTRIES whose names are the
    choices; only = (setting, value, ...): without one of these values of that setting, or where none is
    named without any, this one has no meaning; may_grow = may differ between a run and its --resume although
    it affects numbers.
    """
    metadata = dict(group=group, help=help, affects=affects, **options)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class DataOptions:
    """What load_data needs to find a data set."""

    dataset: str = setting("streets", "data", "data set; streets is drawn by code, nothing to download",
                           kind="dataset", affects="run")
    data_root: str = setting("data", "data", "folder that holds the data set; for hf also OWNER/NAME, for "
                             "folder also @LIST, a file with a tar file or pipe:COMMAND per line",
                             metavar="DIR", affects="nothing")
    val_fraction: float = setting(0.2, "data", "share of the images that validates in a folder without a "
                                  "validation part, and with --resplit (stratified by class)", type=fraction,
                                  affects="run")
    fold: tuple = setting((), "data", "split into N parts in place of --val-fraction, of which part I "
                          "validates: N runs score every image once", type=fold_of, metavar="I/N",
                          affects="run")
    classes: tuple = setting((), "data", "class names of a folder (or hf) that has no class list, in the "
                             "order of the mask values", nargs="+", metavar="NAME", affects="run")
    resplit: bool = setting(False, "data", "pool training and validation images and split them anew, "
                            "stratified by class", action="store_true", affects="run")
    ignore_background: bool = setting(False, "data", "leave the class called background out: its pixels are "
                                      "not counted", action="store_true", affects="run")
    unlabelled: str = setting("background", "data", "what has no label in annotation files (COCO, YOLO, "
                              "labelme ...): a class of its own, or not counted",
                              choices=("background", "ignore"), affects="run")
    skip_bad_labels: bool = setting(False, "data", "leave out the images of a folder whose labels cannot be "
                                    "used, and say which; else they are refused", action="store_true",
                                    affects="run", may_grow=True)
    shards_per_epoch: int = setting(0, "data", "folder of tar files (shards), or @LIST: unpack so many of "
                                    "them for each epoch, in place of all of them at the start; needs "
                                    "--steps, names of the classes and a shard of val",
                                    type=positive_int, metavar="N", only=("dataset", "folder"),
                                    affects="run")
    train_images: int = setting(0, "data", "train on so many of the training images, drawn by --seed; 0 = "
                                "all", type=non_negative_int, affects="run")
    seed: int = setting(0, "run", "seed of weights, order, augmentation and --train-images",
                        type=non_negative_int, affects="run")


@dataclass
class ModelOptions:
    """What a model is: model.ModelSpec adds the number of classes, and every checkpoint holds it."""

    arch: str = setting("dinov2", "model", "dinov2 = --backbone + --head, or a whole network to compare with "
                        "it: fcn_resnet50, deeplabv3_resnet101, segformer_b0 ... segformer_b5, and "
                        "three that are fast on a CPU: lraspp_mobilenet_v3_large, fpn_mobilenetv4_small, "
                        "fpn_efficientnet_lite0",
                        kind="baseline", metavar="NAME", affects="features")
    backbone: str = setting("dinov2_vits14", "model", "dinov2_vits14 ... dinov2_vitg14_reg (torch.hub), "
                            "dinov3_vits16 ... dinov3_vitl16 (timm), vit_tiny, or timm/<model name>",
                            type=backbone_name, metavar="NAME", only=("arch", "dinov2"),
                            affects="features")
    layers: tuple = setting((), "model", "blocks whose feature maps the head sees: 0 = first, -1 = last, or "
                            "quarters = the last of each quarter of them (default: as the head wants)",
                            nargs="+", type=layer_index, metavar="I", only=("arch", "dinov2"),
                            affects="head")
    head: str = setting("detail", "model", "what turns feature maps into classes (listed below)", kind="head",
                        only=("arch", "dinov2"), affects="head")
    split_blocks: int = setting(3, "model", "split, split-detail, mask: the head trains a copy of so "
                                "many last blocks", type=positive_int,
                                only=("head", "split", "split-detail", "mask"), affects="head")
    aux_weight: float = setting(0.0, "model", "fcn_resnet50, deeplabv3_resnet101: weight of the auxiliary "
                                "loss on the third stage; torchvision trains them with 0.5",
                                type=non_negative_float,
                                only=("arch", "fcn_resnet50", "deeplabv3_resnet101"), affects="head")
    widen: bool = setting(False, "model", "--bands of other numbers than three: widen the first convolution "
                          "of the backbone to all of them, and train it (always with --unfreeze all)",
                          action="store_true", affects="features")
    normalize: str = setting("auto", "model", "auto = the mean and std that the weights were trained with, "
                             "none = pixels / 255 only", choices=("auto", "none"), affects="features")


@dataclass
class TrainConfig(ModelOptions, DataOptions):
    """Every setting of train.py; one field = one flag (`data_root` is `--data-root`). Plain JSON types."""

    recipe: str = setting("", "recipe", "start from the settings of a recipe (listed below)", affects="run")
    budget: int = setting(0, "recipe", "start from the settings that scored best in so many minutes on two "
                          "CPU cores; size, views and steps follow from the images. A folder with "
                          "--cache-features and no --recipe, --epochs or --steps has 5",
                          type=budget_minutes, metavar="5|20|90", only=("arch", "dinov2"), affects="run")
    imgsz: tuple = setting((518, 518), "data", "size the network runs at; any H W works", nargs=2,
                           type=image_side, metavar=("H", "W"), affects="run")
    train_imgsz: tuple = setting((), "data", "size it trains at, where that is not --imgsz: a smaller one "
                                 "trains on more images in the same time", nargs=2, type=image_side,
                                 metavar=("H", "W"), only=("train_scale", "fit"), affects="run")
    augment: tuple = setting(("flip",), "data", "changes of the training images (listed below), or none",
                             nargs="+", kind="augment", affects="run")
    copy_paste: float = setting(0.0, "data", "share of the training images into which the pixels of rare "
                                "classes of another one are pasted; without X 0.7", nargs="?", const=0.7,
                                type=probability, metavar="X", only=("train_scale", "fit"), affects="run")
    train_scale: str = setting("fit", "data", "fit = images are resized to --imgsz; native = random windows "
                               "of that size at the images' own resolution times 0.5 to 2, validated by "
                               "tiles: for images much larger than --imgsz", choices=("fit", "native"),
                               affects="run")
    balance: float = setting(0.0, "data", "native: share of the windows that are drawn around a pixel of a "
                             "class, all classes of the image alike; without X 0.5", nargs="?", const=0.5,
                             type=fraction, metavar="X", affects="run")
    cache_images: str = setting("", "data", "native: keep decoded images in DIR (4 bytes a pixel), so that "
                                "windows of them are read without decoding the rest (DIR: outputs/cache)",
                                nargs="?", const="outputs/cache", metavar="DIR", affects="nothing")
    bands: tuple = setting((), "data", "bands of the images that are read, from 1 and in this order, or all "
                           "(default: those that are red, green and blue). Of more than three, a frozen "
                           "backbone sees those that are, else the first three; --head detail and "
                           "split-detail see all", nargs="+", type=band_number, metavar="I", affects="run")
    value_range: tuple = setting((), "data", "values that become black and white: LOW HIGH of all bands or "
                                 "of each in turn, or auto = percentiles 0.5 and 99.5 of each band in the "
                                 "training images (default: auto, and 8-bit images as they are)", nargs="+",
                                 type=range_end, metavar="X", affects="run")
    show_bands: tuple = setting((), "data", "bands that pictures show as red, green and blue (default: those "
                                "that a frozen backbone sees)", nargs=3, type=band_index,
                                metavar=("R", "G", "B"), affects="nothing")
    extra: str = setting("", "data", "folder of more images to train on, of the same classes, such as "
                         "pseudo-labels (infer_image.py --min-confidence)", metavar="DIR",
                         affects="nothing")
    workers: int = setting(2, "data", "processes that load data", type=non_negative_int, metavar="N",
                           affects="nothing")

    weights: str = setting("auto", "model", "auto = published pretrained weights (of the encoder), none = "
                           "random, or a file (.pth, .safetensors)", metavar="auto|none|FILE",
                           affects="features")
    head_weights: str = setting("", "model", "start the head from a trained one: a checkpoint with the same "
                                "head on the same backbone", metavar="FILE", only=("arch", "dinov2"),
                                affects="run")
    unfreeze: object = setting(0, "model", "number of last transformer blocks that train with the head, or "
                               "all (the default of every --arch but dinov2)", type=block_count,
                               metavar="N|all", affects="run")

    loss: str = setting("ce", "training", "loss (listed below), or a sum such as focal+dice", type=loss_name,
                        metavar="NAME[+NAME]", affects="run")
    class_weights: str = setting("none", "training", "weight the classes in ce and focal by their share of "
                                 "the training pixels: enet = 1 / ln(1.02 + share), median = "
                                 "inverse frequency where the class is seen", kind="class_weights",
                                 affects="run")
    teacher: str = setting("", "training", "a trained model (.pth, .onnx, .xml) of the same classes, whose "
                           "logits this one learns beside the labels; --extra may then hold images without "
                           "labels. With --cache-features it sees every view once", metavar="FILE",
                           affects="run")
    teacher_weight: float = setting(1.0, "training", "weight of that loss beside --loss",
                                    type=positive_float, metavar="X", only=("teacher",), affects="run")
    temperature: float = setting(2.0, "training", "temperature of both softmaxes in it: higher ones tell "
                                 "more of the classes that the teacher finds unlikely", type=positive_float,
                                 metavar="X", only=("teacher",), affects="run")
    optimizer: str = setting("adamw", "training", "adamw, adam, or sgd = Nesterov momentum 0.937",
                             kind="optimizer", affects="run")
    lr: float = setting(1e-3, "training", "base learning rate (of the head)", type=positive_float,
                        affects="run")
    backbone_lr_scale: float = setting(0.1, "training", "learning rate of unfrozen and copied blocks, "
                                       "relative to --lr (1 for every --arch but dinov2)",
                                       type=positive_float, metavar="X", affects="run")
    layer_decay: float = setting(1.0, "training", "factor on that rate for every block that follows: "
                                 "below 1, the first blocks change least", type=share, metavar="X",
                                 only=("arch", "dinov2"), affects="run")
    weight_decay: float = setting(1e-3, "training", "weight decay; none on norms and biases",
                                  type=non_negative_float, affects="run")
    scheduler: str = setting("cosine", "training", "learning rate over the run; cosine, poly and linear warm "
                             "up, exponential = x 0.98 per epoch, onecycle rises for 30 %% of the steps",
                             kind="scheduler", affects="run")
    epochs: int = setting(30, "training", "passes over the training images, or parts of --steps",
                          type=positive_int, affects="run", may_grow=True)
    patience: int = setting(0, "training", "stop after so many epochs without a better validation mIoU; 0 = "
                            "never", type=non_negative_int, metavar="N", affects="nothing")
    steps: int = setting(0, "training", "optimizer steps of the whole run, shared out equally among the "
                         "--epochs, after each of which it validates; 0 = an epoch is a pass over the images",
                         type=step_count, affects="run")
    batch_size: int = setting(8, "training", "images per forward pass", type=batch_images, affects="run")
    accumulate: int = setting(1, "training", "forward passes per optimizer step; equals one large batch for "
                              "ce and focal, whose terms are means over pixels", type=positive_int,
                              affects="run")

    cache_features: str = setting("", "run", "compute what is frozen in the backbone once and keep it in DIR "
                                  "for every later epoch and run (DIR: outputs/cache)", nargs="?",
                                  const="outputs/cache", metavar="DIR", affects="run")
    cache_views: int = setting(1, "run", "views per training image to keep: 1 = as it is, more = "
                               "augmented", type=positive_int, only=("cache_features",), affects="run")
    save_head_only: bool = setting(False, "run", "leave the frozen backbone out of the checkpoints, which "
                                   "are then small; who loads one gets the backbone as --weights does, and "
                                   "its hash is checked", action="store_true",
                                   only=("arch", "dinov2"), affects="run")
    compile: bool = setting(False, "run", "torch.compile backbone and head: minutes at the start, faster "
                            "steps, above all on a GPU", action="store_true", affects="run")
    checkpoint_activations: bool = setting(False, "run", "compute what blocks that train keep once more in "
                                           "the backward pass: less memory, longer steps",
                                           action="store_true", affects="nothing")
    amp: str = setting("auto", "run", "autocast: auto = what the device is good at", kind="amp",
                       affects="run")
    device: str = setting("auto", "run", "auto = cuda, else mps, else cpu; or a torch device such as cuda:1",
                          affects="nothing")
    log: tuple = setting((), "run", "mirror history.jsonl and the pictures to experiment trackers, where "
                         "they are installed; none = to none", nargs="+", kind="tracker", affects="nothing")
    resume: bool = setting(False, "run", "continue from OUT_DIR/last.pth (--epochs may grow)",
                           action="store_true", affects="nothing")
    out_dir: str = setting("outputs", "run", "where the run writes; an earlier run moves to previous/",
                           metavar="DIR", affects="nothing")


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
NOT_OF_ARGPARSE = {"group", "kind", "affects", "only", "may_grow"}  # metadata of a field


def flag(name):
    """Return the flag of a setting: "val_fraction" -> "--val-fraction"."""
    return "--" + name.replace("_", "-")


def fields_affecting(kind, options=TrainConfig):
    """Return the names of the settings that affect `kind` (as in setting()); options: a dataclass of them."""
    return [field.name for field in dataclasses.fields(options) if field.metadata.get("affects") == kind]


def unmet_condition(name, config):
    """Return the (setting, values) without which the setting `name` has no meaning in `config`, else None."""
    unmet = None
    while only := FIELDS[name].metadata.get("only"):
        name, *values = only
        value = getattr(config, name)
        if value not in values if values else not value:
            unmet = name, values
    return unmet


def has_meaning(name, config):
    """Return whether the setting `name` means something together with the others of `config`."""
    return unmet_condition(name, config) is None


# What two or more recipes share.
# The configurations published beside the heads: dl.fbaipublicfiles.com/dinov2/dinov2_vits14/
# dinov2_vits14_voc2012_linear_config.py and ..._ms_config.py. What differs is in docs/training.md.
DINOV2_PROTOCOL = dict(dataset="voc", backbone="dinov2_vits14", head="bn", unfreeze=0, lr=1e-3,
                       weight_decay=1e-4, scheduler="linear", batch_size=16, steps=40_000, epochs=40)
DINOV2_FROZEN = dict(backbone="dinov2_vits14", head="bn", unfreeze=0, lr=1e-3, weight_decay=1e-3,
                     scheduler="cosine")
SMALL_BASELINE = dict(weights="none", normalize="none", imgsz=(64, 64), lr=1e-3, weight_decay=0.01,
                      scheduler="exponential", batch_size=64, epochs=30)

# A recipe is a set of defaults under a name: (one line for --help, settings).
RECIPES = {
    "demo": ("drawn streets, small ViT from scratch, minutes on a laptop CPU",
             dict(dataset="streets", backbone="vit_tiny", weights="none", head="bn", unfreeze="all",
                  imgsz=(224, 224), lr=5e-4, backbone_lr_scale=1.0, weight_decay=0.05, scheduler="cosine",
                  batch_size=16, epochs=10)),
    "person-bn": ("own folder of photos with person masks, frozen DINOv2 ViT-S/14 + bn",
                  dict(dataset="folder", classes=("background", "person"), backbone="dinov2_vits14",
                       head="bn", unfreeze=0, imgsz=(640, 640), lr=1e-4, scheduler="none", batch_size=8,
                       epochs=30)),
    "voc-linear": ("VOC 2012, frozen ViT-S/14, BN + 1x1 conv on the last block: DINOv2's linear protocol",
                   dict(DINOV2_PROTOCOL, imgsz=(512, 512), layers=(-1,),
                        augment=("crop-linear", "flip", "photometric"))),
    "voc-ms": ("VOC 2012, frozen ViT-S/14, BN + 1x1 conv on four blocks: DINOv2's multi-scale protocol",
               dict(DINOV2_PROTOCOL, imgsz=(640, 640), layers=(-4, -3, -2, -1),
                    augment=("crop-ms", "flip", "photometric"))),
    "voc-unet": ("VOC 2012, ViT-B/14 with its last block trained, U-Net decoder, Lovasz-Softmax",
                 dict(dataset="voc", backbone="dinov2_vitb14", head="unet", unfreeze=1, backbone_lr_scale=1.0,
                      imgsz=(518, 518), loss="lovasz", lr=1e-4, weight_decay=0.01, scheduler="none",
                      batch_size=2, epochs=8)),
    "aeroscapes-deconv": ("AeroScapes, frozen ViT-B/14, transposed-convolution decoder",
                          dict(dataset="aeroscapes", backbone="dinov2_vitb14", head="deconv", unfreeze=0,
                               imgsz=(518, 518), optimizer="adam", lr=1e-4, weight_decay=0.0,
                               scheduler="none", batch_size=2, epochs=11)),
    "pet-fcn": ("Oxford-IIIT Pet, FCN-ResNet50 from scratch (or --weights auto), 64x64",
                dict(SMALL_BASELINE, dataset="pet", arch="fcn_resnet50")),
    "pet-segformer": ("Oxford-IIIT Pet, SegFormer-B0 from scratch (or --weights auto), 64x64",
                      dict(SMALL_BASELINE, dataset="pet", arch="segformer_b0")),
    "pet-dinov2": ("Oxford-IIIT Pet at 448x448, frozen ViT-S/14 + bn: the sibling of pet-fcn",
                   dict(DINOV2_FROZEN, dataset="pet", imgsz=(448, 448), batch_size=16, epochs=30)),
    "cityscapes-dinov2": ("Cityscapes at half its size, ViT-S/14 with its last two blocks trained (or "
                          "--unfreeze 0)",
                          dict(DINOV2_FROZEN, dataset="cityscapes", imgsz=(518, 1036), unfreeze=2, lr=1e-4,
                               augment=("crop", "flip", "photometric"), batch_size=8, epochs=60)),
    "cityscapes-fcn": ("Cityscapes, FCN-ResNet50 from scratch (or --weights auto), 64x64",
                       dict(SMALL_BASELINE, dataset="cityscapes", arch="fcn_resnet50")),
    "cityscapes-segformer": ("Cityscapes, SegFormer-B0 from scratch (or --weights auto), 64x64",
                             dict(SMALL_BASELINE, dataset="cityscapes", arch="segformer_b0")),
    "drone-deeplab": ("all AeroScapes images split anew, DeepLabV3-ResNet101 pretrained, focal + Dice, SGD",
                      dict(dataset="aeroscapes", resplit=True, val_fraction=0.2, weights="auto",
                           arch="deeplabv3_resnet101", imgsz=(512, 512), loss="focal+dice", optimizer="sgd",
                           lr=1e-2, weight_decay=5e-4, scheduler="onecycle", batch_size=8, accumulate=2,
                           epochs=80)),
}


@dataclass(frozen=True)
class Budget:
    """How many passes of the backbone fit into the minutes of --budget: of one image of PASS_PIXELS through a
    ViT-S/14, on two CPU cores with AVX2. What else a run does is counted in such passes.

    train_pixels, pixels: of an image in training, and in validation and inference.
    """

    passes: int
    train_pixels: int = 252 * 336
    pixels: int = 336 * 448

    def spend(self, images, validation_images, config):
        """Return dict(cache_views, steps, epochs) for so many training and validation images and the batch
        size of a TrainConfig.

        Of a feature cache, a third of the passes at most goes into views; a seventh at most into validation.
        Each image is trained on, or validated, once at least: with many of them a run takes longer than its
        budget.
        """
        cached = bool(config.cache_features)
        views = max(1, min(MOST_VIEWS, self.passes // 3 // images)) if cached else 1
        step_cost, validation_cost = CACHED_COSTS
        if not cached:
            step_cost, validation_cost = (cost * pixels / PASS_PIXELS for cost, pixels in
                                          zip(LIVE_COSTS, (self.train_pixels, self.pixels), strict=True))
        validation = validation_images * validation_cost
        epochs = int(max(1, min(10, self.passes / 7 / max(1, validation))))
        left = self.passes - epochs * validation - (views * images + validation_images) * cached
        steps = max(1, round(max(left / step_cost, images) / config.batch_size / epochs)) * epochs
        return dict(cache_views=views, steps=steps, epochs=epochs)

    def sizes(self, proportion, cached):
        """Return dict(imgsz, train_imgsz) in patches of 14; proportion: H / W of the images; cached: whether
        features are, which train and validate at PASS_PIXELS.
        """
        def size(pixels):
            height = math.sqrt(pixels * proportion)
            return tuple(max(14, 14 * round(side / 14)) for side in (height, height / proportion))

        return dict(imgsz=size(PASS_PIXELS), train_imgsz=()) if cached else \
            dict(imgsz=size(self.pixels), train_imgsz=size(self.train_pixels))


# Chosen on drives of CamVid left out: docs/evaluation.md#camvid-in-minutes.
PASS_PIXELS = 336 * 448
BUDGETS = {5: Budget(900), 20: Budget(3800, pixels=448 * 602),
           90: Budget(17100, train_pixels=336 * 448, pixels=448 * 602)}
LIVE_COSTS, CACHED_COSTS = (3.7, 1.2), (1.2, 0.4)  # of training and of validating on PASS_PIXELS, in passes
MOST_VIEWS = 8
BUDGET_SETTINGS = dict(head="detail", layers=("quarters",), unfreeze="all", lr=1e-3, backbone_lr_scale=0.1,
                       layer_decay=0.8, loss="ce+lovasz", batch_size=4, copy_paste=0.7,
                       augment=("crop", "flip", "color"))
CACHED_BLOCKS = 3  # that train on cached features
DEFAULT_BUDGET = 5  # of a folder with --cache-features

# The settings of every --arch but dinov2, which trains as a whole.
BASELINE_DEFAULTS = dict(unfreeze="all", backbone_lr_scale=1.0)
GROUPS = ("recipe", "data", "model", "training", "run")  # of flags, as --help lists them
LISTED = {"heads": "head", "losses": "loss", "augmentations": "augment"}  # headings at the end of --help


# --- flags ------------------------------------------------------------------------------------------------
def script_parser(description, **options):
    """Return the argparse parser of a script, without flags yet."""
    safe_streams()
    end_at_interrupts()
    return Parser(description=description, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def train_parser(description):
    """Return the argparse parser made from TrainConfig. The namespace holds explicit flags alone."""
    listed = {"recipes": {name: line for name, (line, _) in RECIPES.items()},
              **{heading: registered(*REGISTRIES[kind]) for heading, kind in LISTED.items()}}
    epilog = "\n\n".join(f"{heading}:\n" + "\n".join(f"  {name:21}{line}" for name, line in lines.items())
                         for heading, lines in listed.items())
    parser = script_parser(description, epilog=epilog, argument_default=argparse.SUPPRESS)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for field in FIELDS.values():
        options = {key: value for key, value in field.metadata.items()
                   if key not in NOT_OF_ARGPARSE}
        if kind := field.metadata.get("kind"):
            options["choices"] = names(kind)
        if field.name == "arch":
            options["choices"] = ["dinov2", *options["choices"]]
        elif field.name == "recipe":
            options["choices"] = list(RECIPES)
        elif field.name in ("augment", "log"):
            options["choices"] += ["none"]
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        if field.type is not bool and default != "":
            options["help"] += f" (default: {default})"
        if not {"choices", "action"} & options.keys():
            options.setdefault("metavar", {int: "N", float: "X"}.get(field.type, "NAME"))
        groups[field.metadata["group"]].add_argument(flag(field.name), **options)
    return parser


def add_model_flag(parser, exported=True):
    """Add --model, the same in every script that takes a trained model, `exported` or not."""
    parser.add_argument("--model", default="outputs/best_model_iou.pth", metavar="FILE|NAME",
                        help=f"checkpoint of train.py, {'file of export.py, ' * exported}or an official "
                        "DINOv2 head such as dinov2_vits14_voc2012_linear (outputs/best_model_iou.pth)")


def inference_parser(description, backend=True):
    """Return the parser of a script that runs a trained model, with --backend or without."""
    parser = script_parser(description)
    add_model_flag(parser)
    parser.add_argument("--imgsz", nargs=2, type=image_side, metavar=("H", "W"),
                        help="size the network runs at, with slide the window (default: as trained)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="",
                        help="whole = the image resized to --imgsz; slide = resized until it just covers "
                        "--imgsz, then windows of that size, as mmsegmentation does; tile = windows "
                        "of that size over the image at its own resolution (default: whole; models trained "
                        "by --train-scale native: tile; official heads: their own)")
    parser.add_argument("--tile-scale", type=positive_float, metavar="X",
                        help="tile: pixels that the network sees per pixel of the image (1)")
    parser.add_argument("--overlap", type=non_negative_float, metavar="X",
                        help="tile: what neighbors share, below 1 of their side, else in pixels (0.25)")
    parser.add_argument("--tta", choices=TTA, default="",
                        help="average over the mirrored image, over scales 0.5-1.75, or both")
    if backend:
        parser.add_argument("--backend", choices=["auto", "torch", *names("backend")], default="auto",
                            help="what runs a .pth: auto = torch, or on a CPU OpenVINO where it is "
                            "installed, faster and worth its start; exported files have their own")
    return parser


def parse_inference_args(parser):
    """Return the flags of an inference_parser; ends with an error where they contradict each other, whatever
    the model is.
    """
    args = parser.parse_args()
    if args.protocol in ("whole", "slide") and (args.tile_scale, args.overlap) != (None, None):
        parser.error("--tile-scale and --overlap belong to --protocol tile: give that, or leave them out")
    if args.protocol == "tile" and "ms" in args.tta:
        parser.error("--tta ms cannot be combined with --protocol tile, which has --tile-scale: leave it out")
    if getattr(args, "backend", "auto") not in ("auto", "torch"):
        if "ms" in args.tta:
            parser.error(f"--backend {args.backend} runs at one size: leave out --tta ms")
        if args.device.split(":")[0] not in ("auto", "cpu"):
            parser.error(f"--backend {args.backend} runs on the CPU: give --device cpu")
    return args


def add_image_flags(parser, origin):
    """Add --bands and --value-range; origin: what they are without, in words."""
    parser.add_argument("--bands", nargs="+", type=band_number, default=(), metavar="I",
                        help=f"bands of the images that are read, from 1, or all ({origin})")
    parser.add_argument("--value-range", nargs="+", type=range_end, default=(), metavar="X",
                        help=f"values that become black and white: LOW HIGH, or auto ({origin})")


def add_group_flag(parser):
    """Add --group-by."""
    parser.add_argument("--group-by", default="", metavar="REGEX",
                        help="take the interval over groups of images that are alike, such as the frames of "
                        "a drive: what the first bracket matches in an image's path below the folder of all")


def add_run_flags(parser):
    """Add --device and --out-dir."""
    parser.add_argument("--device", default="auto", help="auto = cuda, else mps, else cpu; or a torch device")
    parser.add_argument("--out-dir", default="outputs", metavar="DIR", help="where results go (outputs)")


def add_preset_flag(parser, what=""):
    """Add --preset; what: the case that it is for."""
    parser.add_argument("--preset", choices=PRESETS, default="veryfast",
                        help=f"{what}how x264 encodes (veryfast; ultrafast: less than half the time, a file "
                        "2 to 4 times as large)")


def add_overlay_flags(parser):
    """Add --alpha and --show."""
    parser.add_argument("--alpha", type=fraction, default=0.5, help="weight of the colors (default: 0.5)")
    parser.add_argument("--show", action="store_true", help="open a window")


def resolve(flags, saved=None):
    """Merge settings into a TrainConfig: defaults < recipe < saved run < flags.

    flags: {name: value} of those on the command line, also `recipe`; saved: settings of a run to resume.
    Raises InputError where a flag changes a setting of the saved run that must stay.
    """
    flags = {name: as_setting(value) for name, value in flags.items()}
    if saved is None:
        defaults = recipe_settings(flags)
    else:
        defaults = {name: as_setting(value) for name, value in saved.items()}
        check_resumed(flags, defaults)
    if unknown := sorted(map(str, defaults.keys() - FIELDS.keys())):
        raise InputError(f"the run to resume has settings unknown here ({', '.join(unknown)}): resume it "
                         "with the version that wrote it")
    config = TrainConfig(**{**defaults, **flags})
    check_settings(config, flags)
    return config


def check_resumed(flags, saved):
    """Raise InputError where flags would make another run of the one with the settings `saved`."""
    for name, value in flags.items():
        metadata = FIELDS[name].metadata
        if metadata["affects"] == "nothing" or metadata.get("may_grow"):
            continue
        before = saved.get(name, FIELDS[name].default)  # earlier versions had fewer settings
        if value != before:
            raise InputError(f"{flag(name)} is {value!r}, but the run to resume has {before!r}: leave the "
                             "flag out, or start a new run without --resume")
    if saved.get("steps") and flags.get("epochs", saved["epochs"]) != saved["epochs"]:
        raise InputError(f"--epochs cannot change, the run to resume has {saved['steps']} steps in "
                         f"{saved['epochs']}: leave it out, or start a new run without --resume")


def as_setting(value):
    """Return a value from argparse or JSON as TrainConfig holds it: tuples for lists, () for `none` alone."""
    value = tuple(value) if isinstance(value, list) else value
    return () if value == ("none",) else value


def recipe_settings(flags):
    """Return the settings of the recipe or the budget among the flags, fitted to their --arch."""
    settings = dict(RECIPES[flags["recipe"]][1]) if flags.get("recipe") else {}
    if budget := chosen_budget(flags):
        settings = dict(BUDGET_SETTINGS, budget=budget)
        if flags.get("head", settings["head"]) != settings["head"]:
            del settings["layers"]  # as the other head wants
        if flags.get("cache_features"):
            copies_blocks = flags.get("head") in FIELDS["split_blocks"].metadata["only"]
            settings["unfreeze"] = 0 if copies_blocks or flags.get("save_head_only") else CACHED_BLOCKS
    if "epochs" in flags:  # means passes over the images, unless --steps is given too
        settings.pop("steps", None)
    arch_of_recipe = settings.get("arch", "dinov2")
    arch = flags.get("arch", arch_of_recipe)
    if (arch == "dinov2") != (arch_of_recipe == "dinov2"):  # the recipe's data with a model of the other kind
        of_model = {*fields_affecting("features"), *fields_affecting("head"), *BASELINE_DEFAULTS}
        settings = {name: value for name, value in settings.items() if name not in of_model}
    return settings if arch == "dinov2" else {**BASELINE_DEFAULTS, **settings}


def chosen_budget(flags):
    """Return the minutes of --budget, DEFAULT_BUDGET for a folder with --cache-features alone, else 0. Raises
    InputError.
    """
    is_native = flags.get("train_scale") == "native"
    if flags.get("budget") and (flags.get("recipe") or is_native):
        other = "--recipe" if flags.get("recipe") else "--train-scale native"
        raise InputError(f"--budget cannot be combined with {other}: leave out one of them")
    is_plain = flags.get("dataset") in OWN_DATA and not {"recipe", "epochs", "steps"} & flags.keys()
    is_plain = is_plain and not is_native and flags.get("arch", "dinov2") == "dinov2"
    return flags.get("budget", DEFAULT_BUDGET if is_plain and flags.get("cache_features") else 0)


def check_settings(config, flags):
    """Raise InputError for flags that contradict each other or would have no effect."""
    for name in flags:
        if unmet := unmet_condition(name, config):
            option, values = unmet
            if not values:
                raise InputError(f"{flag(name)} has no effect without {flag(option)}: add that, or leave it "
                                 "out")
            raise InputError(f"{flag(name)} belongs to {flag(option)} {', '.join(values)}, and this run has "
                             f"{flag(option)} {getattr(config, option)}: leave it out")
    for name in ("augment", "log"):
        if "none" in getattr(config, name):
            raise InputError(f"{flag(name)} none stands alone: leave out none or the others")
    if config.shards_per_epoch:
        check_shards(config)
    check_data_settings(config, flags)
    check_training_settings(config, flags)


def check_shards(config):
    """Raise InputError where --shards-per-epoch is combined with what needs all images at once."""
    needing = ("budget", "cache_features", "class_weights", "copy_paste", "extra", "resplit", "fold",
               "val_fraction", "train_images", "train_scale")
    for name in needing:
        if getattr(config, name) != FIELDS[name].default:
            raise InputError(f"{flag(name)} needs all images together, and --shards-per-epoch has those of a "
                             "few shards at a time: leave out one of them")
    if not config.steps:
        raise InputError("--shards-per-epoch needs --steps, since it is not known how many images there are")


def check_image_flags(bands, value_range):
    """Raise InputError for values of --bands and --value-range that say nothing."""
    if "all" in bands and len(bands) > 1:
        raise InputError("--bands all stands alone: leave out all, or the numbers")
    if value_range and value_range != ("auto",) and (
            len(value_range) % 2 or "auto" in value_range or
            any(low >= high for low, high in zip(value_range[::2], value_range[1::2], strict=True))):
        raise InputError(f"--value-range {' '.join(map(str, value_range))}: give auto, or LOW HIGH with LOW "
                         "below HIGH, of all bands or of each in turn")


def check_data_settings(config, flags):
    """Raise InputError for flags of the data set and its images that contradict each other."""
    check_image_flags(config.bands, config.value_range)
    if flags.get("classes") and config.dataset not in OWN_DATA:
        raise InputError(f"--classes names the classes of a folder, and --dataset {config.dataset} has its "
                         "own: leave it out")
    if "unlabelled" in flags and config.dataset != "folder":
        raise InputError("--unlabelled is for annotation files in a folder, and --dataset "
                         f"{config.dataset} has masks: leave it out")
    if config.skip_bad_labels and config.dataset not in OWN_DATA:
        raise InputError(f"--skip-bad-labels is for a folder of your own, and --dataset {config.dataset} is "
                         "complete: leave it out")
    splitting = [name for name in ("val_fraction", "fold") if name in flags]
    if splitting and config.dataset not in OWN_DATA and not config.resplit:
        raise InputError(f"{flag(splitting[0])} has no effect, {config.dataset} has a validation part: add "
                         "--resplit to split all images anew")
    if len(splitting) == 2:
        raise InputError("--fold I/N has a validation part of 1/N: leave out --val-fraction")
    for name in ("balance", "cache_images"):
        if flags.get(name) and config.train_scale != "native":
            raise InputError(f"{flag(name)} belongs to windows of large images: add --train-scale native, or "
                             "leave it out")


def check_training_settings(config, flags):
    """Raise InputError for flags of model, training and caches that contradict each other."""
    if "quarters" in config.layers and len(config.layers) > 1:
        raise InputError("--layers quarters stands alone: leave out quarters, or the indices")
    if config.steps % config.epochs:
        counts = range(min(config.epochs, config.steps), 0, -1)
        fitting = next(count for count in counts if not config.steps % count)
        raise InputError(f"--steps {config.steps} cannot be shared out equally among {config.epochs} epochs: "
                         f"give a multiple of them, or --epochs {fitting}")
    changing = [name for name in ("augment", "copy_paste") if flags.get(name)]
    if config.cache_features and config.cache_views == 1 and changing and not config.budget:
        raise InputError(f"{flag(changing[0])} has no effect on the one view that is cached: give "
                         "--cache-views K to keep K augmented ones, or leave it out")
    if "save_head_only" in flags and (config.unfreeze != 0 or config.weights == "none"):
        reason = "trains" if config.unfreeze != 0 else "is random"
        raise InputError("--save-head-only leaves out a backbone that can be loaded again, and this one "
                         f"{reason}: leave it out")


def parse_train_args(argv=None, description="Train a segmentation model."):
    """Return {name: value} of the train flags on the command line; exits with code 2 on a wrong flag."""
    return vars(train_parser(description).parse_args(argv))
