"""Heads: they turn the feature maps of a backbone into class logits.

    head = HEADS["unet"](channels=[768], num_classes=21)
    output = head(features, size)              # n x (B, D, h, w), (H, W) -> (B, K, any size up to H, W)
    logits = head.logits(output, geometry)     # Logits of the images

A new head is one class here, entered in HEADS.
"""
import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from config import IGNORE, InputError
from losses import mask_classification
from models.backbones import Tail
from models.logits import Logits, class_ids, pad, pixel_loss

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


class Head(nn.Module):
    """What a Segmenter asks of a head. The defaults serve a head that returns one map of logits.

    reads: how many of the last blocks it reads, or f(depth) -> blocks, where --layers does not say.
    token_blocks: the blocks whose entering tokens it wants in features.tokens. sees_image: whether it reads
    features.images. crops: whether the logits of the padded image are cropped back, or resized onto the
    image, as mmsegmentation did when the official heads were trained. own_loss: whether loss() leaves the
    losses of --loss aside. tokens_alone: whether its logits depend on the tokens and not on the maps.
    """

    reads = 4
    token_blocks = ()
    sees_image = False
    crops = True
    own_loss = False
    tokens_alone = False

    @classmethod
    def build(cls, backbone, spec):
        """Return the head for a Backbone and a ModelSpec. Raises InputError where they do not fit.

        A head that needs more than channels and classes (blocks to copy, options) has a build of its own.
        """
        return cls(backbone.channels, spec.num_classes)

    def copies_blocks(self):
        """Return whether it trains copies of the backbone's blocks, as a Tail."""
        return any(isinstance(module, Tail) for module in self.modules())

    def forward(self, features, size):
        """Features of padded images of `size` = (H, W) -> whatever logits() and loss() take, such as
        (B, K, h, w).
        """
        raise NotImplementedError

    def logits(self, output, geometry):
        """What forward returned -> Logits of images of `geometry`."""
        logits = Logits(output)
        if not self.crops:
            return logits.at(geometry.size)
        return logits.at(geometry.padded).crop(geometry.top, geometry.left, *geometry.size)

    def loss(self, output, masks, geometry, criterion):
        """What forward returned, masks (B, H, W) int64 -> loss, {name: term}, preds (B, H, W) uint8.

        criterion: the losses of --loss; a head with `own_loss` leaves it aside. Pixels of 255 do not count;
        a batch in which none counts gives 0.
        """
        return pixel_loss(criterion, self.logits(output, geometry), masks)


class BNHead(Head):
    """BatchNorm and 1x1 convolution on the maps side by side, as in DINOv2's evaluation."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.bn = BatchNorm2d(sum(channels))
        self.conv_seg = nn.Conv2d(sum(channels), num_classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps, size):
        """n x (B, D, h, w) -> (B, K, h, w)."""
        return self.conv_seg(self.bn(torch.cat(maps, dim=1)))


class LinearHead(Head):
    """1x1 convolution on the last map, without normalization."""

    reads = 1

    def __init__(self, channels, num_classes):
        super().__init__()
        self.conv_seg = nn.Conv2d(sum(channels), num_classes, kernel_size=1)

    def forward(self, maps, size):
        """n x (B, D, h, w) -> (B, K, h, w)."""
        return self.conv_seg(torch.cat(maps, dim=1))


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

    reads = 1

    def __init__(self, channels, num_classes, skips=()):
        super().__init__()
        self.skips = nn.ModuleList(nn.Conv2d(skip, width, kernel_size=1)
                                   for skip, width in zip(skips, UP_WIDTHS, strict=False))
        widths = pairwise((sum(channels), *UP_WIDTHS))
        joined = [skip.out_channels for skip in self.skips] + [0] * (len(UP_WIDTHS) - len(self.skips))
        self.blocks = nn.ModuleList(double_conv(before + skip, after)
                                    for (before, after), skip in zip(widths, joined, strict=True))
        self.conv_seg = nn.Conv2d(UP_WIDTHS[-1], num_classes, kernel_size=1)

    def forward(self, maps, size):
        """n x (B, D, h, w) -> (B, K, *size)."""
        return self.decode(torch.cat(maps, dim=1), [], size)

    def decode(self, features, skips, size):
        """(B, D, h, w) and a map for each of self.skips -> (B, K, *size)."""
        grid = features.shape[-2:]
        for number, block in enumerate(self.blocks):
            last = number + 1 == len(self.blocks)
            target = [full if last else min(full, side * 2 ** (number + 1))
                      for side, full in zip(grid, size, strict=True)]
            features = F.interpolate(features, size=target, mode="bilinear")  # (B, C, 2h, 2w)
            if number < len(self.skips):
                skip = self.skips[number](skips[number])  # (B, C', h, w): cheaper before the upsampling
                features = torch.cat([features, F.interpolate(skip, size=target, mode="bilinear")], dim=1)
            features = block(features)
        return self.conv_seg(features)


class UNetSkipHead(UNetHead):
    """U-Net decoder with earlier blocks joined in as skip connections.

    Up to three earlier blocks join the first up-blocks, latest first. The maps of a ViT all have one
    resolution, so each is upsampled to the block it joins.
    """

    reads = 4

    def __init__(self, channels, num_classes):
        if not 2 <= len(channels) <= 4:
            raise InputError(f"--head unet-skip reads two to four blocks, not {len(channels)}: "
                             "change --layers, or use --head unet")
        super().__init__(channels[-1:], num_classes, skips=channels[-2::-1])

    def forward(self, maps, size):
        """n x (B, D, h, w), the last one the deepest -> (B, K, *size)."""
        return self.decode(maps[-1], maps[-2::-1], size)


class DeconvResizeHead(Head):
    """Four transposed convolutions and a resize, which keeps every pixel in its place.

    With patches of 14 and an image of 518: 37 > 74 > 148 > 296 > 592, resized to 518.
    """

    reads = 1

    def __init__(self, channels, num_classes):
        super().__init__()
        layers = []
        for before, after in pairwise((sum(channels), *DECONV_WIDTHS)):
            layers += [nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1, bias=False),
                       BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.up = nn.Sequential(*layers)
        self.conv_seg = nn.Conv2d(DECONV_WIDTHS[-1], num_classes, kernel_size=1)

    def forward(self, maps, size):
        """n x (B, D, h, w) -> (B, K, *size)."""
        return self.fit(self.conv_seg(self.up(torch.cat(maps, dim=1))), size)  # (B, K, 16h, 16w)

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


def spread(depth):
    """Return four blocks at equal distances, the last one of them: 2 5 8 11 of 12."""
    return sorted({max(0, depth * part // 4 - 1) for part in (1, 2, 3, 4)})


def copied_tail(backbone, count):
    """Return a copy, which trains, of the last `count` blocks of a Backbone. Raises InputError."""
    depth = len(backbone.blocks)
    tail = copy.deepcopy(backbone.tail(max(0, depth - count))).requires_grad_(True)
    if count > depth:
        raise InputError(f"--split-blocks {count}: the backbone has {depth} blocks; give 1 to {depth}")
    return tail


def groups_of(channels):
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

    @property
    def token_blocks(self):
        """The block whose entering tokens it wants."""
        return self.tail.first,

    def forward(self, features):
        """Features of n maps (B, D, h, w) and tokens -> (B, width, h, w)."""
        grid = features[0].shape[-2:]
        left = self.tail(features.tokens[self.tail.first], grid)
        task = self.tail.as_map(left[max(left)], grid)  # (B, D, h, w)
        return self.fusion(torch.cat([self.prior(torch.cat(features, dim=1)), task], dim=1))


def build_on_split(head, backbone, spec):
    """As Head.build, for heads made of a Split, the channels of its map and the number of classes."""
    width = backbone.channels[-1]
    split = Split(copied_tail(backbone, spec.split_blocks), backbone.channels, width)
    return head(split, width, spec.num_classes)


class SplitHead(Head):
    """A trained copy of the last blocks beside the frozen ones (ViT-Split), at four times the patch grid."""

    reads = staticmethod(spread)
    build = classmethod(build_on_split)

    def __init__(self, split, width, num_classes):
        super().__init__()
        self.split, self.token_blocks = split, split.token_blocks
        layers = []
        for before, after in ((width, width // 2), (width // 2, width // 4)):
            layers += [nn.ConvTranspose2d(before, after, kernel_size=2, stride=2),
                       nn.GroupNorm(groups_of(after), after), nn.GELU()]
        self.up = nn.Sequential(*layers, BatchNorm2d(width // 4))
        self.conv_seg = nn.Conv2d(width // 4, num_classes, kernel_size=1)

    def forward(self, features, size):
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
    of the maps and on a stem, which sees in the image what a patch lost: thin and small things. At sides that
    are no multiple of 4 the maps are stretched by up to a pixel at the edges, the stem is not.
    """

    sees_image = True

    def __init__(self, channels, num_classes):
        super().__init__()
        half, quarter = STEM_WIDTHS
        self.direct = BNHead(channels, num_classes)
        self.stem = nn.Sequential(halving(3, half), halving(half, quarter))
        self.project = nn.Conv2d(sum(channels), PROJECTED, kernel_size=1)
        self.join = double_conv(quarter + PROJECTED, DETAIL_WIDTH)
        self.conv_seg = nn.Conv2d(DETAIL_WIDTH, num_classes, kernel_size=1)
        nn.init.zeros_(self.conv_seg.weight)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, features, size):
        """Features of padded images (B, 3, H, W) -> (B, K, H/4, W/4), rounded up."""
        maps = self.direct.bn(self.maps(features))
        detail = self.stem(quartered(features.images))
        direct, coarse = (F.interpolate(part(maps), size=detail.shape[-2:], mode="bilinear")
                          for part in (self.direct.conv_seg, self.project))
        return direct + self.conv_seg(self.join(torch.cat([coarse, detail], dim=1)))

    def maps(self, features):
        """Features of n maps (B, D, h, w) -> (B, n * D, h, w)."""
        return torch.cat(features, dim=1)

    def logits(self, output, geometry):
        """As Head.logits: the output covers what quartered() made of the padded images."""
        size = tuple(4 * side for side in output.shape[-2:])
        top, left = ((side - inner) // 2 for side, inner in zip(size, geometry.padded, strict=True))
        return Logits(output).at(size).crop(top + geometry.top, left + geometry.left, *geometry.size)


def quartered(images):
    """(B, C, H, W) -> the same with sides that are multiples of 4: repeats rows and columns at the edges."""
    (height, width) = images.shape[-2:]
    top, left = -height % 4 // 2, -width % 4 // 2
    return F.pad(images, (left, -width % 4 - left, top, -height % 4 - top), mode="replicate")


class SplitDetailHead(DetailHead):
    """The detail head on what the two branches of the split head make of the maps."""

    reads = staticmethod(spread)
    build = classmethod(build_on_split)

    def __init__(self, split, width, num_classes):
        super().__init__([width], num_classes)
        self.split, self.token_blocks = split, split.token_blocks

    def maps(self, features):
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

    reads = 1
    own_loss = tokens_alone = True

    def __init__(self, tail, width, num_classes):
        super().__init__()
        self.tail, self.token_blocks = tail, (tail.first,)
        tail.prefix += QUERIES  # they go in front, where no rotary embedding turns them
        for block in tail.blocks:
            if hasattr(block.attn, "num_prefix_tokens"):
                block.attn.num_prefix_tokens += QUERIES
        self.queries = nn.Parameter(torch.randn(1, QUERIES, width))
        self.mask = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
                                  nn.Linear(width, width))
        self.up = nn.Sequential(upscaling(width), upscaling(width))
        self.conv_seg = nn.Linear(width, num_classes + 1)  # the last one: nothing

    @classmethod
    def build(cls, backbone, spec):
        """As Head.build."""
        return cls(copied_tail(backbone, spec.split_blocks), backbone.channels[-1], spec.num_classes)

    def forward(self, features, size):
        """Features of one map (B, D, h, w) and tokens -> [(masks (B, Q, 4h, 4w), classes (B, Q, K + 1))],
        logits, after each of the copied blocks in training, else after the last one.
        """
        grid, tokens = features[0].shape[-2:], features.tokens[self.tail.first]
        queries = self.queries.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        left = list(self.tail(torch.cat([queries, tokens], dim=1), grid).values())
        return [self.predict(tokens, grid) for tokens in (left if self.training else left[-1:])]

    def predict(self, tokens, grid):
        """(B, Q + prefix + h * w, D) that left a block -> masks (B, Q, 4h, 4w), classes (B, Q, K + 1)."""
        queries = self.tail.norm(tokens[:, :QUERIES])
        maps = self.up(self.tail.as_map(tokens, grid))  # (B, D, 4h, 4w)
        return torch.einsum("bqd,bdhw->bqhw", self.mask(queries), maps), self.conv_seg(queries)

    def logits(self, output, geometry):
        """As Head.logits: the logarithm of how much of each class the masks of all queries hold."""
        masks, classes = output[-1]
        shares = classes.float().softmax(-1)[..., :-1]  # (B, Q, K)
        values = torch.einsum("bqhw,bqk->bkhw", masks.float().sigmoid(), shares)
        return super().logits(values.float().clamp(min=1e-6).log(), geometry)

    def loss(self, output, masks, geometry, criterion):
        """As Head.loss: that of losses.mask_classification on the grid of the masks, mean over blocks."""
        truth = pad(masks[:, None].float(), geometry, IGNORE)
        truth = F.interpolate(truth, size=output[-1][0].shape[-2:], mode="nearest-exact")
        of_blocks = [mask_classification(*prediction, truth[:, 0].long()) for prediction in output]
        terms = {name: sum(block[name] for block in of_blocks) / len(of_blocks) for name in of_blocks[0]}
        preds = torch.empty(masks.shape, dtype=torch.uint8, device=masks.device)
        with torch.no_grad():
            for images, rows, pixels in self.logits(output, geometry).blocks():
                preds[images, rows] = class_ids(pixels)
        return sum(terms.values()), terms, preds


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
