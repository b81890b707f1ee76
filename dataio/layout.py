"""Which files of a folder are images and masks, which belong together, and which split they are in.

    content = find_pairs(Path("my_photos"))        # content.splits = {"train": [Sample, ...], ...}
    samples = pair_files("images", "masks")        # a.jpg with a.png, a.jpg.png, a_mask.png, mask_a.png, ...

The names of folders tell what lies in them (images, masks), for which split (train, val, test) and in which
group (whatever else is in the name: `drive1/images` and `drive1/masks`). Where no name tells where the masks
are, the files do: masks hold few values, in long runs. Lists such as train.txt may split what was paired.
"""
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import InputError, count_of
from dataio.images import IMAGE_ENDINGS
from dataio.readers import MASK_ENDINGS, Sample, decode_mask
from dataio.scan import distinct
from utils import evenly_sampled, grouped

# Words in the names of folders.
SPLITS = {"train": "train training trn tr", "val": "val valid validation dev", "test": "test testing tst te"}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words.split()}
IMAGE_FOLDERS = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "jpegimages",
                 "rgb", "frames", "input", "inputs", "original", "originals", "leftimg8bit", "orig"}
MASK_FOLDERS = {"mask", "masks", "label", "labels", "annotation", "annotations", "annot", "ann", "anns", "gt",
                "ground", "groundtruth", "truth", "seg", "segmentation", "segmentations", "trimaps", "target",
                "targets", "gtfine", "labelids", "semantic"}
OTHER_FOLDERS = {"object", "objects", "instance", "instances", "inst", "panoptic", "depth", "edges", "boxes",
                 "bbox", "overlay", "overlays", "vis", "viz", "visualization", "preview", "previews"}
VARIANTS = {"color", "colors", "colored", "colour", "colours", "coloured", "colormap", "colormaps", "rgb",
            "visual", "npy"}  # of masks
CONTENTS = {"other": OTHER_FOLDERS, "masks": MASK_FOLDERS, "images": IMAGE_FOLDERS}  # the first one counts
NOISE = {"dir", "folder", "set", "data", "png", "jpg", "class", "raw", "files", "of", "the", "and", "jpeg"}
KNOWN_WORDS = NOISE.union(SPLIT_OF, *CONTENTS.values())

# Words in the names of files: beside its image's name in a mask's, beside what both share in an image's.
MASK_WORDS = ("masks?|labels?|gt|ground_?truth|seg|segmentation|annotations?|annot|ann|trimap|"
              "gtfine_labelids|gtfine_labeltrainids")
IMAGE_WORDS = "images?|imgs?|photos?|pictures?|frames?|rgb|sat|orig|original|leftimg8bit"
COPY_WORDS = VARIANTS | OTHER_FOLDERS | MASK_FOLDERS | {"save"}  # of what shows a pair once more
SEPARATORS = r"[ _.\-()]+"

OBJECTS = "___save"  # ends the names of SuperAnnotate's pictures, in which a color is an object: see its JSON

LIST_FOLDERS = (".", "splits", "lists", "ImageSets", "ImageSets/Segmentation")  # where train.txt, ... may lie
HIDDEN = ".", "__MACOSX"  # begin the names of files and folders that are not read
BAD_ENTRY = ("name on the list of a split and of no image with a mask, or of several (rename the list if it "
             "is another)")
SAMPLED = 4  # files of a folder that are opened to see what they are
# A mask: changes of value per pixel along its rows, and how many of its values hold most of its pixels.
FEW_CHANGES, FEW_VALUES, MOST = 0.2, 32, 0.9
NAMES_IN_MESSAGE, FOLDERS_IN_MESSAGE = 2, 8


@dataclass
class FolderContent:
    """Images and masks of a folder, {split: [Sample]}, and the paths of those without a partner.

    notes, doubts: lines on how the files were understood and what of that may be wrong; entries: the classes
    as [labels.Entry], where the files that the masks were drawn from name them; bad_labels: {what is wrong:
    [files and entries]} of labels that were left out; copies: paths of what shows the same pairs once more,
    such as masks in color.
    """

    splits: dict = field(default_factory=dict)
    images_without_mask: list = field(default_factory=list)
    masks_without_image: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    doubts: list = field(default_factory=list)
    entries: list = None
    bad_labels: dict = field(default_factory=dict)
    copies: list = field(default_factory=list)

    @property
    def samples(self):
        """The Samples of all splits, each once."""
        return list(dict.fromkeys(chain.from_iterable(self.splits.values())))


class NoMasks(InputError):
    """A folder holds no images with masks, by names or by looks."""


# --- files ------------------------------------------------------------------------------------------------
def list_images(folder, endings=IMAGE_ENDINGS):
    """Return the files below `folder` that have one of the endings, sorted, without what is hidden."""
    return [path for path in list_files(folder) if path.suffix.lower() in endings]


def list_files(folder):
    """Return the files below `folder` and below the folders that links in it lead to, sorted, without what is
    hidden and the copies that macOS adds to archives.
    """
    paths = []
    for top, folders, names in os.walk(folder, followlinks=True):
        top = Path(top)
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)
                      and not (os.path.islink(top / name) and leads_back(top / name, folder))]
        paths += [top / name for name in names if not name.startswith(HIDDEN)]
    return sorted(filter(Path.is_file, paths))


def leads_back(link, folder):
    """Return whether a link to a folder leads to one that is listed anyway, or to one above the link."""
    target, root = Path(os.path.realpath(link)), Path(os.path.realpath(folder))
    is_listed = target.is_relative_to(root) and not any(
        name.startswith(HIDDEN) for name in target.relative_to(root).parts)
    return is_listed or root.is_relative_to(target) or str(target) in map(os.path.realpath, link.parents)


def read_list(path):
    """Return the entries of a list file in order, without blank lines and repeats. Raises InputError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: the data set is incomplete") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    entries = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not entries:
        raise InputError(f"{path} lists no images")
    return entries


def existing(samples):
    """Return `samples`. Raises InputError naming the first missing file and how many are missing."""
    missing = [path for sample in samples for path in sample.files() if not path.is_file()]
    if missing:
        more = f" (and {count_of(len(missing) - 1, 'more file')})" if len(missing) > 1 else ""
        raise InputError(f"{missing[0]} is listed but does not exist{more}: complete the data set")
    return samples


# --- images and masks of a folder -------------------------------------------------------------------------
def find_pairs(root):
    """Return the FolderContent of `root`. Raises NoMasks, which describes the folder, and InputError."""
    paths = [path for path in list_images(root, MASK_ENDINGS) if not path.stem.endswith(OBJECTS)]
    base = Path(os.path.commonpath([path.parent for path in paths])) if paths else root
    roles = {path: role_of(path.parent.relative_to(base).parts) for path in paths}
    reason = ""
    for images, masks, is_sure in told_apart(roles):
        if not images or not masks:
            continue
        try:
            content = pair_splits(images, masks)
        except InputError as error:
            if is_sure and not isinstance(error, NoMasks):
                raise
            reason = str(error)
            continue
        if content.samples:
            report_folders(content, paths, root)
            use_lists(content, root, base)
            content.splits.setdefault("train", [])
            return content
        reason = reason or names_differ(images, masks)
    raise NoMasks(f"no images with masks were found under {root}: {describe_folder(root)}; "
                  f"{reason or KNOWN_LAYOUTS}")


class FolderRole(NamedTuple):
    """What the names of the folders above a file tell. content: images, masks, other or "" (nothing) by the
    innermost name that tells; below_masks: whether any of them means masks; is_variant: whether the names up
    to that one hold a word of VARIANTS.
    """

    content: str
    split: str
    group: tuple
    below_masks: bool = False
    is_variant: bool = False


@cache
def role_of(names):
    """Return the FolderRole of the names (a tuple) of a folder and those above it, outermost first."""
    content, split, group, below_masks, is_variant = "", "", [], False, False
    for name in reversed(names):
        words = words_of(name)
        meaning = next((meaning for meaning, known in CONTENTS.items() if known & set(words)), "")
        is_variant |= not content and bool(VARIANTS & set(words))
        content = content or meaning
        below_masks |= meaning == "masks"
        split = split or next((SPLIT_OF[word] for word in words if word in SPLIT_OF), "")
        group += [word for word in reversed(words) if word not in KNOWN_WORDS]
    return FolderRole(content, split, tuple(reversed(group)), below_masks, is_variant)


def words_of(name):
    """Return the lower-case words of a folder's name: 'SegmentationClass_raw' -> segmentation class raw."""
    if name.lower() in IMAGE_FOLDERS | MASK_FOLDERS:
        return [name.lower()]
    spaced = re.sub(r"([a-z0-9])([A-Z])|([A-Z]+)(?=[A-Z][a-z])", r"\1\3 \2", composed(name))
    return re.findall(r"[a-z]+|\d+", spaced.lower())


def composed(name):
    """Return a name with each accented letter as one character (NFC), as most systems write it; macOS writes
    letter and accent (NFD).
    """
    return unicodedata.normalize("NFC", name)


def told_apart(roles):
    """Yield the ways to tell images and masks apart, the surest first: ({path: FolderRole} of the images, the
    same of the masks, whether names tell them apart, and not the files' content).
    """
    def with_content(content):
        return {path: role for path, role in roles.items() if role.content == content}

    def divided(roles, masks):
        return ({path: role for path, role in roles.items() if path not in masks},
                {path: role for path, role in roles.items() if path in masks})

    yield with_content("images"), with_content("masks"), True
    yield with_content(""), with_content("masks"), True  # train and train_masks
    others = {path: role for path, role in roles.items() if role.content != "other"}
    masks = {path for path, role in others.items() if role.below_masks}
    yield *divided(others, masks), True  # masks/images beside images/images
    # in the same folder: a.jpg or a_sat.jpg beside a_mask.png
    names = {path: common_name(path, MASK_AFFIX) for path in roles}
    image_names = {(path.parent, common_name(path)) for path in roles}
    image_names |= {(path.parent, common_name(path, IMAGE_AFFIX)) for path in roles}
    masks = {path for path, name in names.items()
             if name != common_name(path) and (path.parent, name) in image_names}
    yield *divided(roles, masks), True
    # by their looks: all files of an ending in a folder, of which a few are opened
    kinds = grouped(others, lambda path: (path.parent, path.suffix)).values()
    masks = {path for files in kinds if all_look_like_masks(files) for path in files}
    yield *divided(others, masks), False


def all_look_like_masks(files):
    """Return whether a few of the files, evenly spread, look like masks."""
    return all(map(looks_like_mask, evenly_sampled(files, SAMPLED)))


def looks_like_mask(path):
    """Return whether most of a file's pixels are of few values, in long runs: a mask, not a photo."""
    try:
        codes = decode_mask(path).codes
    except InputError:
        return False
    _, counts = distinct(codes)
    changes = np.count_nonzero(codes[:, 1:] != codes[:, :-1]) / codes.size
    return changes <= FEW_CHANGES and np.sort(counts)[-FEW_VALUES:].sum() >= MOST * codes.size


# --- pairs of each split ----------------------------------------------------------------------------------
def pair_splits(images, masks):
    """Return the FolderContent of {path: FolderRole} of images and masks, paired in each split and group.

    Where only the images are in splits, each of them chooses among all masks. Raises InputError as match(),
    for a mask that images of two splits choose, and for masks of another folder that have the names of those
    that are used; NoMasks where nothing pairs because only the names of groups tell masks apart.
    """
    content, copies, ambiguous = FolderContent(), copies_by_folder(images, masks), None
    masks = {path: role for path, role in masks.items() if path not in copies}
    groups = {role.group for role in images.values()}
    image_splits = {role.split for role in images.values()} - {""}
    mask_splits = {role.split for role in masks.values()} - {""}
    splits = sorted(image_splits)
    if "train" not in image_splits and any(not role.split for role in images.values()):
        splits.insert(0, "")
    for split in splits:
        name = split or "train"
        split_images = {path: role.group for path, role in images.items() if role.split == split}
        split_masks = {path: role.group for path, role in masks.items()
                       if role.split == split or not image_splits or not mask_splits}
        if not split_masks:  # as the test images of a contest
            content.notes.append(f"not used: {count_of(len(split_images), 'image')} of {name}, without masks")
            continue
        pairs = match(split_images, split_masks)
        if not pairs.samples:  # the groups may differ: roads/ and roads_gt/
            try:
                pairs = match(dict.fromkeys(split_images, ()), dict.fromkeys(split_masks, ()))
            except InputError as error:
                ambiguous = error
        copies |= copies_by_name(pairs)
        content.splits[name] = pairs.samples
        content.images_without_mask += [path for path in pairs.images_without_mask if path not in copies]
        alone = [path for path in pairs.masks_without_image if path not in copies]
        content.masks_without_image += alone
        refuse_rivals(pairs.samples, [path for path in alone if split_masks[path] not in groups])
    used = grouped(content.samples, lambda sample: sample.mask)
    for mask, (first, *others) in used.items():
        if others:
            raise InputError(f"{mask} is the mask of {first.image} and of {others[0].image}, by their names: "
                             "rename or remove the image that it is not the mask of")
    if ambiguous and not used:
        raise NoMasks(str(ambiguous))
    content.copies = sorted(copies - used.keys())
    if image_splits and not mask_splits:
        content.masks_without_image = sorted(set(masks) - used.keys() - copies)
    return content


def copies_by_folder(images, masks):
    """Return the set of those masks, {path: FolderRole}, that show others once more, as the names of their
    folders tell: masks_color beside masks, but not where both are the masks of other images; arrays beside
    SegmentationClassPNG.
    """
    groups, folders = {role.group for role in images.values()}, {path.parent for path in masks}
    variants = {path for path, role in masks.items() if role.is_variant
                or path.suffix == ".npy" and path.parent.with_name(f"{path.parent.name}PNG") in folders}
    others = {(role.split, role.group) for path, role in masks.items() if path not in variants}
    splits = {split for split, _ in others}

    def is_copy(path):
        _, split, group, *_ = masks[path]
        plain_group = tuple(word for word in group if word not in VARIANTS)
        if group in groups:
            return not others.isdisjoint({("", plain_group), (split, plain_group)})
        return not splits.isdisjoint({"", split})

    return set(filter(is_copy, variants))


def copies_by_name(pairs):
    """Return the set of files without a partner that show one of the Pairs once more, as their names tell:
    those of an image or a mask with a word such as color or overlay behind.
    """
    names = {common_name(sample.image, affix) for sample in pairs.samples for affix in (None, IMAGE_AFFIX)}
    names |= {common_name(sample.mask) for sample in pairs.samples}

    def is_copy(path):
        name = common_name(path)
        ends = [separator.start() for separator in re.finditer(SEPARATORS, name)]
        return any(name[:end] in names and COPY_WORDS & {*words_of(name[end:])} for end in ends)

    return set(filter(is_copy, pairs.images_without_mask + pairs.masks_without_image))


def refuse_rivals(samples, masks):
    """Raise InputError where one of other masks has the name of a Sample's: which of them is meant?"""
    used = {common_name(sample.mask, MASK_AFFIX): sample.mask for sample in samples}
    for path in masks:
        if rival := used.get(common_name(path, MASK_AFFIX)):
            raise same_name(rival, path)


# --- pairs by the names of files --------------------------------------------------------------------------
def affix_pattern(words, letters=""):
    """Return a regex that takes one of `words` off the beginning of a name and off its end."""
    return re.compile(rf"(?:(?:{words})(?:[ _.-]+|(?=\d)))?(.+?)(?:[ _.-]+(?:{words}){letters})?",
                      re.IGNORECASE | re.DOTALL)


MASK_AFFIX = affix_pattern(MASK_WORDS, "|_[PL]|___fuse")  # of CamVid, SuperAnnotate
IMAGE_AFFIX = affix_pattern(IMAGE_WORDS)


def common_name(path, affix=None):
    """Return the composed stem of a file or, with an affix pattern, what that leaves of it; 1.jpg.png and
    1.jpg_mask.png are 1 then.
    """
    name = composed(path.stem)
    return name if affix is None else without_endings(affix.fullmatch(without_endings(name))[1])


def without_endings(name):
    """Return a name without the endings of image files."""
    while Path(name).suffix.lower() in IMAGE_ENDINGS:
        name = Path(name).stem
    return name


def same_name(first, second):
    """Return the InputError of two files of which only one can be meant."""
    return InputError(f"{first} and {second} have the same name: remove the file that is not meant, or move "
                      "its folder away")


class Pairs(NamedTuple):
    """Samples sorted by group and name, and the paths of files without a partner."""

    samples: list
    images_without_mask: list
    masks_without_image: list


def match(images, masks):
    """Return the Pairs of images with the masks of their group, {path: group}: by stem, else by what is left
    without MASK_WORDS, else without IMAGE_WORDS too, whichever pairs most; else by what is left without the
    words that all names of a side share, where all pair then.

    Raises InputError for two files of a side that have the same name.
    """
    def count_shared(sides):
        return len(sides[0].keys() & sides[1].keys())

    affixes = (None, None), (None, MASK_AFFIX), (IMAGE_AFFIX, MASK_AFFIX)
    ways = [(index_by_name(images, image_affix), index_by_name(masks, mask_affix))
            for image_affix, mask_affix in affixes]
    sides = max(ways, key=count_shared)
    if len(images) > 1 and masks and not count_shared(sides):  # of a single name, all words are shared
        distinctive = index_by_distinct_words(images), index_by_distinct_words(masks)
        if count_shared(distinctive) == len(images) == len(masks):
            sides = distinctive
    for by_name in sides:
        for first, second in (paths[:2] for paths in by_name.values() if len(paths) > 1):
            raise same_name(first, second)
    images_by_name, masks_by_name = sides
    names = images_by_name.keys() & masks_by_name.keys()
    return Pairs([Sample(images_by_name[name][0], masks_by_name[name][0]) for name in sorted(names)],
                 [images_by_name[name][0] for name in sorted(images_by_name.keys() - names)],
                 [masks_by_name[name][0] for name in sorted(masks_by_name.keys() - names)])


def index_by_name(groups, affix):
    """Return {(group, common name): [path]} of {path: group}."""
    return grouped(groups, lambda path: (groups[path], common_name(path, affix)))


def index_by_distinct_words(groups):
    """Return {(group, words of the name that not all names have): [path]} of {path: group}."""
    words = {path: re.split(SEPARATORS, common_name(path).lower()) for path in groups}
    shared = set.intersection(*map(set, words.values()))
    return grouped(groups, lambda path: (groups[path], *(word for word in words[path] if word not in shared)))


def pair_files(image_folder, mask_folder):
    """Return the Samples of two folders, in which sub-folders have the same names.

    Raises InputError for an empty folder, for names of which none pair, for an image without mask or a mask
    without image, and as match() does.
    """
    images, masks = ({path: Path(composed(str(path.parent.relative_to(folder))))
                      for path in list_images(folder)}
                     for folder in (image_folder, mask_folder))
    if not images or not masks:
        raise InputError(f"no images in {mask_folder if images else image_folder} (endings "
                         f"{' '.join(IMAGE_ENDINGS)})")
    pairs = match(images, masks)
    if not pairs.samples:
        raise InputError(f"no image in {image_folder} has a mask in {mask_folder}: "
                         f"{names_differ(images, masks)}")
    refuse_unpaired(pairs.images_without_mask, f"mask in {mask_folder}")
    refuse_unpaired(pairs.masks_without_image, f"image in {image_folder}")
    return pairs.samples


def refuse_unpaired(paths, partner):
    """Raise InputError where there are files without their `partner`."""
    if paths:
        more = f" ({len(paths) - 1} more like it)" if len(paths) > 1 else ""
        raise InputError(f"{paths[0]} has no {partner}{more}: add what is missing or move it")


def names_differ(images, masks):
    """Return why names did not pair, as text: two names of each side, and what was tried."""
    image_names, mask_names = (", ".join(path.name for path in sorted(paths)[:NAMES_IN_MESSAGE])
                               for paths in (images, masks))
    return (f"images are called {image_names}, masks {mask_names}; tried were equal names, and names without "
            "image, img, ... and mask, label, gt, seg, ... at either end: rename one side")


# --- lists of the splits ----------------------------------------------------------------------------------
def use_lists(content, root, base):
    """Split the samples as train.txt, val.txt and test.txt tell, where the folder has them.

    Entries are names or paths of images, with or without ending, alone or followed by the mask's. Those that
    are not an image with a mask become bad_labels. Raises InputError for two lists of a split.
    """
    folders = dict.fromkeys(top / name for top in (root, base) for name in LIST_FOLDERS)
    paths = [path for folder in folders for path in sorted(folder.glob("*.txt"))
             if set(words_of(path.stem)) & SPLIT_OF.keys()]
    by_stem = grouped(content.splits.get("train", []), lambda sample: common_name(sample.image))
    lists = {}  # {split: (path, {entry: the Samples of that name})}
    for split, path in lists_by_split(paths).items():
        samples_of = {entry: samples_of_entry(entry, by_stem) for entry in read_list(path)}
        if any(samples_of.values()):  # else it lists something else
            lists[split] = path, samples_of
    if "train" not in lists or set(content.splits) != {"train"}:
        if paths:
            reason = "the folders name the splits" if len(content.splits) > 1 else \
                "none lists images to train on"
            content.notes.append(f"not used: {relative_names(paths, root)} ({reason})")
        return
    splits, wrong = {}, []
    for split, (path, samples_of) in lists.items():
        splits[split] = [samples[0] for samples in samples_of.values() if len(samples) == 1]
        wrong += [" and ".join([f"{entry} of {path.relative_to(root)}",
                                *(str(sample.image.relative_to(root)) for sample in samples[:2])])
                  for entry, samples in samples_of.items() if len(samples) != 1]
    if wrong:
        content.bad_labels[BAD_ENTRY] = wrong
    unlisted = set(content.splits["train"]).difference(*splits.values())
    content.splits, content.images_without_mask, content.masks_without_image = splits, [], []
    not_used = f"; {count_of(len(unlisted), 'pair')} on none of them: not used" if unlisted else ""
    used = [path for path, _ in lists.values()]
    content.notes.append(f"split by {relative_names(used, root)}{not_used}")


def lists_by_split(paths):
    """Return {split: path} of list files, train.txt before train_fold1.txt. Raises InputError for two."""
    lists = {}
    for path in paths:
        splits = {SPLIT_OF[word] for word in words_of(path.stem) if word in SPLIT_OF}
        if len(splits) == 1:  # not train_val.txt
            lists.setdefault(splits.pop(), []).append(path)
    for split, named in lists.items():
        path, *others = [path for path in named if path.stem.lower() in SPLIT_OF] or named
        if others:
            raise InputError(f"{path} and {others[0]} list images of the same split: move one away")
        lists[split] = path
    return lists


def samples_of_entry(entry, by_stem):
    """Return those Samples of {stem: [Sample]} that fit the name and the folders of a list entry best."""
    for text in (entry, re.split(r"[\s,;]+", entry)[0]):
        name = Path(composed(text))
        samples = by_stem.get(name.name) or by_stem.get(name.stem) or []
        if samples:
            shared = [count_shared_folders(name.parts[:-1], sample.image.parts[:-1]) for sample in samples]
            return [sample for sample, count in zip(samples, shared, strict=True) if count == max(shared)]
    return []


def count_shared_folders(names, folders):
    """Return how many of `names` are among `folders` in their order, from the last one on."""
    count, folders = 0, list(map(composed, folders[::-1]))
    for name in map(composed, reversed(names)):
        if name in folders:
            count, folders = count + 1, folders[folders.index(name) + 1:]
    return count


def relative_names(paths, root):
    """Return the paths below `root` as text."""
    return ", ".join(str(path.relative_to(root)) for path in paths)


# --- messages about a folder ------------------------------------------------------------------------------
KNOWN_LAYOUTS = ("it needs images/ and masks/, or train/images train/masks val/images val/masks, or "
                 "images/train masks/train images/val masks/val, or train_images train_labels valid_images "
                 "valid_labels")
HINTS = {ending: "unpack it" for ending in (".zip", ".tar", ".gz")} | {
    ".json": "not read, export masks as PNG", ".xml": "not read, export masks as PNG",
    ".txt": "not read, outlines of YOLO need their data.yaml"}


def report_folders(content, paths, root):
    """Note in a FolderContent which folders are images and masks, which are not used, and doubts of that."""
    images = [sample.image for sample in content.samples]
    masks = [sample.mask for sample in content.samples]
    content.notes.insert(0, f"images: {count_by_folder(images, root)}; masks: {count_by_folder(masks, root)}")
    used = {*images, *masks, *content.images_without_mask, *content.masks_without_image}
    if content.copies:
        content.notes.append(f"left aside: {count_by_folder(content.copies, root)}, by their names "
                             "the same once more (in colors, as arrays, ...)")
    unused = sorted(set(paths) - used - set(content.copies))
    if unused:
        content.notes.append(f"not used: {count_by_folder(unused, root)}")
    fewest = min(Counter(path.parent for path in masks).values())
    for folder, files in grouped(unused, lambda path: path.parent).items():
        *above, _ = names = folder.relative_to(root).parts or ("",)
        beside = folder.parent in {path.parent.parent for path in masks} and role_of(tuple(above)).below_masks
        if role_of(names).content == "other" and not beside:  # masks/object beside masks/car may be a class
            continue  # as its name tells
        if len(files) >= fewest and all_look_like_masks(files):
            content.doubts.append(f"{folder.relative_to(root).as_posix()} is not used and looks like masks "
                                  "too: if it is what you want to learn, move the other folder of masks away")


def count_by_folder(paths, root):
    """Return the folders of files with the number of files as text: 'train/img (96), val/img (24)'."""
    counts = Counter(path.parent.relative_to(root).as_posix() for path in paths)
    return shortened([f"{name} ({count})" for name, count in sorted(counts.items())])


def shortened(texts):
    """Return texts joined by commas, of many the first few."""
    more = f" and {len(texts) - FOLDERS_IN_MESSAGE} more" if len(texts) > FOLDERS_IN_MESSAGE else ""
    return ", ".join(texts[:FOLDERS_IN_MESSAGE]) + more


def describe_folder(root):
    """Return as text which files each folder below `root` holds, and a hint for those that are not read."""
    counts = Counter((path.parent, path.suffix.lower()) for path in list_files(root))
    texts = []
    for (folder, ending), count in counts.items():
        hint = f" ({HINTS[ending]})" if ending in HINTS else ""
        texts.append(f"{folder.relative_to(root).as_posix()}/ holds {count} x {ending or 'no ending'}{hint}")
    return shortened(texts) or "it is empty"
