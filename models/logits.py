"""Logits on the grid a head computes them on, how they become pixels a block of rows at a time, and a loss on
them in the same blocks.

    logits = model.logits(images)                      # Logits: (B, K, h, w) and where they lie in the images
    for part, rows, block in logits.at((480, 640)).blocks():
        block                                          # (b, K, r, 640) of images[part], rows `rows`
    loss, terms, preds = pixel_loss(criterion, logits, masks)

Bilinear resizing is linear along each side, so resizing, cropping and resizing again are two small matrix
products. Most of the time and memory of a segmentation step on ready features goes into full-size logits;
in blocks that fit the cache of a processor they are several times cheaper, and never exist as a whole.
"""
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from config import IGNORE

COARSE = 256  # grids up to this size are carried to pixels by matrix products, larger ones row by row
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 27, "mps": 1 << 26}  # float32 values of a block


class Geometry(NamedTuple):
    """Where images of `size` (H, W) lie in the `padded` (H, W) ones that a backbone sees, in pixels."""

    size: tuple
    padded: tuple
    top: int
    left: int


def geometry_of(size, size_divisor):
    """Return the Geometry of images of `size` = (H, W), centered in the next multiples of size_divisor."""
    extra = [-side % size_divisor for side in size]
    padded = tuple(side + more for side, more in zip(size, extra, strict=True))
    return Geometry(tuple(size), padded, extra[0] // 2, extra[1] // 2)


def pad(images, geometry, value=0.0):
    """Pad (B, C, H, W) with zeros, or another value, to geometry.padded."""
    (height, width), (tall, wide), top, left = geometry
    return F.pad(images, (left, wide - width - left, top, tall - height - top), value=value)


@lru_cache(maxsize=256)
def bilinear_matrix(old, new, device):
    """Return (new, old) float32: what F.interpolate does along one side (half-pixel centers, no
    antialiasing).
    """
    with torch.inference_mode(False):  # an inference tensor could not take part in training later
        return F.interpolate(torch.eye(old)[None], size=new, mode="linear")[0].T.contiguous().to(device)


def resized_rows(values, size, rows):
    """Return the rows `rows` (a slice) of the bilinear resize of values (B, K, h, w) to `size` = (H, W)."""
    high = values.shape[2]
    wanted = torch.arange(size[0], device=values.device)[rows]
    source = ((wanted + 0.5) * (high / size[0]) - 0.5).clamp(min=0)
    above = source.long()  # (r,)
    below = (above + 1).clamp(max=high - 1)
    weight = (source - above)[:, None]
    mixed = values[:, :, above] * (1 - weight) + values[:, :, below] * weight  # (B, K, r, w)
    return F.interpolate(mixed, size=(len(wanted), size[1]), mode="bilinear")


class Logits:
    """values (B, K, h, w) of any float type, and how they become the pixels of H x W images.

    rows (H, h) and columns (W, w): the weights of each side, for coarse values. size: the (H, W) that large
    values are resized to. With neither, the values are the pixels.
    """

    def __init__(self, values, rows=None, columns=None, size=None):
        self.values, self.rows, self.columns, self.size = values, rows, columns, size

    @property
    def shape(self):
        """(B, K, H, W) of the pixels."""
        sides = self.size or self.values.shape[-2:]
        if self.rows is not None:
            sides = len(self.rows), len(self.columns)
        return (*self.values.shape[:2], *sides)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, part):
        """The logits of some images: `part` is a slice."""
        return Logits(self.values[part], self.rows, self.columns, self.size)

    def with_values(self, values):
        """Return Logits of other values (B, K, h, w) on the same grid."""
        return Logits(values, self.rows, self.columns, self.size)

    def flip(self):
        """Return the logits of the mirrored images."""
        if self.rows is None:
            return Logits(self.values.flip(-1), size=self.size)
        return Logits(self.values, self.rows, self.columns.flip(0))

    def at(self, size):
        """Return the logits of the images resized (bilinear) to `size` = (H, W)."""
        height, width = self.shape[-2:]
        if tuple(size) == (height, width):
            return self
        if self.rows is None and max(height, width) > COARSE:
            return Logits(self.pixels(), size=tuple(size))
        rows = bilinear_matrix(height, size[0], self.values.device)
        columns = bilinear_matrix(width, size[1], self.values.device)
        if self.rows is not None:
            rows, columns = rows @ self.rows, columns @ self.columns
        return Logits(self.values, rows, columns)

    def crop(self, top, left, height, width):
        """Return the logits of a part of the images."""
        if self.rows is None and self.size is None:
            return Logits(self.values[..., top:top + height, left:left + width])
        rows, columns = self.rows, self.columns
        if rows is None:  # never all pixels at full size
            rows, columns = (bilinear_matrix(old, new, self.values.device)
                             for old, new in zip(self.values.shape[-2:], self.size, strict=True))
        return Logits(self.values, rows[top:top + height], columns[left:left + width])

    def pixels(self, rows=slice(None)):
        """Return (B, K, rows, W) float32; `rows` a slice of the pixel rows, all by default."""
        if self.rows is None:
            return (resized_rows(self.values.float(), self.size, rows) if self.size
                    else self.values[..., rows, :].float())
        with torch.autocast(self.values.device.type, enabled=False):
            return (self.rows[rows] @ self.values.float()) @ self.columns.T  # (B, K, r, w) -> (B, K, r, W)

    def slices(self):
        """Yield (images, rows), pairs of slices that cover all pixels in parts of about BLOCK values."""
        count, classes, height, width = self.shape
        budget = BLOCK.get(self.values.device.type, BLOCK["cpu"])
        images = max(1, budget // (classes * height * width))
        step = height if images > 1 else max(1, min(height, budget // (classes * width)))
        for first in range(0, count, images):
            for top in range(0, height, step):
                yield slice(first, first + images), slice(top, top + step)

    def blocks(self):
        """Yield (images, rows, pixels (b, K, r, W)) for all of slices()."""
        for images, rows in self.slices():
            yield images, rows, self[images].pixels(rows)


def class_ids(pixels):
    """Return the argmax over classes, the first of equals: (B, K, H, W), K < 255 -> (B, H, W) uint8.

    Several times faster on a CPU than argmax, which looks at one pixel at a time.
    """
    classes = pixels.shape[1]
    best = pixels == pixels.amax(1, keepdim=True)  # (B, K, H, W)
    ranks = torch.arange(classes, 0, -1, dtype=torch.uint8, device=pixels.device)  # K, K-1, ..., 1
    rank = (best.view(torch.uint8) * ranks.view(1, -1, 1, 1)).amax(1)
    return (classes - rank).clamp_(max=classes - 1)  # NaN equals nothing, not even itself


# --- losses a block at a time -----------------------------------------------------------------------------
def pixel_loss(criterion, logits, masks):
    """Return (loss, {name: term}, preds (B, H, W) uint8) of a criterion on Logits.

    masks (B, H, W) int64. A loss that is a mean over pixels is taken a block of rows at a time together with
    its gradient, so that no full-size logits, probabilities or gradients exist; others see them whole.
    """
    if not getattr(criterion, "per_pixel", False):
        pixels = logits.pixels()
        loss, terms = criterion(pixels, masks)
        return loss, terms, class_ids(pixels.detach())
    loss, terms, preds = BlockLoss.apply(logits.values, logits, masks, criterion)
    return loss, dict(zip(criterion.names, terms, strict=True)), preds


class BlockLoss(torch.autograd.Function):
    """The mean over pixels of a criterion, with its gradient to the coarse logits computed on the way."""

    @staticmethod
    def forward(ctx, values, logits, masks, criterion):
        """values = logits.values (B, K, h, w) -> loss, terms (T,), preds (B, H, W) uint8."""
        counted = (masks != IGNORE).sum().clamp(min=1)
        loss, terms = (torch.zeros(size, device=values.device) for size in ((), len(criterion.names)))
        gradient = torch.zeros_like(values, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        preds = torch.empty(masks.shape, dtype=torch.uint8, device=masks.device)
        for images, rows in logits.slices():
            truth = masks[images, rows]
            share = (truth != IGNORE).sum() / counted
            part = logits[images]
            with torch.inference_mode(False), torch.set_grad_enabled(gradient is not None):
                part.values = part.values.detach().float().requires_grad_(gradient is not None)
                pixels = part.pixels(rows)  # (b, K, r, W)
                total, named = criterion(pixels, truth)
                total = total * share
                if gradient is not None:
                    gradient[images] += torch.autograd.grad(total, part.values)[0]
            loss += total.detach()
            terms += torch.stack([named[name].detach() for name in criterion.names]) * share
            preds[images, rows] = class_ids(pixels.detach())
        ctx.save_for_backward(gradient)
        ctx.dtype = values.dtype
        ctx.mark_non_differentiable(terms, preds)
        return loss, terms, preds

    @staticmethod
    def backward(ctx, of_loss, of_terms, of_preds):
        """Chain rule: the gradient to the loss, a scalar, times the saved one."""
        # scaled before it is rounded: small gradients vanish in float16 otherwise
        return (ctx.saved_tensors[0] * of_loss).to(ctx.dtype), None, None, None
