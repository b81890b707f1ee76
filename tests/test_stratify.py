"""The stratified split: deterministic, disjoint, fair; pixel counts kept and counted anew when needed."""

import os

import numpy as np
import pytest
from conftest import blocks, refused, write_folder, write_pair
from PIL import Image

from dataio import stratify
from dataio.readers import Sample, index_table
from dataio.stratify import count_pixels, share_table, stratified_fold, stratified_split


TABLE = index_table(3)


def test_split_is_deterministic_disjoint_and_fair():
    generator = np.random.default_rng(0)
    pixels = generator.integers(1, 1000, (120, 6))
    pixels *= generator.random((120, 6)) < [1, 0.8, 0.5, 0.3, 0.1, 0.05]
    pixels[:3] = 0  # images without any class
    train, val = stratified_split(pixels, 0.2)
    assert (train, val) == stratified_split(pixels, 0.2)
    assert sorted(train + val) == list(range(120)) and len(val) == 24
    shares = pixels[val].sum(0) / pixels.sum(0)
    assert (np.abs(shares - 0.2) < 0.1).all(), shares
    splits = [generator.permutation(120)[:24] for _ in range(50)]
    spread = np.mean([np.abs(pixels[split].sum(0) / pixels.sum(0) - 0.2).max() for split in splits])
    assert np.abs(shares - 0.2).max() < spread / 1.5


@pytest.mark.parametrize(("count", "fraction", "want"), [(2, 0.2, 1), (3, 0.9, 2), (10, 0.01, 1)])
def test_small_splits_train_and_validate(count, fraction, want):
    train, val = stratified_split(np.ones((count, 2), np.int64), fraction)
    assert len(val) == want and len(train) == count - want


@pytest.mark.parametrize(("count", "folds"), [(20, 5), (23, 5), (6, 6), (7, 2)])
def test_folds_score_every_image_once(count, folds):
    """Each fold is as large as the others, and every class has its share in it."""
    generator = np.random.default_rng(1)
    pixels = generator.integers(1, 1000, (count, 3)) * (generator.random((count, 3)) < [1, 0.8, 0.6])
    splits = [stratified_fold(pixels, number + 1, folds) for number in range(folds)]
    assert sorted(image for _, val in splits for image in val) == list(range(count))
    for train, val in splits:
        assert sorted(train + val) == list(range(count)) and count // folds <= len(val) <= count // folds + 1
    if count > 4 * folds - 1:
        shares = np.array([pixels[val].sum(0) / pixels.sum(0) for _, val in splits])
        assert np.abs(shares - 1 / folds).max() < 0.6 / folds
    with refused(f"--fold 1/{count + 1}"):
        stratified_fold(pixels, 1, count + 1)
    with refused():
        stratified_split(pixels[:1], 0.5)


def test_the_last_images_of_rare_classes_are_shared():
    pixels = np.zeros((20, 3), np.int64)
    pixels[:, 0] = 1000
    pixels[[3, 11], 1] = 50  # in two images: one must validate
    pixels[7, 2] = 10  # in a single image: it must train
    train, val = stratified_split(pixels, 0.2)
    assert len({3, 11} & set(val)) == 1 and 7 in train and len(val) == 4


@pytest.mark.parametrize(("images", "want"), [(6, 1), (12, 2), (15, 3)])
def test_a_class_in_a_few_images_has_its_share_in_validation(images, want):
    pixels = np.zeros((200, 2), np.int64)
    pixels[:, 0] = 1000
    pixels[:images, 1] = 100
    assert sum(image < images for image in stratified_split(pixels, 0.2)[1]) == want


@pytest.fixture
def samples(tmp_path):
    """Six pairs of a folder."""
    write_folder(tmp_path, count=6)
    return [Sample(tmp_path / f"images/{n:02d}.png", tmp_path / f"masks/{n:02d}.png") for n in range(6)]


def test_pixels_are_counted_once_and_again_when_a_mask_or_the_table_changes(samples, tmp_path, monkeypatch):
    def count(samples=samples, table=TABLE):
        return count_pixels(samples, table, 3, tmp_path / "cache")

    want = np.stack([np.bincount(np.array(Image.open(s.mask)).ravel(), minlength=3)[:3] for s in samples])
    assert (count() == want).all() and len(list((tmp_path / "cache").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(stratify, "read_mask", None)  # reading would fail
        assert (count() == want).all()
    with monkeypatch.context() as patch:
        patch.setattr(stratify, "code_hash", lambda *modules: "changed")
        patch.setattr(stratify, "read_mask", lambda *_: np.zeros((2, 2), np.uint8))
        assert count()[1].tolist() == [4, 0, 0]
    rows = count([samples[0], Sample(samples[1].image), *samples[2:]])
    assert not rows[1].any() and (rows[2:] == want[2:]).all()
    assert count(table=index_table(3, ignored=(0, 255)))[:, 0].sum() == 0
    path, before = samples[1].mask, samples[1].mask.stat()
    Image.fromarray(np.zeros((45, 61), np.uint8)).save(path)  # repaired, the same size
    path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    assert path.stat().st_size == before.st_size and count()[1].tolist() == [45 * 61, 0, 0]
    write_pair(samples[2].image, samples[2].mask, blocks(45, 61, (2, 2)))
    assert count()[2].tolist() == [0, 0, 45 * 61]
    swapped = samples[2].mask.rename(tmp_path / "swapped.png"), samples[3].mask.rename(samples[2].mask)
    swapped[0].rename(samples[3].mask)
    assert count()[3].tolist() == [0, 0, 45 * 61]


def test_damaged_counts_are_counted_anew_and_a_mask_that_does_not_fit_is_named(samples, tmp_path):
    want = count_pixels(samples, index_table(3), 3, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    for content in (b"", path.read_bytes()[:100], b"not numpy"):
        path.write_bytes(content)
        assert (count_pixels(samples, index_table(3), 3, tmp_path / "cache") == want).all()
    with refused("masks/0", 2):
        count_pixels(samples, index_table(2), 2, tmp_path / "cache")


def test_the_table_of_shares_is_that_of_the_splits():
    samples = ["a", "b", "c"]
    pixels = np.array([[30, 10], [0, 40], [100, 0]])
    splits = {"train": ["a", "c"], "val": ["b"]}
    classes = [("sky", (0, 0, 0)), ("a tree", (0, 255, 0))]
    lines = share_table(dict(zip(samples, pixels, strict=True)), splits, classes)
    assert lines[0].split() == ["train", "images", "train", "pixels", "val", "images", "val", "pixels"]
    assert lines[1].split() == ["sky", "2", "92.86", "%", "0", "0.00", "%"]
    assert lines[2].split() == ["a", "tree", "1", "7.14", "%", "1", "100.00", "%"]
