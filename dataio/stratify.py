"""Pixel counts of every class in every mask, kept on disk, and the stratified split made from them.

    pixels = count_pixels(samples, table, num_classes, "outputs/cache")          # (N, K)
    train, val = stratified_groups(pixels, [80, 20])                             # indices
"""
import hashlib
import re
from pathlib import Path

import numpy as np

from config import IGNORE, InputError, count_of
from dataio import readers
from dataio.contents import hash_contents
from dataio.readers import read_mask
from dataio.scan import scan_image
from utils import all_in_parallel, code_hash, in_parallel, read_kept, write_atomically

SEQUENCE, COMPARED = 8, 8  # images that make a sequence, and pairs of neighbors of it that are compared
ALIKE = 40  # bits of 256 in which the looks of neighboring frames may differ; of other images 75 to 140 do


def digest_of_masks(samples, table):
    """Return a SHA-256 over what the masks of Samples hold, and how they are read. Raises InputError."""
    digest = hashlib.sha256(np.ascontiguousarray(table))
    hashes = hash_contents(sample.mask for sample in samples if sample.mask)
    facts = code_hash(readers), [hashes.get(sample.mask) for sample in samples]
    digest.update(repr(facts).encode())
    return digest


def count_pixels(samples, table, num_classes, cache_dir):
    """Return (N, K) int64: pixels of every class in the mask of every sample, 0 where it has none; counted
    once, then read from cache_dir. Raises InputError for a mask that does not fit the table.
    """
    path = Path(cache_dir) / f"pixels-{digest_of_masks(samples, table).hexdigest()[:16]}.npy"
    pixels = read_kept(path)
    if pixels is not None and pixels.shape == (len(samples), num_classes):
        return pixels

    def count(sample):
        if sample.mask is None:
            return np.zeros(num_classes, np.int64)
        return np.bincount(read_mask(sample.mask, table).ravel(), minlength=IGNORE + 1)[:num_classes]

    pixels = np.stack(all_in_parallel(count, samples, "counting pixels"))
    write_atomically(path, lambda temporary: np.save(temporary, pixels))
    return pixels


def stratified_groups(pixels, sizes):
    """Split images into groups of `sizes` so that every class has its share of pixels in each; deterministic.

    Iterative stratification (Sechidis et al., ECML 2011) on class presence weighted by pixel counts.
    pixels: (N, K); sizes: G numbers of images that add up to N. Returns G sorted lists of indices.
    """
    count = len(pixels)
    room = np.array(sizes)  # images still to go into each group
    ratio = room / count
    shares = pixels / np.maximum(pixels.sum(0), 1)  # (N, K), every class sums to 1
    missing = np.outer(ratio, np.ones(pixels.shape[1]))  # (G, K) share of every class still to come
    present, group_of = pixels > 0, np.full(count, -1)
    images_left = present.sum(0)  # (K,)
    while (group_of < 0).any():
        if images_left.any():
            rarest = np.where(images_left > 0, images_left, count + 1).argmin()
            image = np.where(group_of < 0, shares[:, rarest], -1).argmax()
            need = (missing[:, rarest] - shares[image, rarest]) / ratio  # what would still be missing then
            has_class = np.array([present[group_of == group, rarest].any() for group in range(len(sizes))])
            if images_left[rarest] == 1 and not has_class.all():  # the last chance to be in all groups
                need = -has_class.astype(float)
        else:  # only images without any class are left
            image, need = (group_of < 0).argmax(), room / ratio
        group = np.where(room > 0, need, -np.inf).argmax()
        group_of[image] = group
        room[group] -= 1
        missing[group] -= shares[image]
        images_left -= present[image]
    return [np.flatnonzero(group_of == group).tolist() for group in range(len(sizes))]


def stratified_split(pixels, val_fraction):
    """Return (train, val) lists of indices of images, of pixels (N, K), about N * val_fraction in val."""
    count = len(pixels)
    if count < 2:
        raise InputError("one image cannot be split into training and validation: add images")
    validation = min(max(1, round(count * val_fraction)), count - 1)
    return tuple(stratified_groups(pixels, [count - validation, validation]))


def stratified_fold(pixels, number, folds):
    """Return (train, val) lists of indices of images, of pixels (N, K): fold `number` (1-based) validates."""
    count = len(pixels)
    if count < folds:
        raise InputError(f"--fold {number}/{folds}: {count_of(count, 'image')} (a block of frames counts as "
                         "one) cannot be split into so many folds: lower their number, or add images")
    groups = stratified_groups(pixels, [count // folds + (fold < count % folds) for fold in range(folds)])
    val = groups.pop(number - 1)
    return sorted(sum(groups, [])), val


def split_samples(samples, pixels, val_fraction, fold=()):
    """Return ({"train": [...], "val": [...]} of `samples`, how they were split as text); stratified.

    fold: (i, n) for the i-th of n folds, else val_fraction of the images validates. Frames of a sequence,
    which look like their neighbors, are split in blocks of consecutive frames: a validation frame between two
    training frames would be no test. pixels: (N, K). Raises InputError with too few images.
    """
    blocks, sequences = blocks_of(samples, 1 / fold[1] if fold else val_fraction)
    counts = np.stack([pixels[block].sum(0) for block in blocks])
    groups = stratified_fold(counts, *fold) if fold else stratified_split(counts, val_fraction)
    splits = {}
    for split, numbers in zip(("train", "val"), groups, strict=True):
        indices = sorted(index for number in numbers for index in blocks[number])
        splits[split] = [samples[index] for index in indices]
    text = f"fold {fold[0]} of {fold[1]}, stratified" if fold else "stratified"
    if sequences:
        text += (f" by blocks of consecutive frames ({count_of(sequences, 'sequence')} of frames that look "
                 "alike)")
    return splits, text


def blocks_of(samples, val_fraction):
    """Return (lists of indices of `samples` that go into one split together, number of sequences).

    A sequence: SEQUENCE or more images with consecutive numbers at the end of their names, of which neighbors
    look alike in most of the pairs that are compared. It is cut into blocks of val_fraction of its length.
    """
    families = {}
    for index, sample in enumerate(samples):
        number = re.search(r"(\d+)(\D*)$", sample.image.stem)
        if number:
            key = sample.image.parent, sample.image.stem[:number.start()], number[2]
            families.setdefault(key, []).append((int(number[1]), index))
    blocks, single, sequences = [], set(range(len(samples))), 0
    for family in families.values():
        order = [index for _, index in sorted(family)]
        if len(order) < SEQUENCE or not looks_like_sequence([samples[index].image for index in order]):
            continue
        size = max(1, min(round(len(order) * val_fraction), len(order) // 2))
        blocks += [order[start:start + size] for start in range(0, len(order), size)]
        single -= set(order)
        sequences += 1
    return [*blocks, *([index] for index in sorted(single))], sequences


def looks_like_sequence(paths):
    """Return whether image files in the order of their numbers look like the frames of a clip."""
    starts = np.linspace(0, len(paths) - 2, COMPARED).astype(int)
    pairs = in_parallel(lambda start: [scan_image(path).look for path in paths[start:start + 2]], starts,
                        "comparing neighbors")
    near = [np.bitwise_count(looks[0] ^ looks[1]).sum() <= ALIKE for looks in pairs
            if not isinstance(looks, InputError)]
    return bool(near) and 2 * sum(near) > len(near)


def share_table(pixels, splits, classes):
    """Return lines of a table: images with each class and its share of the pixels, in every split.

    pixels: {sample: (K,) counts}; splits: {name: [sample]}; classes: [(name, color)].
    """
    width = max(len(name) for name, _ in classes)
    head, rows = " " * width, [f"{name:{width}}" for name, _ in classes]
    for split, samples in splits.items():
        counts = np.stack([pixels[sample] for sample in samples])  # (N, K)
        head += f"  {split + ' images':>12}  {split + ' pixels':>12}"
        images, shares = (counts > 0).sum(0), 100 * counts.sum(0) / max(1, counts.sum())
        rows = [f"{row}  {number:12}  {share:10.2f} %"
                for row, number, share in zip(rows, images, shares, strict=True)]
    return [head, *rows]
