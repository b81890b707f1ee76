"""Pixel counts of every class in every mask, kept on disk, and the stratified split made from them.

    pixels = count_pixels(samples, table, num_classes, "outputs/cache")          # (N, K)
    train, val = stratified_split(pixels, val_fraction=0.2)                      # indices
"""
import hashlib
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import IGNORE, InputError, count_of
from dataio.readers import read_mask
from dataio.scan import in_parallel, scan_image
from utils import write_atomically

SEQUENCE, PLACES = 8, 8  # images that make a sequence, and where two neighbors are compared
ALIKE = 40  # bits of 256 in which the looks of neighboring frames may differ; of other images 75 to 140 do


def count_pixels(samples, table, num_classes, cache_dir):
    """Return (N, K) int64: pixels of every class in the mask of every sample; read once, then from cache_dir.

    The file kept is named by a hash over the masks' names, sizes and times and the table, so that a changed
    data set is counted anew. Raises InputError for a mask that does not fit the table.
    """
    digest = hashlib.sha256(np.ascontiguousarray(table))
    for sample in samples:
        facts = sample.mask.stat()
        digest.update(repr((str(sample.mask.resolve()), facts.st_size, facts.st_mtime_ns)).encode())
    kept = Path(cache_dir) / f"pixels-{digest.hexdigest()[:16]}.npy"
    try:
        pixels = np.load(kept, allow_pickle=False)
        if isinstance(pixels, np.ndarray) and pixels.shape == (len(samples), num_classes):
            return pixels
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile):
        pass  # not there, or damaged: count

    def count(sample):
        return np.bincount(read_mask(sample.mask, table).ravel(), minlength=IGNORE + 1)[:num_classes]

    with ThreadPoolExecutor() as pool:
        bar = tqdm(pool.map(count, samples), "counting pixels", len(samples), leave=False, disable=None)
        rows = list(bar)
    write_atomically(kept, lambda temporary: np.save(temporary, np.stack(rows)))
    return np.stack(rows)


def stratified_split(pixels, val_fraction):
    """Split images so that every class has its share of pixels in both parts; deterministic.

    Iterative stratification (Sechidis et al., ECML 2011) on class presence weighted by pixel counts.
    pixels: (N, K). Returns (train indices, val indices), both sorted, with round(N * val_fraction) in val.
    Raises InputError with fewer than two images.
    """
    count = len(pixels)
    if count < 2:
        raise InputError("one image cannot be split into training and validation: add images")
    validation = min(max(1, round(count * val_fraction)), count - 1)
    room = np.array([count - validation, validation])  # images still to go into train, val
    ratio = room / count
    shares = pixels / np.maximum(pixels.sum(0), 1)  # (N, K), every class sums to 1
    wanted = np.outer(ratio, np.ones(pixels.shape[1]))  # (2, K) share of every class still wanted
    present, part = pixels > 0, np.full(count, -1)
    images_left = present.sum(0)  # (K,)
    while (part < 0).any():
        if images_left.any():
            rarest = np.where(images_left > 0, images_left, count + 1).argmin()
            image = np.where(part < 0, shares[:, rarest], -1).argmax()
            need = (wanted[:, rarest] - shares[image, rarest]) / ratio  # what would still be wanted after it
            shown = [present[part == side, rarest].any() for side in (0, 1)]
            if images_left[rarest] == 1 and not all(shown):  # the last chance of a class to be in both parts
                need = [-float(one) for one in shown]
        else:  # only images without any class are left
            image, need = (part < 0).argmax(), room / ratio
        side = np.where(room > 0, need, -np.inf).argmax()
        part[image] = side
        room[side] -= 1
        wanted[side] -= shares[image]
        images_left -= present[image]
    return np.flatnonzero(part == 0).tolist(), np.flatnonzero(part == 1).tolist()


def split_samples(samples, pixels, val_fraction):
    """Return ({"train": [...], "val": [...]} of `samples` by stratified_split, how they were split as text).

    Frames of a sequence, which look like their neighbors, are split in blocks of consecutive frames: a
    validation frame between two training frames would be no test. pixels: (N, K). Raises InputError as
    stratified_split does.
    """
    blocks, sequences = blocks_of(samples, val_fraction)
    counts = np.stack([pixels[block].sum(0) for block in blocks])
    parts = {split: sorted(index for number in numbers for index in blocks[number])
             for split, numbers in zip(("train", "val"), stratified_split(counts, val_fraction), strict=True)}
    text = "stratified" if not sequences else (
        f"stratified by blocks of consecutive frames ({count_of(sequences, 'sequence')} of frames that look "
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
