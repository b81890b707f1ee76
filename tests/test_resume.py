"""A run that is stopped, starved or robbed of its files goes on as if nothing had happened."""

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call, write_folder
from attacks import same_run

from dataio import dataloader as loading
from dataio import feature_cache
from dataio import readers
import checkpoint
import metrics
import train
import utils
from config import InputError, count_of

from test_scripts import train_flags


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder data set of 12 images."""
    return write_folder(tmp_path_factory.mktemp("data"), count=12)


def flags_of(data, out, *more):
    """Return flags of a run of two epochs of three steps with all augmentations."""
    if more == ("segformer",):
        flags = ("--dataset", "folder", "--data-root", data, "--arch", "segformer_b0", "--weights", "none")
        return (*flags, "--imgsz", 32, 32, "--batch-size", 4, "--epochs", 2, "--workers", 0, "--out-dir", out)
    more = [data.parent / "cache" if flag == "CACHE" else flag for flag in more]
    return train_flags(data, out, "--epochs", 2, "--augment", "crop", "flip", "color", *more)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The folder of a run that was never interrupted, by the flags that it adds."""
    runs = {}

    def get(*more):
        if more not in runs:
            out = tmp_path_factory.mktemp("straight")
            call(train, *flags_of(data, out, *more))
            runs[more] = out
        return runs[more]

    return get


def at_step(number, action):
    """Return a Run.after_step that does something after optimizer step `number` of the run, once."""
    original, done = checkpoint.Run.after_step, []

    def after_step(run, step, so_far):
        if step == number and not done:
            done.append(action())
        original(run, step, so_far)

    return after_step


def send(number):
    """Return a function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "step, number, more",
    [
        (1, signal.SIGTERM, ()),
        pytest.param(4, signal.SIGINT, ("--workers", 2), marks=pytest.mark.long),
        pytest.param(
            3, signal.SIGINT, ("--accumulate", 2, "--batch-size", 2), marks=pytest.mark.long
        ),
        pytest.param(2, signal.SIGTERM, ("segformer",), marks=pytest.mark.long),  # drops paths at random
        (3, signal.SIGTERM, ("--steps", 8, "--train-images", 5)),  # an epoch ends within a pass
        (4, signal.SIGTERM, ("--head", "split-detail", "--split-blocks", 1, "--unfreeze", 2,
                             "--cache-features", "CACHE", "--cache-views", 2)),
    ],
    ids=str,
)
def test_a_stop_within_an_epoch_costs_nothing(data, straight, tmp_path, run, monkeypatch, step, number, more):
    whole = straight(*more)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "after_step", at_step(step, send(number)))
        code, _, err = run(train, *flags_of(data, tmp_path, *more))
    assert code == 128 + number and f"after {count_of(step, 'step')} in all; --resume continues there" in err
    assert torch.load(tmp_path / "last.pth")["step"] == step
    code, out, err = run(train, "--resume", "--out-dir", tmp_path)
    assert code == 0 and "resumed after epoch" in out
    same_run(whole, tmp_path)


@pytest.mark.parametrize("more", [(), ("--cache-features",)], ids=["class weights", "features"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_the_first_step_loses_nothing_and_names_its_command(
    data, straight, tmp_path, run, monkeypatch, number, more
):
    out = shutil.copytree(straight(), tmp_path / "my run")
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    flags = ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--imgsz", 42, 56]
    flags += ["--workers", 0, "--class-weights", "enet", "--out-dir", out]
    flags += [*more, tmp_path / "cache"] if more else []
    passes, forward = [], feature_cache.parts_that_fit

    def pass_of(*args):
        passes.append(len(passes) != 1 or send(number)())
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setitem(feature_cache.BATCH, "cpu", 2)
        patch.setattr(feature_cache, "parts_that_fit", pass_of)
        if not more:
            patch.setattr(train, "count_pixels", lambda *args: send(number)())
        code, text, err = run(train, *flags)
    assert code == 128 + number and "the earlier run was moved back" in text
    assert {path.name: path.read_bytes() for path in out.glob("*.*")} == before and err.count("\n") == 2
    assert err.startswith("\nstopped before the run saved anything") and "--resume" not in err
    assert shlex.split(err.split("; go on with: ")[1]) == ["python", "train.py", *map(str, flags)]
    assert ("cache are kept" in err) == bool(more)
    if more:  # the second run computes what the first one has not
        entries = sum(sums[sums != 0].numel() for sums in checksums(tmp_path / "cache", "map"))
        assert entries == 4 * 2  # blocks, images of the first batch
        assert checksums(tmp_path / "cache", "masks")[0].count_nonzero() == 2


def checksums(folder, kind):
    """Return the checksums of the entries of the files of a feature cache, 0 where there is none yet."""
    return [torch.from_file(str(path), size=path.stat().st_size // 8, dtype=torch.int64)
            for path in folder.glob(f"{kind}_*.sums")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_anything_is_in_place_is_one_line(data, tmp_path, run, monkeypatch, number):
    monkeypatch.setattr(train, "load_data", lambda *args: send(number)())
    code, _, err = run(train, *flags_of(data, tmp_path / "out"))
    assert code == 128 + number and err.count("\n") == 2 and "--resume" not in err
    assert err.startswith("\nstopped before the run began; start it again with: python train.py --dataset ")


def test_a_second_signal_does_not_wait_for_the_step(data, straight, tmp_path, run, monkeypatch):
    def twice():
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()

    for step, saved in ((1, False), (4, True)):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.Run, "after_step", at_step(step, twice))
            code, _, err = run(train, *flags_of(data, tmp_path / str(saved)))
        assert code == 143 and ("--resume continues from what was saved last" in err) == saved
        assert ("stopped before the run saved anything; go on with" in err) != saved


@pytest.mark.long
@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_a_real_run_stopped_while_its_cache_fills_goes_on_by_the_line_it_prints(tmp_path, number, workers):
    data, out = write_folder(tmp_path / "data", count=150), tmp_path / "out"
    flags = ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--imgsz", 224, 224]
    flags += ["--epochs", 1, "--workers", workers, "--device", "cpu", "--out-dir", out]
    flags += ["--cache-features", tmp_path / "my cache"]
    pipes = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "train.py", *map(str, flags)]
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    while not any(sums.any() for sums in checksums(tmp_path / "my cache", "masks")):
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, number)  # as a terminal and most batch systems do
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err.count("\n") == 2, err
    filled = checksums(tmp_path / "my cache", "masks")[0].count_nonzero().item()
    assert 0 < filled < 120 and not (out / "last.pth").exists()
    line = err.split("; go on with: python ")[1]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "my cache").glob("*.json")}
    done = subprocess.run(f"{sys.executable} {line}", shell=True, timeout=300, **pipes)
    assert done.returncode == 0 and "0.00 GB of it new" in done.stdout, done.stderr
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items()
    assert (out / "last.pth").exists()


def test_a_stop_in_validation_does_not_train_the_epoch_again(data, straight, tmp_path, run, monkeypatch):
    original, calls = checkpoint.Run.after_batch, []

    def after_batch(self):
        calls.append(len(calls) or send(signal.SIGTERM)())
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "after_batch", after_batch)
        assert run(train, *flags_of(data, tmp_path))[0] == 143
    state = torch.load(tmp_path / "last.pth")
    assert state["epoch"] == 0 and state["progress"]["batches"] == 3 and not state["history"]
    steps, original_step = [], checkpoint.Run.after_step
    monkeypatch.setattr(
        checkpoint.Run,
        "after_step",
        lambda self, step, so_far: steps.append(step) or original_step(self, step, so_far),
    )
    calls.clear()
    with monkeypatch.context() as patch:  # stopped there again: still no step is taken
        patch.setattr(checkpoint.Run, "after_batch", after_batch)
        assert run(train, "--resume", "--out-dir", tmp_path)[0] == 143
    code, text, _ = run(train, "--resume", "--out-dir", tmp_path)
    first, second = (line for line in text.splitlines() if line.startswith("epoch "))
    assert code == 0 and "trained before it was resumed" in first and "images/s" not in first
    assert " images/s, " in second and " resumed" not in second
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows[0]["train_images_per_s"] is rows[0]["train_data_wait"] is None
    assert rows[1]["train_images_per_s"] > 0
    assert steps == [4, 5, 6]
    same_run(straight(), tmp_path)


def test_more_epochs_on_resume_equal_a_longer_run(data, straight, tmp_path, run):
    assert run(train, *flags_of(data, tmp_path), "--epochs", 1)[0] == 0
    assert run(train, "--resume", "--epochs", 2, "--out-dir", tmp_path)[0] == 0
    same_run(straight(), tmp_path)


def test_a_lost_image_costs_nothing_that_was_learned(data, straight, tmp_path, run, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "data")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    with monkeypatch.context() as patch:
        lose = at_step(4, lambda: [os.rename(path, hidden / path.name) for path in copy.glob("images/*")])
        patch.setattr(checkpoint.Run, "after_step", lose)
        code, out, err = run(train, *flags_of(copy, tmp_path / "out"))
    assert code == 2 and "does not exist" in err and "Traceback" not in err
    assert "saved in epoch 2 after 4 steps" in out
    for path in hidden.iterdir():
        os.rename(path, copy / "images" / path.name)
    assert run(train, "--resume", "--out-dir", tmp_path / "out")[0] == 0
    same_run(straight(), tmp_path / "out")


def test_a_full_disk_is_one_line_and_leaves_whole_files(data, straight, tmp_path, run):
    resource = pytest.importorskip("resource")
    shutil.copytree(straight(), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # no file may be larger than this
        code, _, err = run(train, "--resume", "--epochs", 3, "--out-dir", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and ".pth: File too large; nothing that was written before is lost" in err
    assert "Traceback" not in err
    for name in ("last.pth", "best_model_iou.pth", "history.jsonl", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == before[name] or name == "config.json"
    assert not [path for path in (tmp_path / "out").glob(".*") if path.name not in (".lock", ".run.json")]
    assert run(train, "--resume", "--epochs", 3, "--out-dir", tmp_path / "out")[0] == 0


def test_a_second_run_in_a_folder_is_refused_and_a_dead_ones_leftovers_go(data, tmp_path, run):
    pytest.importorskip("fcntl")
    code = f"import utils; folder = utils.RunFolder({str(tmp_path)!r}); folder.__enter__(); "
    code += "print('here', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "here\n"
    for name in (".123.last.pth", ".123.photo.png"):
        (tmp_path / name).write_text("half")
    code, _, err = run(train, *flags_of(data, tmp_path))
    assert code == 2 and "--out-dir" in err and not (tmp_path / "last.pth").exists()
    assert (tmp_path / ".123.last.pth").exists()
    other.kill()
    other.communicate()
    assert run(train, *flags_of(data, tmp_path), "--epochs", 1)[0] == 0
    assert not (tmp_path / ".123.last.pth").exists() and (tmp_path / ".123.photo.png").exists()


def test_what_may_not_change_on_resume_is_refused_and_what_may_is_named(data, straight, tmp_path, run):
    shutil.copytree(straight(), tmp_path / "out")
    path = tmp_path / "out/last.pth"
    state = torch.load(path)
    utils.save_checkpoint(dict(state, processes=4), path)
    code, _, err = run(train, "--resume", "--epochs", 3, "--out-dir", tmp_path / "out")
    assert code == 2 and "batches of 4 processes, and would now of 1:" in err
    utils.save_checkpoint(dict(state, optimizer={"state": {}, "param_groups": []}), path)
    code, _, err = run(train, "--resume", "--epochs", 3, "--out-dir", tmp_path / "out")
    assert code == 2 and "last.pth does not fit the run" in err
    utils.save_checkpoint(dict(state, torch="1.0", code="abc"), path)
    code, out, _ = run(train, "--resume", "--epochs", 3, "--out-dir", tmp_path / "out")
    assert code == 0 and "note: torch is" in out and "it was 1.0" in out and "it was abc" in out


@pytest.mark.plots
def test_a_complete_run_is_drawn_again_and_left_as_it_is(straight, tmp_path, run):
    shutil.copytree(straight(), tmp_path / "out")
    for name in ("history.jsonl", "miou.png", "confusion_matrix.png"):
        (tmp_path / "out" / name).unlink(missing_ok=True)
    code, out, _ = run(train, "--resume", "--out-dir", tmp_path / "out")
    assert code == 0 and "larger --epochs" in out and "best epoch" in out
    rows = [json.loads(line) for line in (tmp_path / "out/history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and (tmp_path / "out/confusion_matrix.png").exists()
    same_run(straight(), tmp_path / "out")


@pytest.mark.parametrize("script", ["train", pytest.param("evaluate", marks=pytest.mark.long)])
def test_a_worker_that_dies_is_reported_with_its_file(data, straight, tmp_path, run, monkeypatch, script):
    original = readers.read_mask

    def read_mask(path, table):
        if path.name == "05.png" and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, table)

    monkeypatch.setattr(readers, "read_mask", read_mask)
    if script == "train":
        flags = flags_of(data, tmp_path / "out", "--workers", 2)
    else:
        flags = ["--model", straight() / "best_model_iou.pth", "--split", "all", "--out-dir", tmp_path]
    code, _, err = run(__import__(script), *flags)
    if logging._lock._is_owned():  # torch's SIGCHLD handler raised while this process forked other workers
        logging._lock.release()
    assert code == 2 and "05.png" in err and "process that loads data died" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "text, reason",
    [
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "died (exited unexpectedly)"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is", "the shared memory is full"),
    ],
    ids=["gone", "shared memory"],
)
def test_the_ends_of_workers_are_told_apart(text, reason):
    with pytest.raises(InputError, match="no file") as error, loading.naming_files():
        raise RuntimeError(text)
    assert reason in str(error.value)
    with pytest.raises(InputError, match="a process that loads data died"), loading.naming_files():
        raise ConnectionResetError
    for other in (RuntimeError("other"), BrokenPipeError("other")):  # `train.py | head` breaks a pipe
        with pytest.raises(type(other), match="other"), loading.naming_files():
            raise other


def test_a_damaged_validation_image_costs_no_epoch(data, straight, tmp_path, run, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "data")
    original = train.engine.evaluate

    def evaluate(model, batches, *args, **options):
        if not (tmp_path / "whole").exists():
            victim = batches.iterable.dataset.samples[1].image
            shutil.copy(victim, tmp_path / "whole")
            victim.write_bytes((tmp_path / "whole").read_bytes()[:60])
            run.victim = victim
        return original(model, batches, *args, **options)

    monkeypatch.setattr(train.engine, "evaluate", evaluate)
    code, out, err = run(train, *flags_of(copy, tmp_path / "out"))
    assert code == 2 and run.victim.name in err and "saved in epoch 1 after 3 steps" in out
    shutil.copy(tmp_path / "whole", run.victim)
    assert run(train, "--resume", "--out-dir", tmp_path / "out")[0] == 0
    same_run(straight(), tmp_path / "out")


def test_ctrl_c_while_a_checkpoint_is_written_is_ctrl_c(tmp_path, monkeypatch):
    utils.save_checkpoint({"a": torch.zeros(9)}, tmp_path / "last.pth")

    def interrupted(checkpoint, file):
        with torch.serialization._open_zipfile_writer(file) as archive:
            archive.write_record("x", b"1" * 99, 99)
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        utils.save_checkpoint({}, tmp_path / "last.pth")
    assert torch.load(tmp_path / "last.pth")["a"].numel() == 9
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]


@pytest.mark.long
def test_patience_ends_a_run_that_no_longer_gets_better_and_more_of_it_continues(tmp_path, run):
    flags = ["--dataset", "folder", "--data-root", write_folder(tmp_path / "data"), "--backbone", "vit_tiny"]
    flags += ["--weights", "none", "--unfreeze", "all", "--lr", 1e-12, "--imgsz", 30, 44, "--workers", 0]
    flags += ["--device", "cpu", "--out-dir", tmp_path / "out"]
    code, text, err = run(train, *flags, "--epochs", 40, "--patience", 2)
    rows = (tmp_path / "out/history.jsonl").read_text().splitlines()
    assert code == 0 and 3 <= len(rows) < 40, err
    assert f"no better validation mIoU for 2 epochs: stopped after epoch {len(rows)} of 40" in text
    code, text, _ = run(train, "--resume", "--out-dir", tmp_path / "out")
    assert code == 0 and "give a larger --patience, or 0, to continue" in text
    assert len((tmp_path / "out/history.jsonl").read_text().splitlines()) == len(rows)
    code, text, err = run(train, "--resume", "--patience", 0, "--epochs", len(rows) + 1, "--out-dir",
                          tmp_path / "out")
    assert code == 0 and len((tmp_path / "out/history.jsonl").read_text().splitlines()) == len(rows) + 1, err


@pytest.mark.parametrize(("mious", "patience", "stalled"), [
    ([], 3, False), ([0.1], 1, False), ([0.1, 0.1], 1, True), ([0.1, 0.2], 1, False), ([0.2, 0.1], 2, False),
    ([0.2, 0.1, 0.2], 2, True), ([0.2, 0.1, 0.2], 0, False), ([float("nan")] * 3, 2, True)], ids=str)
def test_a_run_has_stalled_after_epochs_without_a_better_miou(mious, patience, stalled):
    history = [dict(epoch=number, val_miou=miou) for number, miou in enumerate(mious, 1)]
    assert metrics.has_stalled(history, patience) == stalled
