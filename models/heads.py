"""Heads: they turn the feature maps of a backbone into class logits.

    head = HEADS["unet"](channels=[768], num_classes=21)
    output = head(features)                    # Features -> (B, K, any size up to the images')

A new head is one class here, entered in HEADS.
"""
import copy
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from config import IGNORE, InputError
from losses import mask_classification
from models.upsampling import pad

UP_WIDTHS = (512, 256, 128, 64)  # channels after each of the four up-blocks of the U-Net
DECONV_WIDTHS = (256, 128, 64, 32)
STEM_WIDTHS = (32, 64)  # of the detail head, at a half and a quarter of the image's size
DETAIL_WIDTH = 64
PROJECTED = 32  # channels of the maps where the detail head joins them: with more, it learns scenes by heart
QUERIES = 100  # of the mask head


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that uses its running statistics where a training batch has one value per channel, which has
    no variance: a last batch of one image must not end the run.
    """

    def forward(self, features):
        """(B, C, h, w) -> (B, C, h, w)."""
        if self.training and features.numel() == features.shape[1]:
            return F.batch_norm(features, self.running_mean, self.running_var, self.weight, self.bias,
                                eps=self.eps)
        return super().forward(features)


@dataclass(frozen=True)
class Reads:
    """What a head reads of a backbone.

    maps: how many of the last blocks, or f(depth) -> blocks, where --layers does not say. tokens: the blocks
    (-1 = the last) whose entering tokens it finds in features.tokens. image: whether it reads features.image,
    which has all bands (spec.num_bands) where a frozen backbone sees three of them.
    """

    maps: object = 4
    tokens: tuple = ()
    image: bool = False


class Head(nn.Module):
    """Base of the heads: forward(features) returns logits (B, K, h, w), or a dict of them as `logits` and of
    whatever else its own loss or scores take.

    reads: what it reads. logits_multiple: its logits cover the padded images, continued to multiples of this
    in pixels. auxiliary: {name: weight} of further logits in the dict, of which --loss is taken in training.
    targets: {name: kind} of the targets beside the mask that its loss or its scores take.

    A head may define loss(output, targets, geometry) -> {name: term}, which stands in for --loss; targets:
    {"mask": (B, H, W) int64, ...}, geometry: of models/upsampling.py. It may define scores(output, targets,
    geometry) -> {name: (sum, count)}, which validation adds up and reports as sum / count.
    """

    reads = Reads()
    logits_multiple = 1
    auxiliary = {}
    targets = {}

    @classmethod
    def build(cls, backbone, spec):
        """Return the head for a Backbone and a ModelSpec. Raises InputError where they do not fit.

        A head that needs more than channels and classes (blocks to copy, options) has a build of its own.
        """
        return cls(backbone.channels, spec.num_classes)

    def forward(self, features):
        """Features of padded images -> logits (B, K, h, w), or a dict that holds them."""
        raise NotImplementedError


def logits_of(output):
    """Return the logits (B, K, h, w) of what a head returned."""
    return output["logits"] if isinstance(output, dict) else output


class BNHead(Head):
    """BatchNorm and 1x1 convolution on the maps side by side, as in DINOv2's evaluation."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.bn = BatchNorm2d(sum(channels))
        self.conv_seg = nn.Conv2d(sum(channels), num_classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, features):
        """n maps (B, D, h, w) -> (B, K, h, w)."""
        return self.classify(torch.cat(features.maps, dim=1))

    def classify(self, maps):
        """(B, n * D, h, w) -> (B, K, h, w)."""
        return self.conv_seg(self.bn(maps))


class LinearHead(Head):
    """1x1 convolution on the last map, without normalization."""

    reads = Reads(maps=1)

    def __init__(self, channels, num_classes):
        super().__init__()
        self.conv_seg = nn.Conv2d(sum(channels), num_classes, kernel_size=1)

    def forward(self, features):
        """n maps (B, D, h, w) -> (B, K, h, w)."""
        return self.conv_seg(torch.cat(features.maps, dim=1))


def double_conv(inputs, outputs):
    """Return two 3x3 convolutions, each with BatchNorm and ReLU, as in the U-Net."""
    layers = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, kernel_size=3, padding=1, bias=False), BatchNorm2d(outputs),
                   nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNetHead(Head):
    """U-Net decoder on the last map: four up-blocks, without skip connections.

    Ronneberger et al., U-Net, MICCAI 2015. Four times: upsample (bilinear, x2; the last one straight to the
    image's size) and two convolutions; then a 1x1 convolution. With patches of 14 and an image of 518:
    37 > 74 > 148 > 296 > 518.
    """

    reads = Reads(maps=1)

    def __init__(self, channels, num_classes, skips=()):
        super().__init__()
        self.skips = nn.ModuleList(nn.Conv2d(skip, width, kernel_size=1)
                                   for skip, width in zip(skips, UP_WIDTHS, strict=False))
        widths = pairwise((sum(channels), *UP_WIDTHS))
        joined = [skip.out_channels for skip in self.skips] + [0] * (len(UP_WIDTHS) - len(self.skips))
        self.blocks = nn.ModuleList(double_conv(before + skip, after)
                                    for (before, after), skip in zip(widths, joined, strict=True))
        self.conv_seg = nn.Conv2d(UP_WIDTHS[-1], num_classes, kernel_size=1)

    def forward(self, features):
        """n maps (B, D, h, w) -> (B, K, *features.size)."""
        return self.decode(torch.cat(features.maps, dim=1), [], features.size)

    def decode(self, values, skips, size):
        """(B, D, h, w) and a map for each of self.skips -> (B, K, *size)."""
        grid = values.shape[-2:]
        for number, block in enumerate(self.blocks):
            last = number + 1 == len(self.blocks)
            target = [full if last else min(full, side * 2 ** (number + 1))
                      for side, full in zip(grid, size, strict=True)]
            values = F.interpolate(values, size=target, mode="bilinear")  # (B, C, 2h, 2w)
            if number < len(self.skips):
                skip = self.skips[number](skips[number])  # (B, C', h, w): cheaper before the upsampling
                values = torch.cat([values, F.interpolate(skip, size=target, mode="bilinear")], dim=1)
            values = block(values)
        return self.conv_seg(values)


class UNetSkipHead(UNetHead):
    """U-Net decoder with earlier blocks joined in as skip connections.

    Up to three earlier blocks join the first up-blocks, latest first. The maps of a ViT all have one
    resolution, so each is upsampled to the block it joins.
    """

    reads = Reads(maps=4)

    def __init__(self, channels, num_classes):
        if not 2 <= len(channels) <= 4:
            raise InputError(f"--head unet-skip reads two to four blocks, not {len(channels)}: "
                             "change --layers, or use --head unet")
        super().__init__(channels[-1:], num_classes, skips=channels[-2::-1])

    def forward(self, features):
        """n maps (B, D, h, w), the last of them the deepest -> (B, K, *features.size)."""
        return self.decode(features.maps[-1], features.maps[-2::-1], features.size)


class DeconvResizeHead(Head):
    """Four transposed convolutions and a resize, which keeps every pixel in its place.

    With patches of 14 and an image of 518: 37 > 74 > 148 > 296 > 592, resized to 518.
    """

    reads = Reads(maps=1)

    def __init__(self, channels, num_classes):
        super().__init__()
        layers = []
        for before, after in pairwise((sum(channels), *DECONV_WIDTHS)):
            layers += [nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1, bias=False),
                       BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.up = nn.Sequential(*layers)
        self.conv_seg = nn.Conv2d(DECONV_WIDTHS[-1], num_classes, kernel_size=1)

    def forward(self, features):
        """n maps (B, D, h, w) -> (B, K, *features.size)."""
        logits = self.conv_seg(self.up(torch.cat(features.maps, dim=1)))  # (B, K, 16h, 16w)
        return self.fit(logits, features.size)

    def fit(self, logits, size):
        """Resize (B, K, 16h, 16w) to `size` (bilinear)."""
        return F.interpolate(logits, size=size, mode="bilinear")


class DeconvHead(DeconvResizeHead):
    """Four transposed convolutions and a center crop (patches of 14 to 16 pixels).

    592 is cropped to 518, which shifts what lies off the center: 14 pixels of image become 16 of output.
    """

    @classmethod
    def build(cls, backbone, spec):
        """As Head.build. Raises InputError for patches that the crop does not fit."""
        if not 14 <= backbone.stride <= 16:
            raise InputError(f"--head deconv makes 16 pixels of a patch and crops, and the patches of this "
                             f"backbone are {backbone.stride} pixels wide: use --head deconv-resize or unet")
        return super().build(backbone, spec)

    def fit(self, logits, size):
        """Crop (B, K, 16h, 16w) around its center to `size`, which is not larger."""
        (tall, wide), (height, width) = logits.shape[-2:], size
        top, left = (tall - height) // 2, (wide - width) // 2
        return logits[..., top:top + height, left:left + width]


def four_quarters(depth):
    """Return the last block of each quarter of them: 2 5 8 11 of 12."""
    return sorted({max(0, depth * quarter // 4 - 1) for quarter in (1, 2, 3, 4)})


def copied_tail(backbone, count):
    """Return a copy, which trains, of the last `count` blocks of a Backbone. Raises InputError."""
    depth = len(backbone.blocks)
    tail = copy.deepcopy(backbone.tail(max(0, depth - count))).requires_grad_(True)
    if count > depth:
        raise InputError(f"--split-blocks {count}: the backbone has {depth} blocks; give 1 to {depth}")
    return tail


def norm_groups(channels):
    """Return for GroupNorm the largest number of groups, up to 32, that divides the channels."""
    return max(count for count in range(1, 33) if channels % count == 0)


class Split(nn.Module):
    """The two branches of ViT-Split and their fusion, to one map.

    Li et al., ViT-Split, ICCV 2025 (arXiv 2506.03433): the task branch is a trained copy of the last blocks,
    on the tokens that enter the frozen ones; the prior branch reads frozen maps. The paper's 3x3 convolutions
    are deformable; these are plain. Its copy ends with the frozen final norm; here that is copied too.
    """

    def __init__(self, tail, channels, width):
        super().__init__()
        self.tail = tail
        self.prior = nn.Sequential(nn.Conv2d(sum(channels), width, kernel_size=1), nn.GELU(),
                                   nn.Conv2d(width, width, kernel_size=3, padding=1), nn.GELU())
        self.fusion = nn.Sequential(nn.Conv2d(2 * width, width, kernel_size=1), nn.GELU(),
                                    nn.Conv2d(width, width, kernel_size=3, padding=1), nn.GELU())

    def forward(self, features):
        """Features of n maps (B, D, h, w) and tokens -> (B, width, h, w)."""
        outputs = self.tail(features.tokens[self.tail.first], features.grid)
        task = self.tail.as_map(outputs[max(outputs)], features.grid)  # (B, D, h, w)
        return self.fusion(torch.cat([self.prior(torch.cat(features.maps, dim=1)), task], dim=1))


class OnSplit(Head):
    """Base of the heads on what the two branches of a Split make of the maps."""

    reads = Reads(maps=four_quarters)

    @classmethod
    def build(cls, backbone, spec):
        """As Head.build."""
        width, bands = backbone.channels[-1], [spec.num_bands] * cls.reads.image
        return cls(Split(copied_tail(backbone, spec.split_blocks), backbone.channels, width), width,
                   spec.num_classes, *bands)


class SplitHead(OnSplit):
    """A trained copy of the last blocks beside the frozen ones (ViT-Split), at four times the patch grid."""

    def __init__(self, split, width, num_classes):
        super().__init__()
        self.split = split
        self.reads = replace(self.reads, tokens=(split.tail.first,))
        layers = []
        for before, after in ((width, width // 2), (width // 2, width // 4)):
            layers += [nn.ConvTranspose2d(before, after, kernel_size=2, stride=2),
                       nn.GroupNorm(norm_groups(after), after), nn.GELU()]
        self.up = nn.Sequential(*layers, BatchNorm2d(width // 4))
        self.conv_seg = nn.Conv2d(width // 4, num_classes, kernel_size=1)

    def forward(self, features):
        """Features of n maps (B, D, h, w) and tokens -> (B, K, 4h, 4w)."""
        return self.conv_seg(self.up(self.split(features)))


def halving(inputs, outputs):
    """Return a convolution with a stride of 2, InstanceNorm, so that a darker image is the same, and ReLU.

    4x4, so that every pixel of its output lies in the middle of the two by two that it stands for.
    """
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=False),
                         nn.InstanceNorm2d(outputs, affine=True), nn.ReLU(inplace=True))


class DetailHead(Head):
    """The maps say what, the image says where: both joined at a quarter of the image's size.

    The logits of the bn head, and a correction to them that starts at 0: two convolutions on a few channels
    of the maps and on a stem, which sees in the image what a patch lost: thin and small things, and bands
    that a frozen backbone does not see. At sides that
    are no multiple of 4 the maps are stretched by up to a pixel at the edges, the stem is not.
    """

    reads = Reads(maps=4, image=True)
    logits_multiple = 4

    def __init__(self, channels, num_classes, num_bands=3):
        super().__init__()
        half, quarter = STEM_WIDTHS
        self.direct = BNHead(channels, num_classes)
        self.stem = nn.Sequential(halving(num_bands, half), halving(half, quarter))
        self.project = nn.Conv2d(sum(channels), PROJECTED, kernel_size=1)
        self.join = double_conv(quarter + PROJECTED, DETAIL_WIDTH)
        self.conv_seg = nn.Conv2d(DETAIL_WIDTH, num_classes, kernel_size=1)
        nn.init.zeros_(self.conv_seg.weight)
        nn.init.zeros_(self.conv_seg.bias)

    @classmethod
    def build(cls, backbone, spec):
        """As Head.build."""
        return cls(backbone.channels, spec.num_classes, spec.num_bands)

    def forward(self, features):
        """Features of padded images (B, C, H, W) -> (B, K, H/4, W/4), rounded up."""
        maps = self.direct.bn(self.joined_maps(features))
        detail = self.stem(continued_to_fours(features.image))
        direct, coarse = (F.interpolate(layer(maps), size=detail.shape[-2:], mode="bilinear")
                          for layer in (self.direct.conv_seg, self.project))
        return direct + self.conv_seg(self.join(torch.cat([coarse, detail], dim=1)))

    def joined_maps(self, features):
        """Features of n maps (B, D, h, w) -> (B, n * D, h, w)."""
        return torch.cat(features.maps, dim=1)


def continued_to_fours(images):
    """(B, C, H, W) -> the same with sides that are multiples of 4: repeats rows and columns at the edges."""
    (height, width) = images.shape[-2:]
    top, left = -height % 4 // 2, -width % 4 // 2
    return F.pad(images, (left, -width % 4 - left, top, -height % 4 - top), mode="replicate")


class SplitDetailHead(OnSplit, DetailHead):
    """The detail head on what the two branches of the split head make of the maps."""

    reads = Reads(maps=four_quarters, image=True)

    def __init__(self, split, width, num_classes, num_bands=3):
        super().__init__([width], num_classes, num_bands)
        self.split = split
        self.reads = replace(self.reads, tokens=(split.tail.first,))

    def joined_maps(self, features):
        """Features of n maps (B, D, h, w) and tokens -> (B, D, h, w)."""
        return self.split(features)


def upscaling(width):
    """Return what doubles the sides of a map (B, width, h, w), as in EoMT."""
    from timm.layers import LayerNorm2d
    return nn.Sequential(nn.ConvTranspose2d(width, width, kernel_size=2, stride=2), nn.GELU(),
                         nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, bias=False),
                         LayerNorm2d(width))


class MaskHead(Head):
    """Queries that become masks and their classes in a trained copy of the last blocks, as in EoMT.

    Kerssies et al., Your ViT is Secretly an Image Segmentation Model, CVPR 2025 (arXiv 2503.19108). There the
    whole ViT trains, and in training a query sees only the patches of its own mask, ever less strictly; here
    the copied blocks train alone, and every query sees all patches, as in EoMT at inference.
    """

    reads = Reads(maps=1)

    def __init__(self, tail, width, num_classes):
        super().__init__()
        self.tail = tail
        self.reads = replace(self.reads, tokens=(tail.first,))
        tail.prefix += QUERIES  # they go in front, where no rotary embedding turns them
        for block in tail.blocks:
            if hasattr(block.attn, "num_prefix_tokens"):
                block.attn.num_prefix_tokens += QUERIES
        self.queries = nn.Parameter(torch.empty(1, QUERIES, width).normal_())
        self.mask = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
                                  nn.Linear(width, width))
        self.up = nn.Sequential(upscaling(width), upscaling(width))
        self.conv_seg = nn.Linear(width, num_classes + 1)  # the last one: nothing

    @classmethod
    def build(cls, backbone, spec):
        """As Head.build."""
        return cls(copied_tail(backbone, spec.split_blocks), backbone.channels[-1], spec.num_classes)

    def forward(self, features):
        """Features of one map (B, D, h, w) and tokens -> dict(logits (B, K, 4h, 4w), predictions [(masks
        (B, Q, 4h, 4w), classes (B, Q, K + 1))]), after each of the copied blocks in training, else after the
        last one.
        """
        grid, tokens = features.grid, features.tokens[self.tail.first]
        queries = self.queries.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        outputs = list(self.tail(torch.cat([queries, tokens], dim=1), grid).values())
        predictions = [self.predict(tokens, grid) for tokens in (outputs if self.training else outputs[-1:])]
        return dict(logits=self.class_logits(*predictions[-1]), predictions=predictions)

    def predict(self, tokens, grid):
        """(B, Q + prefix + h * w, D) that left a block -> masks (B, Q, 4h, 4w), classes (B, Q, K + 1)."""
        queries = self.tail.norm(tokens[:, :QUERIES])
        maps = self.up(self.tail.as_map(tokens, grid))  # (B, D, 4h, 4w)
        return torch.einsum("bqd,bdhw->bqhw", self.mask(queries), maps), self.conv_seg(queries)

    def class_logits(self, masks, classes):
        """Masks and classes of the queries -> (B, K, 4h, 4w): the logarithm of how much of each class all
        masks hold together.
        """
        shares = classes.float().softmax(-1)[..., :-1]  # (B, Q, K)
        values = torch.einsum("bqhw,bqk->bkhw", masks.float().sigmoid(), shares)
        return values.float().clamp(min=1e-6).log()

    def loss(self, output, targets, geometry):
        """As Head: that of losses.mask_classification on the grid of the masks, mean over the blocks."""
        predictions = output["predictions"]
        truth = pad(targets["mask"][:, None].float(), geometry, IGNORE)
        truth = F.interpolate(truth, size=predictions[-1][0].shape[-2:], mode="nearest-exact")
        terms = [mask_classification(*prediction, truth[:, 0].long()) for prediction in predictions]
        return {name: sum(block[name] for block in terms) / len(terms) for name in terms[0]}


# A new head is one class above and one line here.
HEADS = {
    "bn": BNHead,
    "linear": LinearHead,
    "unet": UNetHead,
    "unet-skip": UNetSkipHead,
    "deconv": DeconvHead,
    "deconv-resize": DeconvResizeHead,
    "split": SplitHead,
    "detail": DetailHead,
    "split-detail": SplitDetailHead,
    "mask": MaskHead,
}
