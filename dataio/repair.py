"""A clean copy of a data set: the images as they are, masks as PNG files of class ids, classes.txt, lists.

    write_clean_copy(data, Path("clean"))      # of a dataio.scan.ScannedData: check_data.py --fix
"""
from config import IGNORE, InputError, count_of
from dataio.labels import decode_masks, line_entries
from dataio.readers import read_mask
from dataio.scan import all_in_parallel
from utils import copy_file, make_folder, write_lines
from visualize import save_classes, save_mask


def check_target(out, root):
    """Raise InputError where a clean copy of `root` must not be written to the folder `out`."""
    if out.resolve() == root.resolve() or root.resolve() in out.resolve().parents:
        raise InputError(f"--fix {out} lies in the data set itself: choose a folder outside of it")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"--fix {out} is not empty: choose a new folder")


def write_clean_copy(data, out):
    """Write a ScannedData to the folder `out`, decoded as its advice says where there is one.

    Training images that are copies of others are on no list. Raises InputError where there is a choice to
    make first.
    """
    samples, (classes, table) = data.samples, clean_meaning(data, out)
    make_folder(out)
    names = clean_names(samples, data.root)
    ignored = all_in_parallel(lambda sample: copy_pair(sample, names[sample], classes, table, out), samples,
                              "copying")
    save_classes(classes, out)
    splits = without_copies(data)
    for split, split_samples in splits.items():
        if split_samples:
            write_lines(out / f"{split}.txt", [names[sample] for sample in split_samples])
    counts = ", ".join(f"{len(split_samples)} {split}" for split, split_samples in splits.items())
    copies = sum(map(len, data.splits.values())) - sum(map(len, splits.values()))
    unlisted = f"; {count_of(copies, 'training image')} also in another split: on no list" if copies else ""
    print(f"clean copy: {out}, {count_of(len(samples), 'pair')}, {counts}{unlisted}; "
          f"{100 * sum(ignored) / max(1, len(ignored)):.1f} % of the pixels are ignored")


def clean_meaning(data, out):
    """Return (classes, value table) of a ScannedData, by its advice where there is one. Raises InputError
    where there is none, or two.
    """
    files = list(data.advice.files.values()) if data.advice else []
    if len(files) > 1:
        raise InputError(f"--fix {out}: nothing is written. Choose one of the classes.txt above and write it "
                         f"to {data.root} first")
    if files:
        entries = [entry for line in files[0].splitlines() for entry in line_entries("advice", line)]
        meaning = decode_masks(data.samples, data.mask_facts(), entries, data.advice.blurred)
        print("\n".join(meaning.notes))
        return meaning.classes, meaning.table
    if data.classes is None:
        raise InputError(f"--fix {out}: nothing is written. Solve the problems above first: nothing tells "
                         "what the masks mean")
    return data.classes, data.table


def without_copies(data):
    """Return the splits of a ScannedData without training images that other splits have too."""
    digests = {data.images[sample].digest
               for split, samples in data.splits.items() if split != "train" for sample in samples}
    train = [sample for sample in data.splits.get("train", []) if data.images[sample].digest not in digests]
    return {split: train if split == "train" else samples for split, samples in data.splits.items()}


def copy_pair(sample, name, classes, table, out):
    """Write a pair to the folder `out`; return the share of the mask's pixels that are ignored."""
    mask = read_mask(sample.mask, table)  # turned or not, as it was: it is read again with the same image
    save_mask(mask, classes, out / "masks" / f"{name}.png")
    copy_file(sample.image, out / "images" / f"{name}{sample.image.suffix}")
    return float((mask == IGNORE).mean())


def clean_names(samples, root):
    """Return {sample: a name without ending, different for all}: the image's, else with its folders."""
    names, used = {}, set()
    for sample in samples:
        path = sample.image.relative_to(root).with_suffix("").parts
        options = ["_".join(path[start:]) for start in range(len(path) - 1, -1, -1)]
        options += [f"{options[-1]}_{number}" for number in range(2, len(samples) + 2)]
        names[sample] = next(name for name in options if name.lower() not in used)
        used.add(names[sample].lower())
    return names
