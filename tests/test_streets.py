"""The drawn street scenes: deterministic, exact masks, smooth in time; the set on disk is whole or absent."""

import numpy as np
import pytest
from PIL import Image

import utils
from dataio import streets

CLASSES = [("sky", (70, 130, 180)), ("road", (128, 64, 128)), ("grass", (152, 251, 152)),
           ("building", (70, 70, 70)), ("tree", (107, 142, 35)), ("car", (0, 0, 142)),
           ("person", (220, 20, 60))]
SMALL = dict(train=3, val=2, size=(48, 60), seed=5)


@pytest.fixture(scope="module")
def scenes():
    """Twenty scenes of (128, 160): images (20, 128, 160, 3) and masks (20, 128, 160)."""
    pairs = [streets.draw_scene(seed, (128, 160)) for seed in range(20)]
    return np.stack([image for image, _ in pairs]), np.stack([mask for _, mask in pairs])


def contents(root):
    """{path: bytes} of all files under root."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_same_seed_same_bytes():
    image, mask = streets.draw_scene(11, (64, 80))
    again, mask_again = streets.draw_scene(11, (64, 80))
    assert image.tobytes() == again.tobytes() and mask.tobytes() == mask_again.tobytes()


def test_other_seed_other_scene(scenes):
    images, masks = scenes
    assert len({mask.tobytes() for mask in masks}) == len({image.tobytes() for image in images}) == len(masks)
    image, mask = streets.draw_scene((0, 1), (64, 80))
    other, mask_other = streets.draw_scene((1, 0), (64, 80))
    assert (image != other).any() and (mask != mask_other).any()


@pytest.mark.parametrize("size", [(101, 143), (64, 64), (33, 200), (200, 33), (8, 8)])
def test_any_size(size):
    image, mask = streets.draw_scene(2, size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
    assert mask.shape == size and mask.dtype == np.uint8 and mask.max() <= 6


def test_size_changes_only_the_sampling():
    """The same scene at twice the size has the same classes at the same places, up to the outlines."""
    _, small = streets.draw_scene(4, (96, 120))
    _, large = streets.draw_scene(4, (192, 240))
    assert (small == large[::2, ::2]).mean() > 0.95


def test_every_class_has_its_share(scenes):
    _, masks = scenes
    share = np.bincount(masks.ravel(), minlength=7) / masks.size
    assert len(share) == 7 and share.min() >= 0.005, share


def test_outlines_in_the_image_are_those_of_the_mask(scenes):
    """The image changes more along the outlines of its mask than along those of the mask moved 6 pixels."""
    images, masks = scenes
    steps = np.abs(np.diff(images.astype(float), axis=2)).mean(-1)
    there = steps[np.diff(masks, axis=2) != 0].mean()
    moved = [np.roll(masks, shift, axis) for axis in (1, 2) for shift in (-6, 6)]
    moved = [steps[np.diff(other, axis=2) != 0].mean() for other in moved]
    assert there > 1.8 * max(moved), (there, moved)


def test_colors_tell_sky_road_and_grass_apart(scenes):
    images, masks = scenes
    sky, road, grass = (images[masks == kind].mean(0) for kind in (streets.SKY, streets.ROAD, streets.GRASS))
    assert sky.mean() > road.mean() + 20 and sky[2] > sky[0] + 10
    assert np.ptp(road) < 20
    assert grass[1] > max(grass[0], grass[2]) + 25


def test_time_moves_the_scene_smoothly():
    start, mask = streets.draw_scene(6, (96, 120), time=0.0)
    times = {step: streets.draw_scene(6, (96, 120), time=step) for step in (0.04, 2.0)}
    change = {step: np.abs(image.astype(float) - start).mean() for step, (image, _) in times.items()}
    assert (times[2.0][1] != mask).mean() > 0.03 and change[2.0] > 2.5 * change[0.04]
    assert (times[0.04][1] != mask).mean() < 0.03


@pytest.mark.parametrize("seed", [6, 10])
def test_nothing_pops_up_in_a_clip(seed):
    """Over 8 seconds no class gains or loses much of the picture within a fifth of a second."""
    scene = streets.describe(seed)
    masks = [streets.render(scene, (48, 60), step / 5)[1] for step in range(40)]
    shares = np.array([np.bincount(mask.ravel(), minlength=7) / mask.size for mask in masks])
    assert np.abs(np.diff(shares, axis=0)).max() < 0.09


def test_clip_yields_the_scene_over_time():
    clip = streets.draw_clip(3, (40, 60), frames=3, fps=10)
    assert iter(clip) is clip
    frames = list(clip)
    assert len(frames) == 3 and frames[0][0].shape == (40, 60, 3) and frames[0][0].dtype == np.uint8
    for index, pair in enumerate(frames):
        for got, want in zip(pair, streets.draw_scene(3, (40, 60), time=index / 10), strict=True):
            assert (got == want).all()


def test_data_set_on_disk(tmp_path):
    root = tmp_path / "streets"
    streets.write_streets(root, CLASSES, **SMALL)
    names = {f"{split}/{kind}/{index:05d}.png" for split in ("train", "val") for kind in ("images", "masks")
             for index in range(SMALL[split])}
    assert set(contents(root)) == names | {"classes.txt", "streets.json"}
    assert list(tmp_path.iterdir()) == [root]
    assert (root / "classes.txt").read_text().splitlines()[0] == "sky 70 130 180"
    mask = Image.open(root / "val/masks/00001.png")
    assert mask.mode == "P" and mask.size == (60, 48)
    assert mask.getpalette()[:21] == [value for _, rgb in CLASSES for value in rgb]
    image, drawn = streets.draw_scene((5, 1, 1), (48, 60))
    assert (np.array(mask) == drawn).all()
    assert (np.array(Image.open(root / "val/images/00001.png")) == image).all()


def test_written_twice_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        streets.write_streets(tmp_path / name, CLASSES, **SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.long
def test_processes_write_what_one_process_writes(tmp_path, monkeypatch):
    counts = dict(train=64, val=0, size=(16, 20), seed=5)
    monkeypatch.setattr(streets.os, "cpu_count", lambda: 2)
    streets.write_streets(tmp_path / "many", CLASSES, **counts)
    monkeypatch.setattr(streets.os, "cpu_count", lambda: 1)
    streets.write_streets(tmp_path / "one", CLASSES, **counts)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    write_pair = streets.write_pair

    def stop(job):
        if job[1] == 1:
            raise KeyboardInterrupt
        write_pair(job)
    monkeypatch.setattr(streets, "write_pair", stop)
    with pytest.raises(KeyboardInterrupt):
        streets.write_streets(tmp_path / "streets", CLASSES, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_is_current_and_replacing(tmp_path, monkeypatch):
    root = tmp_path / "streets"
    assert not streets.is_current(root, **SMALL)
    streets.write_streets(root, CLASSES, **SMALL)
    assert streets.is_current(root, **SMALL)
    for other in (dict(size=(60, 48)), dict(seed=6), dict(train=4), dict(val=1)):
        assert not streets.is_current(root, **{**SMALL, **other})
    with monkeypatch.context() as patch:
        patch.setattr(streets, "VERSION", streets.VERSION + 1)
        assert not streets.is_current(root, **SMALL)
    (root / "train/masks/00002.png").unlink()
    assert not streets.is_current(root, **SMALL)
    streets.write_streets(root, CLASSES, **SMALL)
    assert streets.is_current(root, **SMALL)


def test_refuses_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="another folder"):
        streets.write_streets(tmp_path, CLASSES, **SMALL)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="7 classes"):
        streets.write_streets(tmp_path / "new", CLASSES[:3], **SMALL)


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
