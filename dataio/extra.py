"""Another folder to train on beside a data set: pseudo-labels, or more of one's own.

    data = with_extra(data, "pseudo_labels")       # data.extra: Samples that data.table decodes
"""
import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from config import IGNORE, DataOptions, InputError, count_of
from dataio.folder import folder
from dataio.labels import class_file
from dataio.readers import OUTSIDE, Sample, drawn_folder, read_mask, unpack_color
from dataio.scan import fill_folder


def with_extra(source, root):
    """Return a DataSource that also trains on all images of the folder `root`, whose classes are its own.

    An image that is in the data set already, byte for byte, is left out: in validation it would be known, in
    training it has better labels. Masks are written anew, in the values of the data set. Raises InputError.
    """
    names = [name for name, _ in source.classes]
    if not Path(root).is_dir():
        raise InputError(f"--extra {root} does not exist: give a folder of images and masks")
    listed = class_file(Path(root))
    extra = folder(Path(root), DataOptions(dataset="folder", data_root=str(root), val_fraction=0.0,
                                           classes=() if listed else tuple(names)))
    unknown = [name for name, _ in extra.classes if name not in names]
    if unknown:
        raise InputError(f"--extra {root} has the class {unknown[0]}, which {source.name} has not: it has "
                         f"{', '.join(names)}; name the same classes in its classes.txt")
    samples = list(dict.fromkeys(sample for part in extra.splits.values() for sample in part))
    sizes = {sample.image.stat().st_size for sample in samples}  # few files need be read
    known = {digest(sample.image) for split, part in source.splits.items() if split != "unused"
             for sample in part if sample.image.stat().st_size in sizes}
    kept = [sample for sample in samples if digest(sample.image) not in known]
    if not kept:
        raise InputError(f"--extra {root}: {source.name} has all of its {count_of(len(samples), 'image')}")
    ids = [names.index(name) for name, _ in extra.classes]
    table, codes = with_codes(source.table, ids)
    notes = [f"--extra {root}: {count_of(len(kept), 'image')} more to train on"]
    if len(kept) < len(samples):
        notes.append(f"{len(samples) - len(kept)} of --extra are in {source.name} already: left out")
    return dataclasses.replace(source, table=table, extra=rewritten(kept, extra.table, codes, root),
                               notes=[*source.notes, *notes])


def digest(path):
    """Return a hash of a file. Raises InputError."""
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


def with_codes(table, ids):
    """Return (a value table, codes (256,) int64): a value or color that the table decodes to each of `ids`,
    at their positions, elsewhere one that it ignores, which is added where it has none.
    """
    ignored = np.flatnonzero(table == IGNORE)
    if not len(ignored):
        table = table.copy()
        ignored = np.flatnonzero(table == OUTSIDE)[-1:]
        table[ignored] = IGNORE
    codes = np.full(256, ignored[0], np.int64)
    codes[:len(ids)] = [np.flatnonzero(table == id)[0] for id in ids]
    return table, codes


def rewritten(samples, table, codes, root):
    """Return the Samples with masks of `codes` in the drawn folder, written where they are not there yet."""
    state = hashlib.sha256(codes.tobytes() + table.tobytes())
    for sample in samples:
        state.update(f"{sample.image.relative_to(root)} ".encode() + digest(sample.mask))
    target = drawn_folder() / state.hexdigest()[:16]
    pairs = [Sample(sample.image, target / f"{sample.image.relative_to(root)}.png") for sample in samples]

    def write(pair, part):
        (_, source), (image, _) = pair
        pixels = codes[read_mask(source, table)]
        if codes.max() > 65535:
            pixels = np.dstack(unpack_color(pixels)).astype(np.uint8)
        path = part / f"{image.relative_to(root)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels if pixels.ndim == 3 else pixels.astype(
            np.uint8 if codes.max() < 256 else np.uint16)).save(path)

    fill_folder(target, write, list(zip(samples, pairs, strict=True)), "masks of --extra")
    return pairs
