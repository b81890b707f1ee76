"""What a file holds is known by its hash, which is made again when the file was touched."""
import os
from types import SimpleNamespace

import pytest
from conftest import refused

from dataio import contents
from dataio.contents import SETTLED, hash_contents


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """The folder of hashes, of this test alone; they are kept at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    monkeypatch.setattr(contents, "SETTLED", -1 << 62)
    return tmp_path / "kept/dinoseg/contents"


@pytest.fixture
def read(monkeypatch):
    """The files that were read."""
    paths, original = [], contents.hash_file
    monkeypatch.setattr(contents, "hash_file", lambda path: paths.append(path) or original(path))
    return paths


def write(path, content, like=None):
    """Write a file with the times of `like`, an os.stat_result."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    if like:
        os.utime(path, ns=(like.st_atime_ns, like.st_mtime_ns))
    return path


def test_equal_contents_have_equal_hashes_and_others_others(tmp_path):
    names = {"a/1": b"x", "b/1": b"x", "a/2": b"y", "a/3": b"", "a/4": b"xx"}
    paths = [write(tmp_path / name, content) for name, content in names.items()]
    for _ in range(2):  # read, then kept
        one, same, *others = (hash_contents(paths)[path] for path in paths)
        assert one == same and len({one, *others}) == 4


def test_a_file_is_read_again_only_when_it_was_touched(tmp_path, read):
    paths = [write(tmp_path / f"a/{number}", b"x%d" % number) for number in range(3)]
    first = hash_contents(paths)
    assert hash_contents(paths) == first == hash_contents(map(str, paths)) and len(read) == 3
    write(paths[1], b"yy", like=paths[1].stat())  # size and time stay
    changed = hash_contents(paths)
    assert read[3:] == [paths[1]] and changed[paths[1]] != first[paths[1]]
    os.replace(write(tmp_path / "a/new", b"zz", like=paths[2].stat()), paths[2])  # as rsync does
    assert hash_contents(paths)[paths[2]] not in (first[paths[2]], changed[paths[1]])
    assert read[4:] == [paths[2]]


def test_a_file_put_in_the_place_of_another_is_read_where_the_system_keeps_no_time_of_that(
        tmp_path, read, monkeypatch):
    def stat(path):
        real = os.stat(path)
        return SimpleNamespace(st_size=real.st_size, st_mtime_ns=real.st_mtime_ns, st_ino=real.st_ino,
                               st_ctime_ns=0)

    monkeypatch.setattr(contents, "os", SimpleNamespace(**{**vars(os), "stat": stat}))
    path = write(tmp_path / "a/1", b"x")
    first = hash_contents([path])
    new = write(tmp_path / "a/new", b"y", like=os.stat(path))
    os.replace(new, path)
    assert hash_contents([path]) != first


def test_hashes_are_kept_in_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))  # Windows
    hash_contents([write(tmp_path / "a/1", b"x")])
    assert len(list((tmp_path / "home/.cache/dinoseg/contents").iterdir())) == 1


@pytest.mark.parametrize(("seconds", "reads"), [(1, 2), (3, 1)])
def test_the_hash_of_a_file_that_may_change_is_not_kept(tmp_path, read, monkeypatch, seconds, reads):
    """Of one that came a second ago, though the time of its content is old; clocks tick in up to 2 s."""
    monkeypatch.setattr(contents, "SETTLED", SETTLED)
    path = write(tmp_path / "a/1", b"x", like=SimpleNamespace(st_atime_ns=0, st_mtime_ns=0))
    now = path.stat().st_ctime_ns + seconds * 10 ** 9
    monkeypatch.setattr(contents, "time", SimpleNamespace(time_ns=lambda: now))
    assert hash_contents([path]) == hash_contents([path]) and len(read) == reads


def test_without_a_place_for_hashes_files_are_read_each_time(tmp_path, read, monkeypatch):
    path = write(tmp_path / "a/1", b"x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # no folder can be made in a file
    assert hash_contents([path]) == hash_contents([path]) and len(read) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff", b'{"1": 3}', b'{"1": []}', b'{"1": [1, 2]}',
                                    b"1" * 9999])
def test_a_damaged_record_is_made_again(tmp_path, kept, damage):
    path = write(tmp_path / "a/1", b"x")
    want = hash_contents([path])
    (record,) = kept.iterdir()
    record.write_bytes(damage)
    assert hash_contents([path]) == want


def test_of_large_files_blocks_are_read(tmp_path, monkeypatch):
    for name, value in (("WHOLE", 100), ("BLOCKS", 5), ("BLOCK", 10)):
        monkeypatch.setattr(contents, name, value)
    path, hashes = tmp_path / "a/1", set()
    for changed in (None, 0, 9, 118, 239, 230):
        content = bytearray(240)
        if changed is not None:
            content[changed] = 1
        hashes.add(hash_contents([write(path, content)])[path])
    hashes.add(hash_contents([write(path, bytes(241))])[path])
    assert len(hashes) == 7


def test_files_up_to_the_limit_are_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "BLOCK", 10)
    path, hashes = tmp_path / "a/1", set()
    for changed in range(25):
        content = bytearray(25)
        content[changed] = 1
        hashes.add(hash_contents([write(path, content)])[path])
    assert len(hashes) == 25


@pytest.mark.parametrize(("megabytes", "is_noticed"), [(256, True), (257, False)])
def test_above_256_megabytes_a_byte_between_two_blocks_does_not_count(tmp_path, megabytes, is_noticed):
    path, hashes = write(tmp_path / "a/1", b""), []
    for value in (b"x", b"y"):
        with open(path, "r+b") as file:
            file.truncate(megabytes << 20)  # nothing is stored of it
            file.seek((1 << 20) + 1000)  # the second block begins later
            file.write(value)
        hashes.append(contents.hash_file(path))
    assert (hashes[0] != hashes[1]) == is_noticed


def test_a_file_that_is_gone_is_named(tmp_path):
    with refused("gone"):
        hash_contents([tmp_path / "gone"])
