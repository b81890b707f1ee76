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


def test_side_by_side_takes_images_of_any_size():
    rows = [
        (np.zeros((*size, 3), np.uint8), blocks(*size, (0, 1)), blocks(*size, (0, 2)))
        for size in ((40, 90), (333, 71), (1, 1), (3, 9000))
    ]
    picture = visualize.side_by_side(rows, CLASSES)
    assert picture.ndim == 3 and picture.dtype == np.uint8
    assert (picture == (255, 0, 0)).all(2).any() and (picture == (0, 200, 100)).all(2).any()


def long_names(count, letters=200):
    """Return classes with long names that share their beginning; the first two are hard to draw."""
    names = [("surface marking, " * letters)[: letters - 4] + f" {id:03d}" for id in range(count)]
    names[:2] = ["W" * letters, "$\\broken{$ math\nin two lines of " + "m" * letters][:count]
    return [(name, ((id * 37) % 256, 255 - id, 7)) for id, name in enumerate(names)]


def test_short_names_keep_beginning_and_end_on_one_line():
    assert [visualize.short(name) for name in ("cat", " a \n dog", "m" * 32)] == ["cat", "a dog", "m" * 32]
    name = visualize.short("surface marking, painted, white, dashed, number 17")
    assert name == "surface marking,…shed, number 17" and len(name) == visualize.LONGEST_NAME
    assert len({visualize.short(name) for name, _ in long_names(254)}) == 254


@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # a file that another test left open
@pytest.mark.parametrize(
    ("count", "letters"), [(2, 200), (32, 200), pytest.param(254, 200, marks=pytest.mark.long)]
)
def test_plots_hold_long_names_and_many_classes(count, letters, tmp_path):
    classes, generator = long_names(count, letters), np.random.default_rng(0)
    ious = [math.nan if id == 1 else 0.5 for id in range(count)]
    counts = np.diag(generator.integers(0, 1000, count)) + generator.integers(0, 2, (count, count))
    visualize.plot_per_class_iou(ious, classes, tmp_path / "per_class_iou.png")
    visualize.plot_confusion(counts, classes, tmp_path / "confusion_matrix.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as file:
            pixels = np.array(file.convert("L"))
        assert min(pixels.shape) > 150 and max(pixels.shape) <= 4000
        assert (pixels[:, 0] == 255).all() and (pixels[-1] == 255).all()  # no name is cut off
        frame = np.flatnonzero((pixels < 128).mean(0) > 0.4)  # left and right edge of the plot
        assert frame[-1] - frame[0] > (600 if path.stem == "per_class_iou" else 200)  # names leave it room


@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # a file that another test left open
@pytest.mark.parametrize("epochs", [1, 300])
def test_curves_are_drawn_without_a_warning(epochs, tmp_path):
    row = {f"{split}_{name}": 0.5 for split in ("train", "val") for name in ("loss", "accuracy", "miou")}
    history = [dict(row, epoch=epoch) for epoch in range(1, epochs + 1)]
    history[-1] |= dict(val_miou=math.nan, val_loss=math.nan, val_labeled=1.0)
    visualize.plot_history(history, tmp_path)
    visualize.plot_head_scores(history, tmp_path)
    for name in ("loss", "accuracy", "miou", "head_scores"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 300


@pytest.mark.parametrize("count", [1, 32, 254])
def test_legends_of_long_names_stay_narrow_and_show_every_color(count):
    classes = long_names(count)
    picture = visualize.legend(classes)
    to_number = np.array([65536, 256, 1])
    assert np.isin([color @ to_number for _, color in classes], picture @ to_number).all()
    assert picture.shape[1] <= 2500 and picture.shape[0] <= 2000
    for left in (0, picture.shape[1] - 1):
        assert (picture[:, left] == 255).all()  # no name runs over the edge
    ids = np.arange(48, dtype=np.uint8).reshape(6, 8) % count
    drawn = visualize.side_by_side([(np.zeros((60, 80, 3), np.uint8), ids, ids)] * 4, classes)
    assert drawn.shape[1] == picture.shape[1] + 3 * 324


def test_a_window_without_a_display_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(InputError, match="--show needs a display"):
        visualize.require_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    visualize.require_display()
