"""torch Datasets over image and mask files: whole images, or windows of them at their own resolution.

    train = SegmentationDataset(samples, table, (518, 518), ("flip",))     # resized to 518x518
    val = SegmentationDataset(samples, table, (518, 518))
    train = WindowDataset(WindowReader(samples, table), (518, 518), ("flip",))      # --train-scale native
    val = TileDataset(WindowReader(samples, table), (518, 518))

Every item is a triple (image (3, h, w) uint8, mask (h, w) uint8, file name).
"""
import hashlib
import math
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.functional import pad
from torch.utils.data import Dataset

from config import IGNORE
from dataio.dataloader import mixed_seed
from dataio.readers import read_image, read_mask, read_orientation, read_pair, rotate_like
from dataio.transforms import augment, continued, fingerprint, resize_image, wanted_size, window_starts
from dataio.windows import read_native, reading_code
from utils import hash_code

SCALES = 0.5, 2.0  # of random windows: pixels that the network sees per pixel of the image


class SegmentationDataset(Dataset):
    """Whole images, resized.

    Training (`augments` a tuple, maybe empty): image (3, h, w) and mask (h, w), both uint8 at `size`.
    Validation (`augments` None): image (3, h, w) at `size`, or as it is where `size` is empty; mask (H, W)
    at the size it is stored in.
    """

    def __init__(self, samples, table, size, augments=None, seed=0):
        self.samples, self.table, self.size = list(samples), table, tuple(size)
        self.augments, self.seed = augments, seed

    def __len__(self):
        return len(self.samples)

    def mask(self, index):
        """Return mask `index` (H, W) uint8 at the size it is stored in, turned as its image is."""
        sample = self.samples[index]
        return torch.from_numpy(rotate_like(read_mask(sample.mask, self.table),
                                            *read_orientation(sample.image)))

    def picture(self, index):
        """Return what item `index` of validation shows, at its own size, (3, H, W) uint8."""
        return read_image(self.samples[index].image)

    def facts(self):
        """Return a dict of all that the items depend on beside the files and the table."""
        facts = dict(split="val" if self.augments is None else "train", imgsz=list(self.size),
                     reading=[reading_code(), hash_code("dataio/torch_datasets.py")])
        if self.augments:
            facts.update(augment=fingerprint(self.augments), seed=self.seed)
        return facts

    @contextmanager
    def drawing(self, item):
        """Context in which torch's random numbers depend on seed, epoch and image alone, not on the worker or
        on what was read before: a resumed run sees what an uninterrupted one would. Yields the index of item
        epoch * len + index.
        """
        epoch, index = divmod(item, len(self))
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, index))
            yield index
        finally:
            torch.set_rng_state(state)

    def __getitem__(self, item):
        sample = self.samples[item % len(self)]
        if self.augments is None:
            image, mask = read_pair(sample, self.table)
            return resize_image(image, self.size) if self.size else image, mask, str(sample.image)
        image, mask = read_pair(sample, self.table, at_least=wanted_size(self.size, self.augments))
        with self.drawing(item):
            image, mask = augment(image, mask, self.size, self.augments)
        return image, mask, str(sample.image)


class NativeDataset(SegmentationDataset):
    """Validation images as they are, read as windows of them are: for --protocol tile."""

    def __init__(self, samples, table):
        super().__init__(samples, table, ())

    def __getitem__(self, item):
        sample = self.samples[item]
        return *read_native(sample, self.table), str(sample.image)


def images_for(protocol, samples, table):
    """Return the dataset of whole images at their own size, read as a predictor.Protocol wants them."""
    return NativeDataset(samples, table) if protocol.tile else SegmentationDataset(samples, table, ())


class WindowDataset(SegmentationDataset):
    """Training at the images' own resolution: random windows of them, times SCALES, at `size`.

    An image is there as often as windows of `size` cover it. balance: share of the windows that are drawn
    around a pixel of `points` (WindowReader.points), of a class of the image that is drawn first, each as
    likely as the others (as nnU-Net does, Isensee et al., Nature Methods 2021).
    """

    def __init__(self, reader, size, augments=(), seed=0, balance=0.0, points=None):
        counts = [max(1, round(math.prod(one) / math.prod(size))) for one in reader.sizes]
        self.images = [index for index, count in enumerate(counts) for _ in range(count)]
        super().__init__([reader.samples[index] for index in self.images], reader.table, size, augments, seed)
        self.reader, self.balance, self.points = reader, balance, points

    def facts(self):
        """As of the base."""
        points = hashlib.sha256(np.ascontiguousarray(self.points)).hexdigest() if self.balance else ""
        return dict(super().facts(), seed=self.seed, windows=[SCALES, self.balance, points])

    def __getitem__(self, item):
        with self.drawing(item) as index:
            image, mask = self.reader.read(self.images[index], *self.draw_window(self.images[index]))
            image, mask = augment(image, mask, self.size, self.augments)
        return image, mask, str(self.samples[index].image)

    def draw_window(self, index):
        """Return (top, left, height, width) in pixels of image `index`."""
        scale = torch.empty(1).uniform_(*SCALES).item()
        sides, corner, point = [max(1, round(side / scale)) for side in self.size], [], None
        if torch.rand(1).item() < self.balance:
            point = self.draw_point(index)
        for axis, (length, side) in enumerate(zip(self.reader.sizes[index], sides, strict=True)):
            lowest, highest = min(0, length - side), max(0, length - side)
            first, last = (lowest, highest) if point is None else (point[axis] - side + 1, point[axis])
            start = torch.randint(first, last + 1, ()).item()
            corner.append(min(max(start, lowest), highest))
        return *corner, *sides

    def draw_point(self, index):
        """Return a pixel (y, x) of image `index`, None where no pixel of it has a class."""
        first, last = np.searchsorted(self.points[:, 0], (index, index + 1))
        rows = self.points[first:last]
        if not len(rows):
            return None
        classes = np.unique(rows[:, 1])
        rows = rows[rows[:, 1] == classes[torch.randint(len(classes), ()).item()]]
        return rows[torch.randint(len(rows), ()).item(), 2:].tolist()


class TileDataset(SegmentationDataset):
    """Validation at the images' own resolution: tiles of `size` that cover each of them, one an item.

    No pixel counts twice: where the last tile of a row or column overlaps the one before, its mask is
    ignored there. Images smaller than a tile are continued by their last pixels, which are not counted.
    """

    def __init__(self, reader, size):
        self.reader, self.tiles = reader, []
        for index, lengths in enumerate(reader.sizes):
            rows, columns = (window_starts(length, side, side)
                             for length, side in zip(lengths, size, strict=True))
            self.tiles += [(index, top, left) for top in rows for left in columns]
        super().__init__([reader.samples[index] for index, _, _ in self.tiles], reader.table, size)

    def facts(self):
        """As of the base."""
        return dict(super().facts(), tiles=True)

    def read(self, item):
        """Return image (3, h, w) and mask (h, w) of a tile."""
        index, *corner = self.tiles[item]
        sides = list(map(min, self.size, self.reader.sizes[index]))
        image, mask = self.reader.read(index, *corner, *sides)
        for axis, (start, side) in enumerate(zip(corner, self.size, strict=True)):
            seen = -start % side  # by the tile before
            mask[(slice(None),) * axis + (slice(0, seen),)] = IGNORE
        missing = [side - there for side, there in zip(self.size, sides, strict=True)]
        return continued(image, self.size), pad(mask, (0, missing[1], 0, missing[0]), value=IGNORE)

    def mask(self, index):
        """As of the base, of a tile."""
        return self.read(index)[1]

    def picture(self, index):
        """As of the base, of a tile."""
        return self.read(index)[0]

    def __getitem__(self, item):
        return *self.read(item), str(self.samples[item].image)
