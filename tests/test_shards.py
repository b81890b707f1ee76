"""infer_image.py on tar files of images: as on the images themselves, resumable, damaged ones skipped."""
import io
import json
import os
import shlex
import shutil
import signal
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import blocks, load, random_images, refused, tiny, train_flags, write_pair
from PIL import Image
from test_distributed import torchrun
from test_many_images import ALL, CLASSES, results

import infer_image
import train
from checkpoint import pack_checkpoint
from dataio.readers import read_sample
from dataio.shards import shard_names, shard_title, unpack


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pth"
    torch.save(pack_checkpoint(tiny(head="detail").eval(), CLASSES, (28, 42)), path)
    return path


def write_shard(path, numbers, compression="", masks=True):
    """Write a tar file: a photo of each number, its mask, a text; return {member: picture}."""
    pictures = {}
    with tarfile.open(path, f"w{compression}") as tar:
        def add(name, content):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        for number in numbers:
            image = random_images(3, 30 + 5 * number, 71 - 3 * number, seed=number).permute(1, 2, 0).numpy()
            picture, file = Image.fromarray(image), io.BytesIO()
            picture.save(file, "JPEG")
            pictures[name := f"some/{number:03d}.jpg"] = file.getvalue()
            add(name, file.getvalue())
            file = io.BytesIO()
            Image.fromarray(image[..., 0]).save(file, "PNG")
            for ending in ("png", "seg.png") if masks else ():
                add(f"some/{number:03d}.{ending}", file.getvalue())
            add(f"some/{number:03d}.txt", b"a street")
        add("README", b"text")
        add("../outside.jpg" if not masks else "other.cls", b"3")
    return pictures


@pytest.fixture
def shards(tmp_path):
    """Two shards of two and three photos: {path: {member: picture}}."""
    return {path: write_shard(path, numbers, compression) for path, numbers, compression in
            ((tmp_path / "000.tar", (0, 1), ""), (tmp_path / "001.tar.gz", (2, 3, 4), ":gz"))}


def plain_results(model_file, pictures, folder, run):
    """Return the results of the photos of a shard as files."""
    inputs = folder / "photos/some"
    inputs.mkdir(parents=True)
    for name, content in pictures.items():
        (folder / "photos" / name).write_bytes(content)
    code, _, err = run(infer_image, "--model", model_file, *ALL, "--device", "cpu", "--input", inputs,
                       "--out-dir", folder / "out")
    assert code == 0, err
    return {name.partition("/")[2]: content for name, content in results(folder / "out").items()}


def without_places(content):
    """Return the bytes of shares.json without the folders of its images."""
    entries = json.loads(content)
    return [dict(entry, image=entry["image"].rsplit("/", 1)[-1]) for entry in entries]


def check_equal(own, plain):
    """Check that the results of a shard are those of its photos."""
    assert own.keys() == plain.keys()
    for name, content in plain.items():
        if name == "shares.json":
            assert without_places(own[name]) == without_places(content)
        else:
            assert own[name] == content, name


def test_results_are_those_of_the_photos(model_file, shards, tmp_path, run):
    code, text, err = run(infer_image, "--model", model_file, *ALL, "--device", "cpu", "--input", *shards,
                          "--out-dir", tmp_path / "out")
    assert code == 0 and "5 images of 2 shards" in text, err
    for path, name in zip(shards, ("000", "001"), strict=True):
        own = results(tmp_path / f"out/inference_results_image/{name}")
        check_equal(own, plain_results(model_file, shards[path], tmp_path / f"plain_{name}", run))
        images = [entry["image"] for entry in json.loads(own["shares.json"])]
        assert images == [f"{path}/{member}" for member in shards[path]]
    assert not list((tmp_path / "out").rglob(".unpacked*"))  # nothing is left of it


def test_a_list_a_pattern_and_a_pipe_name_shards(model_file, shards, tmp_path, run):
    first, second = shards
    lists = tmp_path / "list.txt"
    lists.write_text(f"{tmp_path}/0*.tar\npipe:cat {shlex.quote(str(second))}\n")
    flags = ["--model", model_file, "--device", "cpu", "--input", f"@{lists}", "--out-dir", tmp_path / "out"]
    code, text, err = run(infer_image, *flags)
    assert code == 0 and "5 images of 2 shards" in text, err
    folders = (tmp_path / "out/inference_results_image").iterdir()
    assert sorted(path.name for path in folders) == ["000", "001"]
    again = run(infer_image, *flags, "--skip-done")  # of a run without --skip-done, too
    assert again[0] == 0 and "0 images of 2 shards" in again[1] and "2 were done before" in again[1]


def test_what_is_done_stays_done_and_a_changed_shard_is_done_again(model_file, shards, tmp_path, run):
    flags = ["--model", model_file, "--device", "cpu", "--input", *shards, "--out-dir", tmp_path / "out",
             "--skip-done"]
    assert run(infer_image, *flags)[0] == 0
    folder = tmp_path / "out/inference_results_image"
    write_shard(next(iter(shards)), (5,))
    code, text, _ = run(infer_image, *flags)
    assert code == 0 and "1 images" in text and "1 were done before" in text
    next((folder / "001").glob("*_mask.png")).unlink()
    code, text, _ = run(infer_image, *flags)
    assert code == 0 and "3 images" in text and "1 were done before" in text
    code, text, _ = run(infer_image, *flags)
    assert code == 0 and "0 images" in text and "2 were done before" in text


@pytest.mark.parametrize("fault", ["cut off", "no tar", "pipe fails", "pipe is cut off"])
def test_a_damaged_shard_is_skipped_with_one_line(model_file, shards, tmp_path, run, fault):
    first, second = map(str, shards)
    content = (tmp_path / "000.tar").read_bytes()
    if fault == "pipe fails":
        first = "pipe:cat nothing.tar"
    elif fault == "pipe is cut off":
        first = f"pipe:head -c 3000 {shlex.quote(first)}"
    else:
        (tmp_path / "000.tar").write_bytes(content[:3000] if fault == "cut off" else b"no tar" * 999)
    code, text, err = run(infer_image, "--model", model_file, "--device", "cpu", "--input", first, second,
                          "--out-dir", tmp_path / "out", "--skip-done")
    lines = [line for line in err.splitlines() if "skipped" in line]
    assert code == 1 and len(lines) == 1 and first in lines[0] and "3 images of 2 shards" in text, err
    assert "Traceback" not in err and not list((tmp_path / "out").rglob(".unpacked*"))


def test_a_tar_file_that_is_cut_anywhere_is_noticed(tmp_path):
    """Also between two members, which tarfile takes for its end."""
    path = tmp_path / "a.tar"
    write_shard(path, (1, 2, 3))
    with tarfile.open(path) as tar:
        end = max(member.offset_data + member.size for member in tar)
    content = path.read_bytes()
    for size in range(512, end, 512):
        path.write_bytes(content[:size])
        with refused("a.tar"):
            unpack(str(path), new_folder(tmp_path))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        header = [member.offset for member in tar][2]
    path.write_bytes(content[:header] + b"x" * 300 + content[header + 300:])
    with refused("a.tar"):
        unpack(str(path), new_folder(tmp_path))


def new_folder(parent):
    """Return a new empty folder."""
    return Path(tempfile.mkdtemp(dir=parent))


def unpacked_names(path, members, parent):
    """Write a shard of {name: content, or the target of a link}; return the names of its photos."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    folder = new_folder(parent)
    return [photo.relative_to(folder).as_posix() for photo in unpack(str(path), folder)[0]]


@pytest.mark.parametrize("members, photos", [
    (["a.jpg", "a.png", "b.jpeg", "b.seg.png", "b.txt"], ["a.jpg", "b.jpeg"]),
    (["x/a.png", "y/a.png", "y/a.cls"], ["x/a.png", "y/a.png"]),
    (["shot.v2.jpg", "2024.01.jpg", "2024.02.jpg"], ["2024.01.jpg", "2024.02.jpg", "shot.v2.jpg"]),
    (["a.png", "a.npy", "b.npy"], ["a.png", "b.npy"]),
    (["._a.jpg", "a.jpg", "__MACOSX/a.jpg", ".hidden/b.jpg"], ["a.jpg"]),
    (["./A.JPG", "./b.PNG"], ["A.JPG", "b.PNG"]),
    (["a.tif", "a.tif.msk", "a.tif.aux.xml"], ["a.tif"]),
], ids=str)
def test_of_each_key_the_photo_is_taken(tmp_path, members, photos):
    content = dict.fromkeys(members, b"something")
    assert unpacked_names(tmp_path / "a.tar", content, tmp_path) == photos


def test_what_is_not_clear_is_refused(tmp_path):
    for members in (["a.tif", "a.png"], ["a.txt"], []):
        with refused("a.tar"):
            unpacked_names(tmp_path / "a.tar", dict.fromkeys(members, b"something"), tmp_path)
    with refused("a.tar"):
        unpacked_names(tmp_path / "a.tar", {"../outside.jpg": b"something"}, tmp_path)
    assert not (tmp_path / "outside.jpg").exists()
    folder = new_folder(tmp_path)
    unpacked_names(tmp_path / "a.tar", {"a.jpg": b"something", "b.jpg": "/etc/passwd"}, tmp_path)
    assert unpack(str(tmp_path / "a.tar"), folder) == ([folder / "a.jpg"], 1)


def test_no_two_shards_have_one_name():
    sources = ["a/0.tar", "b/0.tar", "b/0.tgz", "pipe:curl -s 'https://host/1.tar.gz'", "pipe:tar c .",
               "pipe:cat ..", "pipe:aws s3 cp s3://bucket/2.tar -"]
    names = shard_names(sources)
    assert names[:4] == ["0", "b_0", "0_2", "1"] and names[-1] == "2" and len({*names}) == len(sources)
    assert all(name.strip(".") and "/" not in name for name in names)


def test_a_pipe_without_a_name_touches_nothing_of_ours(model_file, shards, tmp_path, run, monkeypatch):
    place = tmp_path / "place"
    (place / "photos").mkdir(parents=True)
    next(iter(shards)).rename(place / "mine.tar")
    with tarfile.open(place / "mine.tar") as tar:
        tar.extractall(place / "photos", filter="data")
    monkeypatch.chdir(place)
    before = {path for path in place.rglob("*")}
    flags = ["--model", model_file, "--device", "cpu", "--input", "pipe:tar c -C photos .", "--out-dir",
             "out"]
    code, text, err = run(infer_image, *flags)
    assert code == 0 and "2 images of 1 shard " in text, err
    out = place / "out"
    assert {path for path in place.rglob("*") if path != out and out not in path.parents} == before


def test_results_of_other_photos_do_not_stay(model_file, shards, tmp_path, run):
    first = next(iter(shards))
    flags = ["--model", model_file, "--device", "cpu", "--input", first, "--out-dir", tmp_path / "out"]
    assert run(infer_image, *flags)[0] == 0
    write_shard(first, (3,))
    (tmp_path / "out/inference_results_image/000/mine.txt").write_text("mine")
    assert run(infer_image, *flags)[0] == 0
    names = {path.name for path in (tmp_path / "out/inference_results_image/000").glob("[!.]*")}
    assert names == {"003_mask.png", "003_overlay.jpg", "legend.png", "mine.txt"}


def test_results_of_another_shard_of_the_name_are_kept(model_file, tmp_path, run):
    for part, numbers in (("train", (1, 2)), ("val", (3,))):
        (tmp_path / part).mkdir()
        write_shard(tmp_path / part / "000.tar", numbers)
    base = ["--model", model_file, "--device", "cpu", "--out-dir", tmp_path / "out", "--input"]
    assert run(infer_image, *base, tmp_path / "train/000.tar")[0] == 0
    before = results(tmp_path / "out")
    for more in ([], ["--skip-done"]):
        code, _, err = run(infer_image, *base, tmp_path / "val/000.tar", *more)
        assert code == 2 and err.count("\n") == 1 and "train/000.tar" in err
    assert results(tmp_path / "out") == before


def test_nothing_is_removed_before_the_new_shard_is_read(model_file, shards, tmp_path, run):
    """And pseudo-labels of the time before are moved, as those of images are."""
    first = next(iter(shards))
    flags = ["--model", model_file, "--device", "cpu", "--min-confidence", 0.4, "--out-dir", tmp_path / "out",
             "--input", first]
    assert run(infer_image, *flags)[0] == 0
    before, content = results(tmp_path / "out"), first.read_bytes()
    first.write_bytes(content[:5000])
    assert run(infer_image, *flags)[0] == 2 and results(tmp_path / "out") == before
    first.write_bytes(content)
    assert run(infer_image, *flags)[0] == 0
    folder = tmp_path / "out/inference_results_image/000"
    masks = sorted(path.name for path in (folder / "pseudo_labels/masks").iterdir())
    assert masks == sorted(path.name for path in (folder / "pseudo_labels_1/masks").iterdir()) and masks


def test_photos_of_one_name_have_names_of_their_folders(model_file, tmp_path, run):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        Image.fromarray(random_images(3, 30, 40).permute(1, 2, 0).numpy()).save(tmp_path / "a.jpg")
        for name in ("album/cover.jpg", "cover.jpg", "other/cover.jpg"):
            tar.add(tmp_path / "a.jpg", name)
    flags = ["--model", model_file, "--device", "cpu", "--input", tmp_path / "a.tar", "--out-dir", tmp_path]
    assert run(infer_image, *flags)[0] == 0
    names = {path.name for path in (tmp_path / "inference_results_image/a").glob("*_mask.png")}
    assert names == {"cover_mask.png", "a_cover_mask.png", "other_cover_mask.png"}


def test_a_signed_address_names_no_folder_by_its_keys():
    source = "pipe:curl -s 'https://host/bucket/000.tar?X-Signature=secret&x=" + 300 * "y" + "'"
    assert shard_names([source]) == ["000"] and "secret" not in shard_title(source)


def test_tiles_of_a_shard_need_what_tiles_need(model_file, tmp_path, run):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        Image.fromarray(random_images(3, 60, 70).permute(1, 2, 0).numpy()).save(tmp_path / "a.tif")
        tar.add(tmp_path / "a.tif", "a.tif")
    flags = ["--model", model_file, "--device", "cpu", "--protocol", "tile", "--input", tmp_path / "a.tar",
             "--out-dir", tmp_path / "out"]
    assert run(infer_image, *flags)[0] == 0
    code, _, err = run(infer_image, *flags, "--polygons", "coco")
    assert code == 2 and "--polygons" in err and "Traceback" not in err


def test_missing_shards_are_refused(model_file, tmp_path, run):
    flags = ["--model", model_file, "--input", tmp_path / "no.tar", "--out-dir", tmp_path]
    code, _, err = run(infer_image, *flags)
    assert code == 2 and err.count("\n") == 1 and "no.tar" in err


# --- training -----------------------------------------------------------------------------------------------
def write_training_shard(path, numbers, ending="png"):
    """Write a shard of photos and masks of a folder data set."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            mask, folder = blocks(45, 61, (0, 1, 2), seed=number), path.parent / "files"
            image = folder / f"{number}.png"
            write_pair(image, folder / "mask.png", mask, seed=number)
            Image.open(image).save(folder / "photo.jpg", quality=95)
            tar.add(folder / "photo.jpg", f"{number:03d}.jpg")
            tar.add(folder / "mask.png", f"{number:03d}.{ending}")
    shutil.rmtree(path.parent / "files")


@pytest.mark.parametrize("ending", ["png", "seg.png"])
def test_a_folder_of_shards_is_a_data_set(tmp_path, run, ending):
    root = tmp_path / "shards"
    root.mkdir()
    for name, numbers in (("train-000", (0, 1)), ("train-001", (0, 3, 4)), ("val-000", (5, 6))):
        write_training_shard(root / f"{name}.tar", numbers, ending)
    (root / "classes.txt").write_text("ground\nroof\npool\n")
    source = load("folder", root)
    assert {split: len(samples) for split, samples in source.splits.items()} == {"train": 5, "val": 2}
    assert [name for name, _ in source.classes] == ["ground", "roof", "pool"]
    numbers = iter((0, 1, 0, 3, 4, 5, 6))
    for sample in [*source.splits["train"], *source.splits["val"]]:
        mask = read_sample(sample, source.table)[1]["mask"].numpy()
        assert (mask == blocks(45, 61, (0, 1, 2), seed=next(numbers))).all()
    files = [sample.image.resolve() for sample in source.splits["train"]]
    times = {path: path.stat().st_mtime_ns for path in files}
    write_training_shard(root / "train-002.tar", (7, 8), ending)
    assert len(load("folder", root).splits["train"]) == 7
    assert times == {path: path.stat().st_mtime_ns for path in times}
    code, _, err = run(train, *train_flags(root, tmp_path / "out", "--epochs", 1))
    assert code == 0, err
    write_shard(root / "train-003.tar", (1,), masks=False)
    code, _, err = run(train, *train_flags(root, tmp_path / "out", "--epochs", 1))
    assert code == 2 and err.count("\n") == 1 and "train-003.tar" in err


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_out_the_shards(model_file, shards, tmp_path, run, processes):
    flags = ["--model", str(model_file), *map(str, ALL), "--device", "cpu", "--input", *map(str, shards)]
    assert run(infer_image, *flags, "--out-dir", tmp_path / "one")[0] == 0
    done = torchrun(processes, *flags, "--out-dir", tmp_path / "many", script="infer_image.py")
    assert done.returncode == 0 and "5 images of 2 shards" in done.stdout, done.stderr
    one, many = results(tmp_path / "one"), results(tmp_path / "many")
    assert one == many


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_within_a_shard_loses_no_other(model_file, shards, tmp_path, run, monkeypatch, number):
    flags = ["--model", model_file, "--device", "cpu", "--input", *shards, "--out-dir", tmp_path / "out",
             "--skip-done"]
    original = infer_image.ImageSegmenter.segment_image
    calls = []

    def stopping(self, *args):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(infer_image.ImageSegmenter, "segment_image", stopping)
        code, text, _ = run(infer_image, *flags)
    assert code == 128 + number and not list((tmp_path / "out").rglob(".unpacked*"))
    code, text, _ = run(infer_image, *flags)
    assert code == 0 and "3 images of 2 shards" in text and "1 were done before" in text
