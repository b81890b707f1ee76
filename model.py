"""The Segmenter, which joins a backbone and a head, and its checkpoints.

    python model.py                                       # prints the default model (flags as train.py)
    python model.py --backbone vit_tiny --imgsz 224 224   # works with no network
    python model.py --arch segformer_b0 --dataset voc

A Segmenter takes uint8 images (B, 3, H, W) of any size and returns logits (B, K, H, W): normalisation,
padding to the patch multiple and cropping are inside, so training, inference and export cannot disagree.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from backbones import FasterAttention, TimmBackbone, build_backbone, create_timm
from baselines import build_baseline
from config import ARCHITECTURES, CLASSES, InputError, parse_train_args, resolve
from heads import HEADS
from upsample import Logits
from weights import load_strictly, published_weights, torch_load

VERSION = 1  # of the checkpoint format
OFFICIAL_NAME = re.compile(r"(dinov2_vit[sblg]14)_(voc2012|ade20k)_(linear|ms)")
OFFICIAL_URL = "https://dl.fbaipublicfiles.com/dinov2/{backbone}/{name}_head.pth"
OFFICIAL_PROTOCOLS = {  # of the configurations published beside the heads
    "linear": dict(window=(512, 512), slide=True, stride=(341, 341)),
    "ms": dict(window=(640, 640), slide=True, stride=(320, 320), scales=(1.0, 1.32, 1.73, 2.28, 3.0),
               flip=True),
}
SPEC_KEYS = {"arch", "backbone", "head", "num_classes", "layers"}
# The same architectures in timm: a trained checkpoint runs where the hub code is not at hand.
TIMM_TWINS = {"dinov2_vits14": "vit_small_patch14", "dinov2_vitb14": "vit_base_patch14",
              "dinov2_vitl14": "vit_large_patch14", "dinov2_vitg14": "vit_giant_patch14"}


# --- the whole model --------------------------------------------------------------------------------------
class Segmenter(nn.Module):
    """Images in, logits at the same size out. `spec` is what build_model needs to make it again."""

    def __init__(self, backbone, head, spec, normalize="auto"):
        super().__init__()
        self.backbone, self.head, self.spec = backbone, head, spec
        self.num_classes, self.crops = spec["num_classes"], True
        mean, std = backbone.normalisation if normalize == "auto" else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)

    def forward(self, images):
        """(B, 3, H, W) uint8 RGB of any H, W -> (B, K, H, W) float32 logits."""
        return self.logits(images).pixels()

    def logits(self, images):
        """(B, 3, H, W) uint8 RGB -> Logits, before anything is made large."""
        return self.decode(self.features(images), images.shape[-2:])

    def features(self, images):
        """(B, 3, H, W) uint8 RGB -> the maps n x (B, D, h, w) of the normalised, padded images."""
        images = pad_to_multiple((images.float() - self.mean) / self.std, self.backbone.patch)
        if self.trains_backbone():
            return self.backbone.features(images)
        with torch.inference_mode(), FasterAttention():
            maps = self.backbone.features(images)
        if torch.is_grad_enabled():  # the head saves its inputs for backward, which inference tensors forbid
            maps = [features.clone(memory_format=torch.channels_last) for features in maps]
        return maps

    def decode(self, maps, size):
        """Maps n x (B, D, h, w) of images of `size` = (H, W) -> Logits."""
        return self.place(self.coarse(maps, size), size)

    def coarse(self, maps, size):
        """Maps n x (B, D, h, w) of images of `size` = (H, W) -> what the head makes of them, (B, K, h, w)."""
        padded, _, _ = padding(size, self.backbone.patch)
        # the layout of tokens: heads are two to three times as fast in it, above all in bfloat16
        maps = [features if features.stride(1) == 1
                else features.contiguous(memory_format=torch.channels_last) for features in maps]
        return self.head(maps, padded).float()

    def place(self, values, size):
        """What the head returns, (B, K, h, w), for images of `size` = (H, W) -> Logits.

        The logits of the padded image are cropped back; without `crops` they are resized onto the image, as
        mmsegmentation did when the official heads were trained.
        """
        padded, top, left = padding(size, self.backbone.patch)
        logits, (height, width) = Logits(values), size
        return logits.at(padded).crop(top, left, height, width) if self.crops else logits.at(size)

    def compile_parts(self):
        """Compile backbone and head (torch.compile) the first time each is called."""
        self.backbone.features = torch.compile(self.backbone.features)
        self.head.compile()

    def trains_backbone(self):
        """Return whether any parameter of the backbone trains."""
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def parameter_counts(self):
        """Return (trained, all) numbers of parameters."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


class HeadOnly(nn.Module):
    """A Segmenter from the features of its frozen backbone on, for images of one size: cache.py has them."""

    def __init__(self, model, size):
        super().__init__()
        self.model, self.size, self.num_classes = model, tuple(size), model.num_classes

    def logits(self, features):
        """(B, h, w, D) bfloat16, all maps side by side -> Logits."""
        kind = features.device.type
        if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) is not torch.bfloat16:
            features = features.float()
        maps = features.permute(0, 3, 1, 2).split(self.model.backbone.channels, dim=1)  # n x (B, D, h, w)
        return self.model.decode(maps, self.size)


def padding(size, multiple):
    """Return (padded (H, W), top, left): where an image of `size` lies, centred, in a multiple, in pixels."""
    extra = [-side % multiple for side in size]
    return tuple(side + more for side, more in zip(size, extra, strict=True)), extra[0] // 2, extra[1] // 2


def pad_to_multiple(images, multiple):
    """Pad (B, C, H, W) with zeros to a multiple, centred."""
    height, width = images.shape[-2:]
    (tall, wide), top, left = padding((height, width), multiple)
    return F.pad(images, (left, wide - width - left, top, tall - height - top))


def build_model(backbone, head, num_classes, layers=(), weights="none", unfreeze=0, arch="dinov2",
                normalize="auto"):
    """Return a Segmenter on the CPU. Arguments as the train flags of the same names; raises InputError.

    An arch other than dinov2 is a whole network: it has no use for backbone, head and layers.
    """
    if arch == "dinov2":
        last = (-1,) if HEADS[head].maps == 1 else ()  # else the default, the last four
        body = build_backbone(backbone, weights, layers or last)
        decoder = build_head(head, body, num_classes)
    else:
        backbone, head = "", ""
        body, decoder = build_baseline(arch, num_classes, weights)
    body.unfreeze(unfreeze)
    spec = dict(arch=arch, backbone=backbone, head=head, num_classes=num_classes, layers=body.layers)
    return Segmenter(body, decoder, spec, normalize)


def build_head(name, backbone, num_classes):
    """Return the head called `name` on the maps of a Backbone. Raises InputError where the two do not fit."""
    if name == "deconv" and not 14 <= backbone.stride <= 16:
        raise InputError(f"--head deconv makes 16 pixels of a patch and crops, and the patches of this "
                         f"backbone are {backbone.stride} pixels wide: use --head deconv-resize or unet")
    return HEADS[name](backbone.channels, num_classes)


# --- checkpoints ------------------------------------------------------------------------------------------
def pack_checkpoint(model, classes, imgsz, **more):
    """Return a self-contained checkpoint: tensors and plain JSON types only."""
    classes = [[name, list(colour)] for name, colour in classes]
    return dict(format="dinoseg", version=VERSION, spec=model.spec, classes=classes, imgsz=list(imgsz),
                model=model.state_dict(), **more)


def read_checkpoint(path):
    """Read a file that pack_checkpoint made. Raises InputError where it is missing, damaged or not ours."""
    checkpoint = torch_load(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != "dinoseg":
        raise InputError(f"{path} is not a checkpoint of train.py (best_model_iou.pth, last.pth)")
    missing = {"spec", "classes", "imgsz", "model"} - checkpoint.keys()
    if missing:
        raise InputError(f"{path} is an incomplete checkpoint (no {', '.join(sorted(missing))})")
    try:
        spec = {"arch": "dinov2", **checkpoint["spec"]}  # the first checkpoints had no other
        known = (checkpoint.get("version") == VERSION and spec.keys() == SPEC_KEYS
                 and spec["arch"] in ARCHITECTURES and (spec["arch"] != "dinov2" or spec["head"] in HEADS))
        if not known:
            raise InputError(f"{path} was written by another version of this code: use that version")
        checkpoint["spec"] = spec
        check_content(checkpoint)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{path} is no checkpoint of train.py, it was made by hand ({error})") from None
    if len(checkpoint["classes"]) != spec["num_classes"]:
        raise InputError(f"{path} names {len(checkpoint['classes'])} classes, but has {spec['num_classes']}")
    return checkpoint


def check_content(checkpoint):
    """Raise ValueError, or what Python raises, for a checkpoint whose entries are not of their types."""
    spec, size = checkpoint["spec"], checkpoint["imgsz"]
    for name, (red, green, blue) in checkpoint["classes"]:
        if not isinstance(name, str) or not all(0 <= int(part) <= 255 for part in (red, green, blue)):
            raise ValueError(f"class {name}")
    if len(size) != 2 or not all(isinstance(side, int) and 0 < side < 1 << 16 for side in size):
        raise ValueError(f"imgsz {size}")
    if not all(isinstance(layer, int) for layer in spec["layers"]) or not isinstance(spec["backbone"], str):
        raise ValueError(f"backbone {spec['backbone']}, layers {spec['layers']}")
    if not all(isinstance(value, torch.Tensor) for value in checkpoint["model"].values()):
        raise ValueError("no tensors")


def load_model(path):
    """Return (Segmenter in eval mode, checkpoint dict) from a file alone; nothing in it trains.

    `path` may also be the name of an official DINOv2 head. Where a DINOv2 was trained and torch.hub's code is
    not at hand, the same network from timm takes its place. Raises InputError.
    """
    if OFFICIAL_NAME.fullmatch(str(path)) and not Path(path).exists():
        return load_official(str(path))
    checkpoint = read_checkpoint(path)
    spec, state = checkpoint["spec"], checkpoint["model"]
    try:
        model = build_model(**spec)
    except InputError:
        if spec["arch"] != "dinov2" or spec["backbone"].removesuffix("_reg") not in TIMM_TWINS:
            raise
        model, state = timm_twin(spec, state)
    load_strictly(model, state, path)
    return model.requires_grad_(False).eval(), checkpoint


# --- official heads ---------------------------------------------------------------------------------------
def load_official(name):
    """Return (Segmenter in eval mode, checkpoint dict) of a head published with DINOv2 (Oquab et al., 2023).

    name: dinov2_vit{s,b,l,g}14_{voc2012,ade20k}_{linear,ms}. The backbone comes through torch.hub; the head
    file from torch.hub's cache, else downloaded. Its keys are those of mmsegmentation: decode_head.bn.*,
    decode_head.conv_seg.*. The checkpoint's `protocol` is the official test protocol. Raises InputError.
    """
    backbone, dataset, kind = OFFICIAL_NAME.fullmatch(name).groups()
    classes = CLASSES[{"voc2012": "voc"}.get(dataset, dataset)]
    state = published_weights(OFFICIAL_URL.format(backbone=backbone, name=name), instead="")
    prefix = "decode_head."
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    layers = (-1,) if kind == "linear" else ()  # the last block, or the last four
    model = build_model(backbone, "bn", len(classes), layers, weights="auto")
    load_strictly(model.head, state, f"{name}_head.pth")
    model.crops = False
    window = (512, 512) if kind == "linear" else (640, 640)
    checkpoint = pack_checkpoint(model, classes, window, protocol=OFFICIAL_PROTOCOLS[kind])
    return model.requires_grad_(False).eval(), checkpoint


def timm_twin(spec, state):
    """Return the Segmenter of a DINOv2 spec built with timm, and `state` renamed to fit it; same outputs."""
    official = spec["backbone"]
    registers = official.endswith("_reg")
    name = TIMM_TWINS[official.removesuffix("_reg")] + ("_reg4_dinov2" if registers else "_dinov2")
    backbone = TimmBackbone(create_timm(name), spec["layers"])
    if not registers:  # the official code interpolates these two kinds of models differently
        backbone.positions.offset, backbone.positions.antialias = 0.1, False
    prefix = "backbone.net."
    inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    outer = {key: value for key, value in state.items() if not key.startswith(prefix)}
    inner = {prefix + key: value for key, value in checkpoint_filter_fn(inner, backbone.net).items()}
    head = build_head(spec["head"], backbone, spec["num_classes"])
    return Segmenter(backbone, head, spec), {**outer, **inner}


def main():
    """Print the model that the train flags describe: its layers, parameters, output shape."""
    config = resolve(parse_train_args(description="Print the model that these train.py flags describe."))
    classes = CLASSES.get(config.dataset) or config.classes or ("background", "foreground")
    if config.ignore_background:
        classes = [entry for entry in classes if entry[0] != "background"]
    model = build_model(config.backbone, config.head, len(classes), config.layers, "none", config.unfreeze,
                        config.arch, config.normalize)
    print(model)
    trained, total = model.parameter_counts()
    shape = (1, 3, *config.imgsz)
    with torch.inference_mode():
        logits = model.eval()(torch.zeros(shape, dtype=torch.uint8))
    body = model.backbone
    if config.arch == "dinov2":
        print(f"blocks read {body.layers} of {len(body.blocks)}, patch {body.patch}")
    print(f"parameters: {trained:,} trained, {total - trained:,} frozen, {total:,} in all")
    print(f"images {shape} uint8 -> logits {tuple(logits.shape)} {str(logits.dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
