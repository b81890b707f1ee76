"""A run that is stopped, starved or robbed of its files goes on as if nothing had happened."""
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from attacks import same_run
from conftest import ROOT, call, write_folder
from test_scripts import OPTIONS, history_of, registered_options, train_flags

import checkpoint
import config
import metrics
import evaluate
import train
import utils
from config import InputError
from dataio import contents, dataloader, feature_cache, readers


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder data set of 12 images."""
    return write_folder(tmp_path_factory.mktemp("data"), count=12)


def flags_of(data, out, *more):
    """Return flags of a run of two epochs of three steps with augmentations; `more` may replace them."""
    if "--arch" in more:
        flags = ("--dataset", "folder", "--data-root", data, "--weights", "none", "--imgsz", 32, 32,
                 "--batch-size", 4, "--workers", 0, "--out-dir", out)
    else:
        flags = train_flags(data, out, "--imgsz", 28, 42, "--augment", "crop", "flip", "color")
    more = [data.parent / "cache" if flag == "CACHE" else flag for flag in more]
    return (*flags, "--epochs", 2, *more)


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


def doing_once(method, condition, action):
    """Return a method of Run that does something before its work, the first time condition(run) holds."""
    original, done = getattr(checkpoint.Run, method), []

    def changed(run, *args):
        if condition(run) and not done:
            done.append(action())
        original(run, *args)

    return changed


def at_step(number, action):
    """Return a Run.after_step that does something after optimizer step `number` of the run, once."""
    return doing_once("after_step", lambda run: run.state.step == number, action)


def in_validation(epoch, action):
    """Return a Run.after_batch that does something after the first batch of the validation of an epoch."""
    return doing_once("after_batch", lambda run: len(run.state.history) == epoch - 1, action)


def send(number):
    """Return a function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def command_in(err):
    """Return the words of the command that a message ends with."""
    return shlex.split(err[err.index("python train.py"):])


def contents_of(folder):
    """Return {path: content} of all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- signals ------------------------------------------------------------------------------------------------
COUNT = max(len(config.names(kind)) for kind in OPTIONS.values())
CASES = [
    *(pytest.param(registered_options(number), id=" ".join(registered_options(number)[1::2]),
                   marks=[pytest.mark.long] * (number > 2))
      for number in range(COUNT)),  # every registered value of these options
    ["--accumulate", 2, "--batch-size", 2],
    ["--steps", 8, "--train-images", 5],  # an epoch ends within a pass
    ["--head", "split-detail", "--split-blocks", 1, "--unfreeze", 2, "--cache-features", "CACHE",
     "--cache-views", 2],
    ["--head", "mask", "--split-blocks", 1, "--unfreeze", 0, "--backbone-lr-scale", 0.3],
    ["--augment", "flip", "--train-scale", "native", "--balance", 0.9],
    pytest.param(["--workers", 2], marks=pytest.mark.long),
    pytest.param(["--arch", "segformer_b0"], marks=pytest.mark.long),  # drops paths at random
]


@pytest.mark.parametrize("more", CASES, ids=lambda more: " ".join(map(str, more)))
def test_stops_in_an_epoch_and_in_validation_cost_nothing(data, straight, tmp_path, run, monkeypatch, more):
    uninterrupted, last = straight(*more), tmp_path / "last.pth"
    step = 1 + len(str(more)) % 5  # of six or more
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "after_step", at_step(step, send(signal.SIGTERM)))
        code, _, err = run(train, *flags_of(data, tmp_path, *more))
    state = torch.load(last)
    assert code == 143 and "--resume" in err and state["step"] == step
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "after_batch", in_validation(2, send(signal.SIGINT)))
        assert run(train, "--resume", "--out-dir", tmp_path)[0] == 130
    state = torch.load(last)
    assert state["epoch"] == len(state["history"]) == 1 and state["progress"]["images"] > 0
    with monkeypatch.context() as patch:  # no step is taken again
        patch.setattr(checkpoint.Run, "after_step", None)
        code, out, err = run(train, "--resume", "--out-dir", tmp_path)
    assert code == 0 and "images/s" not in out, err  # that of epoch 2 is not known
    row = history_of(tmp_path)[1]
    assert row["train_images_per_s"] is row["train_data_wait"] is None
    same_run(uninterrupted, tmp_path)


@pytest.mark.parametrize(("number", "cached"), [(signal.SIGINT, False), (signal.SIGTERM, True)], ids=str)
def test_a_stop_before_the_first_step_touches_nothing_and_names_its_command(
        data, straight, tmp_path, run, monkeypatch, number, cached):
    out, cache = shutil.copytree(straight(), tmp_path / "my run"), tmp_path / "cache"
    before = contents_of(out)
    flags = ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--imgsz", 42, 56]
    flags += ["--workers", 0, "--class-weights", "enet", "--epochs", 2, "--out-dir", out]
    flags += ["--cache-features", cache] if cached else []
    passes, forward = [], feature_cache.parts_that_fit

    def count_pass(*args):
        passes.append(len(passes) != 1 or send(number)())
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setitem(feature_cache.BATCH, "cpu", 2)
        patch.setattr(feature_cache, "parts_that_fit", count_pass)
        if not cached:
            patch.setattr(train, "count_pixels", lambda *args: send(number)())
        code, _, err = run(train, *flags)
    assert code == 128 + number and err.count("\n") == 2 and "--resume" not in err
    assert command_in(err) == ["python", "train.py", *map(str, flags)]
    assert before.items() <= contents_of(out).items()  # no previous/, at most cache/ is new
    if cached:  # the second run computes what the first one has not
        assert str(cache) in err.split("python train.py")[0]
        entries = sum(sums.count_nonzero() for sums in checksums(cache, "map"))
        assert entries == 4 * 2  # blocks, images of the first batch
        assert checksums(cache, "mask")[0].count_nonzero() == 2


def checksums(folder, kind):
    """Return the checksums of the entries of the files of a feature cache, 0 where there is none yet."""
    return [torch.from_file(str(path), size=path.stat().st_size // 8, dtype=torch.int64)
            for path in folder.glob(f"{kind}_*.sums")]


def test_a_stop_while_data_are_looked_for_names_the_command(data, tmp_path, run, monkeypatch):
    monkeypatch.setattr(train, "load_data", lambda *args: send(signal.SIGINT)())
    flags = flags_of(data, tmp_path / "out")
    code, _, err = run(train, *flags)
    assert code == 130 and err.count("\n") == 2 and "--resume" not in err
    assert command_in(err) == ["python", "train.py", *map(str, flags)] and not (tmp_path / "out").exists()


def test_a_second_signal_does_not_wait_for_the_step(data, tmp_path, run, monkeypatch):
    def twice():
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()

    for step, saved in ((1, False), (4, True)):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.Run, "after_step", at_step(step, twice))
            code, _, err = run(train, *flags_of(data, tmp_path / str(saved)))
        assert code == 143 and ("--resume" in err) == saved == ("python train.py" not in err)


@pytest.mark.long
@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_a_real_run_stopped_while_its_cache_fills_goes_on_by_the_line_it_prints(tmp_path, number, workers):
    data, out, cache = write_folder(tmp_path / "data", count=150), tmp_path / "out", tmp_path / "my cache"
    flags = ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--imgsz", 224, 224]
    flags += ["--epochs", 1, "--workers", workers, "--device", "cpu", "--out-dir", out]
    pipes = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "train.py", *map(str, flags), "--cache-features", str(cache)]
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    while not any(sums.any() for sums in checksums(cache, "mask")):
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, number)  # as a terminal and most batch systems do
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err.count("\n") == 2, err
    assert 0 < checksums(cache, "mask")[0].count_nonzero() < 120 and not (out / "last.pth").exists()
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*.json")}
    done = subprocess.run([sys.executable, *command_in(err)[1:]], timeout=300, **pipes)
    assert done.returncode == 0 and "0.00 GB of it new" in done.stdout, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (out / "last.pth").exists()


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


def test_a_run_that_nobody_asks_saves_every_ten_minutes_and_goes_on_after_it_was_killed(
        data, straight, tmp_path, run, monkeypatch):
    """Steps of four minutes: it is saved after the third of five."""
    seconds, original, more = [0.0], checkpoint.Run.after_step, ("--batch-size", 2)

    def after_step(run, progress):
        seconds[0] += 240
        if run.state.step == 5:
            raise ZeroDivisionError("killed")
        original(run, progress)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(checkpoint.Run, "after_step", after_step)
        patch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
        call(train, *flags_of(data, tmp_path, *more))
    assert torch.load(tmp_path / "last.pth")["step"] == 3
    assert run(train, "--resume", "--out-dir", tmp_path)[0] == 0
    same_run(straight(*more), tmp_path)


# --- resuming -----------------------------------------------------------------------------------------------
def test_more_epochs_on_resume_equal_a_longer_run(data, straight, tmp_path, run):
    assert run(train, *flags_of(data, tmp_path), "--epochs", 1)[0] == 0
    assert run(train, "--resume", "--epochs", 2, "--out-dir", tmp_path)[0] == 0
    assert not (tmp_path / "previous").exists()
    same_run(straight(), tmp_path)


@pytest.mark.parametrize(("change", "more", "named"), [
    (lambda path: path.unlink(), (), "last.pth"),
    (lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]), (), "last.pth"),
    (lambda path: shutil.copy(path.with_name("best_model_iou.pth"), path), (), "last.pth"),
    (lambda path: torch.save(dict(torch.load(path), processes=4), path), (), "--nproc-per-node 4"),
    (lambda path: torch.save(dict(torch.load(path), optimizer={"state": {}, "param_groups": []}), path), (),
     "last.pth"),
    (None, ("--data-root", "OTHER"), "--resume"),
    (None, ("--head", "linear"), "--head"),
    (None, ("--lr", 0.1), "--lr"),
    (None, ("--loss", "dice"), "--loss"),
], ids=["none", "cut", "the best one", "processes", "optimizer", "data", "head", "lr", "loss"])
def test_what_may_not_change_on_resume_is_refused(straight, tmp_path, run, change, more, named):
    out = shutil.copytree(straight(), tmp_path / "out")
    if change:
        change(out / "last.pth")
    if "OTHER" in more:
        more = ("--data-root", write_folder(tmp_path / "data", count=6))
    before = contents_of(out)
    code, _, err = run(train, "--resume", "--epochs", 3, "--out-dir", out, *more)
    assert code == 2 and named in err and err.count("\n") == 1
    assert contents_of(out) == before


def test_a_run_that_is_resumed_twice_loses_no_epoch(straight, tmp_path, run, monkeypatch):
    """A job that is started again while the old process still saves: last.pth is not read before its end."""
    out = shutil.copytree(straight(), tmp_path / "out")
    flags = [str(word) for word in ("--resume", "--epochs", 4, "--out-dir", out)]
    read_checkpoint, codes = train.read_checkpoint, []

    def read_after_another(*args):
        other = [sys.executable, ROOT / "train.py", *flags]
        codes.append(subprocess.run(other, capture_output=True).returncode)
        return read_checkpoint(*args)

    monkeypatch.setattr(train, "read_checkpoint", read_after_another)
    code, _, err = run(train, "--resume", "--epochs", 3, "--out-dir", out)
    assert codes == [2] and code == 0 and len(history_of(out)) == 3, err


def test_other_class_names_are_refused_and_named(data, tmp_path, run):
    folder, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    lines = ["ground", "cat", "dog"]
    (folder / "classes.txt").write_text("\n".join(lines))
    assert run(train, *flags_of(folder, out, "--epochs", 1))[0] == 0
    (folder / "classes.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    before = contents_of(out)
    code, _, err = run(train, "--resume", "--epochs", 2, "--out-dir", out)
    assert code == 2 and err.count("\n") == 1 and all(name in err for name in lines[:2])
    assert contents_of(out) == before


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_a_file_edited_at_its_size_and_time_is_noticed(data, tmp_path, run, folder, monkeypatch):
    """Its content tells, though its hash of before is kept: by --resume, evaluate.py and --cache-features."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    monkeypatch.setattr(contents, "SETTLED", -1 << 62)
    copy, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    for path in copy.glob("*/*.png"):  # files whose size says nothing
        Image.open(path).save(path, compress_level=0)
    flags = ("--dataset", "folder", "--data-root", copy, "--backbone", "vit_tiny", "--imgsz", 28, 42,
             "--workers", 0, "--epochs", 1, "--cache-features", tmp_path / "cache", "--out-dir")
    code, _, err = run(train, *flags, out)
    assert code == 0, err
    path = copy / folder / "00.png"
    before, pixels = path.stat(), np.array(Image.open(path))
    Image.fromarray(np.flipud(pixels)).save(path, compress_level=0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    code, _, err = run(train, "--resume", "--epochs", 2, "--out-dir", out)
    assert code == 2 and "data set" in err
    code, text, _ = run(evaluate, "--model", out / "last.pth", "--out-dir", tmp_path)
    assert code == 0 and "warning: files" in text
    losses = []
    for more in ((), ("--cache-features", tmp_path / "new")):
        assert run(train, *flags, tmp_path / f"again{len(losses)}", *more)[0] == 0
        losses.append(history_of(tmp_path / f"again{len(losses)}")[0]["train_loss"])
    assert losses[0] == losses[1] != history_of(out)[0]["train_loss"]


def test_what_may_change_on_resume_is_named(straight, tmp_path, run):
    out = shutil.copytree(straight(), tmp_path / "out")
    state = torch.load(out / "last.pth")
    utils.save_checkpoint(dict(state, device="cuda:7", torch="1.0", code="abc"), out / "last.pth")
    code, text, _ = run(train, "--resume", "--epochs", 3, "--out-dir", out)
    notes = [line for line in text.splitlines() if line.startswith("note:")]
    assert code == 0 and len(history_of(out)) == 3
    assert all(before in note for before, note in zip(("cuda:7", "1.0", "abc"), notes, strict=True))


@pytest.mark.plots
def test_a_complete_run_is_drawn_again_and_left_as_it_is(straight, tmp_path, run):
    shutil.copytree(straight(), tmp_path / "out")
    for name in ("history.jsonl", "miou.png", "confusion_matrix.png"):
        (tmp_path / "out" / name).unlink(missing_ok=True)
    code, out, _ = run(train, "--resume", "--out-dir", tmp_path / "out")
    assert code == 0 and "--epochs" in out
    assert [row["epoch"] for row in history_of(tmp_path / "out")] == [1, 2]
    assert (tmp_path / "out/confusion_matrix.png").exists()
    same_run(straight(), tmp_path / "out")


@pytest.mark.long
def test_patience_ends_a_run_that_no_longer_gets_better_and_more_of_it_continues(data, tmp_path, run):
    flags = train_flags(data, tmp_path, "--lr", 1e-12, "--epochs", 40, "--patience", 2)
    code, _, err = run(train, *flags)
    rows = history_of(tmp_path)
    assert code == 0 and 3 <= len(rows) < 40, err
    code, text, _ = run(train, "--resume", "--out-dir", tmp_path)
    assert code == 0 and "--patience" in text and len(history_of(tmp_path)) == len(rows)
    more = ["--patience", 0, "--epochs", len(rows) + 1]
    code, text, err = run(train, "--resume", *more, "--out-dir", tmp_path)
    assert code == 0 and len(history_of(tmp_path)) == len(rows) + 1, err


@pytest.mark.parametrize(("mious", "patience", "stalled"), [
    ([], 3, False), ([0.1], 1, False), ([0.1, 0.1], 1, True), ([0.1, 0.2], 1, False), ([0.2, 0.1], 2, False),
    ([0.2, 0.1, 0.2], 2, True), ([0.2, 0.1, 0.2], 0, False), ([float("nan")] * 3, 2, True)], ids=str)
def test_a_run_has_stalled_after_epochs_without_a_better_miou(mious, patience, stalled):
    history = [dict(epoch=number, val_miou=miou) for number, miou in enumerate(mious, 1)]
    assert metrics.has_stalled(history, patience) == stalled


# --- files that are lost, a full disk, dead workers -------------------------------------------------------
@pytest.mark.parametrize("step", [3, 4], ids=["validation", "training"])  # read the next image
def test_lost_images_cost_nothing_that_was_learned(data, straight, tmp_path, run, monkeypatch, step):
    images, out = shutil.copytree(data, tmp_path / "data") / "images", tmp_path / "out"
    hidden = tmp_path / "hidden"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "after_step", at_step(step, lambda: images.rename(hidden)))
        code, _, err = run(train, *flags_of(tmp_path / "data", out))
    assert code == 2 and ".png" in err and err.count("\n") == 1
    assert torch.load(out / "last.pth")["step"] == step
    hidden.rename(images)
    assert run(train, "--resume", "--out-dir", out)[0] == 0
    same_run(straight(), out)


def test_weights_that_are_not_finite_replace_no_others(data, straight, tmp_path, run, monkeypatch):
    """A gradient of nan shows in the next loss; a signal may come before it."""
    original = checkpoint.Run.after_step

    def after_step(run, progress):
        if run.state.step == 4:
            next(run.state.model.head.parameters()).data.fill_(float("nan"))
            run.stop.asked = signal.SIGTERM
        original(run, progress)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "after_step", after_step)
        code, _, err = run(train, *flags_of(data, tmp_path))
    assert code == 1 and "step 4" in err and err.count("\n") == 1
    assert torch.load(tmp_path / "last.pth")["step"] == 3
    assert run(train, "--resume", "--out-dir", tmp_path)[0] == 0
    same_run(straight(), tmp_path)


def test_processes_with_other_data_are_refused_before_anything_is_written(data, tmp_path, run, monkeypatch):
    monkeypatch.setattr(utils, "all_gather", lambda value: [value, dict(value, data_fingerprint="files:0")])
    code, _, err = run(train, *flags_of(data, tmp_path / "out"))
    assert code == 2 and "data" in err and err.count("\n") == 1
    assert not (tmp_path / "out/last.pth").exists()


def test_files_that_change_while_a_run_trains_are_noticed_at_its_end(data, tmp_path, run, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "data")

    def change():
        pixels = np.array(Image.open(copy / "masks/00.png"))
        Image.fromarray(np.flipud(pixels)).save(copy / "masks/00.png")

    for number, changes in enumerate((False, True)):
        with monkeypatch.context() as patch:
            if changes:
                patch.setattr(checkpoint.Run, "after_step", at_step(2, change))
            code, text, err = run(train, *flags_of(copy, tmp_path / f"out{number}", "--epochs", 1))
        assert code == 0 and ("warning: files" in text) == changes, err


def test_a_full_disk_is_one_line_and_leaves_complete_files(straight, tmp_path, run):
    resource = pytest.importorskip("resource")
    out = shutil.copytree(straight(), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # no file may be larger than this
        code, _, err = run(train, "--resume", "--epochs", 3, "--out-dir", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and str(out) in err and ".pth" in err and err.count("\n") == 1
    for name in ("last.pth", "best_model_iou.pth", "history.jsonl"):
        assert (out / name).read_bytes() == before[name]
    assert json.loads((out / "config.json").read_text())
    assert [path.name for path in out.glob(".*")] == [".lock"]
    assert run(train, "--resume", "--epochs", 3, "--out-dir", out)[0] == 0


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
        monkeypatch.setattr(evaluate, "FEW_IMAGES", 0)
        flags = ["--model", straight() / "best_model_iou.pth", "--split", "all", "--out-dir", tmp_path]
    code, _, err = run(__import__(script), *flags)
    if logging._lock._is_owned():  # torch's SIGCHLD handler raised while this process forked other workers
        logging._lock.release()
    assert code == 2 and "05.png" in err and err.count("\n") == 1


@pytest.mark.parametrize(("text", "named"), [
    ("DataLoader worker (pid(s) 7) exited unexpectedly", "exited unexpectedly"),
    ("DataLoader worker (pid 7) is killed by signal: Bus error. It is", "--shm-size"),
], ids=["gone", "memory"])
def test_the_ends_of_workers_are_told_apart(text, named):
    with pytest.raises(InputError, match=named), dataloader.naming_files():
        raise RuntimeError(text)
    with pytest.raises(InputError, match="--workers"), dataloader.naming_files():
        raise ConnectionResetError
    for other in (RuntimeError("other"), BrokenPipeError("other")):  # `train.py | head` breaks a pipe
        with pytest.raises(type(other), match="other"), dataloader.naming_files():
            raise other
