"""Finds images, masks and split lists in a folder that nobody described.

    found = find_pairs(Path("my_photos"))      # found.splits = {"train": [Sample, ...], ...}

The names of folders say what lies in them (images, masks), for which split (train, val, test) and to which
group of pairs it belongs (whatever else is in the name: `drive1/images` and `drive1/masks`). Where no name
says where the masks are, the files do: few values, in long runs.
"""
import dataclasses
import json
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import InputError, count_of
from dataio.pairs import (IMAGE_AFFIX, MASK_AFFIX, common_name, is_another_drawing, list_images, match,
                          read_list, unlike)
from dataio.readers import MASK_ENDINGS, decode_mask
from dataio.scan import distinct

SPLITS = {"train": "train training trn tr", "val": "val valid validation dev", "test": "test testing tst te"}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words.split()}
IMAGE_FOLDERS = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "jpegimages",
                 "rgb", "frames", "input", "inputs", "original", "originals", "leftimg8bit", "orig"}
MASK_FOLDERS = {"mask", "masks", "label", "labels", "annotation", "annotations", "annot", "ann", "anns", "gt",
                "ground", "groundtruth", "truth", "seg", "segmentation", "segmentations", "trimaps", "target",
                "targets", "gtfine", "labelids"}
OTHER_FOLDERS = {"object", "objects", "instance", "instances", "inst", "panoptic", "depth", "edges", "boxes",
                 "bbox", "overlay", "overlays", "vis", "viz", "visualization", "preview", "previews"}
ROLES = {"other": OTHER_FOLDERS, "masks": MASK_FOLDERS, "images": IMAGE_FOLDERS}  # the first of a name counts
NOISE = {"dir", "folder", "set", "data", "png", "jpg", "class", "raw", "files", "of", "the", "and", "jpeg"}
KNOWN_WORDS = set().union(*ROLES.values(), SPLIT_OF, NOISE)
LISTS = (".", "splits", "lists", "ImageSets", "ImageSets/Segmentation")  # where train.txt, ... may lie
LOOKED_AT = 4  # files of a folder that are opened to see what they are
# A mask: changes of value per pixel along its rows, and how many of its values hold most of its pixels.
FEW_CHANGES, FEW_VALUES, MOST = 0.2, 32, 0.9
LISTED = 8  # folders that an error names


@dataclasses.dataclass
class Found:
    """What find_pairs found. splits, no_mask, no_image: {split: [...]}, the last two of paths alone.

    notes: lines on what was taken for what; doubts: what may have been taken wrongly; entries: the classes
    as [labels.Entry], where the files that the masks were drawn from name them.
    """

    splits: dict
    no_mask: dict
    no_image: dict
    notes: list
    doubts: list
    entries: list = None


class NoMasks(InputError):
    """A folder holds no images with masks, by names or by looks."""


class Place(NamedTuple):
    """What the names of the folders above a file say. role: images, masks, other or "" (nothing), of the
    innermost name that has one; below_masks: whether any of them means masks.
    """

    role: str
    split: str
    group: tuple
    below_masks: bool = False


def words_of(name):
    """Return the lower-case words of a folder's name: 'SegmentationClass_raw' -> segmentation class raw."""
    if name.lower() in IMAGE_FOLDERS | MASK_FOLDERS:
        return [name.lower()]
    parts = re.sub(r"([a-z0-9])([A-Z])|([A-Z]+)(?=[A-Z][a-z])", r"\1\3 \2", name)
    return re.findall(r"[a-z]+|\d+", parts.lower())


def place_of(parts):
    """Return the Place of the files of a folder from the names of it and those above, outermost first."""
    role, split, group, below_masks = "", "", [], False
    for name in reversed(parts):
        words = words_of(name)
        roles = [known for known, names in ROLES.items() if names & set(words)]
        role = role or next(iter(roles), "")
        below_masks |= roles[:1] == ["masks"]
        split = split or next((SPLIT_OF[word] for word in words if word in SPLIT_OF), "")
        group += [word for word in reversed(words) if word not in KNOWN_WORDS]
    return Place(role, split, tuple(reversed(group)), below_masks)


def find_pairs(root):
    """Return what was Found of images and masks under `root`. Raises NoMasks that says what lies there."""
    paths = list_images(root, MASK_ENDINGS)
    base = common_folder(root, paths)
    folders = {folder: place_of(folder.relative_to(base).parts) for folder in {path.parent for path in paths}}
    places = {path: folders[path.parent] for path in paths}
    unpaired = ""
    for assign in (by_folder_names, by_bare_folders, by_outer_names, by_file_names, by_content):
        images, masks = assign(places)
        try:
            found = pair_up(images, masks) if images and masks else None
        except InputError as error:
            if assign is not by_content:
                raise
            unpaired, found = str(error), None
        if found and any(found.splits.values()):
            break
        unpaired = unpaired or found and unlike(images, masks)
    else:
        raise NoMasks(f"no images with masks found under {root}: {seen(root, set(paths))}; "
                      f"{unpaired or ADVICE}")
    samples = [sample for part in found.splits.values() for sample in part]
    images, masks = [sample.image for sample in samples], [sample.mask for sample in samples]
    found.notes.insert(0, f"images: {shown_folders(images, root)}; masks: {shown_folders(masks, root)}")
    lonely = [path for part in (found.no_mask, found.no_image) for files in part.values() for path in files]
    unused = sorted(set(paths) - {*images, *masks, *lonely})
    if unused:
        found.notes.append(f"not used: {shown_folders(unused, root)}")
        found.doubts += other_masks(unused, masks, root)
    use_lists(found, root, base)
    found.splits.setdefault("train", [])
    return found


def common_folder(root, paths):
    """Return the folder below which all image files lie, so that folders around everything say nothing."""
    base = Path(root)
    while paths and all(path.parent != base for path in paths):
        below = {path.relative_to(base).parts[0] for path in paths}
        if len(below) > 1:
            break
        base = base / below.pop()
    return base


# --- which files are images, which are masks --------------------------------------------------------------
# f({path: Place}) -> ({image path: Place}, {mask path: Place}), empty where it cannot tell.
def with_role(places, role):
    """Return the part of {path: Place} that has a role."""
    return {path: place for path, place in places.items() if place.role == role}


def by_folder_names(places):
    """Images and masks lie in folders called so."""
    return with_role(places, "images"), with_role(places, "masks")


def by_bare_folders(places):
    """Masks lie in folders called so, images in folders whose name says nothing: train and train_masks."""
    return with_role(places, ""), with_role(places, "masks")


def by_outer_names(places):
    """Masks lie anywhere below a folder called so: masks/images beside images/images."""
    masks = {path: place for path, place in places.items() if place.below_masks}
    return {path: place for path, place in places.items() if path not in masks}, masks


def by_file_names(places):
    """Images and masks lie in one folder: a.jpg or a_sat.jpg beside a_mask.png."""
    names = {(path.parent, name) for path in places for name in (path.stem, common_name(path, IMAGE_AFFIX))}
    masks = {path: place for path, place in places.items() if common_name(path, MASK_AFFIX) != path.stem
             and (path.parent, common_name(path, MASK_AFFIX)) in names}
    return {path: place for path, place in places.items() if path not in masks}, masks


def by_content(places):
    """Masks are the files of one ending in one folder that look like masks; a few of each are opened."""
    kinds = {}
    for path, place in places.items():
        if place.role != "other":
            kinds.setdefault((path.parent, path.suffix), []).append(path)
    flat = {kind: all(map(looks_like_mask, some(files))) for kind, files in kinds.items()}
    return [{path: places[path] for kind, files in kinds.items() if flat[kind] == side for path in files}
            for side in (False, True)]


def some(files):
    """Return a few files, evenly spread."""
    return [files[index] for index in np.linspace(0, len(files) - 1, min(LOOKED_AT, len(files))).astype(int)]


def looks_like_mask(path):
    """Return whether a file holds few values or colors, in long runs, as a mask does and a photo does not.

    A JPEG mask holds many, but few of them often.
    """
    try:
        mask = decode_mask(path)
    except InputError:
        return False
    codes = mask.codes
    _, counts = distinct(codes)
    changes = np.count_nonzero(codes[:, 1:] != codes[:, :-1]) / codes.size
    return changes <= FEW_CHANGES and np.sort(counts)[-FEW_VALUES:].sum() >= MOST * codes.size


# --- pairs and splits -------------------------------------------------------------------------------------
def pair_up(images, masks):
    """Return what was Found of {path: Place} of images and masks: paired in each split and group.

    Where only one side names splits, its files choose among all of the other.
    """
    found = Found({}, {}, {}, [], [])
    image_splits = {place.split for place in images.values()} - {""}
    mask_splits = {place.split for place in masks.values()} - {""}
    undivided = any(not place.split for place in images.values()) and "train" not in image_splits
    for split in [*[""] * undivided, *sorted(image_splits)]:
        name = split or "train"
        sides = [{path: place.group for path, place in places.items() if not by_split or place.split == split}
                 for places, by_split in ((images, image_splits), (masks, image_splits and mask_splits))]
        found.splits[name], found.no_mask[name], found.no_image[name] = match(*sides)
        if not found.splits[name]:  # what the names of the folders have besides may differ: roads/, roads_gt/
            with suppress(InputError):
                again = match(*[dict.fromkeys(side, ()) for side in sides])
                found.splits[name], found.no_mask[name], found.no_image[name] = again
        if not found.splits[name] and not sides[1]:  # as the test images of a contest
            found.notes.append(f"not used: {count_of(len(sides[0]), 'image')} of {name}, without any mask")
            for part in (found.splits, found.no_mask, found.no_image):
                part.pop(name)
        else:
            names = {common_name(sample.image, affix) for sample in found.splits[name]
                     for affix in (None, IMAGE_AFFIX)}
            found.no_image[name] = [path for path in found.no_image[name]
                                    if not is_another_drawing(path, names)]
    if image_splits and not mask_splits:
        used = {sample.mask for part in found.splits.values() for sample in part}
        found.no_image = {"train": sorted(set(masks) - used)}
    return found


def use_lists(found, root, base):
    """Split the samples as train.txt, val.txt and test.txt say, where the folder has them.

    Entries are names or paths of images, with or without ending, alone or followed by the mask's. Raises
    InputError for an entry that is no image with a mask.
    """
    paths = [path for folder in dict.fromkeys(top / name for top in (root, base) for name in LISTS)
             for path in sorted(folder.glob("*.txt")) if set(words_of(path.stem)) & SPLIT_OF.keys()]
    lists = {}

    def is_exact(path):
        return path.stem.lower() in SPLIT_OF

    for path in sorted(paths, key=is_exact, reverse=True):  # train.txt before train_fold1.txt
        split, *more = {SPLIT_OF[word] for word in words_of(path.stem) if word in SPLIT_OF}
        if more:
            continue  # train_val.txt
        twin = lists.setdefault(split, path)
        if twin != path and is_exact(twin) == is_exact(path):
            raise InputError(f"{twin} and {path} both list {split} images: move one away")
    samples = {}
    for sample in found.splits.get("train", []):
        samples.setdefault(sample.image.stem, []).append(sample)
    entries = {split: [(entry, listed_samples(entry, samples)) for entry in read_list(path)]
               for split, path in lists.items()}
    entries = {split: listed for split, listed in entries.items() if any(fits for _, fits in listed)}
    if "train" not in entries or set(found.splits) != {"train"}:
        if paths:
            why = "the folders name the parts" if len(found.splits) > 1 else "none lists images to train on"
            shown = ", ".join(str(path.relative_to(root)) for path in paths)
            found.notes.append(f"not used: {shown} ({why})")
        return
    shown = ", ".join(str(lists[split].relative_to(root)) for split in entries)
    for split, listed in entries.items():
        for entry, fits in listed:
            if len(fits) != 1:
                why = "there is no image of that name with a mask" if not fits else \
                    f"{fits[0].image} and {fits[1].image} have that name"
                raise InputError(f"{lists[split]} lists {entry}, and {why}: correct the list, or rename it "
                                 "if it is not the list of this part")
    parts = {split: [fits[0] for _, fits in listed] for split, listed in entries.items()}
    left = set(found.splits["train"]) - {sample for part in parts.values() for sample in part}
    found.splits, found.no_mask, found.no_image = parts, {}, {}  # what is on no list need not pair
    found.notes.append(f"split as {shown} say" + (f"; {count_of(len(left), 'pair')} on none of them: not used"
                                                  if left else ""))


def listed_samples(entry, samples):
    """Return the Samples of {stem: [Sample]} that an entry of a list file may mean: of its name, and of those
    the ones that lie in most of the folders that it names, in their order.
    """
    for text in (entry, re.split(r"[\s,;]+", entry)[0]):
        name = Path(text)
        fits = samples.get(name.name) or samples.get(name.stem) or []
        if fits:
            shared = [common_parts(name.parts[:-1], sample.image.parts[:-1]) for sample in fits]
            return [sample for sample, number in zip(fits, shared, strict=True) if number == max(shared)]
    return []


def common_parts(wanted, parts):
    """Return how many of the names in `wanted` are found in `parts`, in their order, from the last one on."""
    number, parts = 0, list(parts)
    for name in reversed(wanted):
        if name in parts:
            number, parts = number + 1, parts[:len(parts) - parts[::-1].index(name) - 1]
    return number


def other_masks(unused, masks, root):
    """Return warnings of folders that are not used, look like masks too, and hold as many files."""
    folders, warnings, fewest = {}, [], min(Counter(path.parent for path in masks).values())
    for path in unused:
        folders.setdefault(path.parent, []).append(path)
    for folder, files in folders.items():
        if len(files) >= fewest and all(map(looks_like_mask, some(files))):
            warnings.append(f"{folder.relative_to(root).as_posix()} is not used and looks like masks too: if "
                            "it is what you want to learn, move the other folder of masks away")
    return warnings


# --- what lies there --------------------------------------------------------------------------------------
ADVICE = ("it needs images/ and masks/, or train/images train/masks val/images val/masks, or images/train "
          "masks/train images/val masks/val, or train_images train_labels valid_images valid_labels")


FORMATS = {".npz": "NumPy arrays", ".mat": "MATLAB files", ".svg": "drawings",
           ".tfrecord": "TFRecords"}
JSON_FORMATS = {  # keys that a file of each has, the first that fits counts
    "COCO annotations": {"images", "annotations"},
    "labelme polygons": {"shapes", "imagePath"},
    "Supervisely annotations": {"objects", "size"},
    "VIA annotations": {"_via_img_metadata"},
    "Cityscapes polygons": {"objects", "imgHeight"},
    "Label Studio annotations": {"data", "annotations"},
}


def shown_folders(paths, root):
    """Return the folders of files with the number of files as text: 'train/img (96), val/img (24)'."""
    counts = Counter(path.parent.relative_to(root).as_posix() for path in paths)
    return shortened([f"{name} ({count})" for name, count in sorted(counts.items())])


def shortened(texts):
    """Return texts joined by commas, of many the first few."""
    more = f" and {len(texts) - LISTED} more" if len(texts) > LISTED else ""
    return ", ".join(texts[:LISTED]) + more


def seen(root, images):
    """Return what lies below `root` as text: the folders, how many files they hold and what these look like.
    """
    folders = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            folders.setdefault(path.parent, []).append(path)
    texts = []
    for folder, files in folders.items():
        pictures = [path for path in files if path in images]
        others = [path for path in files if path not in images]
        kinds = [f"{count_of(len(pictures), 'picture')} ({looks_of(pictures)})"] if pictures else []
        kinds += [f"{count_of(len(others), 'file')} ({label_format(others)})"] if others else []
        texts.append(f"{folder.relative_to(root).as_posix()}/ holds {' and '.join(kinds)}")
    return shortened(texts) or "it is empty"


def looks_of(pictures):
    """Return whether picture files look like photos or like masks."""
    flat = list(map(looks_like_mask, some(pictures)))
    return "masks, by their looks" if 2 * sum(flat) > len(flat) else "photos, by their looks"


def label_format(files):
    """Return what kind of files without pixels these are, such as the annotations of a tool."""
    endings = Counter(path.suffix.lower() for path in files)
    ending = endings.most_common(1)[0][0]
    if ending in (".zip", ".tar", ".gz"):
        return "an archive: unpack it"
    path = next(path for path in files if path.suffix.lower() == ending)
    recognize = {".json": json_format, ".txt": text_format, ".xml": xml_format}.get(ending)
    try:
        named = recognize(path) if recognize else FORMATS.get(ending)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        named = None
    return f"{named}, not read: export masks as PNG" if named else f"{ending or 'without ending'}, no images"


def json_format(path):
    """Return which tool's annotations a JSON file holds, or None."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    keys = set(content) if isinstance(content, dict) else set(content[0])
    return next((name for name, wanted in JSON_FORMATS.items() if wanted <= keys),
                "JSON annotations" if keys else None)


def text_format(path):
    """Return whether a text file holds YOLO polygons or boxes, or None."""
    rows = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if rows and all(row[0].isdecimal() and all(0 <= float(cell) <= 1 for cell in row[1:]) for row in rows):
        if all(len(row) >= 7 and len(row) % 2 for row in rows):
            return "YOLO polygons without their data.yaml"
        if all(len(row) == 5 for row in rows):
            return "YOLO boxes, which hold no shapes"
    return None


def xml_format(path):
    """Return whether an XML file holds VOC boxes or annotations of CVAT, or None."""
    start = path.read_text(encoding="utf-8-sig")[:2000]
    return "VOC boxes, which hold no shapes" if "<annotation>" in start else \
        "CVAT annotations" if "<annotations>" in start else None
