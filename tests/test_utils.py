"""Device choice with fakes, atomic files, the folder of a run, errors as one line."""

import json
import math

import pytest
import torch

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


@pytest.mark.parametrize(
    ("kind", "capability", "want"),
    [
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda", (9, 0), torch.bfloat16),
        ("cuda", (7, 5), torch.float16),
        ("mps", None, None),
    ],
)
def test_autocast_type_follows_the_device(monkeypatch, kind, capability, want):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert utils.best_dtype(torch.device(kind)) is want


@pytest.mark.parametrize(("able", "want"), [({}, None), ({"avx512_bf16": True}, torch.bfloat16)])
def test_cpu_autocast_needs_bf16_instructions(monkeypatch, able, want):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    precision = Precision("auto", torch.device("cpu"))
    assert precision.dtype is want
    with precision.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (want or torch.float32)


def test_only_fp16_scales_gradients():
    cpu = torch.device("cpu")
    assert [Precision(name, cpu).scaler.is_enabled() for name in ("fp16", "bf16", "off")] == [
        True,
        False,
        False,
    ]


def test_a_failed_write_leaves_the_earlier_file_and_no_rubbish(tmp_path):
    path = tmp_path / "history.jsonl"
    utils.save_json_lines([{"epoch": 1, "x": math.nan}], path)

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        utils.write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"epoch": 1, "x": None}
    assert [item.name for item in tmp_path.iterdir()] == ["history.jsonl"]


def a_run(path, *names, resume=False):
    """Do as a run does that writes these files or folders."""
    with RunFolder(path, resume) as folder:
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(str(names))
        folder.save()
    return folder


def test_whatever_an_earlier_run_wrote_is_moved_and_nothing_else(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "photo.jpg").write_text("mine")
    for number in range(3):
        folder = a_run(tmp_path, "last.pth", f"new_kind_{number}/events", "valid_preds/epoch_001.png")
        (tmp_path / "inference_results_image").mkdir(exist_ok=True)  # of another script, after the run
        a_run(tmp_path / "other", "last.pth")  # a run of its own below it
        (tmp_path / "cache").mkdir(exist_ok=True)
        if number:
            moved = {path.name for path in folder.moved.iterdir()}
            assert moved == {"last.pth", f"new_kind_{number - 1}", "valid_preds"}
    kept = {"notes", "photo.jpg", "inference_results_image", "other", "cache", "previous"}
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} - kept == {
        "last.pth", "new_kind_2", "valid_preds"}
    assert len(list((tmp_path / "previous").iterdir())) == 2 and (tmp_path / "other/last.pth").exists()


def test_a_run_that_fails_before_it_saves_gives_the_earlier_one_back(tmp_path, capsys):
    a_run(tmp_path, "last.pth", "events/1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError), RunFolder(tmp_path):
        assert not (tmp_path / "last.pth").exists()
        raise InputError("a bad image")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert "moved back" in capsys.readouterr().out and not (tmp_path / "previous").exists()
    with pytest.raises(InputError), RunFolder(tmp_path):  # it has begun a file of the same name
        (tmp_path / "events").mkdir()
        (tmp_path / "events/1").write_text("of the run that failed")
        raise InputError("a bad image")
    assert {path: path.read_bytes() for path in before} == before
    (failed,) = (tmp_path / "previous").iterdir()
    assert failed.name.endswith("_failed") and (failed / "events/1").read_text() == "of the run that failed"
    with pytest.raises(InputError), RunFolder(tmp_path) as folder:  # once it has saved, it is a run
        (tmp_path / "last.pth").write_text("new")
        folder.save()
        raise InputError("a bad image")
    assert (tmp_path / "last.pth").read_text() == "new" and (folder.moved / "events/1").exists()


def test_a_resumed_run_stays_where_it_is_and_owns_what_it_adds(tmp_path):
    a_run(tmp_path, "last.pth")
    (tmp_path / "mine.txt").write_text("")
    a_run(tmp_path, "events/1", resume=True)
    assert (tmp_path / "last.pth").exists() and not (tmp_path / "previous").exists()
    folder = a_run(tmp_path, "last.pth")
    assert {path.name for path in folder.moved.iterdir()} == {"last.pth", "events"}
    assert (tmp_path / "mine.txt").exists()


def test_runs_of_earlier_versions_are_known_by_their_files(tmp_path):
    for name in ("last.pth", "miou.png", "mine.txt"):
        (tmp_path / name).write_text("")
    folder = a_run(tmp_path, "last.pth")
    assert {path.name for path in folder.moved.iterdir()} == {"last.pth", "miou.png"}


def test_an_out_dir_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out-dir"):
        utils.make_folder(tmp_path / "file/below")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad mask"), 2),
        (FloatingPointError("the loss is nan"), 1),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device", "outputs/last.pth"), 2),
        (
            InputError(
                "Caught InputError in DataLoader worker process 0.\nTraceback\nconfig.InputError: bad mask"
            ),
            2,
        ),
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
    if isinstance(error, InputError):
        assert printed == "error: bad mask"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    ],
)
def test_out_of_memory_is_one_line(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        utils.run_main(main)
    assert stop.value.code == 2 and "--batch-size" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [ZeroDivisionError, RuntimeError])
def test_a_fault_of_ours_keeps_its_traceback(fault):
    def main():
        raise fault

    with pytest.raises(fault):
        utils.run_main(main)


def test_a_picture_that_cannot_be_written_says_why(tmp_path):
    def write(path):
        raise OSError("encoder error -2 when writing image file")  # as PIL does, without a number

    with pytest.raises(OSError, match="encoder error -2") as error:
        utils.write_atomically(tmp_path / "a.png", write)
    assert error.value.filename == str(tmp_path / "a.png") and not list(tmp_path.iterdir())
