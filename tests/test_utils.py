"""Device choice with fakes, atomic files, runs set aside, colours and plots."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import blocks
from PIL import Image

import utils
from config import InputError
from utils import Precision, overlay, pick_device

CLASSES = [("background", (0, 0, 0)), ("cat", (255, 0, 0)), ("a dog with a long name", (0, 200, 100))]


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


def test_an_earlier_run_is_moved_and_other_folders_stay(tmp_path):
    assert utils.set_aside(tmp_path) is None
    for number in range(3):
        (tmp_path / "last.pth").write_text(str(number))
        (tmp_path / "valid_preds").mkdir()
        (tmp_path / "inference_results_image").mkdir(exist_ok=True)
        place = utils.set_aside(tmp_path)
        assert (place / "last.pth").read_text() == str(number) and (place / "valid_preds").is_dir()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["inference_results_image", "previous"]
    assert len(list((tmp_path / "previous").iterdir())) == 3


def test_an_out_dir_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out-dir"):
        utils.make_folder(tmp_path / "file/below")


@pytest.mark.parametrize("keep", [None, 0])
def test_overlay_equals_a_loop(keep):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (9, 13, 3), dtype=np.uint8)
    pred = generator.integers(0, 3, (9, 13), dtype=np.uint8)
    out = overlay(image, pred, utils.colour_table(CLASSES), 0.4, keep)
    for row, column in np.ndindex(9, 13):
        id = pred[row, column]
        want = image[row, column] if id == keep else 0.6 * image[row, column] + 0.4 * np.array(CLASSES[id][1])
        assert np.abs(out[row, column] - want).max() <= 0.51


def test_mask_png_holds_class_ids_and_the_palette(tmp_path):
    pred = blocks(17, 23, (0, 1, 2))
    utils.save_mask(pred, CLASSES, tmp_path / "mask.png")
    mask = Image.open(tmp_path / "mask.png")
    assert mask.mode == "P" and (np.array(mask) == pred).all()
    assert (np.array(mask.convert("RGB")) == utils.colour_table(CLASSES)[pred]).all()


@pytest.mark.parametrize("count", [1, 2, 150])
def test_legend_shows_every_colour(count):
    classes = [(f"class {id}", (id, 255 - id, 7)) for id in range(count)]
    picture = utils.legend(classes)
    for _, colour in classes:
        assert (picture == colour).all(2).any()


def test_side_by_side_takes_images_of_any_size():
    rows = [
        (np.zeros((*size, 3), np.uint8), blocks(*size, (0, 1)), blocks(*size, (0, 2)))
        for size in ((40, 90), (333, 71), (1, 1), (3, 9000))
    ]
    picture = utils.side_by_side(rows, CLASSES)
    assert picture.ndim == 3 and picture.dtype == np.uint8
    assert (picture == (255, 0, 0)).all(2).any() and (picture == (0, 200, 100)).all(2).any()


def test_plots_are_drawn_with_absent_classes_and_a_first_epoch(tmp_path):
    row = {f"{part}_{name}": 0.5 for part in ("train", "val") for name in ("loss", "accuracy", "miou")}
    history = [dict(row, epoch=1), dict(row, epoch=2, val_miou=math.nan, val_loss=math.nan)]
    for rows in (history[:1], history, history[1:]):
        utils.plot_history(rows, tmp_path)
    utils.plot_per_class_iou([0.5, math.nan, 0.0], CLASSES, tmp_path / "per_class_iou.png")
    utils.plot_confusion(
        np.array([[5, 1, 0], [0, 0, 0], [2, 2, 2]]), CLASSES, tmp_path / "confusion_matrix.png"
    )
    for path in tmp_path.iterdir():
        assert Image.open(path).size[0] > 300
    assert len(list(tmp_path.iterdir())) == 5


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


def test_a_window_without_a_display_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(InputError, match="--show needs a display"):
        utils.require_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    utils.require_display()


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
