"""Joint transforms: what training does to an image and its targets at once.

    targets = {"mask": mask, "depth": depth}                    # (H, W) uint8 labels, (H, W) float32 map
    image, targets = augment(image, targets, (518, 518), ("crop", "flip"))       # all at that size

A new augmentation is one class below, entered in AUGMENTS. It must keep the image and all targets aligned.
How a target is moved depends on its type: class ids (uint8) by nearest neighbor, with 255 where pixels are
made up; maps of numbers (float32) linearly, with NaN there. tests/test_transforms.py checks every registered
one.
"""
import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from config import IGNORE
from dataio.readers import short_hash
from dataio.resizing import padding_color, resize_image, resize_targets
from utils import code_hash, modules_of

UNKNOWN = {torch.uint8: IGNORE, torch.float32: math.nan}  # value of target pixels that are made up
RARE = 0.25  # of the share that each class would have if all had the same: with less it is rare
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # of RGB (NTSC)


@dataclass(frozen=True)
class Augmentation:
    """Base: called with image (C, H, W) uint8, its targets {name: (H, W)}, and the size (h, w) of the run;
    `mask` is always one of the targets.

    resizes: whether the result has the size of the run whatever comes in, targets of sizes of their own too;
    else all are resized before. zoom: how many times larger than the run's size the image is needed at most.
    of_colors: what of it needs three bands, and is left out where the image has others. Fields are its
    parameters.
    """

    resizes = False
    zoom = 1.0
    of_colors = ""

    def __call__(self, image, targets, size):
        """(C, H, W), {name: (H, W)} -> the same, at their own or the run's size."""
        raise NotImplementedError


@dataclass(frozen=True)
class ScaleCrop(Augmentation):
    """Scale by 0.5 to 2 times what fits into --imgsz, then crop.

    scale: range of the factor on the size at which the image just fits into the run's or, with `covers`, just
    covers it. max_share: the crop is drawn anew, up to ten times, while one class has more of its counted
    pixels. Pixels beyond the image are padding_color, mask 255. The result has the size of the run.
    """

    scale: tuple = (0.5, 2.0)
    covers: bool = False
    max_share: float = 1.0
    resizes = True

    @property
    def zoom(self):
        """The largest factor."""
        return self.scale[1]

    def __call__(self, image, targets, size):
        """(C, H, W), {name: (H, W)} -> (C, *size), {name: size}."""
        height, width = image.shape[-2:]
        fits = size[0] / height, size[1] / width
        factor = (max if self.covers else min)(fits) * torch.empty(1).uniform_(*self.scale).item()
        scaled = max(1, round(height * factor)), max(1, round(width * factor))
        image, targets = resize_image(image, scaled), resize_targets(targets, scaled)
        for _ in range(10):
            corner = random_corner(scaled, size)
            mask = window_of(targets["mask"], corner, size, IGNORE)
            if self.max_share == 1 or is_mixed(mask, self.max_share):
                break
        return window_of(image, corner, size, padding_color(image)), {
            name: window_of(target, corner, size, UNKNOWN[target.dtype]) for name, target in targets.items()}


def random_corner(size, window):
    """Return the random (top, left) of a window (h, w) in an image (H, W), as torchvision's RandomCrop."""
    corner = []
    for length, side in zip(size, window, strict=True):
        padding = max(0, side - length)  # on both ends
        last = length + 2 * padding - side
        start = int(torch.randint(0, last + 1, size=())) if last > 0 else 0
        corner.append(start - padding)
    return corner


def window_of(values, corner, size, fill):
    """Return the window (..., h, w) of `size` at `corner` of (..., H, W), filled with `fill` (a number or a
    tensor (..., 1, 1)) where it lies beyond.
    """
    inside = [slice(max(0, start), max(0, start + side)) for start, side in zip(corner, size, strict=True)]
    crop = values[..., inside[0], inside[1]]
    if tuple(crop.shape[-2:]) == tuple(size):
        return crop
    window = torch.empty((*values.shape[:-2], *size), dtype=values.dtype)
    window[:] = fill
    top, left = max(0, -corner[0]), max(0, -corner[1])
    window[..., top:top + crop.shape[-2], left:left + crop.shape[-1]] = crop
    return window


@dataclass(frozen=True)
class LinearCrop(ScaleCrop):
    """Scale by 0.5 to 2 times what fills --imgsz, then crop: DINOv2's linear protocol."""

    covers: bool = True
    max_share: float = 0.75


@dataclass(frozen=True)
class MultiScaleCrop(LinearCrop):
    """Scale by 1 to 3 times what fills --imgsz, then crop: DINOv2's multi-scale protocol."""

    scale: tuple = (1.0, 3.0)


def is_mixed(mask, max_share):
    """Return whether a mask (H, W) has two classes or more, none above `max_share` of the counted pixels."""
    counts = np.bincount(mask.numpy().ravel(), minlength=IGNORE + 1)[:IGNORE]
    return np.count_nonzero(counts) > 1 and counts.max() < max_share * counts.sum()


@dataclass(frozen=True)
class Flip(Augmentation):
    """Mirror left to right. share: of the images."""

    share: float = 0.5

    def __call__(self, image, targets, size):
        if torch.rand(1).item() >= self.share:
            return image, targets
        return image.flip(-1), {name: target.flip(-1) for name, target in targets.items()}


@dataclass(frozen=True)
class ColorJitter(Augmentation):
    """Change brightness, contrast, saturation and hue at random.

    brightness, contrast, saturation: factors 1 +- the value; hue: +- a share of the circle. All four are
    linear in RGB, the hue as a rotation of the chroma plane of YIQ, so that one matrix does them at once:
    twenty times as fast as torchvision's ColorJitter, which goes through HSV. Of images of other bands than
    three, brightness and contrast of each band change.
    """

    of_colors = "saturation and hue"

    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.3
    hue: float = 0.05

    def __call__(self, image, targets, size):
        spans = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue])
        drawn = (torch.rand(4) * 2 - 1) * spans
        bright, contrasted, saturated = (1 + drawn[:3]).tolist()
        if len(image) != 3:
            means = image.float().mean((1, 2), keepdim=True)  # (C, 1, 1)
            values = bright * (contrasted * image + (1 - contrasted) * means)
            return values.round_().clamp_(0, 255).to(torch.uint8), targets
        angle = 2 * math.pi * drawn[3].item()
        cosine, sine = math.cos(angle) * saturated, math.sin(angle) * saturated
        turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])  # of (Y, I, Q)
        colors = bright * contrasted * (np.linalg.inv(TO_YIQ) @ turn @ TO_YIQ)  # (3, 3)
        pixels = image.permute(1, 2, 0).contiguous().numpy()  # (H, W, 3)
        gray = bright * float(TO_YIQ[0] @ np.array(cv2.mean(pixels)[:3]))
        matrix = np.hstack([colors, np.full((3, 1), (1 - contrasted) * gray)])
        return torch.from_numpy(cv2.transform(pixels, matrix)).permute(2, 0, 1), targets


@dataclass(frozen=True)
class PhotometricDistortion(Augmentation):
    """Change brightness, contrast, saturation and hue, each of half of the images: mmsegmentation's.

    brightness: +- gray levels; contrast, saturation: factors 1 +- the value; hue: +- half degrees, as OpenCV
    counts them. Contrast comes before or after saturation and hue, at random. Liu et al., SSD, ECCV 2016. Of
    images of other bands than three, brightness and contrast change.
    """

    of_colors = "saturation and hue"

    brightness: int = 32
    contrast: float = 0.5
    saturation: float = 0.5
    hue: int = 18

    def __call__(self, image, targets, size):
        drawn = torch.rand(4) * 2 - 1
        bright, contrast, saturation, hue, early = (torch.rand(5) < 0.5).tolist()
        levels = np.arange(256, dtype=np.float32)
        pixels = image.permute(1, 2, 0).contiguous().numpy()  # (H, W, C)
        has_colors = pixels.shape[2] == 3
        contrasted = levels * (1 + self.contrast * drawn[1].item())

        def look_up(pixels, table):
            looked_up = cv2.LUT(pixels, np.clip(table, 0, 255).astype(np.uint8))
            return looked_up.reshape(pixels.shape)  # OpenCV leaves out an axis of length 1

        if bright:
            pixels = look_up(pixels, levels + self.brightness * drawn[0].item())
        if contrast and early:
            pixels = look_up(pixels, contrasted)
        if has_colors and (saturation or hue):
            hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)  # hue 0..179
            if saturation:
                hsv[..., 1] = look_up(hsv[..., 1], levels * (1 + self.saturation * drawn[2].item()))
            if hue:
                hsv[..., 0] = look_up(hsv[..., 0], (levels + round(self.hue * drawn[3].item())) % 180)
            pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if contrast and not early:
            pixels = look_up(pixels, contrasted)
        return torch.from_numpy(pixels).permute(2, 0, 1), targets


# A new augmentation is one class above and one line here; they are applied in this order.
@dataclass(frozen=True)
class CopyPaste:
    """Pixels of rare classes of another image, put where they lie in it.

    Ghiasi et al., Simple Copy-Paste Is a Strong Data Augmentation Method for Instance Segmentation, CVPR
    2021, with classes in place of objects. share: of the images that get some; images: {rare class: indices
    of the images that show it}.
    """

    share: float
    images: dict

    @classmethod
    def of(cls, pixels, share):
        """Return the one for a data set; pixels: (N, K) int, of every class in every image."""
        shares = pixels.sum(0) / max(1, pixels.sum())
        rare = np.flatnonzero((shares > 0) & (shares < RARE / pixels.shape[1]))
        return cls(share, {id: np.flatnonzero(pixels[:, id]).tolist() for id in rare.tolist()})

    def draw(self):
        """Return the index of an image to paste from, any rare class as likely as another, or None."""
        if not self.images or torch.rand(1).item() >= self.share:
            return None
        images = list(self.images.values())[torch.randint(len(self.images), ()).item()]
        return images[torch.randint(len(images), ()).item()]

    def __call__(self, image, targets, other_image, other_targets):
        """Images (C, h, w) and targets {name: (h, w)} of one size -> image and targets."""
        pasted = torch.isin(other_targets["mask"], torch.tensor(list(self.images), dtype=torch.uint8))
        return torch.where(pasted, other_image, image), {
            name: torch.where(pasted, other_targets[name], target) for name, target in targets.items()}


AUGMENTS = {
    "crop": ScaleCrop(),
    "crop-linear": LinearCrop(),
    "crop-ms": MultiScaleCrop(),
    "flip": Flip(),
    "color": ColorJitter(),
    "photometric": PhotometricDistortion(),
}


def augment(image, targets, size, names):
    """Bring an image and its targets to `size` = (h, w) with the augmentations in `names`, in the order of
    AUGMENTS.

    image (C, H, W) uint8, targets {name: (H, W) uint8 or float32}, each of any size -> all at `size`. Random
    numbers come from torch's global generator. Raises ValueError where an augmentation returns anything else.
    """
    steps = [step for name, step in AUGMENTS.items() if name in names]
    forms = {name: (tuple(size), target.dtype) for name, target in targets.items()}
    forms["image"] = (len(image), *size), torch.uint8
    if not any(step.resizes for step in steps):
        image, targets = resize_image(image, size), resize_targets(targets, size)
    for step in steps:
        image, targets = step(image, targets, size)
    result = {name: (tuple(target.shape), target.dtype) for name, target in targets.items()}
    result["image"] = tuple(image.shape), image.dtype
    if result != forms:
        raise ValueError(f"--augment {' '.join(names)} returned {result}: these have to be {forms}")
    return image, targets


def needed_size(size, names):
    """Return the (h, w) in pixels that an image needs at most for augment() to `size`."""
    zoom = max((AUGMENTS[name].zoom for name in names), default=1.0)
    return [math.ceil(side * zoom) for side in size]


def fingerprint(names):
    """Return a hash of all that the augmentations in `names` do: their parameters, and the code of the
    modules in which their classes are defined.
    """
    steps = [(name, step) for name, step in AUGMENTS.items() if name in names]
    modules = modules_of(Augmentation, *(type(step) for _, step in steps))
    return short_hash((code_hash(*modules), repr(steps)))
