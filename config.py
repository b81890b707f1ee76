"""Class tables of every data set, the training settings as one flat dataclass, and the recipes.

    python train.py --help                  # every setting below, as a flag
    python train.py --recipe demo           # a recipe is only a set of defaults; explicit flags beat it

This file imports nothing of ours and no torch, so every other file may import it.
"""
import argparse
import dataclasses
from dataclasses import dataclass

IGNORE = 255  # mask value that no loss and no metric counts, whatever the data set stores


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, which file or flag, what to do."""


# --- classes: [(name, (R, G, B)), ...], index in the list = class id --------------------------------------
VOC = [
    ("background", (0, 0, 0)), ("aeroplane", (128, 0, 0)), ("bicycle", (0, 128, 0)), ("bird", (128, 128, 0)),
    ("boat", (0, 0, 128)), ("bottle", (128, 0, 128)), ("bus", (0, 128, 128)), ("car", (128, 128, 128)),
    ("cat", (64, 0, 0)), ("chair", (192, 0, 0)), ("cow", (64, 128, 0)), ("diningtable", (192, 128, 0)),
    ("dog", (64, 0, 128)), ("horse", (192, 0, 128)), ("motorbike", (64, 128, 128)),
    ("person", (192, 128, 128)), ("pottedplant", (0, 64, 0)), ("sheep", (128, 64, 0)), ("sofa", (0, 192, 0)),
    ("train", (128, 192, 0)), ("tvmonitor", (0, 64, 128)),
]
CAMVID = [
    ("sky", (128, 128, 128)), ("building", (128, 0, 0)), ("pole", (192, 192, 128)), ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)), ("tree", (128, 128, 0)), ("sign", (192, 128, 128)), ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)), ("pedestrian", (64, 64, 0)), ("bicyclist", (0, 128, 192)),
]
STREETS = [
    ("sky", (70, 130, 180)), ("road", (128, 64, 128)), ("grass", (152, 251, 152)),
    ("building", (250, 170, 30)), ("tree", (35, 120, 35)), ("car", (0, 0, 200)), ("person", (220, 20, 60)),
]
CLASSES = {"voc": VOC, "camvid": CAMVID, "streets": STREETS}

# Colours for classes that came without one: background black, then far apart in hue, green first.
SPARE_COLOURS = [
    (0, 0, 0), (0, 255, 0), (230, 25, 75), (0, 130, 200), (255, 225, 25), (145, 30, 180), (70, 240, 240),
    (245, 130, 48), (240, 50, 230), (0, 128, 128), (210, 245, 60), (170, 110, 40), (128, 0, 0),
    (170, 255, 195), (128, 128, 0), (0, 0, 128), (250, 190, 212), (220, 190, 255), (128, 128, 128),
    (255, 215, 180),
]


def spare_colour(index):
    """Return an (R, G, B) for class `index` (0-based), distinct for neighbours; repeats after 20."""
    return SPARE_COLOURS[index] if index < len(SPARE_COLOURS) else SPARE_COLOURS[1 + (index - 1) % 19]


# --- training settings ------------------------------------------------------------------------------------
BACKBONES = [f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg")]
DATASETS = ["streets", "voc", "camvid", "folder"]
HEADS = ["bn", "linear"]
LOSSES = ["ce"]
SCHEDULERS = ["cosine", "poly", "none"]
AUGMENTS = ["crop", "flip", "color", "none"]
PRECISIONS = ["auto", "bf16", "fp16", "off"]


def positive_int(text):
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def whole_number(text):
    """argparse type: a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def fraction(text):
    """argparse type: a number between 0 and 1, both excluded."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def positive_float(text):
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def non_negative_float(text):
    """argparse type: a finite number of at least 0."""
    return 0.0 if text in ("0", "0.0") else positive_float(text)


def block_count(text):
    """argparse type of --unfreeze: a whole number of blocks, or `all`."""
    return text if text == "all" else whole_number(text)


def backbone_name(text):
    """argparse type of --backbone: one of BACKBONES, `vit_tiny`, or `timm/<model name>`."""
    if text in BACKBONES or text == "vit_tiny" or (text.startswith("timm/") and len(text) > 5):
        return text
    raise argparse.ArgumentTypeError(f"unknown backbone {text!r} (known: {', '.join(BACKBONES)}, vit_tiny, "
                                     "timm/<any timm model name>)")


def setting(default, group, help, **argparse_options):
    """One field of TrainConfig: its default, the heading it stands under in --help, its help line."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **argparse_options})


@dataclass
class TrainConfig:
    """Every setting of train.py; one field = one flag (`data_root` is `--data-root`). Plain JSON types."""

    dataset: str = setting("streets", "data", "data set; streets is drawn by our code, nothing to download",
                           choices=DATASETS)
    data_root: str = setting("data", "data", "folder that holds the data set", metavar="DIR")
    val_fraction: float = setting(0.2, "data", "share of a folder without a validation part that becomes one "
                                  "(deterministic, stratified by class)", type=fraction)
    classes: tuple = setting((), "data", "class names of a folder that has no classes.txt, in the order of "
                             "the mask values", nargs="+", metavar="NAME")
    imgsz: tuple = setting((518, 518), "data", "size the network trains at; any H W works", nargs=2,
                           type=positive_int, metavar=("H", "W"))
    augment: tuple = setting(("flip",), "data", "crop = scale 0.5-2 and random crop, flip, color; or none",
                             nargs="+", choices=AUGMENTS)
    workers: int = setting(2, "data", "processes that load data", type=whole_number, metavar="N")

    backbone: str = setting("dinov2_vits14", "model", f"{BACKBONES[0]} ... {BACKBONES[-1]} (torch.hub), "
                            "vit_tiny, or timm/<model name>", type=backbone_name, metavar="NAME")
    weights: str = setting("auto", "model", "auto = published pretrained weights, none = random, or a file "
                           "(.pth, .safetensors)", metavar="auto|none|FILE")
    layers: tuple = setting((), "model", "blocks whose feature maps the head sees, 0 = first (default: the "
                            "last four; for linear the last one)", nargs="+", type=whole_number, metavar="I")
    head: str = setting("bn", "model", "bn = BatchNorm + 1x1 conv on several maps, linear = 1x1 conv",
                        choices=HEADS)
    unfreeze: object = setting(0, "model", "how many of the last transformer blocks train with the head, "
                               "or all", type=block_count, metavar="N|all")

    loss: str = setting("ce", "training", "ce = cross entropy", choices=LOSSES)
    lr: float = setting(1e-3, "training", "base learning rate of AdamW (of the head)", type=positive_float)
    backbone_lr_scale: float = setting(0.1, "training", "learning rate of unfrozen blocks, relative to --lr",
                                       type=positive_float, metavar="X")
    weight_decay: float = setting(1e-3, "training", "AdamW weight decay", type=non_negative_float)
    scheduler: str = setting("cosine", "training", "learning rate over the run; cosine and poly warm up",
                             choices=SCHEDULERS)
    epochs: int = setting(30, "training", "passes over the training images", type=positive_int)
    batch_size: int = setting(8, "training", "images a forward pass", type=positive_int)
    accumulate: int = setting(1, "training", "forward passes an optimizer step", type=positive_int)

    amp: str = setting("auto", "run", "autocast: auto = what the device is good at", choices=PRECISIONS)
    seed: int = setting(0, "run", "seed of weights, order and augmentation", type=whole_number)
    device: str = setting("auto", "run", "auto = cuda, else mps, else cpu; or a torch device such as cuda:1")
    resume: bool = setting(False, "run", "go on from OUT_DIR/last.pth with its settings (--epochs may grow)",
                           action="store_true")
    out_dir: str = setting("outputs", "run", "where the run writes; an earlier run moves to previous/",
                           metavar="DIR")


# A recipe is a set of defaults under a name: (one line for --help, settings).
RECIPES = {
    "demo": ("streets drawn by our code, small ViT from scratch, minutes on a laptop CPU",
             dict(dataset="streets", backbone="vit_tiny", weights="none", head="bn", unfreeze="all",
                  imgsz=(224, 224), lr=5e-4, backbone_lr_scale=1.0, weight_decay=0.05, scheduler="cosine",
                  batch_size=16, epochs=10)),
    "person-bn": ("own folder of photos with person masks, frozen DINOv2 ViT-S/14 + bn",
                  dict(dataset="folder", classes=("background", "person"), backbone="dinov2_vits14",
                       head="bn", unfreeze=0, imgsz=(640, 640), lr=1e-4, scheduler="none", batch_size=8,
                       epochs=30)),
}

# Settings that may differ between a run and its --resume; the others shape the model, the data or the
# steps.
MAY_CHANGE_ON_RESUME = {"epochs", "workers", "device", "data_root", "out_dir", "resume"}


def train_parser(description):
    """Return the argparse parser made from TrainConfig. Flags not given stay out of the namespace."""
    recipes = "\n".join(f"  {name:12} {line}" for name, (line, _) in RECIPES.items())
    parser = argparse.ArgumentParser(
        description=description, epilog=f"recipes:\n{recipes}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    parser.add_argument("--recipe", choices=list(RECIPES), help="start from these settings (listed below)")
    groups = {}
    for field in dataclasses.fields(TrainConfig):
        options = dict(field.metadata)
        group = options.pop("group")
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        if field.type is not bool and default != "":
            options["help"] += f" (default: {default})"
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if not {"choices", "action"} & options.keys():
            options.setdefault("metavar", {int: "N", float: "X"}.get(field.type, "NAME"))
        groups[group].add_argument("--" + field.name.replace("_", "-"), **options)
    return parser


def resolve(given, saved=None):
    """Merge settings into a TrainConfig: defaults < recipe < saved run < flags that were given.

    Args: given = dict of the flags that were given (with `recipe` if any); saved = settings of a run to
    resume. Raises InputError where `given` changes a setting of the saved run that must stay.
    """
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    recipe = given.pop("recipe", None)
    defaults = dict(RECIPES[recipe][1]) if recipe else {}
    if saved is not None:
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        wanted = {**defaults, **given}
        changed = [name for name, value in wanted.items()
                   if name not in MAY_CHANGE_ON_RESUME and name in saved and value != saved[name]]
        if changed:
            name = changed[0]
            raise InputError(f"--{name.replace('_', '-')} is {wanted[name]!r}, but the run to resume has "
                             f"{saved[name]!r}: leave the flag out, or start a new run without --resume")
        defaults = saved
    unknown = defaults.keys() - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        raise InputError(f"the run to resume has settings unknown here ({', '.join(sorted(unknown))}): "
                         "resume it with the version that wrote it")
    config = TrainConfig(**{**defaults, **given})
    if "none" in config.augment and len(config.augment) > 1:
        raise InputError("--augment none stands alone: leave out none or the others")
    if "none" in config.augment:
        config.augment = ()
    return config


def parse_train_args(argv=None, description="Train a segmentation model."):
    """Return the dict of train flags given on the command line; exits with code 2 on a wrong flag."""
    return vars(train_parser(description).parse_args(argv))
