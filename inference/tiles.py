"""Large images at their own resolution: overlapping tiles, blended, a band of rows at a time.

    tiles = Tiles(probabilities, image, side=(518, 518), stride=(389, 389))
    for _, rows in tiles.slices():                     # in order, from the top
        tiles.shares(rows)                             # (1, K, r, W) probabilities of these rows

Memory grows with the width of the image, not with its height: one row of tiles is kept, K x side x W values.
"""
import math

import torch
from tqdm import tqdm

from dataio.transforms import continued, window_starts
from models.logits import BLOCK, Logits

MANY = 50  # tiles from which a progress bar is worth its lines
SMALLEST = 1e-12  # of a probability, so that it has a logarithm


def ramp(length, before, after):
    """Return the weights (length,) of a tile along one side: 0 in the outer quarter of what it shares with
    the tile `before` and `after` it, in pixels (0 = none), 1 within, a straight line between.

    The weights of two neighbors add up to 1. What a network says near the edge of a tile, where it sees the
    surroundings of one side alone, counts for nothing.
    """
    place = torch.arange(length) + 0.5
    weights = torch.ones(length)
    for overlap, distance in ((before, place), (after, length - place)):
        if overlap:
            weights *= ((distance - overlap / 4) / (overlap / 2)).clamp(0, 1)
    return weights


class Tiles:
    """One image as overlapping tiles, with the interface of models.logits.Logits; the logits are the
    logarithms of blended probabilities.

    probabilities: (n, 3, h, w) uint8 crops -> (n, K, h, w) float32; image: (1, 3, H, W) uint8, on any device,
    or an object with its `shape` and read(top, left, h, w) -> (1, 3, h, w), None where there is nothing;
    side: (h, w) of a tile, stride: (h, w) between two, in pixels of the image. slices() and pixels() are
    called in turns, once through: rows are forgotten as the next ones are computed.
    """

    def __init__(self, probabilities, image, side, stride, num_classes, batch_size=8):
        self.probabilities, self.num_classes, self.batch_size = probabilities, num_classes, batch_size
        self.image, self.size = image, tuple(image.shape[-2:])
        self.side, self.stride = tuple(side), tuple(stride)
        self.width = max(self.size[1], self.side[1])
        self.top, self.sums, self.weights = 0, None, None

    def __len__(self):
        return 1

    @property
    def starts(self):
        """Return (tops, lefts) of the tiles, in pixels."""
        return [window_starts(length, side, stride) for length, side, stride
                in zip(self.size, self.side, self.stride, strict=True)]

    def at(self, size):
        """Return the logits at another size (H, W): all of them at once, unless it is the image's own."""
        if tuple(size) == self.size:
            return self
        return Logits(torch.cat([self.pixels(rows) for _, rows in self.slices()], 2)).at(size)

    def slices(self):
        """Yield (slice of images, slice of rows) from the top, computing what pixels() then returns."""
        tops, lefts = self.starts
        bar = tqdm(total=len(tops) * len(lefts), desc="tiles", leave=False,
                   disable=None if len(tops) * len(lefts) >= MANY else True)
        with bar:
            for index, top in enumerate(tops):
                self.move_to(top)
                self.add_row(tops, index, lefts, bar)
                end = tops[index + 1] if index + 1 < len(tops) else self.size[0]
                step = max(1, BLOCK["cpu"] // (self.num_classes * self.width))
                for first in range(top, end, step):
                    yield slice(0, 1), slice(first, min(end, first + step))

    def move_to(self, top):
        """Keep, of the sums over the rows from self.top on, those from `top` on."""
        if self.sums is not None:
            for plane in (*self.sums, self.weights):  # (h, W), one at a time: they are large
                kept = plane[top - self.top:].clone()
                plane.zero_()
                plane[:len(kept)] = kept
        self.top = top

    def crop(self, top, left):
        """Return a tile (1, 3, h, w) of the image, which its last pixels continue where it is smaller than
        that; None where it holds nothing.
        """
        sides = [min(side, length) for side, length in zip(self.side, self.size, strict=True)]
        if isinstance(self.image, torch.Tensor):
            crop = self.image[..., top:top + sides[0], left:left + sides[1]]
        else:
            crop = self.image.read(top, left, *sides)
        return None if crop is None else continued(crop, self.side)

    def add_row(self, tops, row, lefts, bar):
        """Add the probabilities of a row of tiles to the sums."""
        high, wide = self.side
        along_y = edges(tops, row, high)
        for first in range(0, len(lefts), self.batch_size):
            part = range(first, min(first + self.batch_size, len(lefts)))
            crops = {column: self.crop(tops[row], lefts[column]) for column in part}
            bar.update(len(part))
            crops = {column: crop for column, crop in crops.items() if crop is not None}
            if not crops:
                continue
            found = self.probabilities(torch.cat(list(crops.values())))  # (n, K, h, w)
            if self.sums is None:
                self.sums = found.new_zeros(self.num_classes, high, self.width)
                self.weights = found.new_zeros(high, self.width)
            for column, shares in zip(crops, found, strict=True):
                left = lefts[column]
                weight = (along_y[:, None] * edges(lefts, column, wide)).to(shares.device)
                self.sums[..., left:left + wide].addcmul_(shares, weight)
                self.weights[:, left:left + wide] += weight

    def shares(self, rows):
        """Return the probabilities (1, K, r, W) float32 of rows that slices() has just named; 0 where there
        is nothing.
        """
        if self.sums is None:
            return torch.zeros(1, self.num_classes, rows.stop - rows.start, self.size[1])
        part = slice(rows.start - self.top, rows.stop - self.top)
        weights = self.weights[part, :self.size[1]].clamp(min=SMALLEST)
        return (self.sums[:, part, :self.size[1]] / weights)[None]

    def pixels(self, rows):
        """Return the logits (1, K, r, W) of the same rows; all equal where there is nothing."""
        return self.shares(rows).clamp_(min=SMALLEST).log_()


def edges(starts, index, length):
    """Return the ramp (length,) of the tile `index` of those that begin at `starts`."""
    before = starts[index - 1] + length - starts[index] if index else 0
    after = starts[index] + length - starts[index + 1] if index + 1 < len(starts) else 0
    return ramp(length, before, after)


def overlap_pixels(overlap, side):
    """Return the overlap (h, w) in pixels of tiles of `side` (h, w): a share of them below 1, else pixels."""
    return tuple(round(overlap * length) if overlap < 1 else math.floor(overlap) for length in side)
