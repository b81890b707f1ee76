"""What is in mask and image files of every kind, against numpy on the decoded pixels."""

import cv2
import numpy as np
from conftest import blocks, refused
from PIL import Image

from config import InputError
from dataio.scan import distinct, fits, scan_image, scan_mask
from utils import in_parallel

RED, GREEN = 255 << 16, 255 << 8


def painted(mask):
    """Return a mask of 0 and 1 painted red and green."""
    return np.array([[255, 0, 0], [0, 255, 0]], np.uint8)[mask]


def photo(seed, size=(240, 320)):
    """Return a smooth random picture (H, W, 3) uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC))


def bits_apart(facts, others):
    """Return how many bits the looks of two images differ in."""
    return int(np.bitwise_count(facts.look ^ others.look).sum())


def test_distinct_equals_numpy_unique():
    for codes in (np.random.default_rng(0).integers(0, 9, (30, 41)), np.zeros((1, 1), np.int64)):
        for ours, theirs in zip(distinct(codes), np.unique(codes, return_counts=True), strict=True):
            assert (ours == theirs).all()


def test_masks_of_every_kind(tmp_path):
    mask = blocks(23, 31, (0, 1), seed=3)
    counts = np.bincount(mask.ravel()).tolist()
    palette = Image.fromarray(mask)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    cases = (
        (Image.fromarray(mask), [0, 1], [0, 0x010101]),
        (palette, [0, 1], [RED, GREEN]),
        (Image.fromarray(painted(mask)), None, [GREEN, RED]),
        (Image.fromarray(np.repeat(mask[..., None], 3, 2)), [0, 1], [0, 0x010101]),
        (Image.fromarray(mask.astype(np.uint16) * 65535), [0, 65535], None),
        (Image.fromarray(mask.astype(bool)), [0, 1], [0, 0xFFFFFF]),
    )
    for picture, values, colors in cases:
        picture.save(tmp_path / "mask.png")
        facts = scan_mask(tmp_path / "mask.png")
        assert facts.size == (23, 31) and facts.kind == "PNG"
        for array, expected in ((facts.values, values), (facts.colors, colors)):
            assert (array is None) == (expected is None) and (array is None or array.tolist() == expected)
        assert facts.counts.tolist() == (counts if values else counts[::-1])


def test_files_that_are_damaged_or_not_class_masks_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "cut.png").write_bytes((tmp_path / "noise.png").read_bytes()[:90])
    for name in ("noise.png", "float.tif", "cut.png", "gone.png"):
        with refused(name):
            scan_mask(tmp_path / name)


def test_looks_are_close_for_the_same_picture_and_far_for_others(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(0)).save(tmp_path / "a.png")
    Image.fromarray(photo(0)).resize((200, 150)).save(tmp_path / "b.jpg", quality=60, exif=exif)
    Image.fromarray(photo(1)).save(tmp_path / "c.png")
    first, copy, other = (scan_image(tmp_path / name) for name in ("a.png", "b.jpg", "c.png"))
    assert bits_apart(first, copy) <= 10 and bits_apart(first, other) > 60
    assert first.digest != copy.digest and first.size == (240, 320) and copy.size == (150, 200)
    assert (first.orientation, copy.orientation) == (1, 6)


def test_deep_images_look_as_they_are_read(tmp_path):
    plain = []
    for seed in (0, 1):
        Image.fromarray(photo(seed)[..., 0]).save(tmp_path / "plain.png")
        plain.append(scan_image(tmp_path / "plain.png"))
    for seed in (0, 1):
        for name, scale in (("16.png", 257), ("12.tif", 16)):
            cv2.imwrite(tmp_path / name, photo(seed)[..., 0].astype(np.uint16) * scale)
            facts = scan_image(tmp_path / name)
            assert facts.stored.dtype == "uint16" and facts.size == (240, 320)
            quantiles = np.percentile(photo(seed)[..., 0] * float(scale), (0.5, 50, 99.5))
            assert np.allclose(facts.quantiles[0], quantiles, rtol=0.1, atol=3 * scale)
            assert bits_apart(facts, plain[seed]) <= 10 and bits_apart(facts, plain[1 - seed]) > 60
    cv2.imwrite(tmp_path / "color.tif", (photo(0) / 255).astype(np.float32))
    assert scan_image(tmp_path / "color.tif").stored.bands == 3 and plain[0].stored.is_picture


def test_masks_fit_as_stored_or_turned_as_exif_says():
    assert fits((60, 80), (60, 80), 1) and not fits((80, 60), (60, 80), 1)
    assert fits((80, 60), (60, 80), 6) and fits((60, 80), (60, 80), 6) and not fits((80, 60), (60, 80), 3)


def test_damaged_images_are_results_of_a_scan_not_its_end(tmp_path):
    Image.fromarray(photo(0)).save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    (tmp_path / "c.jpg").write_bytes(b"")
    results = in_parallel(scan_image, [tmp_path / f"{name}.jpg" for name in "abcd"], "images")
    assert [isinstance(facts, InputError) for facts in results] == [False, True, True, True]
    assert all(f"{name}.jpg" in str(error) for name, error in zip("bcd", results[1:], strict=True))
