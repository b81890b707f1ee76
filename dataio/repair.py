"""A clean copy of a data set: the images as they are, masks as PNG files of class ids, classes.txt, lists.

    fix(data, Path("clean"))      # of a dataio.scan.ScannedData
"""
import shutil
from pathlib import Path

from config import IGNORE, InputError, count_of
from dataio.labels import decode_masks, line_entries
from dataio.readers import read_mask
from dataio.scan import in_parallel
from utils import make_folder, write_atomically
from visualize import save_mask


def check_target(out, root):
    """Raise InputError where a clean copy of `root` must not be written to the folder `out`."""
    if out.resolve() == root.resolve() or root.resolve() in out.resolve().parents:
        raise InputError(f"--fix {out} lies in the data set itself: choose a folder outside of it")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"--fix {out} is not empty: choose a new folder")


def fix(data, out):
    """Write a ScannedData to the folder `out`, decoded as its advice says where there is one.

    Training images that are copies of others are on no list. Raises InputError where there is a choice to
    make first.
    """
    samples, classes, table = data.samples, data.classes, data.table
    files = data.advice.files if data.advice else {}
    if len(files) > 1 or classes is None and not files:
        raise InputError(f"--fix {out}: nothing is written. " + (
            f"Choose one of the classes.txt above and write it to {data.root} first" if files else
            "Solve the problems above first: nothing tells what the masks mean"))
    if files:
        (text,) = files.values()
        entries = [entry for line in text.splitlines() for entry in line_entries("advice", line)]
        classes, table, notes = decode_masks(data.root, samples, data.mask_facts(), listed=entries,
                                             blurred=data.advice.blurred)
        print("\n".join(notes))
    make_folder(out)
    names = clean_names(samples, data.root)
    ignored = in_parallel(lambda sample: copy_pair(sample, names[sample], classes, table, out), samples,
                          "copying")
    broken = next((error for error in ignored if isinstance(error, InputError)), None)
    if broken:
        raise broken
    save_classes(classes, out)
    parts = without_copies(data)
    for split, part in parts.items():
        if part:
            write_text(out / f"{split}.txt", [names[sample] for sample in part])
    left = sum(map(len, data.splits.values())) - sum(map(len, parts.values()))
    print(f"clean copy: {out}, {count_of(len(samples), 'pair')}, " + ", ".join(
        f"{len(part)} {split}" for split, part in parts.items())
        + (f"; {count_of(left, 'training image')} also in another part: on no list" if left else "")
        + f"; {100 * sum(ignored) / max(1, len(ignored)):.1f} % of the pixels are ignored")


def without_copies(data):
    """Return the splits of a ScannedData without training images that other parts have too."""
    digests = {data.images[sample].digest
               for split, part in data.splits.items() if split != "train" for sample in part}
    return {split: [sample for sample in part
                    if split != "train" or data.images[sample].digest not in digests]
            for split, part in data.splits.items()}


def copy_pair(sample, name, classes, table, out):
    """Write one pair to the folder `out`; return the share of the mask's pixels that are ignored."""
    mask = read_mask(sample.mask, table)  # turned or not, as it was: it is read again with the same image
    save_mask(mask, classes, out / "masks" / f"{name}.png")
    copy_file(sample.image, out / "images" / f"{name}{sample.image.suffix}")
    return float((mask == IGNORE).mean())


def clean_names(samples, root):
    """Return {sample: a name without ending, different for all}: the image's, else with its folders."""
    names, taken = {}, set()
    for sample in samples:
        parts = sample.image.relative_to(root).with_suffix("").parts
        options = ["_".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        name = next((name for name in options if name.lower() not in taken), None)
        number = 2
        while name is None or name.lower() in taken:
            name, number = f"{options[0]}_{number}", number + 1
        taken.add(name.lower())
        names[sample] = name
    return names


def save_classes(classes, folder):
    """Write the classes.txt of a folder with masks of class ids."""
    write_text(folder / "classes.txt", [f"{name.replace('=', '-')} {color[0]} {color[1]} {color[2]}"
                                        for name, color in classes])


def copy_file(path, target):
    """Copy a file, whole or not at all."""
    write_atomically(target, lambda temporary: shutil.copyfile(path, temporary))


def write_text(path, lines):
    """Write lines as a UTF-8 text file."""
    text = "\n".join(lines) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
