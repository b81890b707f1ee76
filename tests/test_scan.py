"""What is in mask and image files of every kind, against numpy on the decoded pixels."""

import cv2
import numpy as np
import pytest
from conftest import blocks
from PIL import Image

from config import InputError
from dataio.scan import distinct, fits, in_parallel, scan_image, scan_mask

RED, GREEN = 255 << 16, 255 << 8


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (30, 41)], ids=str)
def test_distinct_equals_numpy_unique(shape):
    for codes in (np.random.default_rng(0).integers(0, 9, shape), np.zeros(shape, np.int64)):
        values, counts = distinct(codes)
        want = np.unique(codes, return_counts=True)
        assert (values == want[0]).all() and (counts == want[1]).all()


def painted(mask):
    """Return a mask of 0 and 1 painted red and green."""
    return np.array([[255, 0, 0], [0, 255, 0]], np.uint8)[mask]


def test_masks_of_every_kind(tmp_path):
    mask = blocks(23, 31, (0, 1), seed=3)
    counts = np.bincount(mask.ravel()).tolist()
    palette = Image.fromarray(mask)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    cases = {
        "index.png": (Image.fromarray(mask), [0, 1], [0, 0x010101]),
        "palette.png": (palette, [0, 1], [RED, GREEN]),
        "painted.png": (Image.fromarray(painted(mask)), None, [GREEN, RED]),
        "gray.png": (Image.fromarray(np.repeat(mask[..., None], 3, 2)), [0, 1], [0, 0x010101]),
        "deep.png": (Image.fromarray(mask.astype(np.uint16) * 65535), [0, 65535], None),
        "bits.png": (Image.fromarray(mask.astype(bool)), [0, 1], [0, 0xFFFFFF]),
    }
    for name, (picture, values, colors) in cases.items():
        picture.save(tmp_path / name)
        facts = scan_mask(tmp_path / name)
        assert facts.size == (23, 31) and facts.kind == "PNG", name
        assert (facts.values is None) == (values is None) and (facts.colors is None) == (colors is None)
        assert values is None or facts.values.tolist() == values, name
        assert colors is None or facts.colors.tolist() == colors, name
        assert facts.counts.tolist() == (counts if name != "painted.png" else counts[::-1])


def test_damaged_and_unfit_masks_are_named(tmp_path):
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(blocks(90, 90, (0, 1, 2))).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:90])
    for name, reason in (("float.tif", "integers"), ("cut.png", "damaged"), ("gone.png", "not exist")):
        with pytest.raises(InputError, match=f"{name}.*{reason}"):
            scan_mask(tmp_path / name)


def photo(seed, size=(240, 320)):
    """Return a smooth random picture (H, W, 3) uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC))


def test_looks_are_close_for_the_same_picture_and_far_for_others(tmp_path):
    Image.fromarray(photo(0)).save(tmp_path / "a.png")
    Image.fromarray(photo(0)).resize((200, 150)).save(tmp_path / "b.jpg", quality=60)
    Image.fromarray(photo(1)).save(tmp_path / "c.png")
    a, b, c = (scan_image(tmp_path / name) for name in ("a.png", "b.jpg", "c.png"))
    assert np.bitwise_count(a.look ^ b.look).sum() <= 10 < 60 < np.bitwise_count(a.look ^ c.look).sum()
    assert a.digest != b.digest and a.size == (240, 320) and b.size == (150, 200) and a.orientation == 1
    turned = Image.fromarray(photo(0))
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "t.jpg", exif=turned.getexif())
    assert scan_image(tmp_path / "t.jpg").orientation == 6


def test_deep_images_look_as_they_are_read(tmp_path):
    looks = {}
    for seed in (0, 1):
        pixels = photo(seed)
        Image.fromarray(pixels[..., 0]).save(tmp_path / "plain.png")
        looks[seed] = [scan_image(tmp_path / "plain.png").look]
        for name, scale in (("16.png", 257), ("12.tif", 16)):
            cv2.imwrite(tmp_path / name, pixels[..., 0].astype(np.uint16) * scale)
            facts = scan_image(tmp_path / name)
            assert facts.depth == int(name[:2]) and facts.mode == "I;16" and facts.size == (240, 320)
            looks[seed].append(facts.look)
        cv2.imwrite(tmp_path / "color.tif", (pixels / 255).astype(np.float32))
        assert scan_image(tmp_path / "color.tif").depth == scan_image(tmp_path / "plain.png").depth == 8
    for near in (0, 1):
        assert all(np.bitwise_count(look ^ looks[near][0]).sum() <= 10 for look in looks[near])
        assert all(np.bitwise_count(look ^ looks[1 - near][0]).sum() > 60 for look in looks[near])


def test_masks_fit_as_stored_or_turned_as_exif_says():
    assert fits((60, 80), (60, 80), 1) and not fits((80, 60), (60, 80), 1)
    assert fits((80, 60), (60, 80), 6) and fits((60, 80), (60, 80), 6) and not fits((80, 60), (60, 80), 3)


def test_photos_are_no_class_masks(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    with pytest.raises(InputError, match="noise.png holds [0-9]+ different values: it is not a class mask"):
        scan_mask(tmp_path / "noise.png")


def test_damaged_images_are_results_of_a_scan_not_its_end(tmp_path):
    Image.fromarray(photo(0)).save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    (tmp_path / "c.jpg").write_bytes(b"")
    found = in_parallel(scan_image, [tmp_path / f"{name}.jpg" for name in "abcd"], "images")
    assert [isinstance(one, InputError) for one in found] == [False, True, True, True]
    assert "b.jpg is damaged" in str(found[1]) and "d.jpg cannot be read" in str(found[3])
