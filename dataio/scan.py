"""What is in one image or mask file, read once: values, colors, sizes, fingerprints to find duplicates by.

    facts = scan_mask("mask.png")        # facts.values, facts.colors, facts.counts
    facts = scan_image("photo.jpg")      # facts.digest, facts.look
"""
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from config import InputError
from dataio.image_rule import PERCENTILES, data_of, file_alpha, look_at, scale
from dataio.images import Stored, naming_damage, open_picture, stored_of, to_rgb, upright_size
from dataio.readers import decode_mask
from utils import all_in_parallel

LOOK = 16  # side of the difference hash: 16 x 16 bits
MOST_VALUES = 4096  # distinct values in a mask; more is a photo or was blurred
MOST_BLURRED = 65536  # the same of a JPEG mask, which may be read nevertheless


class MaskFacts(NamedTuple):
    """What a mask file holds. size: (H, W); mode, kind: as PIL names the pixels and the file.

    values: (n,) int64, the distinct stored values, None where it is painted in colors; colors: (n,) int64,
    the same as 24-bit codes, gray for 8-bit masks without colors, None for deeper ones; counts: (n,) int64,
    pixels of each.
    """

    size: tuple
    mode: str
    kind: str
    values: np.ndarray
    colors: np.ndarray
    counts: np.ndarray


class ImageFacts(NamedTuple):
    """What an image file holds. stored: its images.Stored; mode: as PIL names its pixels, or their type and
    the number of bands.

    digest: of its bytes; look: (4,) uint64, its difference hash, close for images that look alike. quantiles:
    (C, 3), where it is no picture: PERCENTILES and median of each band, NaN where it has no data; empty: the
    share of its pixels without data.
    """

    stored: Stored
    mode: str
    digest: bytes
    look: np.ndarray
    quantiles: np.ndarray | None = None
    empty: float = 0.0

    @property
    def size(self):
        """(H, W) as stored."""
        return self.stored.size

    @property
    def orientation(self):
        """That of EXIF, 1 = upright."""
        return self.stored.orientation


def fits(mask_size, image_size, orientation):
    """Return whether a mask (H, W) fits an image stored as (H, W), as stored or turned upright."""
    return mask_size in (image_size, upright_size(image_size, orientation))


def distinct(codes):
    """Return (distinct values, counts) of an integer array; fast where neighbors are mostly equal."""
    flat = codes.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(starts, append=flat.size)
    values, inverse = np.unique(flat[starts], return_inverse=True)
    return values.astype(np.int64), np.bincount(inverse, lengths).astype(np.int64)


def scan_mask(path):
    """Return the MaskFacts of a file. Raises InputError where it is damaged or not a class mask at all."""
    mask = decode_mask(path)
    values = mask.values
    if values is None:
        colors, counts = distinct(mask.colors)
    else:
        values, counts = distinct(values.astype(np.int32))
        colors = mask.color_of(values) if mask.pixels.ndim == 2 else values * 0x010101
    if len(counts) > (MOST_BLURRED if mask.kind == "JPEG" else MOST_VALUES):
        raise InputError(f"{path} holds {len(counts)} different values: it is not a class mask, or a lossy "
                         "format blurred it; export it again as PNG")
    return MaskFacts(mask.pixels.shape[:2], mask.mode, mask.kind, values, colors, counts)


def scan_image(path):
    """Return the ImageFacts of a file; JPEGs are decoded at a fraction of their size. Raises InputError."""
    stored = stored_of(path)
    if stored.is_picture:
        with open_picture(path) as image, naming_damage(path):
            mode = image.mode
            image.draft("L", (4 * LOOK, 4 * LOOK))
            gray = to_rgb(image).convert("L")
        quantiles, empty = None, 0.0
    else:
        values, valid = look_at(path, stored, range(1, stored.bands + 1), file_alpha(path, stored))
        mode, (quantiles, empty) = str(stored), band_facts(values, valid, stored.nodata)
        low, _, high = np.nan_to_num(quantiles[0])
        gray = Image.fromarray(scale(np.nan_to_num(values[0]), low, max(high, low + 1e-6)))
    small = np.asarray(gray.resize((LOOK + 1, LOOK), Image.Resampling.BOX), np.int16)
    digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest()
    look = np.packbits(small[:, 1:] > small[:, :-1]).view(np.uint64)
    return ImageFacts(stored, mode, digest, look, quantiles, empty)


def band_facts(values, valid, nodata):
    """Return (quantiles (C, 3), share of pixels without data) of bands (C, h, w), as in ImageFacts."""
    bands = [data_of(band if valid is None else band[valid], nodata) for band in values]
    shares = PERCENTILES[0], 50, PERCENTILES[1]
    quantiles = [np.percentile(band, shares) if band.size else np.full(3, np.nan) for band in bands]
    return np.array(quantiles), 1 - max(band.size for band in bands) / values[0].size


def fill_folder(target, write, items, title):
    """Make the folder `target` by write(item, folder) of every item, with threads, unless it is there. It
    appears when all is written. Raises InputError.
    """
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        if len(items) == 1:  # here, where Ctrl-C ends it
            write(items[0], temporary)
        else:
            all_in_parallel(lambda item: write(item, temporary), items, title)
        if not target.is_dir():  # else another process was faster
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
