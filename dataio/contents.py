"""What files hold, as hashes: each file is read once, and again when it was touched.

    hashes = hash_contents(["a.jpg", "a.png"])         # {Path: 32 hex digits}

A file that is edited keeps its name, often its size and with `cp -p` its time, so that these do not tell what
a model was trained on. Hashes are kept in ~/.cache/dinoseg/contents, a file for each folder of images.
"""
import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from config import InputError
from utils import all_in_parallel, grouped, write_text

WHOLE = 1 << 28  # bytes of the largest file that is read as a whole
BLOCKS, BLOCK = 256, 1 << 20  # of a larger one: how many blocks are read, the first and the last among them
DIGITS = 12  # of a hash that stand for it among those of other images
SETTLED = 2 * 10 ** 9  # nanoseconds: a file may change again within a tick of its file system's clock


def hash_contents(paths):
    """Return {Path: 32 hex digits} of files; equal contents have equal hashes. Raises InputError."""
    states = {path: state_of(path) for path in dict.fromkeys(map(Path, paths))}
    kept = {folder: read_hashes(folder) for folder in {path.parent for path in states}}
    hashes = {path: kept[path.parent][path.name][-1] for path, state in states.items()
              if kept[path.parent].get(path.name, [])[:-1] == state}
    touched, now = [path for path in states if path not in hashes], time.time_ns()
    hashes.update(zip(touched, all_in_parallel(hash_file, touched, "file contents"), strict=True))
    for folder, files in grouped(touched, lambda path: path.parent).items():
        settled = {path.name: [*states[path], hashes[path]] for path in files
                   if now - max(states[path][1:3]) > SETTLED}
        if settled:
            keep_hashes(folder, kept[folder] | settled)
    return hashes


def contents_of(paths):
    """Return one text that tells which contents files have: DIGITS of each hash. Raises InputError."""
    return "".join(sorted({digest[:DIGITS] for digest in hash_contents(paths).values()}))


def digests_in(contents):
    """Return the set of what a text of contents_of holds: DIGITS of each hash."""
    return {contents[start:start + DIGITS] for start in range(0, len(contents), DIGITS)}


def joined(*texts):
    """Return the text of contents_of for all files of several such texts."""
    return "".join(sorted(set().union(*map(digests_in, texts))))


def paths_in(contents, paths):
    """Return those Paths whose contents are in a text of contents_of. Raises InputError."""
    known = digests_in(contents)
    hashes = hash_contents(paths) if known else {}
    return [path for path, digest in hashes.items() if digest[:DIGITS] in known]


def state_of(path):
    """Return [size, time of its content, time of its inode, inode] of a file: touched, it has another of
    them. Raises InputError where it is not there.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def hash_file(path):
    """Return the hash of a file: of all of it or, above WHOLE, of its size and BLOCKS. Raises InputError."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest, starts = hashlib.sha256(f"{size} ".encode()), range(0, size, BLOCK)
            if size > WHOLE:
                starts = [(size - BLOCK) * number // (BLOCKS - 1) for number in range(BLOCKS)]
            for start in starts:
                file.seek(start)
                digest.update(file.read(BLOCK))
            return digest.hexdigest()[:32]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


def record_of(folder):
    """Return the file that keeps the hashes of the files in a folder."""
    name = hashlib.sha256(os.fsencode(os.path.abspath(folder))).hexdigest()[:16]
    return cache_home() / f"contents/{name}.json"


def read_hashes(folder):
    """Return {file name: [*state_of, hash]} that is kept of a folder, {} where nothing readable is."""
    with suppress(OSError, ValueError):
        kept = json.loads(record_of(folder).read_text(encoding="utf-8"))
        if isinstance(kept, dict) and all(isinstance(entry, list) and entry for entry in kept.values()):
            return kept
    return {}


def keep_hashes(folder, entries):
    """Write what read_hashes returns; nothing happens where the disk is full or read-only."""
    with suppress(OSError):
        write_text(record_of(folder), json.dumps(entries))


def cache_home():
    """Return the folder of what is kept for all runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoseg"
