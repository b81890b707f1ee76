"""Tar files of images, as WebDataset writes them: what has one key belongs together, 000.jpg with 000.png.

    photos, links = unpack("shards/000.tar", folder)             # or "pipe:curl -s https://host/000.tar"
    root, shards = training_folder("shards")                     # train/train-000.tar/images, .../masks

A tar file is read once, from its beginning to its end, so that it may come from anywhere. To train on, shards
are unpacked into the user's cache (~/.cache/dinoseg/shards), each once, or as dataio/stream.py needs them.
"""
import os
import re
import select
import shutil
import signal
import subprocess
import tarfile
import zlib
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path, PurePosixPath

from config import InputError, count_of, one_line
from dataio.contents import WHOLE, cache_home, hash_contents, state_of
from dataio.images import COMPANIONS, IMAGE_ENDINGS, READERS
from dataio.labels import CLASS_FILES, class_file
from dataio.layout import HIDDEN, SPLIT_OF, words_of
from dataio.readers import short_hash
from dataio.scan import fill_folder
from utils import grouped

PIPE = "pipe:"
ENDINGS = (".tar", ".tar.gz", ".tgz")
TAR_ENDING = re.compile(r"\.(tar(\.\w+)?|tgz)$", re.IGNORECASE)  # a command may read others, such as .tar.zst
LOSSY = (".jpg", ".jpeg", ".webp")  # of a photo, beside which a .png is its mask
WAKE_SECONDS = 0.2  # after which it is asked whether to go on waiting for a command
LONGEST_NAME = 100  # characters of the name of a shard's results


# --- names ------------------------------------------------------------------------------------------------
def is_shard(text):
    """Return whether an input is a tar file, or a command that prints one."""
    return text.startswith(PIPE) or text.lower().endswith(ENDINGS) and not Path(text).is_dir()


def listed(text, flag):
    """Return the lines of the file behind @FILE, else the text alone. Raises InputError."""
    if not text.startswith("@") or Path(text).exists():
        return [text]
    try:
        lines = Path(text[1:]).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {text}: {text[1:]} is not a text file that can be read "
                         f"({one_line(str(error))})") from None
    return [line for line in lines if line.strip()]


def shard_names(sources):
    """Return one distinct name per shard for its results: that of its file, after that of its folder where
    these repeat, then with a number.
    """
    names = {}
    for source in sources:
        parts = plain_parts(source)
        numbered = (f"{parts[-1]}_{number}" for number in count(2))
        candidates = chain([parts[-1], "_".join(parts)], numbered)
        names[next(name for name in candidates if name not in names)] = source
    return list(names)


def shard_title(source):
    """Return what a shard is called: a command without what follows ? or # in addresses, keys perhaps."""
    return re.sub(r"[?#][^\s'\"]*", "", source) if source.startswith(PIPE) else source


def plain_parts(source):
    """Return the folder and the name of a shard, or of the first tar file that a command names, without its
    ending, as names of files may be.
    """
    is_pipe, title = source.startswith(PIPE), shard_title(source)
    words = [word.strip("'\"();|") for word in re.split(r"\s+", title)] if is_pipe else [source]
    word = next(filter(TAR_ENDING.search, words), words[-1])
    parts = re.split(r"[/\\]+", TAR_ENDING.sub("", word))
    return [re.sub(r"[^\w.-]+", "_", part).strip(".")[:LONGEST_NAME] or "shard" for part in parts[-2:]]


# --- reading ----------------------------------------------------------------------------------------------
class Member(tarfile.TarInfo):
    """A member of a tar file that has to be whole: tarfile takes a damaged header for the end."""

    @classmethod
    def fromtarfile(cls, file):
        try:
            return super().fromtarfile(file)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


@contextmanager
def opened(source, stop):
    """Context with the tarfile.TarFile of a shard, to be read in order, to its end unless stop(). Raises
    InputError.
    """
    if not source.startswith(PIPE):
        try:
            file = open(source, "rb")  # noqa: SIM115 - closed below
        except OSError as error:
            raise InputError(f"{source} cannot be read ({error.strerror})") from None
        with file, tarfile.open(fileobj=file, mode="r|*", tarinfo=Member) as tar:
            yield tar
        return
    # a session of its own: Ctrl-C is for this script
    with subprocess.Popen(source.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE, bufsize=0,
                          stdin=subprocess.DEVNULL, start_new_session=True) as process:
        is_read, output = False, Output(process.stdout, stop)
        try:
            with tarfile.open(fileobj=output, mode="r|*", tarinfo=Member) as tar:
                yield tar
            while output.read(1 << 20):  # what pads the end
                pass
            is_read = not stop()
        finally:
            if not is_read:  # it would wait for a reader, as a worker process may hold the pipe too
                end_command(process)
            process.stdout.close()
        if (code := process.wait()) and not stop():
            raise InputError(f"{shard_title(source)}: the command ended with exit code {code}")


class Output:
    """What a command prints, until stop(): one that sends nothing is not waited for then, but on Windows."""

    def __init__(self, pipe, stop):
        self.pipe, self.stop = pipe, stop

    def read(self, size):
        """Return up to `size` bytes, none at the end."""
        while os.name == "posix" and not select.select([self.pipe], [], [], WAKE_SECONDS)[0]:
            if self.stop():
                return b""
        return b"" if self.stop() else self.pipe.read(size)


def end_command(process):
    """Kill a command that a shell started in a session of its own, and what it started."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def extract(source, folder, stop=lambda: False):
    """Write the pictures, arrays and COMPANIONS of a shard below a folder, until stop(); return how many
    links to such were left out. Raises InputError where it cannot be read to its end.
    """
    links = 0
    try:
        with opened(source, stop) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                is_wanted = name.name.lower().endswith((*IMAGE_ENDINGS, *COMPANIONS))
                if is_wanted and not any(part.startswith(HIDDEN) for part in name.parts):
                    links += member.issym() or member.islnk()
                    if member.isreg():
                        tar.extract(member, folder, filter="data")
                tar.members.clear()  # it would remember all of them
                if stop():
                    break
    except (tarfile.TarError, EOFError, zlib.error) as error:
        if stop():
            return links
        raise InputError(f"{shard_title(source)} is not a tar file, or is damaged or cut off "
                         f"({one_line(str(error))}): write or download it again") from None
    return links


def key_of(path):
    """Return the key of an unpacked file: its path up to the first dot of its name."""
    return path.with_name(path.name.partition(".")[0])


def photos_among(files, source):
    """Return the photos among the files of one key: those of LOSSY, else its only picture, else its only
    array. Raises InputError where there are several.
    """
    pictures = [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]
    of_kind = {kind: [path for path in pictures if path.suffix.lower() in endings] for kind, endings in
               (("lossy", LOSSY), ("picture", {*IMAGE_ENDINGS} - {*READERS}), ("array", READERS))}
    photos = of_kind["lossy"] or of_kind["picture"] or of_kind["array"]
    if len(photos) > 1 and not of_kind["lossy"]:
        raise InputError(f"{source}: {' '.join(path.name for path in photos)} have one key, and none is a "
                         ".jpg: it is not known which is the photo")
    return photos


def unpack(source, folder, stop=lambda: False):
    """Unpack the photos of a shard below a new folder, until stop(); return their paths, sorted, and how
    many links were left out. Raises InputError where it holds none, or cannot be read to its end.
    """
    links = extract(source, folder, stop)
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    title = shard_title(source)
    photos = [photo for own in grouped(files, key_of).values() for photo in photos_among(own, title)]
    if not photos and not stop():
        raise InputError(f"{title} holds no image")
    for path in {*files} - {*photos}:  # masks: beside a photo of their name, it would be called otherwise
        if not path.name.lower().endswith(COMPANIONS):
            path.unlink()
    return sorted(photos), links


# --- training ---------------------------------------------------------------------------------------------
def is_listed(root):
    """Return whether a --data-root is @FILE, a list of shards."""
    return str(root).startswith("@") and not Path(root).exists()


def place_of(root):
    """Return the folder of a --data-root as a Path: of a list, the one that it lies in."""
    return Path(str(root)[1:]).parent if is_listed(root) else Path(root)


def shards_of(root):
    """Return the shards on a list, or in a folder that holds nothing else; [] for other folders. Raises
    InputError.
    """
    if is_listed(root):
        shards = listed(str(root), "--data-root")
        for shard in shards:
            if not is_shard(shard) or not (shard.startswith(PIPE) or Path(shard).is_file()):
                raise InputError(f"--data-root {root}: {shard_title(shard)} is neither a tar file nor a "
                                 f"command ({PIPE}...)")
        return shards
    content = [path for path in sorted(Path(root).iterdir()) if not path.name.startswith(HIDDEN)]
    shards = [str(path) for path in content if is_shard(path.name)]
    others = any(path.is_dir() or path.suffix.lower() in IMAGE_ENDINGS for path in content)
    return [] if others else shards


def split_of(shard, by_folder):
    """Return the split that the name of a shard says or, by_folder, that of its folder (val/000.tar)."""
    names = reversed(plain_parts(shard)) if by_folder else [Path(shard).name]
    return next((SPLIT_OF[word] for name in names for word in words_of(name) if word in SPLIT_OF), "train")


def class_list_of(root):
    """Return the file that names the classes of the shards in a folder, or beside their list; None without.
    """
    folder = place_of(root)
    if not is_listed(root):
        return class_file(folder)
    # the folder of a list may hold anything
    return next((folder / name for name in CLASS_FILES if (folder / name).is_file()), None)


def training_folder(root, first_only=False):
    """Return (the folder of images and masks that the shards in a folder or on a list hold, unpacked; the
    {name: shard} of those of train). A folder without shards, or with other data, is returned as it is.

    The name of a shard says which split it is of (train-000.tar). first_only: of those of train, unpack the
    first by name. What a command prints is taken to be what it printed before. Raises InputError.
    """
    if not (shards := shards_of(root)):
        return Path(root), {}
    own_names = shard_names(shards) if is_listed(root) else [Path(shard).name for shard in shards]
    names = dict(sorted(zip(shards, own_names, strict=True), key=lambda pair: pair[1]))
    splits = {shard: split_of(shard, is_listed(root)) for shard in names}
    of_train = {name: shard for shard, name in names.items() if splits[shard] == "train"}
    later = [*of_train.values()][1:] if first_only else []
    wanted = [shard for shard in names if shard not in later]
    class_list = class_list_of(root)
    files = {shard: Path(shard) for shard in wanted if not shard.startswith(PIPE)}
    hashes = hash_contents([*files.values(), *([class_list] if class_list else [])])
    home, versions = cache_home() / "shards", {shard: short_hash([shard, os.getcwd()]) for shard in wanted}
    for shard, path in files.items():  # of a large one, parts alone are hashed
        more = state_of(path)[:2] if path.stat().st_size > WHOLE else ()
        versions[shard] = short_hash([hashes[path], *more])
    folders = {shard: home / version for shard, version in versions.items()}
    if missing := [shard for shard in wanted if not folders[shard].is_dir()]:
        print(f"unpacking {count_of(len(missing), 'shard')} of {root} into {home} (once)", flush=True)
    for shard in missing:
        fill_folder(folders[shard], write_pairs, [shard], names[shard])
    if old := [shard for shard in wanted if shard.startswith(PIPE) and shard not in missing]:
        print(f"note: what {count_of(len(old), 'command')} printed was kept from before, such as "
              f"{folders[old[0]]}: remove it where that has changed", flush=True)

    def link(shard, target):
        if shard == class_list:
            shutil.copyfile(shard, target / shard.name)
            return
        place = target / splits[shard] / names[shard]
        place.parent.mkdir(exist_ok=True)
        try:
            os.symlink(folders[shard], place, target_is_directory=True)
        except OSError:  # Windows has rights for it
            shutil.copytree(folders[shard], place)

    content = [[names[shard], splits[shard], version] for shard, version in versions.items()]
    content += [[class_list.name, hashes[class_list]]] if class_list else []
    target = home / "sets" / short_hash(content)
    fill_folder(target, link, [*wanted, *([class_list] if class_list else [])], "shards")
    return target, of_train


def write_pairs(shard, folder, stop=lambda: False, left_out=None):
    """Write the photo and the mask of every key of a shard below `folder`, until stop(). Raises InputError
    for what cannot be read; for a key that is no pair too, unless it goes to the list `left_out`.
    """
    title = shard_title(shard)
    if links := extract(shard, folder / "all", stop):
        raise InputError(f"{title} holds {count_of(links, 'link')} in place of images: write it with tar "
                         "--dereference")
    files = sorted(file for file in folder.glob("all/**/*") if file.is_file())
    if not files and not stop():
        raise InputError(f"{title} holds no image")
    for number, (key, own) in enumerate(grouped(files, key_of).items()):
        photos = [file for file in own if file.suffix.lower() in LOSSY]
        masks = [file for file in own if file not in photos]
        if len(photos) != 1 or len(masks) != 1:
            reason = f"{title}: {key.name} has {' '.join(file.name for file in own)}, and needs a photo " \
                     "(.jpg) and a mask (.png)"
            if left_out is None:
                raise InputError(reason)
            left_out.append(reason)
            continue
        for kind, file in (("images", photos[0]), ("masks", masks[0])):
            target = folder / kind / f"{number:06d}_{key.name}{file.suffix.lower()}"
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
    shutil.rmtree(folder / "all", ignore_errors=True)
