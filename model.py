"""The whole model: a backbone, a head, and what makes images of any size fit both.

    python model.py --recipe demo                      # prints layers, parameters, output shape
    model = build_model(ModelSpec(num_classes=21, backbone="dinov2_vits14", head="bn"), weights="auto")
    logits = model(images)                             # (B, 3, H, W) uint8 -> (B, K, H, W), any H, W

Normalization and padding live in the Segmenter, so training, inference and export cannot disagree.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

import dataclasses
from dataclasses import dataclass

from config import InputError, ModelOptions, fields_affecting, parse_train_args, resolve

if __name__ == "__main__":
    parse_train_args()  # --help and wrong flags are answered before torch is imported

import torch
from torch import nn

import utils
from models.backbones import Features, Tail, build_backbone, origin_code
from models.baselines import build_baseline
from models.heads import HEADS
from models.logits import geometry_of, pad
from models.weights import hash_state


@dataclass
class ModelSpec(ModelOptions):
    """All that build_model needs to make a model again, but its weights; stored in every checkpoint.

    A new option of a model is one field of config.ModelOptions: it is a flag, stored, and reaches Head.build.
    """

    num_classes: int = 0

    @classmethod
    def of(cls, options, num_classes):
        """Return the spec that the ModelOptions (or a TrainConfig) describe."""
        fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(ModelOptions)}
        return cls(**fields, num_classes=num_classes)


class SegmentationModel(nn.Module):
    """Base of what is trained and scored: from output() of the inputs the head makes logits or a loss."""

    def output(self, inputs):
        """Inputs of the model -> (what the head returns, the Geometry of the images)."""
        raise NotImplementedError

    def logits(self, inputs):
        """Inputs of the model -> Logits, before anything is made large."""
        return self.head.logits(*self.output(inputs))

    def loss(self, inputs, masks, criterion):
        """Inputs of the model, masks (B, H, W) int64 -> loss, {name: term}, preds (B, H, W)."""
        output, geometry = self.output(inputs)
        return self.head.loss(output, masks, geometry, criterion)


class Segmenter(SegmentationModel):
    """Images in, logits at the same size out. `spec` is what build_model needs to make it again."""

    def __init__(self, backbone, head, spec):
        super().__init__()
        self.backbone, self.head, self.spec, self.num_classes = backbone, head, spec, spec.num_classes
        mean, std = backbone.normalization if spec.normalize == "auto" else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)

    def forward(self, images):
        """(B, 3, H, W) uint8 RGB of any H, W -> (B, K, H, W) float32 logits."""
        return self.logits(images).pixels()

    def output(self, images, geometry=None):
        """(B, 3, H, W) uint8 RGB -> (what the head returns, Geometry)."""
        geometry = geometry or geometry_of(images.shape[-2:], self.backbone.size_divisor)
        return self.decode(self.features(images, geometry), geometry), geometry

    def features(self, images, geometry=None):
        """(B, 3, H, W) uint8 RGB -> Features of the normalized, padded images."""
        images = self.normalized(images, geometry)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.backbone.trains()):
            return self.backbone.features(images, self.head.token_blocks)

    def normalized(self, images, geometry=None):
        """(B, 3, H, W) uint8 RGB -> (B, 3, *geometry.padded) float32, normalized, then padded with zeros."""
        geometry = geometry or geometry_of(images.shape[-2:], self.backbone.size_divisor)
        return pad((images.float() - self.mean) / self.std, geometry)

    def decode(self, features, geometry):
        """Features of images of `geometry` -> what the head returns."""
        # the layout of tokens: in bfloat16 heads are two to three times as fast in it, in float32 up to 1.6
        # (but a U-Net trains 1.3 times as fast in the other)
        maps = [one if one.stride(1) == 1 else one.contiguous(memory_format=torch.channels_last)
                for one in features]
        return self.head(Features(maps, features.tokens, features.images), geometry.padded)

    # --- for the feature cache
    def cached_parts(self):
        """Return the names of what CachedSegmenter needs of an image. Raises InputError where no training can
        start from what a frozen part of the backbone computes.
        """
        backbone, head = self.backbone, self.head
        image = ["image"] * head.sees_image
        if not backbone.layers:
            raise InputError("--cache-features keeps what the blocks of a backbone compute, and "
                             f"{self.spec.arch} has none: leave it out, or give --arch dinov2")
        asked = {block % len(backbone.blocks) for block in head.token_blocks}
        if not backbone.trains():
            return [*(f"map {layer}" for layer in backbone.layers),
                    *(f"tokens {block}" for block in sorted(asked)), *image]
        first = backbone.first_trained()
        if first is None:
            raise InputError("--cache-features keeps what enters the first block that trains, and parameters "
                             "before the blocks train too: leave it out, or give --unfreeze N")
        backbone.tail(first)  # says where that cannot be
        asked |= {first, *(layer + 1 for layer in backbone.layers)}
        return [*(f"tokens {block}" for block in sorted(asked) if block <= first), *image]

    def compute_parts(self, parts, images):
        """(B, 3, H, W) uint8 RGB -> {part: (B, ...)} as CachedSegmenter takes them."""
        blocks = [int(part.partition(" ")[2]) for part in parts if part.startswith("tokens")]
        features = self.backbone.features(self.normalized(images), blocks)
        known = {f"map {layer}": values.permute(0, 2, 3, 1)
                 for layer, values in zip(self.backbone.layers, features, strict=True)}
        known.update({f"tokens {block}": values for block, values in features.tokens.items()})
        known["image"] = images.permute(0, 2, 3, 1)
        return {part: known[part] for part in parts}

    def part_facts(self, parts):
        """Return {part: what it depends on beside the image at the size of training, as plain values}."""
        code = utils.hash_code("model.py", "models/backbones.py", "models/logits.py")
        options = {name: getattr(self.spec, name) for name in fields_affecting("features", ModelOptions)
                   if getattr(self.spec, name) != getattr(ModelOptions, name)}
        shared = dict(options, backbone=self.spec.backbone, mean=self.mean.flatten().tolist(),
                      std=self.std.flatten().tolist(), code=[code, origin_code(self.spec.backbone)])
        whole, facts = None, {}
        for part in parts:
            kind, _, block = part.partition(" ")
            if kind == "map":  # one hash for all of them: a backbone may have gigabytes
                whole = whole or hash_state(self.backbone.state_dict())
            state = self.backbone.frozen_state(int(block)) if kind == "tokens" else {}
            facts[part] = {} if kind == "image" else dict(shared, block=int(block), weights=hash_state(state)
                                                          if kind == "tokens" else whole)
        return facts

    def compile_parts(self):
        """Compile backbone and head (torch.compile) the first time each is called."""
        self.backbone.features = torch.compile(self.backbone.features)
        self.head.compile()

    def pretrained(self):
        """Return the names of the parameters of the backbone and of the copies of its blocks in the head."""
        parts = {"backbone": self.backbone, **{name: module for name, module in self.named_modules()
                                               if isinstance(module, Tail)}}
        return {f"{prefix}.{name}" for prefix, part in parts.items() for name, _ in part.named_parameters()}

    def parameter_counts(self):
        """Return (trained, all) numbers of parameters."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


class CachedSegmenter(SegmentationModel):
    """A Segmenter from where its training begins: its inputs are what the feature cache keeps of an image.

    Segmenter.cached_parts() names them: `map L`, the normed map (h, w, D) of block L of a frozen backbone;
    `tokens L`, (prefix + h * w, D), un-normed, as they enter block L; `image`, (H, W, 3) uint8. Where blocks
    of the backbone train, they are run on the tokens that enter the first of them. For one size.
    """

    def __init__(self, model, size):
        super().__init__()
        self.model, self.num_classes = model, model.num_classes
        self.geometry = geometry_of(size, model.backbone.size_divisor)
        # in a list, because these are the backbone's own modules and not once more those of this one
        self.tails = [model.backbone.tail(model.backbone.first_trained())] if model.backbone.trains() else []

    @property
    def head(self):
        """The head of the Segmenter."""
        return self.model.head

    def compile_parts(self):
        """Compile the trained blocks and the head (torch.compile) the first time each is called."""
        for part in (*self.tails, self.head):
            part.compile()

    def output(self, inputs):
        """{part: (B, ...)}, maps and tokens in bfloat16 -> (what the head returns, Geometry)."""
        backbone, parts = self.model.backbone, {kind: {} for kind in ("map", "tokens", "image")}
        for part, values in inputs.items():
            kind, _, block = part.partition(" ")
            parts[kind][int(block or 0)] = values
        maps = [as_autocast(values).permute(0, 3, 1, 2) for values in parts["map"].values()]
        tokens = {block: values.float() for block, values in parts["tokens"].items()}
        features = Features(maps, {block: tokens[block % len(backbone.blocks)]
                                   for block in self.head.token_blocks if maps})
        for tail in self.tails:
            grid = tuple(side // backbone.size_divisor for side in self.geometry.padded)
            features = tail.features(tokens, grid, backbone.layers, self.head.token_blocks)
        for values in parts["image"].values():
            features.images = self.model.normalized(values.permute(0, 3, 1, 2), self.geometry)
        return self.model.decode(features, self.geometry), self.geometry


def as_autocast(values):
    """Return bfloat16 values as they are where autocast computes in bfloat16, else in float32."""
    kind = values.device.type
    bfloat16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.bfloat16
    return values if bfloat16 else values.float()


def build_model(spec, weights="none", unfreeze=0, backbone=None):
    """Return the Segmenter of a ModelSpec, on the CPU. Raises InputError.

    weights: auto, none or a file, of the backbone; unfreeze: number of last blocks that train, or "all";
    backbone: a Backbone to use in place of the one that the spec names. An arch other than dinov2 is a whole
    network: it has no use for backbone, head and layers.
    """
    if spec.arch == "dinov2":
        head = HEADS[spec.head]
        backbone = backbone or build_backbone(spec.backbone, weights, spec.layers or head.reads)
        spec = dataclasses.replace(spec, layers=tuple(backbone.layers))
        decoder = head.build(backbone, spec)
    else:
        backbone, decoder = build_baseline(spec, weights)
        spec = dataclasses.replace(spec, backbone="", head="", layers=())
    backbone.unfreeze(unfreeze)
    return Segmenter(backbone, decoder, spec)


def main():
    """Print the model that the train flags describe: its layers, parameters, output shape."""
    from datasets import DATASETS
    config = resolve(parse_train_args(description="Print the model that these train.py flags describe."))
    _, classes = DATASETS[config.dataset]
    if not classes:
        classes = [(name, None) for name in config.classes or ("background", "foreground")]
        print(f"{len(classes)} classes: --classes names those of a {config.dataset}")
    num_classes = len(classes) - any(config.ignore_background and name == "background" for name, _ in classes)
    model = build_model(ModelSpec.of(config, num_classes), "none", config.unfreeze)
    print(model)
    trained, total = model.parameter_counts()
    shape = (1, 3, *config.imgsz)
    with torch.inference_mode():
        logits = model.eval()(torch.zeros(shape, dtype=torch.uint8))
    backbone = model.backbone
    if config.arch == "dinov2":
        print(f"blocks read {backbone.layers} of {len(backbone.blocks)}, patch {backbone.size_divisor}")
    print(f"parameters: {trained:,} trained, {total - trained:,} frozen, {total:,} in all")
    print(f"images {shape} uint8 -> logits {tuple(logits.shape)} {str(logits.dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    utils.run_main(main)
