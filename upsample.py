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

COARSE = 256  # grids up to this size are carried to pixels by matrix products, larger ones row by row
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 27, "mps": 1 << 26}  # float32 values of a block


@lru_cache(maxsize=256)
def bilinear_matrix(old, new, device):
    """Return (new, old) float32: what F.interpolate does along one side (half-pixel centres, no
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
    """values (B, K, h, w) float32, and how they become the pixels of H x W images.

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
        if self.rows is None:
            return Logits(self.pixels()[..., top:top + height, left:left + width])
        return Logits(self.values, self.rows[top:top + height], self.columns[left:left + width])

    def pixels(self, rows=slice(None)):
        """Return (B, K, rows, W) float32; `rows` a slice of the pixel rows, all by default."""
        if self.rows is None:
            return resized_rows(self.values, self.size, rows) if self.size else self.values[..., rows, :]
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
