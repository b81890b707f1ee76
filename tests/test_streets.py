"""The drawn street scenes: deterministic, exact masks, smooth in time; written completely or not at all."""

import numpy as np
import pytest
from PIL import Image

import utils
from dataio import streets
from datasets import STREETS

SMALL = dict(train=3, val=2, size=(48, 60), seed=5)


@pytest.fixture(scope="module")
def scenes():
    """Twenty scenes of (128, 160): images (20, 128, 160, 3) and masks (20, 128, 160)."""
    pairs = [streets.draw_scene(seed, (128, 160)) for seed in range(20)]
    return np.stack([image for image, _ in pairs]), np.stack([mask for _, mask in pairs])


def contents(root):
    """{path: bytes} of all files under root."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_seed_and_time_decide_the_scene(scenes):
    images, masks = scenes
    assert len({mask.tobytes() for mask in masks}) == len({image.tobytes() for image in images}) == len(masks)
    image, mask = streets.draw_scene(11, (128, 160))
    assert (image == images[11]).all() and (mask == masks[11]).all()
    assert (streets.draw_scene((0, 1), (64, 80))[1] != streets.draw_scene((1, 0), (64, 80))[1]).any()
    clip = streets.draw_clip(11, (128, 160), frames=2, fps=10)
    assert iter(clip) is clip
    for index, (image, mask) in enumerate(clip):
        expected = streets.draw_scene(11, (128, 160), time=index / 10)
        assert (image == expected[0]).all() and (mask == expected[1]).all()
    assert index == 1 and (image != images[11]).any()


@pytest.mark.parametrize("size", [(101, 143), (64, 64), (33, 200), (200, 33), (8, 8)])
def test_any_size(size):
    image, mask = streets.draw_scene(2, size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
    assert mask.shape == size and mask.dtype == np.uint8 and mask.max() <= 6


def test_size_changes_only_the_sampling():
    _, small = streets.draw_scene(4, (96, 120))
    _, large = streets.draw_scene(4, (192, 240))
    assert (small == large[::2, ::2]).mean() > 0.95


def test_every_class_has_its_share_and_is_in_most_scenes(scenes):
    _, masks = scenes
    shares = np.stack([np.bincount(mask.ravel(), minlength=7) / mask.size for mask in masks])
    assert shares.shape == (20, 7) and shares.mean(0).min() >= 0.02, shares.mean(0)
    assert ((shares > 0.002).mean(0) > 0.6).all(), (shares > 0.002).mean(0)


def test_outlines_in_the_image_are_those_of_the_mask(scenes):
    """The image changes more along the outlines of its mask than along those of the mask moved 6 pixels."""
    images, masks = scenes
    steps = np.abs(np.diff(images.astype(float), axis=2)).mean(-1)
    there = steps[np.diff(masks, axis=2) != 0].mean()
    moved = [np.roll(masks, shift, axis) for axis in (1, 2) for shift in (-6, 6)]
    moved = [steps[np.diff(other, axis=2) != 0].mean() for other in moved]
    assert there > 1.8 * max(moved), (there, moved)


def test_colors_tell_sky_road_and_grass_apart_but_not_walls_cars_and_shirts(scenes):
    images, masks = scenes
    means = [images[masks == kind].mean(0) for kind in range(7)]
    sky, road, grass = means[streets.SKY], means[streets.ROAD], means[streets.GRASS]
    assert sky.mean() > road.mean() + 20 and sky[2] > sky[0] + 10
    assert np.ptp(road) < 20
    assert grass[1] > max(grass[0], grass[2]) + 25
    colors = images // 32 @ np.array([64, 8, 1])   # one of 512
    for kind, other in ((streets.CAR, streets.BUILDING), (streets.PERSON, streets.BUILDING)):
        shared = np.isin(colors[masks == kind], colors[masks == other]).mean()
        assert shared > 0.4, (kind, other, shared)


@pytest.mark.parametrize("seed", [6, 10])
def test_clips_move_smoothly(seed):
    """Over 8 seconds no class gains or loses much of the picture within a fifth of a second; all moves on."""
    scene = streets.describe(seed)
    masks = np.stack([streets.render(scene, (48, 60), step / 5)[1] for step in range(40)])
    shares = np.array([np.bincount(mask.ravel(), minlength=7) / mask.size for mask in masks])
    assert np.abs(np.diff(shares, axis=0)).max() < 0.09
    changes = (masks[1:] != masks[:-1]).mean((1, 2))
    assert changes.max() < 0.2 and (masks[0] != masks[10]).mean() > 1.5 * changes[:10].mean() > 0


def test_data_set_on_disk(tmp_path):
    root = tmp_path / "streets"
    streets.write_streets(root, STREETS, **SMALL)
    names = {f"{split}/{kind}/{index:05d}.png" for split in ("train", "val") for kind in ("images", "masks")
             for index in range(SMALL[split])}
    assert set(contents(root)) == names | {"classes.txt", "streets.json"}
    assert list(tmp_path.iterdir()) == [root]
    first = STREETS[0]
    assert (root / "classes.txt").read_text().splitlines()[0] == " ".join(map(str, [first[0], *first[1]]))
    mask = Image.open(root / "val/masks/00001.png")
    assert mask.mode == "P" and mask.size == (60, 48)
    assert mask.getpalette()[:21] == [value for _, rgb in STREETS for value in rgb]
    image, drawn = streets.draw_scene((5, 1, 1), (48, 60))
    assert (np.array(mask) == drawn).all()
    assert (np.array(Image.open(root / "val/images/00001.png")) == image).all()


@pytest.mark.long
def test_processes_write_what_one_process_writes(tmp_path, monkeypatch):
    for name, cpus in (("many", 2), ("single", 1)):
        monkeypatch.setattr(streets.os, "cpu_count", lambda cpus=cpus: cpus)
        streets.write_streets(tmp_path / name, STREETS, train=64, val=0, size=(16, 20), seed=5)
    assert contents(tmp_path / "many") == contents(tmp_path / "single")


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def stop(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(streets, "write_pair", stop)
    with pytest.raises(KeyboardInterrupt):
        streets.write_streets(tmp_path / "streets", STREETS, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_is_current_and_replacing(tmp_path, monkeypatch):
    root = tmp_path / "streets"
    assert not streets.is_current(root, **SMALL)
    streets.write_streets(root, STREETS, **SMALL)
    assert streets.is_current(root, **SMALL)
    for other in (dict(size=(60, 48)), dict(seed=6), dict(train=4), dict(val=1)):
        assert not streets.is_current(root, **{**SMALL, **other})
    with monkeypatch.context() as patch:
        patch.setattr(streets, "VERSION", streets.VERSION + 1)
        assert not streets.is_current(root, **SMALL)
    (root / "train/masks/00002.png").unlink()
    assert not streets.is_current(root, **SMALL)
    streets.write_streets(root, STREETS, **SMALL)
    assert streets.is_current(root, **SMALL)


def test_refuses_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        streets.write_streets(tmp_path, STREETS, **SMALL)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="7"):
        streets.write_streets(tmp_path / "new", STREETS[:3], **SMALL)


@pytest.mark.long
def test_examples_are_drawn_once_and_not_needed_where_nothing_can_be_written(tmp_path, monkeypatch):
    picture, clip = streets.write_examples(tmp_path)
    before = picture.stat().st_mtime_ns, clip.stat().st_mtime_ns
    assert streets.write_examples(tmp_path) == (picture, clip)
    assert (picture.stat().st_mtime_ns, clip.stat().st_mtime_ns) == before and clip.stat().st_size > 10_000

    def read_only(path, write):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(utils, "write_atomically", read_only)
    assert streets.write_examples(tmp_path) == (picture, clip)  # all there
    clip.unlink()
    assert streets.write_examples(tmp_path) == ()
