"""Resizing images, class ids and maps of numbers: the one way in which every script does it.

    image = resize_image(image, (518, 518))                         # (..., C, H, W) uint8, antialiased
    targets = resize_targets({"mask": mask}, (518, 518))            # each by its type
"""
import math
import platform
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch.nn import functional as F

PADDING_COLOR = (124, 116, 104)  # the ImageNet mean, so that padding is close to zero after normalization


def resize_image(image, size):
    """Resize (..., C, H, W) uint8 to (..., C, h, w), bilinear, antialiased; every script resizes by it.

    Equal to torchvision's resize, whose import takes as long as torch's.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    images, size = image.reshape(-1, *image.shape[-3:]), tuple(size)
    if len(images) == 1 and images.is_contiguous(memory_format=torch.channels_last):
        # with this stride of its one image, torch leaves the colors of a pixel side by side
        images = images.as_strided(images.shape, (images.numel(), *images.stride()[1:]))
    fast = image.device.type == "cpu" and (platform.machine() in ("aarch64", "arm64") or
                                           torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"))
    resized = F.interpolate(images if fast else images.float(), size, mode="bilinear", antialias=True)
    resized = resized if fast else resized.round_().clamp_(0, 255).to(image.dtype)
    return resized.reshape(*image.shape[:-2], *size)


def resize_mask(mask, size):
    """Resize class ids (H, W) uint8 to (h, w) by nearest neighbor, pixel centers aligned.

    Equal to torchvision's NEAREST_EXACT in a seventh of the time: whole rows are copied, twice.
    """
    rows, columns = (nearest(old, new) for old, new in zip(mask.shape, size, strict=True))
    return torch.from_numpy(cv2.transpose(cv2.transpose(mask.numpy())[columns])[rows])


def resize_map(values, size):
    """Resize numbers (H, W) float32 to (h, w), bilinear, antialiased.

    Unknown pixels (NaN) are left out of the averages; a new pixel is NaN where most of what it averages is.
    """
    if tuple(values.shape) == tuple(size):
        return values
    unknown = values.isnan()
    planes = torch.stack([values.masked_fill(unknown, 0), (~unknown).float()])  # (2, H, W)
    totals, shares = F.interpolate(planes[None], tuple(size), mode="bilinear", antialias=True)[0]
    return torch.where(shares >= 0.5, totals / shares, math.nan)


def resize_targets(targets, size):
    """Resize {name: (H, W)} to {name: (h, w)}, class ids by nearest neighbor, maps linearly."""
    return {name: resize_mask(target, size) if target.dtype == torch.uint8 else resize_map(target, size)
            for name, target in targets.items()}


def padding_color(image):
    """Return (C, 1, 1) uint8, what is put around an image (C, H, W): PADDING_COLOR, or the mean of each band
    where these are not three.
    """
    if len(image) == 3:
        return torch.tensor(PADDING_COLOR, dtype=torch.uint8)[:, None, None]
    return image.float().mean((1, 2), keepdim=True).round().to(torch.uint8)


def continued(image, size):
    """Return (..., C, H, W) uint8 of at least `size` = (h, w): what is missing at the right and below is its
    last pixels.
    """
    missing = 0, max(0, size[1] - image.shape[-1]), 0, max(0, size[0] - image.shape[-2])
    if not any(missing):
        return image
    return F.pad(image.float(), missing, mode="replicate").to(image.dtype)


def window_starts(length, window, stride):
    """Return where windows start along one side; the last one is shifted in so that it ends at the edge."""
    return [*range(0, length - window, stride), max(0, length - window)]


@lru_cache(64)
def nearest(old, new):
    """Return for each of `new` pixels of a line which of `old` pixels its center lies in, (new,) int64."""
    centers = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * (np.float32(old) / np.float32(new))
    return np.minimum(centers.astype(np.int64), old - 1)
