"""From logits on the grid of a head to pixels, a block of rows at a time, and a loss in the same blocks.

    logits, geometry = model.logits(images)            # (B, K, h, w), and where they lie in the images
    pixels(logits, geometry)                           # (B, K, H, W) float32, at the size of the images
    label_maps(logits, geometry, [(480, 640)])         # [(480, 640) uint8 class ids] at other sizes
    loss, terms, preds = pixel_loss(criterion, logits, geometry, masks)

Bilinear resizing is linear along each side, so resizing, cropping and resizing again are two small matrix
products. Most of the time and memory of a segmentation step on ready features goes into full-size logits;
in blocks that fit the cache of a processor they are several times cheaper, and never exist at once.
"""
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from config import IGNORE

LARGE_GRID = 256  # pixels above which logits at pixel size are resized row by row, not by matrix products
BLOCK_VALUES = {"cpu": 1 << 20, "cuda": 1 << 27, "mps": 1 << 26}  # float32 values of a block


# --- geometry ---------------------------------------------------------------------------------------------
class Geometry(NamedTuple):
    """Where the logits of images lie, all in pixels.

    size: (H, W) of the images. padded: (H, W) of the images as the backbone sees them, the images in their
    middle. covered: the (H, W) that logits have when they are resized to pixels; the image begins at (top,
    left) of it. mirrored: whether the images were mirrored, so that pixels have to be mirrored back.
    """

    size: tuple
    padded: tuple
    covered: tuple
    top: int = 0
    left: int = 0
    mirrored: bool = False


def geometry_of(size, size_divisor=1, logits_multiple=1, stretched=False):
    """Return the Geometry of images of `size` = (H, W), centered in the next multiples of size_divisor.

    The logits cover these, continued on all sides to multiples of logits_multiple. stretched: logits of the
    padded images are stretched over the images instead, as mmsegmentation did for DINOv2's published heads.
    """
    padded = next_multiples(size, size_divisor)
    covered = tuple(size) if stretched else next_multiples(padded, logits_multiple)
    top, left = ((outer - inner) // 2 + (middle - side) // 2 if not stretched else 0
                 for outer, inner, middle, side in zip(covered, padded, padded, size, strict=True))
    return Geometry(tuple(size), padded, covered, top, left)


def next_multiples(size, divisor):
    """Return (H, W) rounded up to multiples of a divisor."""
    return tuple(side + -side % divisor for side in size)


def pad(images, geometry, value=0.0):
    """Pad (B, C, H, W) with zeros, or another value, to geometry.padded."""
    (height, width), (tall, wide) = geometry.size, geometry.padded
    top, left = (tall - height) // 2, (wide - width) // 2
    return F.pad(images, (left, wide - width - left, top, tall - height - top), value=value)


# --- logits to pixels -------------------------------------------------------------------------------------
def pixels(logits, geometry, size=None, rows=slice(None)):
    """Return the logits (B, K, r, W) float32 of the rows `rows` (a slice) of the images resized to `size`.

    logits: (B, K, h, w) of any float type; size: (H, W), by default that of the images.
    """
    size = tuple(size or geometry.size)
    at_pixel_size = tuple(logits.shape[-2:]) == geometry.covered
    if at_pixel_size and (size == geometry.size or max(geometry.size) > LARGE_GRID):
        (height, width), top, left = geometry.size, geometry.top, geometry.left
        logits = logits[..., top:top + height, left:left + width]
        logits = logits.flip(-1) if geometry.mirrored else logits
        return logits[..., rows, :].float() if size == geometry.size else resized_rows(logits, size, rows)
    vertical, horizontal = side_matrices(tuple(logits.shape[-2:]), geometry, size, logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        return (vertical[rows] @ logits.float()) @ horizontal.T  # (B, K, r, w) -> (B, K, r, W)


@lru_cache(maxsize=128)
def side_matrices(grid, geometry, size, device):
    """Return (H, h) and (W, w) float32: what resizing, cropping and resizing again do along each side."""
    matrices = []
    # kept for later: an inference tensor could not take part in training, nor is autocast always the same
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for axis, start in enumerate((geometry.top, geometry.left)):
            length = geometry.size[axis]
            matrix = bilinear_matrix(grid[axis], geometry.covered[axis])[start:start + length]
            if axis == 1 and geometry.mirrored:
                matrix = matrix.flip(0)
            if size[axis] != length:
                matrix = bilinear_matrix(length, size[axis]) @ matrix
            matrices.append(matrix.contiguous().to(device))
    return matrices


def bilinear_matrix(old, new):
    """Return (new, old) float32: F.interpolate along one side (half-pixel centers, no antialiasing)."""
    return F.interpolate(torch.eye(old)[None], size=new, mode="linear")[0].T


def resized_rows(logits, size, rows):
    """Return the rows `rows` (a slice) of the bilinear resize of logits (B, K, h, w) to `size` = (H, W)."""
    height = logits.shape[2]
    numbers = torch.arange(size[0], device=logits.device)[rows]
    source = ((numbers + 0.5) * (height / size[0]) - 0.5).clamp(min=0)
    above = source.long()  # (r,)
    below = (above + 1).clamp(max=height - 1)
    weight = (source - above)[:, None]
    mixed = logits[:, :, above].float() * (1 - weight) + logits[:, :, below].float() * weight  # (B, K, r, w)
    return F.interpolate(mixed, size=(len(numbers), size[1]), mode="bilinear")


def block_slices(shape, device):
    """Yield (images, rows), pairs of slices that cover pixels of `shape` (B, K, H, W) in blocks of about
    BLOCK_VALUES values.
    """
    count, classes, height, width = shape
    budget = BLOCK_VALUES.get(device.type, BLOCK_VALUES["cpu"])
    images = max(1, budget // (classes * height * width))
    step = height if images > 1 else max(1, min(height, budget // (classes * width)))
    for first in range(0, count, images):
        for top in range(0, height, step):
            yield slice(first, first + images), slice(top, top + step)


# --- label maps -------------------------------------------------------------------------------------------
def class_ids(pixels):
    """Return the argmax over classes, the first of equals: (B, K, H, W), K < 255 -> (B, H, W) uint8.

    Several times faster on a CPU than argmax, which looks at one pixel at a time.
    """
    classes = pixels.shape[1]
    best = pixels == pixels.amax(1, keepdim=True)  # (B, K, H, W)
    ranks = torch.arange(classes, 0, -1, dtype=torch.uint8, device=pixels.device)  # K, K-1, ..., 1
    rank = (best.view(torch.uint8) * ranks.view(1, -1, 1, 1)).amax(1)
    return (classes - rank).clamp_(max=classes - 1)  # NaN equals nothing, not even itself


def label_maps(logits, geometry, sizes):
    """Return the class ids of logits (B, K, h, w), a list of (H, W) uint8, one for each of `sizes`."""
    preds = []
    for index, size in enumerate(sizes):
        single = logits[index:index + 1]
        pred = torch.empty(tuple(size), dtype=torch.uint8, device=logits.device)
        for _, rows in block_slices((1, logits.shape[1], *size), logits.device):
            pred[rows] = class_ids(pixels(single, geometry, size, rows))[0]
        preds.append(pred)
    return preds


def class_map(logits, geometry, size):
    """Return the class ids (H, W) uint8 of logits (1, K, h, w) on the CPU, at `size` = (H, W): as label_maps
    does, but where two classes are as good as tied. Class by class in OpenCV it takes a half to a third of
    the time, for frames of a video.
    """
    (height, width), top, left, best = geometry.size, geometry.top, geometry.left, None
    for id, plane in enumerate(logits[0].float().numpy()):
        plane = resized_plane(plane, geometry.covered)[top:top + height, left:left + width]
        plane = resized_plane(cv2.flip(plane, 1) if geometry.mirrored else plane, size)
        if best is None:
            best, ids = plane.copy(), np.zeros(size, np.uint8)
            continue
        better = cv2.compare(plane, best, cv2.CMP_GT)  # 255 where it is larger
        cv2.max(plane, best, dst=best)
        cv2.max(ids, better & np.uint8(id), dst=ids)  # ids rise: the larger one is the later one
    return torch.from_numpy(ids)


def resized_plane(plane, size):
    """Resize (h, w) float32 to `size` = (H, W), bilinear, half-pixel centers, no antialiasing."""
    if plane.shape == tuple(size):
        return plane
    return cv2.resize(plane, tuple(size)[::-1], interpolation=cv2.INTER_LINEAR)


# --- losses a block at a time -----------------------------------------------------------------------------
def pixel_loss(criterion, logits, geometry, masks):
    """Return (loss, {name: term}, preds (B, H, W) uint8) of a criterion on logits (B, K, h, w).

    masks (B, H, W) int64 of the images' size. A loss that is a mean over pixels is taken a block of rows at a
    time together with its gradient, so that no full-size logits, probabilities or gradients exist; others
    are given all pixels at once.
    """
    if not getattr(criterion, "per_pixel", False):
        values = pixels(logits, geometry)
        loss, terms = criterion(values, masks)
        return loss, terms, class_ids(values.detach())
    loss, terms, preds = BlockLoss.apply(logits, geometry, masks, criterion)
    return loss, dict(zip(criterion.names, terms, strict=True)), preds


class BlockLoss(torch.autograd.Function):
    """The mean over pixels of a criterion, with its gradient to the coarse logits computed on the way."""

    @staticmethod
    def forward(ctx, logits, geometry, masks, criterion):
        """logits (B, K, h, w), masks (B, H, W) -> loss, terms (T,), preds (B, H, W) uint8."""
        device, needs_gradient = logits.device, ctx.needs_input_grad[0]
        counted = (masks != IGNORE).sum().clamp(min=1)
        loss, terms = torch.zeros((), device=device), torch.zeros(len(criterion.names), device=device)
        gradient = torch.zeros_like(logits, dtype=torch.float32) if needs_gradient else None
        preds = torch.empty(masks.shape, dtype=torch.uint8, device=device)
        for images, rows in block_slices((*logits.shape[:2], *geometry.size), device):
            truth = masks[images, rows]
            share = (truth != IGNORE).sum() / counted
            with torch.inference_mode(False), torch.set_grad_enabled(needs_gradient):
                coarse = logits[images].detach().float().requires_grad_(needs_gradient)
                values = pixels(coarse, geometry, rows=rows)  # (b, K, r, W)
                total, named_terms = criterion(values, truth)
                total = total * share
                if needs_gradient:
                    gradient[images] += torch.autograd.grad(total, coarse)[0]
            loss += total.detach()
            terms += torch.stack([named_terms[name].detach() for name in criterion.names]) * share
            preds[images, rows] = class_ids(values.detach())
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(terms, preds)
        return loss, terms, preds

    @staticmethod
    def backward(ctx, loss_gradient, terms_gradient, preds_gradient):
        """Chain rule: the gradient to the loss, a scalar, times the saved one."""
        # scaled before it is rounded: small gradients vanish in float16 otherwise
        return (ctx.saved_tensors[0] * loss_gradient).to(ctx.dtype), None, None, None
