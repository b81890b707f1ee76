"""The whole model: a backbone, a head, and what makes images of any size fit both.

    python model.py --recipe demo                      # prints layers, parameters, output shape
    model = build_model(ModelSpec(num_classes=21, backbone="dinov2_vits14", head="bn"), weights="auto")
    logits = model(images)                             # (B, 3, H, W) uint8 -> (B, K, H, W), any H, W

Normalization and padding live in the Segmenter, so training, inference and export cannot disagree.
"""
import dataclasses
from dataclasses import dataclass
from functools import partial
from types import MethodType

from config import InputError, ModelOptions, fields_affecting, parse_train_args, resolve

if __name__ == "__main__":
    parse_train_args()  # --help and wrong flags are answered before torch is imported

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import utils
from models.backbones import Features, Part, Tail, build_backbone, origin_code
from models.baselines import build_baseline
from models.heads import HEADS, four_quarters, logits_of
from models.upsampling import geometry_of, pad, pixels
from models.weights import hash_state


@dataclass
class ModelSpec(ModelOptions):
    """All that build_model needs to make a model again, but its weights; stored in every checkpoint.

    A new option of a model is one field of config.ModelOptions: it is a flag, stored, and reaches Head.build.
    """

    num_classes: int = 0
    num_bands: int = 3
    colors: tuple = (0, 1, 2)  # positions of the bands that a backbone made for RGB sees

    @classmethod
    def of(cls, options, num_classes, num_bands=3, colors=(0, 1, 2)):
        """Return the spec that the ModelOptions (or a TrainConfig) describe, for images of so many bands."""
        fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(ModelOptions)}
        widen = options.widen or getattr(options, "unfreeze", 0) == "all"  # what trains can see all bands
        return cls(**{**fields, "widen": widen and num_bands != 3}, num_classes=num_classes,
                   num_bands=num_bands, colors=tuple(colors))


class Segmenter(nn.Module):
    """Images in, logits at the same size out. `spec` is what build_model needs to make it again.

    Images have spec.num_bands bands; of other numbers than three, a backbone that was not widened sees the
    three spec.colors, the head all. Wherever it takes images, it takes the Features of a feature cache, in
    which what is frozen is done. stretched: whether logits are stretched over the images instead of cropped,
    as in geometry_of.
    """

    def __init__(self, backbone, head, spec):
        super().__init__()
        self.backbone, self.head, self.spec, self.num_classes = backbone, head, spec, spec.num_classes
        self.stretched = False
        self.trained_tail = ()  # the Tail that trains on cached tokens; a tuple, as its blocks are not new
        mean, std = backbone.normalization if spec.normalize == "auto" else ((0.0,) * 3, (1.0,) * 3)
        for name, values, other in (("mean", mean, 0.0), ("std", std, 1.0)):
            buffer = torch.full((1, spec.num_bands, 1, 1), other)
            buffer[0, list(spec.colors), 0, 0] = torch.tensor(values)
            self.register_buffer(name, buffer * 255)

    def normalize_bands(self, mean, std):
        """Normalize the bands beside spec.colors by these means and standard deviations of values 0..255,
        (C,) each, unless normalize is none.
        """
        for position in set(range(self.spec.num_bands)) - set(self.spec.colors):
            if self.spec.normalize == "auto":
                self.mean[0, position], self.std[0, position] = mean[position], std[position]

    def forward(self, images):
        """(B, C, H, W) uint8 of any H, W -> (B, K, H, W) float32 logits."""
        return pixels(*self.logits(images))

    def logits(self, images):
        """(B, C, H, W) uint8, or Features of a cache -> logits (B, K, h, w), their Geometry."""
        output, geometry = self.output(images)
        return logits_of(output), geometry

    def output(self, images, geometry=None):
        """(B, C, H, W) uint8, or Features of a cache -> (what the head returns, Geometry)."""
        cached = isinstance(images, Features)
        features = self.finish(images) if cached else self.features(images, geometry)
        # the layout of tokens: in bfloat16 heads are two to three times as fast in it, in float32 up to 1.6
        # (but a U-Net trains 1.3 times as fast in the other)
        features.maps = [values if values.stride(1) == 1 else
                         values.contiguous(memory_format=torch.channels_last) for values in features.maps]
        return self.head(features), features.geometry

    def features(self, images, geometry=None):
        """(B, C, H, W) uint8 -> Features of the normalized, padded images."""
        geometry = geometry or self.geometry(images.shape[-2:])
        images = self.normalized(images, geometry)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.backbone.trains()):
            maps, tokens = self.backbone(self.seen(images), self.head.reads.tokens)
        return Features(maps, tokens, images, geometry)

    def seen(self, images):
        """(B, C, H, W) normalized -> those of its bands that the backbone sees, (B, channels_in, H, W)."""
        as_it_is = self.backbone.channels_in == self.spec.num_bands and self.spec.colors == (0, 1, 2)
        return images if as_it_is or self.backbone.channels_in != 3 else images[:, list(self.spec.colors)]

    def geometry(self, size):
        """Return the Geometry of images of `size` = (H, W)."""
        return geometry_of(size, self.backbone.size_divisor, self.head.logits_multiple, self.stretched)

    def normalized(self, images, geometry):
        """(B, C, H, W) uint8 -> (B, C, *geometry.padded) float32, normalized, then padded with zeros."""
        return pad((images.float() - self.mean) / self.std, geometry)

    # --- for the feature cache
    def starts_from_images(self):
        """Return whether a training starts from the images, as nothing before what trains is frozen."""
        return not self.backbone.layers or self.backbone.first_trained() is None

    def cached_parts(self):
        """Return the Parts of an image that a training needs. Raises InputError where no training can start
        from what a frozen part of the backbone computes.
        """
        backbone, reads = self.backbone, self.head.reads
        image = [Part("image")] * reads.image
        if not backbone.layers:
            raise InputError("--cache-features keeps what the blocks of a backbone compute, and "
                             f"{self.spec.arch} has none: leave it out, or give --arch dinov2")
        token_blocks = {block % len(backbone.blocks) for block in reads.tokens}
        if not backbone.trains():
            return [*(Part("map", layer) for layer in backbone.layers),
                    *(Part("tokens", block) for block in sorted(token_blocks)), *image]
        first = backbone.first_trained()
        if first is None:
            raise InputError("--cache-features keeps what enters the first block that trains, and parameters "
                             "before the blocks train too: leave it out, or give --unfreeze N")
        self.trained_tail = (backbone.tail(first),)  # raises where that cannot be
        token_blocks |= {first, *(layer + 1 for layer in backbone.layers)}
        return [*(Part("tokens", block) for block in sorted(token_blocks) if block <= first), *image]

    def compute_parts(self, parts, images):
        """(B, C, H, W) uint8 -> {Part: (B, ...)}, maps and tokens as the backbone computes them."""
        blocks = [part.block for part in parts if part.kind == "tokens"]
        normalized = self.normalized(images, self.geometry(images.shape[-2:]))
        maps, tokens = self.backbone(self.seen(normalized), blocks)
        values = {Part("map", layer): values.permute(0, 2, 3, 1)  # (B, h, w, D)
                  for layer, values in zip(self.backbone.layers, maps, strict=True)}
        values.update({Part("tokens", block): values for block, values in tokens.items()})
        values[Part("image")] = images.permute(0, 2, 3, 1)  # (B, H, W, C)
        return {part: values[part] for part in parts}

    def finish(self, cached):
        """Features of a cache, in bfloat16 -> Features that the head takes: runs the blocks that train."""
        if not (cached.maps or cached.tokens):
            return self.features(cached.image, cached.geometry)
        depth, token_blocks = len(self.backbone.blocks), self.head.reads.tokens
        maps = [as_autocast(values) for values in cached.maps]
        tokens = {block: values.float() for block, values in cached.tokens.items()}
        if maps:
            tokens = {block: tokens[block % depth] for block in token_blocks}
        for tail in self.trained_tail:
            grid = tuple(side // self.backbone.size_divisor for side in cached.geometry.padded)
            maps, tokens = tail.maps_and_tokens(tokens, grid, self.backbone.layers, token_blocks)
        image = None if cached.image is None else self.normalized(cached.image, cached.geometry)
        return Features(maps, tokens, image, cached.geometry)

    def part_facts(self, parts):
        """Return {Part: what it depends on beside the image at the size of training, as plain values}."""
        code = utils.code_hash(*utils.modules_of(type(self), type(self.backbone), pad))
        options = {name: getattr(self.spec, name) for name in fields_affecting("features", ModelOptions)
                   if getattr(self.spec, name) != getattr(ModelOptions, name)}
        colors = list(self.spec.colors)
        shared = dict(options, backbone=self.spec.backbone, mean=self.mean[0, colors].flatten().tolist(),
                      std=self.std[0, colors].flatten().tolist(), colors=colors,
                      code=[code, origin_code(self.spec.backbone)])
        all_weights, facts = None, {}
        for part in parts:
            if part.kind == "image":
                facts[part] = {}
                continue
            if part.kind == "tokens":
                weights = hash_state(self.backbone.frozen_state(part.block))
            else:  # one hash for all of them: a backbone may have gigabytes
                weights = all_weights = all_weights or hash_state(self.backbone.state_dict())
            facts[part] = dict(shared, block=part.block, weights=weights)
        return facts

    # --- what it consists of
    def compile_parts(self):
        """Compile backbone and head (torch.compile) the first time each is called."""
        for module in (*(self.trained_tail or [self.backbone]), self.head):
            module.compile()

    def checkpoint_activations(self):
        """Let blocks that train keep their input alone, and compute the rest once more in the backward pass
        (Chen et al. 2016, arXiv 1604.06174). Returns how many there are.
        """
        modules = [self.backbone, *(module for module in self.modules() if isinstance(module, Tail))]
        blocks = {block for module in modules for block in module.blocks
                  if any(parameter.requires_grad for parameter in block.parameters())}
        for block in blocks:
            block.forward = MethodType(computed_again, block)  # of a copy, it is bound to the copy
        return len(blocks)

    def pretrained(self):
        """Return {name: how many blocks follow it} of the parameters of the backbone and of the copies of its
        blocks in the head.
        """
        modules = {"backbone": self.backbone, **{name: module for name, module in self.named_modules()
                                                 if isinstance(module, Tail)}}
        following = {}
        for prefix, module in modules.items():
            blocks = list(module.blocks)
            after = {id(parameter): len(blocks) - 1 - number for number, block in enumerate(blocks)
                     for parameter in block.parameters()}
            norm = getattr(getattr(module, "net", module), "norm", nn.Identity())
            after.update((id(parameter), 0) for parameter in norm.parameters())
            following.update((f"{prefix}.{name}", after.get(id(parameter), len(blocks)))
                             for name, parameter in module.named_parameters())
        return following

    def parameter_counts(self):
        """Return (trained, all) numbers of parameters."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def computed_again(block, *args, **kwargs):
    """The forward of a block, which keeps its inputs alone for the backward pass."""
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def as_autocast(values):
    """Return bfloat16 values as they are where autocast computes in bfloat16, else in float32."""
    kind = values.device.type
    bfloat16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.bfloat16
    return values if bfloat16 else values.float()


def build_model(spec, weights="none", unfreeze=0, backbone=None):
    """Return the Segmenter of a ModelSpec, on the CPU. Raises InputError.

    weights: auto, none or a file, of the backbone; unfreeze: number of last blocks that train, or "all";
    backbone: a Backbone to use in place of the one that the spec names, not widened. An arch other than
    dinov2 is a whole network: it has no use for backbone, head and layers.
    """
    if spec.arch == "dinov2":
        head = HEADS[spec.head]
        layers = four_quarters if spec.layers == ("quarters",) else spec.layers or head.reads.maps
        backbone = backbone or build_backbone(spec.backbone, weights, layers)
        spec = dataclasses.replace(spec, layers=tuple(backbone.layers))
        decoder = head.build(backbone, spec)
    else:
        backbone, decoder = build_baseline(spec, weights)
        spec = dataclasses.replace(spec, backbone="", head="", layers=())
    if spec.widen:
        backbone.widen(spec.colors, spec.num_bands)
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
    leaves_one_out = config.ignore_background and any(utils.is_background(name) for name, _ in classes)
    num_classes = len(classes) - leaves_one_out
    num_bands = len(config.bands) if len(config.bands) > 1 else 3  # of all bands, it is not known how many
    colors = [min(position, num_bands - 1) for position in range(3)]
    model = build_model(ModelSpec.of(config, num_classes, num_bands, colors), "none", config.unfreeze)
    print(model)
    trained, total = model.parameter_counts()
    shape = (1, num_bands, *config.imgsz)
    with torch.inference_mode():
        logits = model.eval()(torch.zeros(shape, dtype=torch.uint8))
    backbone = model.backbone
    if config.arch == "dinov2":
        print(f"blocks read {backbone.layers} of {len(backbone.blocks)}, patch {backbone.size_divisor}")
    print(f"parameters: {trained:,} trained, {total - trained:,} frozen, {total:,} in all")
    print(f"images {shape} uint8 -> logits {tuple(logits.shape)} {str(logits.dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    utils.run_main(main)
