"""Logits on the grid a head computes them on, and how they become pixels, a block of rows at a time.

    logits = model.logits(images)                      # Logits: (B, K, h, w) and where they lie in the images
    for part, rows, block in logits.at((480, 640)).blocks():
        block                                          # (b, K, r, 640) of images[part], rows `rows`

Bilinear resizing is linear along each side, so resizing, cropping and resizing again are two small matrix
products. Most of the time and memory of a segmentation step on ready features goes into full-size logits;
in blocks that fit the cache of a processor they are several times cheaper, and never exist as a whole.
"""
from functools import lru_cache

import torch
import torch.nn.functional as F

BLOCK = {"cpu": 1 << 20, "cuda": 1 << 27, "mps": 1 << 26}  # float32 values of a block


@lru_cache(maxsize=256)
def bilinear_matrix(old, new, device):
    """Return (new, old) float32: what F.interpolate does along one side (half-pixel centres, no
    antialiasing).
    """
    with torch.inference_mode(False):  # an inference tensor could not take part in training later
        return F.interpolate(torch.eye(old)[None], size=new, mode="linear")[0].T.contiguous().to(device)


class Logits:
    """values (B, K, h, w) float32; rows (H, h) and columns (W, w) carry them to the pixels of an H x W image.

    Without rows and columns, the values are those of the pixels.
    """

    def __init__(self, values, rows=None, columns=None):
        self.values, self.rows, self.columns = values, rows, columns

    @property
    def shape(self):
        """(B, K, H, W) of the pixels."""
        if self.rows is None:
            return tuple(self.values.shape)
        return (*self.values.shape[:2], len(self.rows), len(self.columns))

    def __len__(self):
        return len(self.values)

    def __getitem__(self, part):
        """The logits of some images: `part` is a slice."""
        return Logits(self.values[part], self.rows, self.columns)

    def flip(self):
        """Return the logits of the mirrored images."""
        if self.rows is None:
            return Logits(self.values.flip(-1))
        return Logits(self.values, self.rows, self.columns.flip(0))

    def at(self, size):
        """Return the logits of the images resized (bilinear) to `size` = (H, W)."""
        height, width = self.shape[-2:]
        if tuple(size) == (height, width):
            return self
        rows = bilinear_matrix(height, size[0], self.values.device)
        columns = bilinear_matrix(width, size[1], self.values.device)
        if self.rows is not None:
            rows, columns = rows @ self.rows, columns @ self.columns
        return Logits(self.values, rows, columns)

    def crop(self, top, left, height, width):
        """Return the logits of a part of the images."""
        if self.rows is None:
            return Logits(self.values[..., top:top + height, left:left + width])
        return Logits(self.values, self.rows[top:top + height], self.columns[left:left + width])

    def pixels(self, rows=slice(None)):
        """Return (B, K, rows, W) float32; `rows` a slice of the pixel rows, all by default."""
        if self.rows is None:
            return self.values[..., rows, :]
        with torch.autocast(self.values.device.type, enabled=False):
            return (self.rows[rows] @ self.values) @ self.columns.T  # (B, K, r, w) -> (B, K, r, W)

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
