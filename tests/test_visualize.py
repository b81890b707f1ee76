"""Overlays against a loop, palette masks, legends, plots."""

import math

import numpy as np
import pytest
import visualize
from conftest import blocks
from PIL import Image

from config import InputError
from visualize import overlay

CLASSES = [("background", (0, 0, 0)), ("cat", (255, 0, 0)), ("a dog with a long name", (0, 200, 100))]


@pytest.mark.parametrize("keep", [None, 0])
def test_overlay_equals_a_loop(keep):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (9, 13, 3), dtype=np.uint8)
    pred = generator.integers(0, 3, (9, 13), dtype=np.uint8)
    out = overlay(image, pred, visualize.color_table(CLASSES), 0.4, keep)
    for row, column in np.ndindex(9, 13):
        id = pred[row, column]
        want = image[row, column] if id == keep else 0.6 * image[row, column] + 0.4 * np.array(CLASSES[id][1])
        assert np.abs(out[row, column] - want).max() <= 0.51


def test_mask_png_holds_class_ids_and_the_palette(tmp_path):
    pred = blocks(17, 23, (0, 1, 2))
    visualize.save_mask(pred, CLASSES, tmp_path / "mask.png")
    mask = Image.open(tmp_path / "mask.png")
    assert mask.mode == "P" and (np.array(mask) == pred).all()
    assert (np.array(mask.convert("RGB")) == visualize.color_table(CLASSES)[pred]).all()


@pytest.mark.parametrize("count", [1, 2, 150])
def test_legend_shows_every_color(count):
    classes = [(f"class {id}", (id, 255 - id, 7)) for id in range(count)]
    picture = visualize.legend(classes)
    for _, color in classes:
        assert (picture == color).all(2).any()


def test_side_by_side_takes_images_of_any_size():
    rows = [
        (np.zeros((*size, 3), np.uint8), blocks(*size, (0, 1)), blocks(*size, (0, 2)))
        for size in ((40, 90), (333, 71), (1, 1), (3, 9000))
    ]
    picture = visualize.side_by_side(rows, CLASSES)
    assert picture.ndim == 3 and picture.dtype == np.uint8
    assert (picture == (255, 0, 0)).all(2).any() and (picture == (0, 200, 100)).all(2).any()


def test_plots_are_drawn_with_absent_classes_and_a_first_epoch(tmp_path):
    row = {f"{part}_{name}": 0.5 for part in ("train", "val") for name in ("loss", "accuracy", "miou")}
    history = [dict(row, epoch=1), dict(row, epoch=2, val_miou=math.nan, val_loss=math.nan)]
    for rows in (history[:1], history, history[1:]):
        visualize.plot_history(rows, tmp_path)
    visualize.plot_per_class_iou([0.5, math.nan, 0.0], CLASSES, tmp_path / "per_class_iou.png")
    visualize.plot_confusion(
        np.array([[5, 1, 0], [0, 0, 0], [2, 2, 2]]), CLASSES, tmp_path / "confusion_matrix.png"
    )
    for path in tmp_path.iterdir():
        assert Image.open(path).size[0] > 300
    assert len(list(tmp_path.iterdir())) == 5


def test_a_window_without_a_display_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(InputError, match="--show needs a display"):
        visualize.require_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    visualize.require_display()
