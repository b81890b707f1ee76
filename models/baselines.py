"""The networks to compare with, as a backbone (encoder) and a head (decoder), like every other model here.

    backbone, head = build_baseline(ModelSpec(arch="fcn_resnet50", num_classes=21), weights="auto")

FCN-ResNet50 (Long et al., 2015) and DeepLabV3-ResNet101 (Chen et al., 2017) are torchvision's, with an
auxiliary classifier in training where the spec has an aux_weight; SegFormer-B0..B5 (Xie et al., 2021) is the
one of transformers. Both packages are imported when asked for.
"""
import torch
from torch import nn

from config import InputError
from models.backbones import Backbone
from models.heads import BatchNorm2d, Head
from models.weights import hugging_face_weights, load_strictly, published_weights, read_weights

ENCODERS = {"fcn_resnet50": "ResNet50_Weights", "deeplabv3_resnet101": "ResNet101_Weights"}  # in torchvision
# Widths of the four stages, depths of the four stages, width of the decoder: table 6 of the paper.
SEGFORMER = {"segformer_b0": ((32, 64, 160, 256), (2, 2, 2, 2), 256),
             "segformer_b1": ((64, 128, 320, 512), (2, 2, 2, 2), 256),
             "segformer_b2": ((64, 128, 320, 512), (3, 4, 6, 3), 768),
             "segformer_b3": ((64, 128, 320, 512), (3, 4, 18, 3), 768),
             "segformer_b4": ((64, 128, 320, 512), (3, 8, 27, 3), 768),
             "segformer_b5": ((64, 128, 320, 512), (3, 6, 40, 3), 768)}


class ResNetBackbone(Backbone):
    """The dilated ResNet of a torchvision segmentation network: the map of its last stage, stride 8; where
    there is an auxiliary classifier, that of the stage before comes first.
    """

    def __init__(self, net):
        channels = [1024, 2048] if "aux" in net.return_layers.values() else [2048]
        super().__init__(net.to(memory_format=torch.channels_last), size_divisor=1, layers=[],
                         channels=channels, stride=8)

    def maps(self, images):
        """(B, 3, H, W) normalized -> [(B, 1024, H/8, W/8) if wanted, (B, 2048, H/8, W/8)], rounded up."""
        # channels last: three times as fast on the CPU in bf16, and what tensor cores want
        return list(self.net(images.contiguous(memory_format=torch.channels_last)).values())


class SegformerBackbone(Backbone):
    """The hierarchical encoder of a SegFormer: four maps at strides 4, 8, 16 and 32.

    Images are padded to multiples of 32, below which the reduced attention of the first stage has no keys.
    """

    def __init__(self, net):
        super().__init__(net, size_divisor=32, layers=[], channels=net.config.hidden_sizes, stride=4)

    def maps(self, images):
        """(B, 3, H, W) normalized -> 4 x (B, D, H/s, W/s), s = 4, 8, 16, 32."""
        return list(self.net(images, output_hidden_states=True).hidden_states)


class SegformerHead(Head):
    """The decoder of a SegFormer."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, features):
        """4 maps (B, D, h, w) -> (B, K, h, w) of the finest of them."""
        return self.net(features.maps)


class TorchvisionHead(Head):
    """The decoder of a torchvision network on the last stage and, in training, its auxiliary classifier.

    aux: a classifier on the stage before, or None; its loss counts aux_weight times (Zhao et al., Pyramid
    Scene Parsing Network, CVPR 2017). It has no effect on the validation loss or on a prediction.
    """

    def __init__(self, net, aux, aux_weight):
        super().__init__()
        self.net, self.aux, self.auxiliary = net, aux, {"aux": aux_weight}

    def forward(self, features):
        """The maps of a ResNetBackbone -> dict(logits (B, K, h, w)), in training with the auxiliary `aux`."""
        output = dict(logits=self.net(features.maps[-1]))
        if self.aux and self.training:
            output["aux"] = self.aux(features.maps[0])
        return output


def build_baseline(spec, weights="none"):
    """Return (Backbone, head) of the network that is the `arch` of a ModelSpec.

    weights: auto = the encoder as published for ImageNet, none, or a file of the encoder or of the whole
    network, of which the encoder is read. Raises InputError.
    """
    backbone, head = BASELINES[spec.arch](spec, weights)
    backbone.pretrained = weights != "none"
    return replace_batch_norms(backbone), replace_batch_norms(head)


def replace_batch_norms(module):
    """Return a module in which every nn.BatchNorm2d has become a BatchNorm2d of heads.py."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            norm = BatchNorm2d(child.num_features, child.eps, child.momentum)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm)
        else:
            replace_batch_norms(child)
    return module


def build_torchvision(spec, weights):
    """Return (ResNetBackbone, TorchvisionHead); arguments as build_baseline."""
    from torchvision import models
    published = getattr(models, ENCODERS[spec.arch]).IMAGENET1K_V1
    make = getattr(models.segmentation, spec.arch)
    net = make(weights=None, weights_backbone=None, num_classes=spec.num_classes,
               aux_loss=bool(spec.aux_weight))
    if weights != "none":
        state = published_weights(published.url) if weights == "auto" else read_weights(weights)
        if any(key.startswith("backbone.") for key in state):  # a whole network, such as the one for COCO
            state = {key.removeprefix("backbone."): value for key, value in state.items()
                     if key.startswith("backbone.")}
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        load_strictly(net.backbone, state, published.url if weights == "auto" else weights)
    return ResNetBackbone(net.backbone), TorchvisionHead(net.classifier, net.aux_classifier, spec.aux_weight)


def build_segformer(spec, weights):
    """Return (SegformerBackbone, SegformerHead); arguments as build_baseline."""
    from transformers import SegformerConfig, SegformerModel
    from transformers.models.segformer.modeling_segformer import SegformerDecodeHead
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arch = spec.arch
    widths, depths, decoder = SEGFORMER[arch]
    config = SegformerConfig(hidden_sizes=list(widths), depths=list(depths), decoder_hidden_size=decoder,
                             num_labels=spec.num_classes)
    if weights == "none":
        net = SegformerModel(config)
    else:
        state = (
            hugging_face_weights(f"nvidia/mit-{arch[-2:]}") if weights == "auto" else read_weights(weights)
        )
        # by from_pretrained, which renames the keys of files that earlier versions wrote
        net, report = SegformerModel.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        wrong = sorted(report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]})
        if wrong:
            raise InputError(f"--weights {weights} does not fit {arch} ({len(wrong)} weights missing or of "
                             f"another shape, such as {wrong[0]}): it belongs to another model")
    return SegformerBackbone(net), SegformerHead(SegformerDecodeHead(config))


# A new network is one function above, f(spec, weights) -> (Backbone, Head), and one line here.
BASELINES = {
    "fcn_resnet50": build_torchvision,
    "deeplabv3_resnet101": build_torchvision,
    "segformer_b0": build_segformer,
    "segformer_b1": build_segformer,
    "segformer_b2": build_segformer,
    "segformer_b3": build_segformer,
    "segformer_b4": build_segformer,
    "segformer_b5": build_segformer,
}
