"""Heads: they turn the feature maps of a backbone into class logits.

    head = HEADS["unet"](channels=[768], num_classes=21)
    logits = head(maps, size)       # n x (B, D, h, w), (H, W) -> (B, K, any size up to H, W)

`maps` of a head class is how many of the last blocks it reads where --layers does not say (1 or 4); `size`
is the size of the padded image in pixels. What a head returns at a smaller size the Segmenter upsamples
(bilinear). A new head is one class, entered in HEADS (and its name in config.py).
"""
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from config import InputError

UP_WIDTHS = (512, 256, 128, 64)  # channels after each of the four up-blocks of the U-Net
DECONV_WIDTHS = (256, 128, 64, 32)


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that uses its running statistics where a training batch has one value a channel, which has no
    variance: a last batch of one image must not end the run.
    """

    def forward(self, features):
        """(B, C, h, w) -> (B, C, h, w)."""
        if self.training and features.numel() == features.shape[1]:
            return F.batch_norm(features, self.running_mean, self.running_var, self.weight, self.bias,
                                eps=self.eps)
        return super().forward(features)


class BNHead(nn.Module):
    """Concatenate the maps, BatchNorm, 1x1 convolution: the BNHead of the official DINOv2 evaluation."""

    maps = 4

    def __init__(self, channels, num_classes):
        super().__init__()
        self.bn = BatchNorm2d(sum(channels))
        self.conv_seg = nn.Conv2d(sum(channels), num_classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps, size):
        """n x (B, D, h, w) -> (B, K, h, w)."""
        return self.conv_seg(self.bn(torch.cat(maps, dim=1)))


class LinearHead(nn.Module):
    """A linear classifier of every patch (1x1 convolution), without normalisation."""

    maps = 1

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


class UNetHead(nn.Module):
    """The decoder of a U-Net (Ronneberger et al., 2015) on the maps side by side, without skip connections.

    Four times: upsample (bilinear, x2; the last one straight to the image's size) and two convolutions;
    then a 1x1 convolution. With patches of 14 and an image of 518: 37 > 74 > 148 > 296 > 518.
    """

    maps = 1

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
    """UNetHead with skip connections: up to three earlier blocks join the first up-blocks, latest first.

    The maps of a ViT all have one resolution, so each is upsampled to the block it joins.
    """

    maps = 4

    def __init__(self, channels, num_classes):
        if not 2 <= len(channels) <= 4:
            raise InputError(f"--head unet-skip reads two to four blocks, not {len(channels)}: "
                             "change --layers, or use --head unet")
        super().__init__(channels[-1:], num_classes, skips=channels[-2::-1])

    def forward(self, maps, size):
        """n x (B, D, h, w), the last one the deepest -> (B, K, *size)."""
        return self.decode(maps[-1], maps[-2::-1], size)


class DeconvHead(nn.Module):
    """Four transposed convolutions, each doubling the size, then a centre crop to the image's size.

    With patches of 14 and an image of 518: 37 > 74 > 148 > 296 > 592, cropped to 518. The crop shifts what
    lies off the centre (14 pixels of image become 16 of output); DeconvResizeHead keeps every pixel in place.
    """

    maps = 1

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
        """Crop (B, K, 16h, 16w) around its centre to `size`, which is not larger."""
        (tall, wide), (height, width) = logits.shape[-2:], size
        top, left = (tall - height) // 2, (wide - width) // 2
        return logits[..., top:top + height, left:left + width]


class DeconvResizeHead(DeconvHead):
    """DeconvHead with a bilinear resize in place of the crop; for patches of any size."""

    def fit(self, logits, size):
        """Resize (B, K, 16h, 16w) to `size`."""
        return F.interpolate(logits, size=size, mode="bilinear")


HEADS = {"bn": BNHead, "linear": LinearHead, "unet": UNetHead, "unet-skip": UNetSkipHead,
         "deconv": DeconvHead, "deconv-resize": DeconvResizeHead}
