"""Pixel counts of every class in every mask, kept on disk, and the stratified split made from them.

    pixels = count_pixels(samples, table, num_classes, "outputs/cache")          # (N, K)
    train, val = stratified_parts(pixels, [80, 20])                              # indices
"""
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import IGNORE, InputError, count_of
from dataio.readers import read_mask
from dataio.scan import in_parallel, scan_image
from utils import hash_code, read_kept, write_atomically

SEQUENCE, PLACES = 8, 8  # images that make a sequence, and where two neighbors are compared
ALIKE = 40  # bits of 256 in which the looks of neighboring frames may differ; of other images 75 to 140 do


def digest_of_masks(samples, table):
    """Return a SHA-256 over the names, sizes and times of the masks of Samples, and how they are read."""
    digest = hashlib.sha256(np.ascontiguousarray(table))
    digest.update(hash_code("dataio/readers.py").encode())
    for sample in samples:
        facts = sample.mask.stat()
        digest.update(repr((str(sample.mask.resolve()), facts.st_size, facts.st_mtime_ns)).encode())
    return digest


def count_pixels(samples, table, num_classes, cache_dir):
    """Return (N, K) int64: pixels of every class in the mask of every sample; read once, then from cache_dir.

    The file kept is named by a hash over the masks' names, sizes and times and how they are read, so that a
    changed data set is counted anew. Raises InputError for a mask that does not fit the table.
    """
    digest = digest_of_masks(samples, table)
    kept = Path(cache_dir) / f"pixels-{digest.hexdigest()[:16]}.npy"
    pixels = read_kept(kept)
    if pixels is not None and pixels.shape == (len(samples), num_classes):
        return pixels

    def count(sample):
        return np.bincount(read_mask(sample.mask, table).ravel(), minlength=IGNORE + 1)[:num_classes]

    with ThreadPoolExecutor() as pool:
        bar = tqdm(pool.map(count, samples), "counting pixels", len(samples), leave=False, disable=None)
        rows = list(bar)
    write_atomically(kept, lambda temporary: np.save(temporary, np.stack(rows)))
    return np.stack(rows)


def stratified_parts(pixels, sizes):
    """Split images into parts of `sizes` so that every class has its share of pixels in each; deterministic.

    Iterative stratification (Sechidis et al., ECML 2011) on class presence weighted by pixel counts.
    pixels: (N, K); sizes: P numbers of images that add up to N. Returns P sorted lists of indices.
    """
    count = len(pixels)
    room = np.array(sizes)  # images still to go into each part
    ratio = room / count
    shares = pixels / np.maximum(pixels.sum(0), 1)  # (N, K), every class sums to 1
    wanted = np.outer(ratio, np.ones(pixels.shape[1]))  # (P, K) share of every class still wanted
    present, part = pixels > 0, np.full(count, -1)
    images_left = present.sum(0)  # (K,)
    while (part < 0).any():
        if images_left.any():
            rarest = np.where(images_left > 0, images_left, count + 1).argmin()
            image = np.where(part < 0, shares[:, rarest], -1).argmax()
            need = (wanted[:, rarest] - shares[image, rarest]) / ratio  # what would still be wanted after it
            shown = [present[part == side, rarest].any() for side in range(len(sizes))]
            if images_left[rarest] == 1 and not all(shown):  # the last chance of a class to be in all parts
                need = [-float(one) for one in shown]
        else:  # only images without any class are left
            image, need = (part < 0).argmax(), room / ratio
        side = np.where(room > 0, need, -np.inf).argmax()
        part[image] = side
        room[side] -= 1
        wanted[side] -= shares[image]
        images_left -= present[image]
    return [np.flatnonzero(part == side).tolist() for side in range(len(sizes))]


def stratified_split(pixels, val_fraction):
    """Return (train, val) lists of image indices by stratified_parts, round(N * val_fraction) in val.

    pixels: (N, K). Raises InputError with fewer than two images.
    """
    count = len(pixels)
    if count < 2:
        raise InputError("one image cannot be split into training and validation: add images")
    validation = min(max(1, round(count * val_fraction)), count - 1)
    return tuple(stratified_parts(pixels, [count - validation, validation]))


def stratified_fold(pixels, number, folds):
    """Return (train, val) lists of image indices: fold `number` (1-based) of `folds` of one size validates.

    pixels: (N, K). Raises InputError with fewer images than folds.
    """
    count = len(pixels)
    if count < folds:
        raise InputError(f"--fold {number}/{folds}: {count_of(count, 'image')} (a block of frames counts as "
                         "one) cannot be split into so many folds: lower their number, or add images")
    parts = stratified_parts(pixels, [count // folds + (part < count % folds) for part in range(folds)])
    val = parts.pop(number - 1)
    return sorted(sum(parts, [])), val


def split_samples(samples, pixels, val_fraction, fold=()):
    """Return ({"train": [...], "val": [...]} of `samples`, how they were split as text); stratified.

    fold: (i, n) for the i-th of n folds, else val_fraction of the images validates. Frames of a sequence,
    which look like their neighbors, are split in blocks of consecutive frames: a validation frame between two
    training frames would be no test. pixels: (N, K). Raises InputError with too few images.
    """
    blocks, sequences = blocks_of(samples, 1 / fold[1] if fold else val_fraction)
    counts = np.stack([pixels[block].sum(0) for block in blocks])
    sides = stratified_fold(counts, *fold) if fold else stratified_split(counts, val_fraction)
    parts = {split: sorted(index for number in numbers for index in blocks[number])
             for split, numbers in zip(("train", "val"), sides, strict=True)}
    text = f"fold {fold[0]} of {fold[1]}, stratified" if fold else "stratified"
    if sequences:
        text += (f" by blocks of consecutive frames ({count_of(sequences, 'sequence')} of frames that look "
                 "alike)")
    return {split: [samples[index] for index in indices] for split, indices in parts.items()}, text


def blocks_of(samples, val_fraction):
    """Return (lists of indices of `samples` that go into one part together, number of sequences).

    A sequence: SEQUENCE or more images with consecutive numbers as the last part of their names, of which
    neighbors look alike in most of a few places. It is cut into blocks of val_fraction of its length.
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
    starts = np.linspace(0, len(paths) - 2, PLACES).astype(int)
    pairs = in_parallel(lambda start: [scan_image(path).look for path in paths[start:start + 2]], starts,
                        "comparing neighbors")
    near = [np.bitwise_count(pair[0] ^ pair[1]).sum() <= ALIKE for pair in pairs
            if not isinstance(pair, InputError)]
    return bool(near) and 2 * sum(near) > len(near)


def share_table(pixels, parts, classes):
    """Return lines of a table: images with each class and its share of the pixels, in every part.

    pixels: {sample: (K,) counts}; parts: {name: [sample]}; classes: [(name, color)].
    """
    width = max(len(name) for name, _ in classes)
    counts = {part: np.stack([pixels[sample] for sample in samples]) for part, samples in parts.items()}
    lines = [" " * width + "".join(f"  {part + ' images':>12}  {part + ' pixels':>12}" for part in counts)]
    for id, (name, _) in enumerate(classes):
        cells = [f"  {(part[:, id] > 0).sum():12}  {100 * part[:, id].sum() / max(1, part.sum()):10.2f} %"
                 for part in counts.values()]
        lines.append(f"{name:{width}}" + "".join(cells))
    return lines
