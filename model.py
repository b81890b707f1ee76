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

from config import ModelOptions, parse_train_args, resolve

if __name__ == "__main__":
    parse_train_args()  # --help and wrong flags are answered before torch is imported

import torch
from torch import nn

import utils
from models.backbones import Features, build_backbone
from models.baselines import build_baseline
from models.heads import HEADS
from models.logits import geometry_of, pad


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
        geometry = geometry or geometry_of(images.shape[-2:], self.backbone.size_divisor)
        images = pad((images.float() - self.mean) / self.std, geometry)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.backbone.trains()):
            return self.backbone.features(images, self.head.token_blocks)

    def decode(self, features, geometry):
        """Features of images of `geometry` -> what the head returns."""
        # the layout of tokens: heads are two to three times as fast in it, above all in bfloat16
        maps = [one if one.stride(1) == 1 else one.contiguous(memory_format=torch.channels_last)
                for one in features]
        return self.head(Features(maps, features.tokens, features.images), geometry.padded)

    def compile_parts(self):
        """Compile backbone and head (torch.compile) the first time each is called."""
        self.backbone.features = torch.compile(self.backbone.features)
        self.head.compile()

    def parameter_counts(self):
        """Return (trained, all) numbers of parameters."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


class HeadOnly(SegmentationModel):
    """A Segmenter from the maps of its frozen backbone on, as the feature cache has them; for one size."""

    def __init__(self, model, size):
        super().__init__()
        self.model, self.num_classes = model, model.num_classes
        self.geometry = geometry_of(size, model.backbone.size_divisor)

    @property
    def head(self):
        """The head of the Segmenter."""
        return self.model.head

    def output(self, features):
        """(B, h, w, D) bfloat16, all maps side by side -> (what the head returns, Geometry)."""
        kind = features.device.type
        if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) is not torch.bfloat16:
            features = features.float()
        maps = features.permute(0, 3, 1, 2).split(self.model.backbone.channels, dim=1)  # n x (B, D, h, w)
        return self.model.decode(Features(maps), self.geometry), self.geometry


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
