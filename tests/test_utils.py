"""Device choice with fakes, atomic files, the folder of a run, errors as one line."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
from unittest import mock

import pytest
import torch
from conftest import ROOT, refused

import utils
from config import InputError
from utils import Precision, RunFolder, pick_device


@pytest.mark.parametrize(("cuda", "mps", "want"), [(2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")])
def test_auto_device_is_cuda_then_mps_then_cpu(monkeypatch, cuda, mps, want):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == want
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:7", "mps", "xpu", "cuda:x"])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"--device {name} "):
        pick_device(name)


@pytest.mark.parametrize(("kind", "capability", "want"), [
    ("cuda", (9, 0), torch.bfloat16), ("cuda", (7, 5), torch.float16), ("mps", None, None)])
def test_autocast_type_follows_the_device(monkeypatch, kind, capability, want):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert utils.best_dtype(torch.device(kind)) is want


@pytest.mark.parametrize(("able", "want"), [({}, None), ({"avx512_bf16": True}, torch.bfloat16)])
def test_cpu_autocast_needs_bf16_instructions(monkeypatch, able, want):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    with Precision("auto", torch.device("cpu")).autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (want or torch.float32)


@pytest.mark.parametrize("name", utils.PRECISIONS)
def test_only_fp16_scales_gradients(name):
    assert Precision(name, torch.device("cpu")).scaler.is_enabled() == (name == "fp16")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("encoder error -2")])
def test_a_failed_write_says_why_and_leaves_the_earlier_file_and_no_rubbish(tmp_path, error):
    path = tmp_path / "history.jsonl"
    utils.save_json_lines([{"epoch": 1, "x": math.nan}], path)

    def fail(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(OSError, match=error.strerror or str(error)) as raised:  # PIL's have a text alone
        utils.write_atomically(path, fail)
    assert raised.value.filename == str(path)
    assert json.loads(path.read_text()) == {"epoch": 1, "x": None}
    assert [item.name for item in tmp_path.iterdir()] == ["history.jsonl"]


def write_run(path, *names, resume=False):
    """Do as a run does that writes these files or folders."""
    with RunFolder(path, resume) as folder:
        folder.make_room()
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(str(names))
        folder.make_room()
        assert folder.saved == (path / "last.pth").exists()


def test_an_earlier_run_is_moved_to_another_disk_too(tmp_path, monkeypatch):
    def rename(*args):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    write_run(tmp_path, "last.pth", "valid_preds/epoch_001.png")
    monkeypatch.setattr(os, "rename", rename)
    write_run(tmp_path, "last.pth", "config.json")
    (earlier,) = (tmp_path / "previous").iterdir()
    assert (earlier / "valid_preds/epoch_001.png").exists() and "epoch" in (earlier / "last.pth").read_text()
    assert not (tmp_path / "valid_preds").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, capfd, code):
    fcntl = pytest.importorskip("fcntl")

    def flock(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    write_run(tmp_path, "last.pth")
    out, err = capfd.readouterr()
    assert (tmp_path / "last.pth").exists() and not err
    assert out.count("\n") == (code != errno.ENOSYS)  # filelock has another kind of lock for this one
    assert code == errno.ENOSYS or str(tmp_path) in out


def test_locks_that_are_not_implemented_are_none(tmp_path, monkeypatch, capsys):
    """As filelock says of some file systems, by its version."""
    monkeypatch.setattr(utils.FileLock, "_acquire", mock.Mock(side_effect=NotImplementedError("no flock")))
    write_run(tmp_path, "last.pth")
    assert str(tmp_path) in capsys.readouterr().out


def test_a_lock_is_waited_for_as_long_as_asked_and_open_to_all_users(tmp_path):
    held, leave = threading.Event(), threading.Event()

    def hold():
        with utils.FileLock(tmp_path / ".other"):
            held.set()
            leave.wait(20)

    threading.Thread(target=hold, daemon=True).start()
    lock = utils.FileLock(tmp_path / ".other")
    assert held.wait(20)
    with pytest.raises(utils.Timeout):
        utils.acquire(lock, "--flag", timeout=0)
    threading.Timer(0.2, leave.set).start()
    utils.acquire(lock, "--flag")
    assert lock.is_locked and leave.is_set()
    lock.release()
    umask = os.umask(0o022)
    try:
        with RunFolder(tmp_path) as folder:
            assert os.stat(folder.lock.lock_file).st_mode & 0o777 == 0o666
    finally:
        os.umask(umask)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_lock_that_cannot_be_had_names_its_file(tmp_path, monkeypatch, code):
    def opened(lock, *args):
        raise OSError(code, os.strerror(code), lock.lock_file)

    monkeypatch.setattr(utils.FileLock, "_acquire", opened)
    with refused("--out-dir", tmp_path / ".lock", os.strerror(code), "another folder"):
        write_run(tmp_path, "last.pth")


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def test_an_earlier_run_is_moved_and_nothing_else(tmp_path):
    mine = ("notes/a.txt", "photo.jpg", ".123.photo.png", "other/last.pth", "cache/c.bin")
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    for number in range(3):
        write_run(tmp_path, "last.pth", "valid_preds/epoch_001.png", f"tensorboard/{number}")
    assert {name for name in files_in(tmp_path) if not name.startswith("previous/")} == {
        *mine, "last.pth", "valid_preds/epoch_001.png", "tensorboard/2"}
    earlier = list((tmp_path / "previous").iterdir())
    assert len(earlier) == 2  # though they ended within the same second
    assert {len(files_in(folder)) for folder in earlier} == {3}


def test_a_run_that_fails_before_it_writes_and_a_resumed_run_move_nothing(tmp_path):
    write_run(tmp_path, "last.pth", "wandb/1")
    before = files_in(tmp_path)
    (tmp_path / ".123.last.pth").write_text("half")  # of a run that was killed
    with pytest.raises(InputError), RunFolder(tmp_path) as folder:
        assert not folder.saved
        raise InputError("a bad image")
    assert files_in(tmp_path) == before
    write_run(tmp_path, "miou.png", resume=True)
    assert set(files_in(tmp_path)) == {"last.pth", "wandb/1", "miou.png"}


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    with RunFolder(tmp_path), pytest.raises(InputError, match="--out-dir"), RunFolder(tmp_path):
        pass
    with RunFolder(tmp_path):
        pass


def test_an_out_dir_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with refused("--out-dir", tmp_path / "file/below"):
        utils.make_folder(tmp_path / "file/below")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with refused("--flag", tmp_path, "not writable"):
        utils.make_folder(tmp_path, "--flag")


@pytest.mark.parametrize(("processes", "is_main"), [("2", False), ("1", True)])
def test_which_process_is_the_main_one_is_known_before_they_meet(monkeypatch, processes, is_main):
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setenv("RANK", "1")
    assert utils.is_main_process() == is_main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad mask"), 2),
        (FloatingPointError("the loss is nan"), 1),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device", "outputs/last.pth"), 2),
        (InputError("Caught InputError in DataLoader worker process 0.\nTraceback\nconfig.InputError: bad "
                    "mask"), 2),
        (torch.OutOfMemoryError("CUDA out of memory"), 2),
        (MemoryError(), 2),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 2),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), 2),
        (utils.Stopped(15, "stopped"), 143),
    ],
)
def test_errors_become_one_line_and_an_exit_code(capsys, error, code):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        utils.run_main(main)
    assert stop.value.code == code
    printed = capsys.readouterr().err.strip()
    assert "\n" not in printed and "Traceback" not in printed
    assert not isinstance(error, InputError) or printed == "error: bad mask"
    assert not utils.is_out_of_memory(error) or "--batch-size" in printed


@pytest.mark.parametrize("fault", [ZeroDivisionError, RuntimeError, OSError])
def test_a_fault_of_ours_keeps_its_traceback(fault):
    def main():
        raise fault

    with pytest.raises(fault):
        utils.run_main(main)


# --- signals ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_script_with_a_line_and_leaves_nothing_half_done(tmp_path, number):
    """Even while it writes a file."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import utils
def write(path):
    path.write_text("half")
    os.kill(os.getpid(), {int(number)})
    import time; time.sleep(20)
utils.run_main(lambda: utils.write_atomically("result", write))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 128 + number and "Traceback" not in process.stderr
    assert process.stderr.count("stopped") == 1 and not list(tmp_path.iterdir())


def test_a_script_that_is_started_to_survive_interrupts_does(tmp_path):
    """As by `nohup` or `&` in a script: what is ignored stays ignored."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
signal.signal(signal.SIGINT, signal.SIG_IGN)
import utils
utils.run_main(lambda: os.kill(os.getpid(), signal.SIGINT))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
