"""infer_image.py on many images: lists, going on after a crash, several processes."""
import json
import os
import shutil
import signal
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import random_images, tiny, wait_for
from PIL import Image
from test_distributed import start_torchrun, torchrun

import infer_image
from checkpoint import pack_checkpoint

ALL = ("--json", "--polygons", "coco", "geojson", "--probabilities", "max",
       "--cutout", "--min-confidence", 0.4)
CLASSES = [("background", (0, 0, 0)), ("tar", (9, 0, 0)), ("crack", (0, 9, 0))]


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(pack_checkpoint(tiny(head="detail").eval(), CLASSES, (28, 42)), path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Seven photos of as many sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(7):
        image = random_images(3, 30 + 5 * number, 71 - 3 * number, seed=number)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return folder


def results(out):
    """Return {name: content} of the files of a run."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and not path.name.startswith(".")}


def test_what_is_done_is_left_out_and_all_ends_as_if_it_had_not_been(model_file, photos, tmp_path, run):
    base = ["--model", model_file, "--device", "cpu", *ALL, "--input"]
    assert run(infer_image, *base, photos, "--out-dir", tmp_path / "whole")[0] == 0
    whole, out = results(tmp_path / "whole"), tmp_path / "parts"
    assert run(infer_image, *base, *[photos / f"{n}.png" for n in range(4)], "--out-dir", out)[0] == 0
    journal = next((out / "inference_results_image").glob(".done_*"))
    journal.write_text(journal.read_text()[:-20])  # as a crash leaves it
    before = {path: os.stat(path).st_mtime_ns for path in out.rglob("*_mask.png")}
    flags = [*base, photos, "--out-dir", out, "--skip-done"]
    code, text, _ = run(infer_image, *flags)
    assert code == 0 and "3 were done before" in text and results(out) == whole
    again = {path.name for path, time in before.items() if os.stat(path).st_mtime_ns != time}
    assert again == {"3_mask.png"}
    assert "7 were done before" in run(infer_image, *flags)[1] and results(out) == whole
    shutil.copy(photos / "1.png", photos / "2.png")  # another picture
    assert "6 were done before" in run(infer_image, *flags)[1]
    masks = [whole["inference_results_image/1_mask.png"], results(out)["inference_results_image/2_mask.png"]]
    assert masks[0] == masks[1]
    next(out.rglob("4_cutout.png")).unlink()
    next(out.rglob("5_mask.png")).write_bytes(b"")
    assert "5 were done before" in run(infer_image, *flags)[1]
    for more in (("--alpha", 0.9), (), ("--alpha", 0.9)):  # what others have written over it is not its own
        assert "done before" not in run(infer_image, *flags, *more)[1]
    assert "done before" not in run(infer_image, *[flag for flag in flags if flag != "--skip-done"])[1]


def test_results_of_one_name_belong_to_the_image_that_has_it(model_file, photos, tmp_path, run):
    base = ["--model", model_file, "--device", "cpu", "--out-dir", tmp_path / "out", "--skip-done", "--input"]
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(photos / "2.png", other / "0.png")
    for inputs, before in (([photos / "0.png"], 0), ([other], 0), ([photos / "0.png"], 0),
                           ([photos / "0.png", other], 1), ([photos / "0.png", other], 2)):
        code, text, _ = run(infer_image, *base, *inputs)
        assert code == 0 and (f"{before} were done before" in text) == bool(before), (inputs, text)


def test_a_list_names_files_folders_and_globs(model_file, photos, tmp_path, run):
    (tmp_path / "list.txt").write_text(f"{photos / '3.png'}\n\n{photos}/[01].png\n", encoding="utf-8")
    flags = ["--model", model_file, "--device", "cpu", "--out-dir", tmp_path / "out", "--input"]
    code, text, _ = run(infer_image, *flags, f"@{tmp_path / 'list.txt'}")
    assert code == 0 and "3 of 3" in text
    for named in (f"@{tmp_path / 'gone.txt'}", f"@{model_file}"):
        code, _, err = run(infer_image, *flags, named)
        assert code == 2 and named in err and err.count("\n") == 1


@pytest.mark.parametrize("processes, more", [
    (2, ()), pytest.param(3, ("--protocol", "tile"), marks=pytest.mark.long),
    pytest.param(9, (), marks=pytest.mark.long)])
def test_processes_write_what_a_single_one_writes(model_file, photos, tmp_path, run, processes, more):
    """And one photo that is damaged ends nobody."""
    (photos / "broken.png").write_bytes(b"no picture")
    all_flags = ALL if not more else ("--json", "--polygons", "coco")
    flags = ["--model", model_file, "--device", "cpu", "--input", photos, *all_flags, *more]
    done = torchrun(processes, *flags, "--out-dir", tmp_path / "many", script="infer_image.py")
    assert "7 of 8 images" in done.stdout and done.stderr.count("skipped: ") == 1, done.stderr
    code, _, _ = run(infer_image, *flags, "--out-dir", tmp_path / "one")
    assert code == 1 and results(tmp_path / "many") == results(tmp_path / "one")
    assert len(json.loads((tmp_path / "one/inference_results_image/shares.json").read_text())) == 7


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes as Linux lists them")
def test_what_killed_processes_had_done_stays_and_the_rest_follows(model_file, photos, tmp_path, run):
    for number in range(60):
        shutil.copy(photos / f"{number % 7}.png", photos / f"more{number}.png")
    flags = ["--model", model_file, "--device", "cpu", "--input", photos, *ALL, "--tta", "ms,flip"]
    process = start_torchrun(2, *flags, "--out-dir", tmp_path / "many", script="infer_image.py")
    folder = tmp_path / "many/inference_results_image"

    def done():
        return sum(len(path.read_text().splitlines()) for path in folder.glob(".done_*"))

    wait_for(lambda: done() > 5 or process.poll() is not None)
    children = [file.read_text().split() for file in Path(f"/proc/{process.pid}/task").glob("*/children")]
    for pid in [*chain.from_iterable(children), process.pid]:
        os.kill(int(pid), signal.SIGKILL)
    process.communicate()
    assert 0 < done() < 67
    code, text, _ = run(infer_image, *flags, "--out-dir", tmp_path / "many", "--skip-done")
    assert code == 0 and "were done before" in text
    assert run(infer_image, *flags, "--out-dir", tmp_path / "one")[0] == 0
    assert results(tmp_path / "many") == results(tmp_path / "one")
