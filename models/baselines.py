"""The networks to compare with, as a backbone (encoder) and a head (decoder), like every other model here.

    backbone, head = build_baseline(ModelSpec(arch="fcn_resnet50", num_classes=21), weights="auto")

FCN-ResNet50 (Long et al., 2015) and DeepLabV3-ResNet101 (Chen et al., 2017) are torchvision's, with an
auxiliary classifier in training where the spec has an aux_weight; SegFormer-B0..B5 (Xie et al., 2021) is the
one of transformers. Three are small enough for a laptop to run in real time: torchvision's LR-ASPP on
MobileNetV3 (Howard et al., 2019), and a pyramid on timm's MobileNetV4 (Qin et al., 2024) or
EfficientNet-Lite0 (after Tan and Le, 2019). The packages are imported when asked for.
"""
import torch
import torch.nn.functional as F
from torch import nn

from config import InputError
from models.backbones import Backbone, load_timm_net
from models.heads import BatchNorm2d, Head
from models.weights import hugging_face_weights, load_strictly, published_weights, read_weights

ENCODERS = {"fcn_resnet50": "ResNet50_Weights", "deeplabv3_resnet101": "ResNet101_Weights",  # in torchvision
            "lraspp_mobilenet_v3_large": "MobileNet_V3_Large_Weights"}
PYRAMIDS = {"fpn_mobilenetv4_small": "mobilenetv4_conv_small.e2400_r224_in1k",  # in timm
            "fpn_efficientnet_lite0": "tf_efficientnet_lite0.in1k"}
PYRAMID_WIDTH = 64
# Widths of the four stages, depths of the four stages, width of the decoder: table 6 of the paper.
SEGFORMER = {"segformer_b0": ((32, 64, 160, 256), (2, 2, 2, 2), 256),
             "segformer_b1": ((64, 128, 320, 512), (2, 2, 2, 2), 256),
             "segformer_b2": ((64, 128, 320, 512), (3, 4, 6, 3), 768),
             "segformer_b3": ((64, 128, 320, 512), (3, 4, 18, 3), 768),
             "segformer_b4": ((64, 128, 320, 512), (3, 8, 27, 3), 768),
             "segformer_b5": ((64, 128, 320, 512), (3, 6, 40, 3), 768)}


class TorchvisionBackbone(Backbone):
    """The dilated encoder of a torchvision segmentation network: the maps that its decoder reads, the finest
    of stride 8.
    """

    def __init__(self, net, channels):
        super().__init__(net.to(memory_format=torch.channels_last), size_divisor=1, layers=[],
                         channels=channels, stride=8)

    def maps(self, images):
        """(B, 3, H, W) normalized -> maps (B, D, H/s, W/s), rounded up: of a ResNet the last one, s = 8,
        after the one before where an auxiliary classifier reads it; of a MobileNet s = 8 and 16.
        """
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


class PyramidBackbone(Backbone):
    """A convolutional network of timm: four maps at strides 4, 8, 16 and 32. Images are padded to multiples
    of 32.
    """

    def __init__(self, net):
        info = net.feature_info
        indices = [index for index, stage in enumerate(info) if stage["reduction"] >= 4]
        net.prune_intermediate_layers(indices, prune_head=True)
        super().__init__(net.to(memory_format=torch.channels_last), size_divisor=32, layers=[],
                         channels=[info[index]["num_chs"] for index in indices], stride=4)
        self.indices = indices
        self.normalization = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]

    @property
    def blocks(self):
        """None: its stages, which timm calls blocks, are no transformer blocks."""
        return []

    def maps(self, images):
        """(B, 3, H, W) normalized -> 4 x (B, D, H/s, W/s), s = 4, 8, 16, 32."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.net.forward_intermediates(images, indices=self.indices, intermediates_only=True)


class PyramidHead(Head):
    """The top-down path of a feature pyramid (Lin et al., Feature Pyramid Networks, CVPR 2017), with
    depthwise separable convolutions, PYRAMID_WIDTH channels wide.
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        width = PYRAMID_WIDTH
        self.lateral = nn.ModuleList(nn.Sequential(nn.Conv2d(count, width, 1, bias=False),
                                                   BatchNorm2d(width)) for count in channels)
        self.smooth = nn.ModuleList(nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), BatchNorm2d(width),
            nn.Conv2d(width, width, 1, bias=False), BatchNorm2d(width)) for _ in channels[1:])
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, features):
        """4 maps (B, D, h, w), the finest first -> (B, K, h, w) of the finest."""
        *finer, coarsest = (lateral(values) for lateral, values in
                            zip(self.lateral, features.maps, strict=True))
        values = coarsest
        for lateral, smooth in zip(reversed(finer), self.smooth, strict=True):
            values = lateral + F.interpolate(values, size=lateral.shape[-2:], mode="bilinear")
            values = values + smooth(values)
        return self.classify(F.relu(values))


class LRASPPHead(Head):
    """The decoder of torchvision's LR-ASPP, on maps of stride 8 and 16."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, features):
        """2 maps (B, D, h, w) -> (B, K, h, w) of the finer one."""
        low, high = features.maps
        return self.net(dict(low=low, high=high))


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
        """The maps of a ResNet -> dict(logits (B, K, h, w)), in training with the auxiliary `aux`."""
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
    """Return a module in which every nn.BatchNorm2d has become a BatchNorm2d of heads.py, that of timm with
    its activation behind it.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            norm = BatchNorm2d(child.num_features, child.eps, child.momentum)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, nn.Sequential(norm, child.act) if hasattr(child, "act") else norm)
        else:
            replace_batch_norms(child)
    return module


def build_torchvision(spec, weights):
    """Return (TorchvisionBackbone, TorchvisionHead); arguments as build_baseline."""
    from torchvision.models import segmentation
    net = getattr(segmentation, spec.arch)(weights=None, weights_backbone=None, num_classes=spec.num_classes,
                                           aux_loss=bool(spec.aux_weight))
    load_encoder(net, spec.arch, weights)
    backbone = TorchvisionBackbone(net.backbone, [1024, 2048] if spec.aux_weight else [2048])
    return backbone, TorchvisionHead(net.classifier, net.aux_classifier, spec.aux_weight)


def build_lraspp(spec, weights):
    """Return (TorchvisionBackbone, LRASPPHead); arguments as build_baseline."""
    from torchvision.models import segmentation
    net = getattr(segmentation, spec.arch)(weights=None, weights_backbone=None, num_classes=spec.num_classes)
    load_encoder(net, spec.arch, weights)
    channels = [net.classifier.low_classifier.in_channels, net.classifier.cbr[0].in_channels]
    return TorchvisionBackbone(net.backbone, channels), LRASPPHead(net.classifier)


def load_encoder(net, arch, weights):
    """Load `weights` as build_baseline has them into the encoder of a torchvision segmentation network."""
    from torchvision import models
    if weights == "none":
        return
    published = getattr(models, ENCODERS[arch]).IMAGENET1K_V1
    state = published_weights(published.url) if weights == "auto" else read_weights(weights)
    for prefix in ("backbone.", "features."):  # of a whole network such as the one for COCO, of a MobileNet
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()
                     if key.startswith(prefix)}
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    load_strictly(net.backbone, state, published.url if weights == "auto" else weights)


def build_pyramid(spec, weights):
    """Return (PyramidBackbone, PyramidHead); arguments as build_baseline."""
    backbone = PyramidBackbone(load_timm_net(PYRAMIDS[spec.arch], weights))  # without drop layers
    return backbone, PyramidHead(backbone.channels, spec.num_classes)


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
    "lraspp_mobilenet_v3_large": build_lraspp,
    "fpn_mobilenetv4_small": build_pyramid,
    "fpn_efficientnet_lite0": build_pyramid,
    "segformer_b0": build_segformer,
    "segformer_b1": build_segformer,
    "segformer_b2": build_segformer,
    "segformer_b3": build_segformer,
    "segformer_b4": build_segformer,
    "segformer_b5": build_segformer,
}
