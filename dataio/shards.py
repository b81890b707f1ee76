"""Tar files of images, as WebDataset writes them: what has one key belongs together, 000.jpg with 000.png.

    with unpacked("shards/000.tar", "outputs/.000") as images:   # or "pipe:curl -s https://host/000.tar"
        images                                                   # [Path] of its images, gone afterwards
    root = training_folder("shards")                             # train/000/images, train/000/masks, ...

A tar file is read once, from its beginning to its end, so that it may come from anywhere. To train on, shards
are unpacked into the user's cache (~/.cache/dinoseg/shards), once, a folder each.
"""
import os
import re
import shutil
import subprocess
import tarfile
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

from config import InputError, count_of, one_line
from dataio.contents import cache_home, hash_contents
from dataio.images import IMAGE_ENDINGS
from dataio.layout import HIDDEN, SPLIT_OF, words_of
from dataio.readers import short_hash
from dataio.scan import fill_folder

PIPE = "pipe:"
ENDINGS = (".tar", ".tar.gz", ".tgz")
LOSSY = (".jpg", ".jpeg", ".webp")  # of a photo, beside which a .png is its mask


def is_shard(text):
    """Return whether an input is a tar file, or a command that prints one."""
    return text.startswith(PIPE) or text.lower().endswith(ENDINGS)


def shard_names(sources):
    """Return one distinct name per shard for its results: a number follows where names repeat."""
    names, taken = [], set()
    for name in map(shard_name, sources):
        candidates = chain([name], (f"{name}_{number}" for number in count(2)))
        names.append(next(candidate for candidate in candidates if candidate not in taken))
        taken.add(names[-1])
    return names


def shard_name(source):
    """Return the name of a shard's file, which a command ends with too, without its ending."""
    name = re.split(r"[/\\\\\s]", source.rstrip("'\" "))[-1]
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
    return re.sub(r"[^\w.-]+", "_", name.removesuffix(ending)) or "shard"


@contextmanager
def unpacked(source, folder, single=True):
    """Context in which the images of a shard lie in `folder`; gives their paths, in order of the names: of
    each key one photo, or all pictures, .seg.png too. Raises InputError where it cannot be read to its end.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        with opened(source) as tar:
            for member in tar:
                ending = ending_of(member.name) if single else Path(member.name).suffix.lower()
                if member.isfile() and ending in IMAGE_ENDINGS:
                    tar.extract(member, folder, filter="data")
                tar.members.clear()  # it would remember all of them
        yield photos(folder) if single else sorted(filter(Path.is_file, folder.rglob("*")))
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"--input {source} is not a tar file, or is damaged or cut off "
                         f"({one_line(str(error))}): write or download it again") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ending_of(name):
    """Return what follows the key of a member, in lower case: .seg.png of a/000.seg.png."""
    _, dot, ending = name.rsplit("/", 1)[-1].lstrip(".").partition(".")
    return f"{dot}{ending}".lower()


def photos(folder):
    """Return, sorted, the one photo of each key below a folder, that of LOSSY where there are others beside
    it, which are removed.
    """
    of_key = {}
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(paths, key=lambda path: (path.suffix.lower() not in LOSSY, path)):
        if of_key.setdefault(path.with_suffix(""), path) is not path:
            path.unlink()
    return sorted(of_key.values())


def training_folder(root):
    """Return the folder of images and masks that the shards in a folder hold, unpacked; a folder without
    shards as it is. Raises InputError.

    The name of a shard says which split it is of (train-000.tar), as the names of folders do.
    """
    root = Path(root)
    content = [path for path in sorted(root.iterdir()) if not path.name.startswith(HIDDEN)]
    files = [path for path in content if is_shard(path.name)]
    if not files or any(path.is_dir() or path.suffix.lower() in IMAGE_ENDINGS for path in content):
        return root
    hashes, folders = hash_contents(files), {}
    target = cache_home() / "shards" / short_hash(os.path.abspath(root))
    for path, name in zip(files, shard_names(map(str, files)), strict=True):
        split = next((SPLIT_OF[word] for word in words_of(name) if word in SPLIT_OF), "train")
        folders[target / split / f"{name}-{hashes[path][:8]}"] = path
    for folder in {*target.glob("*/*")} - folders.keys():  # of shards that were changed or removed
        shutil.rmtree(folder)
    if missing := [folder for folder in folders if not folder.is_dir()]:
        print(f"unpacking {count_of(len(missing), 'shard')} of {root} into {target} (once)", flush=True)
    for folder in missing:
        fill_folder(folder, write_pairs, [folders[folder]], folder.name)
    classes = root / "classes.txt"
    if classes.is_file():
        shutil.copyfile(classes, target / "classes.txt")
    return target


def write_pairs(path, folder):
    """Write the photo and the mask of every key of a shard below `folder`. Raises InputError."""
    with unpacked(str(path), folder / "all", single=False) as paths:
        keys = {}
        for file in paths:
            keys.setdefault(file.with_name(file.name[:-len(ending_of(file.name))]), []).append(file)
        for number, (key, files) in enumerate(keys.items()):
            photo = [file for file in files if ending_of(file.name) in LOSSY]
            masks = [file for file in files if file not in photo]
            if len(photo) != 1 or len(masks) != 1:
                raise InputError(f"{path}: {key.name} has {' '.join(sorted(file.name for file in files))}, "
                                 "and a photo (.jpg) and a mask (.png) are needed")
            for kind, file in (("images", photo[0]), ("masks", masks[0])):
                target = folder / kind / f"{number:06d}_{key.name}{file.suffix.lower()}"
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)


@contextmanager
def opened(source):
    """Context with the tarfile.TarFile of a shard, to be read in order. Raises InputError."""
    if not source.startswith(PIPE):
        try:
            with open(source, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
                yield tar
        except OSError as error:
            raise InputError(f"--input {source} cannot be read ({error.strerror or error})") from None
        return
    command = source.removeprefix(PIPE)
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|*") as tar:
                yield tar
            process.stdout.read()  # the padding behind the end
        finally:
            process.stdout.close()
        if code := process.wait():
            raise InputError(f"--input {source}: the command ended with exit code {code}")
