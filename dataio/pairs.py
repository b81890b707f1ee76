"""Lists of files, and which mask belongs to which image, by name.

    samples = pair_files("images", "masks")        # a.jpg with a.png, a.jpg.png, a_mask.png, mask_a.png, ...
"""
import re
from pathlib import Path

from config import InputError, count_of
from dataio.readers import IMAGE_ENDINGS, Sample

# What a mask's name may have beside its image's name, and an image's name beside what both have in common.
MASK_WORDS = ("masks?|labels?|gt|ground_?truth|seg|segmentation|annotations?|annot|ann|trimap|"
              "gtfine_labelids|gtfine_labeltrainids")
IMAGE_WORDS = "images?|imgs?|photos?|pictures?|frames?|rgb|sat|orig|original|leftimg8bit"
SEPARATORS = r"[ _.\-()]+"
SHOWN_NAMES = 2  # of each side in a message about names that do not pair


def affix_pattern(words, letters=""):
    """Return a regex that takes one of `words` off the beginning of a name and off its end."""
    return re.compile(rf"(?:(?:{words})(?:[ _.-]+|(?=\d)))?(.+?)(?:[ _.-]+(?:{words}){letters})?",
                      re.IGNORECASE | re.DOTALL)


MASK_AFFIX = affix_pattern(MASK_WORDS, "|_[PL]")
IMAGE_AFFIX = affix_pattern(IMAGE_WORDS)


def common_name(path, affix=None):
    """Return the name of a file without its ending and, with an affix pattern, without what it takes off.

    The ending of an image within a mask's name (1.jpg.png) goes too then.
    """
    if affix is None:
        return path.stem  # inner dots stay part of it
    stem = path.stem
    while Path(stem).suffix.lower() in IMAGE_ENDINGS:
        stem = Path(stem).stem
    return affix.fullmatch(stem)[1]


# --- lists ------------------------------------------------------------------------------------------------
def list_images(folder, endings=IMAGE_ENDINGS):
    """Return the image files below `folder`, sorted, without hidden files and folders and other endings."""
    folder = Path(folder)
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings
                  and not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
                  and path.is_file())


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


# --- pairs ------------------------------------------------------------------------------------------------
def by_key(groups, affix):
    """Return {(group, common name): path} of {path: group}, and the pairs of paths that share a key."""
    found, twins = {}, []
    for path, group in groups.items():
        other = found.setdefault((group, common_name(path, affix)), path)
        if other is not path:
            twins.append((other, path))
    return found, twins


def match(images, masks):
    """Pair images with the masks of their group: by stem, else by what is left without MASK_WORDS, else
    without IMAGE_WORDS too, whichever pairs most; else by what is left without the words that all names of a
    side share, where all pair then.

    images, masks: {path: group}. Returns (Samples sorted by group and name, images without mask, masks
    without image). Raises InputError for two files that would be the same one of a pair.
    """
    best = None
    for affixes in ((None, None), (None, MASK_AFFIX), (IMAGE_AFFIX, MASK_AFFIX)):
        keyed = [by_key(groups, affix) for groups, affix in zip((images, masks), affixes, strict=True)]
        common = keyed[0][0].keys() & keyed[1][0].keys()
        if best is None or len(common) > len(best[0]):
            best = common, keyed
        if len(common) == max(len(images), len(masks)):
            break
    common, keyed = best
    if not common and images and masks:
        bare = [by_bare_name(images), by_bare_name(masks)]
        if bare[0].keys() == bare[1].keys() and len(bare[0]) == len(images) == len(masks):
            common, keyed = bare[0].keys(), [(found, []) for found in bare]
    for one, other in [*keyed[0][1], *keyed[1][1]][:1]:
        if one.parent != other.parent:
            raise InputError(f"{one.parent} and {other.parent} both hold {one.stem}: move one of these "
                             "folders away, or give it the name of the images that it belongs to")
        raise InputError(f"{one} and {other} have the same name: which one is meant? remove one")
    sides = [found for found, _ in keyed]
    samples = [Sample(sides[0][key], sides[1][key]) for key in sorted(common)]
    return samples, *([found[key] for key in sorted(found.keys() - common)] for found in sides)


def by_bare_name(groups):
    """Return {(group, words of the name that not all names have): path} of {path: group}."""
    words = {path: re.split(SEPARATORS, path.stem.lower()) for path in groups}
    shared = set.intersection(*map(set, words.values()))
    return {(groups[path], *(word for word in found if word not in shared)): path
            for path, found in words.items()}


def is_another_drawing(path, names):
    """Return whether a file's name is one of `names` and more: x_color.png beside x.png."""
    cuts = [cut.start() for cut in re.finditer(SEPARATORS, path.stem)]
    return any(path.stem[:cut] in names for cut in cuts)


def match_files(image_folder, mask_folder):
    """Return match() of the files of two folders, in which sub-folders have the same names.

    Raises InputError for an empty folder, for names of which none pair, and as match() does.
    """
    files = []
    for folder in (image_folder, mask_folder):
        files.append({path: path.parent.relative_to(folder).as_posix() for path in list_images(folder)})
    if not all(files):
        empty = mask_folder if files[0] else image_folder
        raise InputError(f"no images in {empty} (endings {' '.join(IMAGE_ENDINGS)})")
    found = match(*files)
    if not found[0]:
        raise InputError(f"no image in {image_folder} has a mask in {mask_folder}: {unlike(*files)}")
    return found


def unlike(images, masks):
    """Return why names did not pair, as text: two names of each side, and what was tried."""
    shown = [", ".join(path.name for path in sorted(paths)[:SHOWN_NAMES]) for paths in (images, masks)]
    return (f"images are called {shown[0]}, masks {shown[1]}; tried were equal names, and names without "
            "image, img, ... and mask, label, gt, seg, ... at either end: rename one side")


def pair_files(image_folder, mask_folder):
    """Return the Samples of match_files. Raises InputError for an image without mask, a mask without image.
    """
    samples, *lonely = match_files(image_folder, mask_folder)
    refuse_lonely(*lonely, f"mask in {mask_folder}", f"image in {image_folder}")
    return samples


def refuse_lonely(no_mask, no_image, mask="mask", image="image"):
    """Raise InputError where a list of images without mask, or of masks without image, is not empty."""
    for paths, other in ((no_mask, mask), (no_image, image)):
        if paths:
            more = f" ({len(paths) - 1} more like it)" if len(paths) > 1 else ""
            raise InputError(f"{paths[0]} has no {other}{more}: add what is missing or move it")
