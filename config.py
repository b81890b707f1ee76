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
AEROSCAPES = [
    ("background", (0, 0, 0)), ("person", (192, 128, 128)), ("bike", (0, 128, 0)), ("car", (128, 128, 128)),
    ("drone", (128, 0, 0)), ("boat", (0, 0, 128)), ("animal", (192, 0, 128)), ("obstacle", (192, 0, 0)),
    ("construction", (192, 128, 0)), ("vegetation", (0, 64, 0)), ("road", (128, 128, 0)),
    ("sky", (0, 128, 128)),
]
PET = [("foreground", (0, 200, 0)), ("background", (0, 0, 0)), ("boundary", (255, 225, 25))]
CITYSCAPES = [
    ("road", (128, 64, 128)), ("sidewalk", (244, 35, 232)), ("building", (70, 70, 70)),
    ("wall", (102, 102, 156)), ("fence", (190, 153, 153)), ("pole", (153, 153, 153)),
    ("traffic light", (250, 170, 30)), ("traffic sign", (220, 220, 0)), ("vegetation", (107, 142, 35)),
    ("terrain", (152, 251, 152)), ("sky", (70, 130, 180)), ("person", (220, 20, 60)),
    ("rider", (255, 0, 0)), ("car", (0, 0, 142)), ("truck", (0, 0, 70)), ("bus", (0, 60, 100)),
    ("train", (0, 80, 100)), ("motorcycle", (0, 0, 230)), ("bicycle", (119, 11, 32)),
]
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # of 0..33
ADE20K = [
    ("wall", (120, 120, 120)), ("building", (180, 120, 120)), ("sky", (6, 230, 230)),
    ("floor", (80, 50, 50)), ("tree", (4, 200, 3)), ("ceiling", (120, 120, 80)),
    ("road", (140, 140, 140)), ("bed", (204, 5, 255)), ("windowpane", (230, 230, 230)),
    ("grass", (4, 250, 7)), ("cabinet", (224, 5, 255)), ("sidewalk", (235, 255, 7)),
    ("person", (150, 5, 61)), ("earth", (120, 120, 70)), ("door", (8, 255, 51)),
    ("table", (255, 6, 82)), ("mountain", (143, 255, 140)), ("plant", (204, 255, 4)),
    ("curtain", (255, 51, 7)), ("chair", (204, 70, 3)), ("car", (0, 102, 200)),
    ("water", (61, 230, 250)), ("painting", (255, 6, 51)), ("sofa", (11, 102, 255)),
    ("shelf", (255, 7, 71)), ("house", (255, 9, 224)), ("sea", (9, 7, 230)),
    ("mirror", (220, 220, 220)), ("rug", (255, 9, 92)), ("field", (112, 9, 255)),
    ("armchair", (8, 255, 214)), ("seat", (7, 255, 224)), ("fence", (255, 184, 6)),
    ("desk", (10, 255, 71)), ("rock", (255, 41, 10)), ("wardrobe", (7, 255, 255)),
    ("lamp", (224, 255, 8)), ("bathtub", (102, 8, 255)), ("railing", (255, 61, 6)),
    ("cushion", (255, 194, 7)), ("base", (255, 122, 8)), ("box", (0, 255, 20)),
    ("column", (255, 8, 41)), ("signboard", (255, 5, 153)), ("chest of drawers", (6, 51, 255)),
    ("counter", (235, 12, 255)), ("sand", (160, 150, 20)), ("sink", (0, 163, 255)),
    ("skyscraper", (140, 140, 140)), ("fireplace", (250, 10, 15)), ("refrigerator", (20, 255, 0)),
    ("grandstand", (31, 255, 0)), ("path", (255, 31, 0)), ("stairs", (255, 224, 0)),
    ("runway", (153, 255, 0)), ("case", (0, 0, 255)), ("pool table", (255, 71, 0)),
    ("pillow", (0, 235, 255)), ("screen door", (0, 173, 255)), ("stairway", (31, 0, 255)),
    ("river", (11, 200, 200)), ("bridge", (255, 82, 0)), ("bookcase", (0, 255, 245)),
    ("blind", (0, 61, 255)), ("coffee table", (0, 255, 112)), ("toilet", (0, 255, 133)),
    ("flower", (255, 0, 0)), ("book", (255, 163, 0)), ("hill", (255, 102, 0)), ("bench", (194, 255, 0)),
    ("countertop", (0, 143, 255)), ("stove", (51, 255, 0)), ("palm", (0, 82, 255)),
    ("kitchen island", (0, 255, 41)), ("computer", (0, 255, 173)), ("swivel chair", (10, 0, 255)),
    ("boat", (173, 255, 0)), ("bar", (0, 255, 153)), ("arcade machine", (255, 92, 0)),
    ("hovel", (255, 0, 255)), ("bus", (255, 0, 245)), ("towel", (255, 0, 102)),
    ("light", (255, 173, 0)), ("truck", (255, 0, 20)), ("tower", (255, 184, 184)),
    ("chandelier", (0, 31, 255)), ("awning", (0, 255, 61)), ("streetlight", (0, 71, 255)),
    ("booth", (255, 0, 204)), ("television receiver", (0, 255, 194)), ("airplane", (0, 255, 82)),
    ("dirt track", (0, 10, 255)), ("apparel", (0, 112, 255)), ("pole", (51, 0, 255)),
    ("land", (0, 194, 255)), ("bannister", (0, 122, 255)), ("escalator", (0, 255, 163)),
    ("ottoman", (255, 153, 0)), ("bottle", (0, 255, 10)), ("buffet", (255, 112, 0)),
    ("poster", (143, 255, 0)), ("stage", (82, 0, 255)), ("van", (163, 255, 0)), ("ship", (255, 235, 0)),
    ("fountain", (8, 184, 170)), ("conveyer belt", (133, 0, 255)), ("canopy", (0, 255, 92)),
    ("washer", (184, 0, 255)), ("plaything", (255, 0, 31)), ("swimming pool", (0, 184, 255)),
    ("stool", (0, 214, 255)), ("barrel", (255, 0, 112)), ("basket", (92, 255, 0)),
    ("waterfall", (0, 224, 255)), ("tent", (112, 224, 255)), ("bag", (70, 184, 160)),
    ("minibike", (163, 0, 255)), ("cradle", (153, 0, 255)), ("oven", (71, 255, 0)),
    ("ball", (255, 0, 163)), ("food", (255, 204, 0)), ("step", (255, 0, 143)), ("tank", (0, 255, 235)),
    ("trade name", (133, 255, 0)), ("microwave", (255, 0, 235)), ("pot", (245, 0, 255)),
    ("animal", (255, 0, 122)), ("bicycle", (255, 245, 0)), ("lake", (10, 190, 212)),
    ("dishwasher", (214, 255, 0)), ("screen", (0, 204, 255)), ("blanket", (20, 0, 255)),
    ("sculpture", (255, 255, 0)), ("hood", (0, 153, 255)), ("sconce", (0, 41, 255)),
    ("vase", (0, 255, 204)), ("traffic light", (41, 0, 255)), ("tray", (41, 255, 0)),
    ("ashcan", (173, 0, 255)), ("fan", (0, 245, 255)), ("pier", (71, 0, 255)),
    ("crt screen", (122, 0, 255)), ("plate", (0, 255, 184)), ("monitor", (0, 92, 255)),
    ("bulletin board", (184, 255, 0)), ("shower", (0, 133, 255)), ("radiator", (255, 214, 0)),
    ("glass", (25, 194, 194)), ("clock", (102, 255, 0)), ("flag", (92, 0, 255)),
]
CLASSES = {"voc": VOC, "camvid": CAMVID, "streets": STREETS, "aeroscapes": AEROSCAPES, "pet": PET,
           "cityscapes": CITYSCAPES, "ade20k": ADE20K}

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
ARCHITECTURES = ["dinov2", "fcn_resnet50", "deeplabv3_resnet101", *[f"segformer_b{i}" for i in range(6)]]
DATASETS = ["streets", "voc", "camvid", "aeroscapes", "pet", "cityscapes", "ade20k", "folder"]
HEADS = ["bn", "linear", "unet", "unet-skip", "deconv", "deconv-resize"]
LOSSES = ["ce", "lovasz", "focal", "dice"]
CLASS_WEIGHTS = ["none", "enet", "median"]
OPTIMIZERS = ["adamw", "adam", "sgd"]
SCHEDULERS = ["cosine", "poly", "exponential", "onecycle", "none"]
AUGMENTS = ["crop", "flip", "color", "none"]
NORMALIZATIONS = ["auto", "none"]
PRECISIONS = ["auto", "bf16", "fp16", "off"]


def positive_int(text):
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def whole_number(text):
    """argparse type: a whole number of at least 0 that fits 32 bits."""
    if not text.isdecimal() or int(text) >= 2 ** 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0 (and below 2**32)")
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
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def block_count(text):
    """argparse type of --unfreeze: a whole number of blocks, or `all`."""
    return text if text == "all" else whole_number(text)


def backbone_name(text):
    """argparse type of --backbone: one of BACKBONES, `vit_tiny`, or `timm/<model name>`."""
    if text in BACKBONES or text == "vit_tiny" or (text.startswith("timm/") and len(text) > 5):
        return text
    raise argparse.ArgumentTypeError(f"unknown backbone {text!r} (known: {', '.join(BACKBONES)}, vit_tiny, "
                                     "timm/<any timm model name>)")


def loss_name(text):
    """argparse type of --loss: one of LOSSES, or several joined by `+`."""
    parts = text.split("+")
    if set(parts) <= set(LOSSES) and len(set(parts)) == len(parts):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no loss: give {', '.join(LOSSES)}, or a sum of different "
                                     "ones such as focal+dice")


def setting(default, group, help, **argparse_options):
    """One field of TrainConfig: its default, the heading it stands under in --help, its help line."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **argparse_options})


@dataclass
class TrainConfig:
    """Every setting of train.py; one field = one flag (`data_root` is `--data-root`). Plain JSON types."""

    recipe: str = setting("", "recipe", "start from the settings of a recipe (listed below)", choices=())
    dataset: str = setting("streets", "data", "data set; streets is drawn by our code, nothing to download",
                           choices=DATASETS)
    data_root: str = setting("data", "data", "folder that holds the data set", metavar="DIR")
    val_fraction: float = setting(0.2, "data", "share of the images that validates in a folder without a "
                                  "validation part, and with --resplit (stratified by class)", type=fraction)
    classes: tuple = setting((), "data", "class names of a folder that has no classes.txt, in the order of "
                             "the mask values", nargs="+", metavar="NAME")
    resplit: bool = setting(False, "data", "pool training and validation images and split them anew, "
                            "stratified by class", action="store_true")
    ignore_background: bool = setting(False, "data", "leave the class called background out: its pixels are "
                                      "not counted", action="store_true")
    imgsz: tuple = setting((518, 518), "data", "size the network trains at; any H W works", nargs=2,
                           type=positive_int, metavar=("H", "W"))
    augment: tuple = setting(("flip",), "data", "crop = scale 0.5-2 and random crop, flip, color; or none",
                             nargs="+", choices=AUGMENTS)
    workers: int = setting(2, "data", "processes that load data", type=whole_number, metavar="N")

    arch: str = setting("dinov2", "model", "dinov2 = --backbone + --head, or a whole network to compare with "
                        "it: fcn_resnet50, deeplabv3_resnet101, segformer_b0 ... segformer_b5",
                        choices=ARCHITECTURES, metavar="NAME")
    backbone: str = setting("dinov2_vits14", "model", f"{BACKBONES[0]} ... {BACKBONES[-1]} (torch.hub), "
                            "vit_tiny, or timm/<model name>", type=backbone_name, metavar="NAME")
    weights: str = setting("auto", "model", "auto = published pretrained weights (of the encoder), none = "
                           "random, or a file (.pth, .safetensors)", metavar="auto|none|FILE")
    normalize: str = setting("auto", "model", "auto = the mean and std that the weights were trained with, "
                             "none = pixels / 255 only", choices=NORMALIZATIONS)
    layers: tuple = setting((), "model", "blocks whose feature maps the head sees: 0 = first, -1 = last "
                            "(default: the last four for bn and unet-skip, else the last one)", nargs="+",
                            type=int, metavar="I")
    head: str = setting("bn", "model", "bn = BatchNorm + 1x1 conv on several maps, linear = 1x1 conv, unet = "
                        "four up-blocks, unet-skip = the same with earlier blocks joined in, deconv = four "
                        "transposed convolutions and a centre crop, deconv-resize = the same with a resize "
                        "in place of the crop", choices=HEADS)
    unfreeze: object = setting(0, "model", "how many of the last transformer blocks train with the head, "
                               "or all (the default of every --arch but dinov2)", type=block_count,
                               metavar="N|all")

    loss: str = setting("ce", "training", "ce = cross entropy, lovasz = Lovasz-Softmax, focal (gamma 2), "
                        "dice = soft Dice; or a sum such as focal+dice", type=loss_name,
                        metavar="NAME[+NAME]")
    class_weights: str = setting("none", "training", "weight the classes in ce and focal by their share of "
                                 "the training pixels: enet = 1 / ln(1.02 + share), median = "
                                 "inverse frequency where the class is seen", choices=CLASS_WEIGHTS)
    optimizer: str = setting("adamw", "training", "adamw, adam, or sgd = Nesterov momentum 0.937",
                             choices=OPTIMIZERS)
    lr: float = setting(1e-3, "training", "base learning rate (of the head)", type=positive_float)
    backbone_lr_scale: float = setting(0.1, "training", "learning rate of unfrozen blocks, relative to --lr "
                                       "(1 for every --arch but dinov2)", type=positive_float, metavar="X")
    weight_decay: float = setting(1e-3, "training", "weight decay; none on norms and biases",
                                  type=non_negative_float)
    scheduler: str = setting("cosine", "training", "learning rate over the run; cosine and poly warm up, "
                             "exponential = x 0.98 an epoch, onecycle rises for 30 %% of the steps",
                             choices=SCHEDULERS)
    epochs: int = setting(30, "training", "passes over the training images", type=positive_int)
    batch_size: int = setting(8, "training", "images a forward pass", type=positive_int)
    accumulate: int = setting(1, "training", "forward passes an optimizer step; equals one large batch for "
                              "ce and focal, whose terms are means over pixels", type=positive_int)

    cache_features: str = setting("", "run", "compute the features of a frozen backbone once and keep them "
                                  "in DIR for every later epoch and run (DIR: outputs/cache)", nargs="?",
                                  const="outputs/cache", metavar="DIR")
    cache_views: int = setting(1, "run", "views of a training image to keep: 1 = as it is, more = "
                               "augmented", type=positive_int)
    compile: bool = setting(False, "run", "torch.compile backbone and head: minutes at the start, faster "
                            "steps, above all on a GPU", action="store_true")
    amp: str = setting("auto", "run", "autocast: auto = what the device is good at", choices=PRECISIONS)
    seed: int = setting(0, "run", "seed of weights, order and augmentation", type=whole_number)
    device: str = setting("auto", "run", "auto = cuda, else mps, else cpu; or a torch device such as cuda:1")
    resume: bool = setting(False, "run", "go on where OUT_DIR/last.pth stands (--epochs may grow)",
                           action="store_true")
    out_dir: str = setting("outputs", "run", "where the run writes; an earlier run moves to previous/",
                           metavar="DIR")


# What two or more recipes share.
DINOV2_PROTOCOL = dict(dataset="voc", backbone="dinov2_vits14", head="bn", unfreeze=0, lr=1e-3,
                       weight_decay=1e-3, augment=("crop", "flip"), batch_size=16, epochs=60)
SMALL_BASELINE = dict(weights="none", normalize="none", imgsz=(64, 64), lr=1e-3, weight_decay=0.01,
                      scheduler="exponential", batch_size=64, epochs=30)

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
    "voc-linear": ("VOC 2012, frozen ViT-S/14, BN + 1x1 conv on the last block: DINOv2's linear protocol",
                   dict(DINOV2_PROTOCOL, imgsz=(512, 512), layers=(-1,), scheduler="poly")),
    "voc-ms": ("VOC 2012, frozen ViT-S/14, BN + 1x1 conv on four blocks: DINOv2's multi-scale protocol",
               dict(DINOV2_PROTOCOL, imgsz=(640, 640), layers=(-4, -3, -2, -1), scheduler="cosine")),
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

# Settings of --arch dinov2 alone; the defaults of every other --arch, which trains as a whole; all that a
# recipe says of its model and that means nothing for one of the other kind.
DINOV2_ONLY = ("backbone", "head", "layers")
BASELINE_DEFAULTS = dict(unfreeze="all", backbone_lr_scale=1.0)
OF_A_MODEL = (*DINOV2_ONLY, *BASELINE_DEFAULTS, "weights", "normalize")

# Settings that may differ between a run and its --resume; the others shape model, data or steps.
MAY_CHANGE_ON_RESUME = {"epochs", "workers", "device", "data_root", "out_dir", "resume"}


def train_parser(description):
    """Return the argparse parser made from TrainConfig. Flags not given stay out of the namespace."""
    recipes = "\n".join(f"  {name:21}{line}" for name, (line, _) in RECIPES.items())
    parser = argparse.ArgumentParser(
        description=description, epilog=f"recipes:\n{recipes}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    groups = {}
    for field in dataclasses.fields(TrainConfig):
        options = dict(field.metadata)
        group = options.pop("group")
        if field.name == "recipe":
            options["choices"] = list(RECIPES)
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
    given = {name: as_setting(value) for name, value in given.items()}
    if saved is not None:
        defaults = {name: as_setting(value) for name, value in saved.items()}
        changed = [name for name, value in given.items()
                   if name not in MAY_CHANGE_ON_RESUME and name in defaults and value != defaults[name]]
        if changed:
            name = changed[0]
            raise InputError(f"--{name.replace('_', '-')} is {given[name]!r}, but the run to resume has "
                             f"{defaults[name]!r}: leave the flag out, or start a new run without --resume")
    else:
        defaults = recipe_settings(given)
    unknown = defaults.keys() - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        raise InputError(f"the run to resume has settings unknown here ({', '.join(sorted(unknown))}): "
                         "resume it with the version that wrote it")
    config = TrainConfig(**{**defaults, **given})
    check_settings(config, given)
    return config


def as_setting(value):
    """Return a value from argparse or JSON as TrainConfig holds it: tuples for lists, () for `none` alone."""
    value = tuple(value) if isinstance(value, list) else value
    return () if value == ("none",) else value


def recipe_settings(given):
    """Return the settings of the recipe in `given`, fitted to the --arch in `given`."""
    settings = dict(RECIPES[given["recipe"]][1]) if given.get("recipe") else {}
    own = settings.get("arch", "dinov2")
    arch = given.get("arch", own)
    if (arch == "dinov2") != (own == "dinov2"):  # the recipe's data and steps with a model of the other kind
        settings = {name: value for name, value in settings.items() if name not in OF_A_MODEL}
    return settings if arch == "dinov2" else {**BASELINE_DEFAULTS, **settings}


def check_settings(config, given):
    """Raise InputError for flags in `given` that contradict each other or would have no effect."""
    misfit = [name for name in DINOV2_ONLY if name in given and config.arch != "dinov2"]
    if misfit:
        raise InputError(f"--{misfit[0]} belongs to --arch dinov2, and {config.arch} is a whole network: "
                         "leave it out")
    if config.class_weights != "none" and not {"ce", "focal"} & set(config.loss.split("+")):
        raise InputError(f"--class-weights acts on ce and focal, and --loss {config.loss} has neither: "
                         "leave it out, or add one (such as --loss ce+dice)")
    if "none" in config.augment:
        raise InputError("--augment none stands alone: leave out none or the others")
    if given.get("classes") and config.dataset != "folder":
        raise InputError(f"--classes names the classes of a folder, and --dataset {config.dataset} has its "
                         "own: leave it out")
    if "val_fraction" in given and config.dataset != "folder" and not config.resplit:
        raise InputError(f"--val-fraction has no effect, {config.dataset} has a validation part: add "
                         "--resplit to split all images anew")
    if config.cache_features and (config.arch != "dinov2" or config.unfreeze != 0):
        raise InputError("--cache-features keeps what a frozen backbone computes, and here it trains: leave "
                         "out --cache-features, or give --arch dinov2 --unfreeze 0")
    if "cache_views" in given and not config.cache_features:
        raise InputError("--cache-views has no effect without --cache-features: add it")
    if config.cache_features and config.cache_views == 1 and given.get("augment"):
        raise InputError("--augment has no effect on the one view that is cached: give --cache-views K to "
                         "keep K augmented ones, or leave out --augment")
    if "backbone_lr_scale" in given and config.unfreeze == 0:
        raise InputError("--backbone-lr-scale has no effect on a frozen backbone: add --unfreeze N or all")


def parse_train_args(argv=None, description="Train a segmentation model."):
    """Return the dict of train flags given on the command line; exits with code 2 on a wrong flag."""
    return vars(train_parser(description).parse_args(argv))
