"""infer_image.py on tar files of images: as on the images themselves, resumable, damaged ones skipped."""
import io
import json
import os
import shlex
import shutil
import signal
import tarfile

import pytest
import torch
from conftest import blocks, load, random_images, tiny, train_flags, write_pair
from PIL import Image
from test_distributed import torchrun
from test_many_images import ALL, CLASSES, results

import infer_image
import train
from checkpoint import pack_checkpoint
from dataio.readers import read_sample
from dataio.shards import shard_names, unpacked


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
    assert not list((tmp_path / "out").glob(".0*"))  # nothing is left of what was unpacked


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
    assert "Traceback" not in err and not list((tmp_path / "out").glob(".0*"))


def test_no_member_leaves_its_folder_and_no_name_is_taken_twice(tmp_path):
    write_shard(tmp_path / "a.tar", (1,), masks=False)
    outside = tmp_path / "outside.jpg"
    with pytest.raises(Exception) as error, unpacked(str(tmp_path / "a.tar"), tmp_path / "in"):
        pass
    assert "a.tar" in str(error.value) and not outside.exists() and not (tmp_path / "in").exists()
    names = shard_names(["a/0.tar", "b/0.tar", "pipe:curl -s 'https://host/0.tar.gz'", "pipe:cat"])
    assert len(set(names)) == 4 and names[:2] == ["0", "0_2"] and names[2] == "0_3"


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
    times = {path: path.stat().st_mtime_ns for path in source.splits["train"][0].image.parents[2].rglob("*")}
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
    assert code == 128 + number and not list((tmp_path / "out").glob(".0*"))
    code, text, _ = run(infer_image, *flags)
    assert code == 0 and "3 images of 2 shards" in text and "1 were done before" in text
