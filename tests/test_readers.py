"""Files of every kind come out right, broken ones give one line that names them."""
import shutil
import struct
import zlib
from contextlib import nullcontext

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacks import png_header
from conftest import blocks, refused, write_pair
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_image_rule import write_tiff

from dataio import images, readers
from dataio.image_rule import PICTURES, decide_rule, read_image
from dataio.images import EXIF_ORIENTATION, TIFF_PLANAR, read_orientation
from dataio.layout import pair_files, read_list
from dataio.readers import (PaintedMask, Sample, Target, decode_mask, index_table, ranges, read_map,
                            read_mask, read_sample, rotate_like)


def gradient(height=31, width=47):
    """Return an RGB picture (height, width, 3) uint8 whose corners all differ."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 8, columns * 5, 255 - rows * 4], 2).clip(0, 255).astype(np.uint8)


def save(array, path, **options):
    """Write an array as an image file and return its path."""
    Image.fromarray(array).save(path, **options)
    return path


def pixels_of(path):
    """Return a file as it is read, (H, W, 3) int."""
    return read_image(path).permute(1, 2, 0).numpy().astype(int)


def oriented(orientation):
    """Return the EXIF data of an orientation."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return exif


# --- images -----------------------------------------------------------------------------------------------
def test_gray_rgba_and_palette_images(tmp_path):
    pixels = gradient()
    gray = pixels[..., :1].astype(int)
    alpha = np.full(gray.shape, 255, np.uint8)
    alpha[:5] = 0
    assert (pixels_of(save(pixels[..., 0], tmp_path / "gray.png")) == gray).all()
    clear = save(np.dstack([pixels, alpha]), tmp_path / "rgba.png")
    assert (pixels_of(clear) == np.where(alpha, pixels, 255)).all()
    Image.fromarray(pixels).quantize(32).save(tmp_path / "palette.png")
    assert np.abs(pixels_of(tmp_path / "palette.png") - pixels).mean() < 12


def test_damaged_color_tiffs_are_named(tmp_path, capfd):
    want, path = gradient(), tmp_path / "float.tif"
    cv2.imwrite(path, (want[..., ::-1] / 255).astype(np.float32))
    assert read_orientation(path) == (want.shape[:2], 1)
    with refused(path):
        decode_mask(path)
    path.write_bytes(path.read_bytes()[:-9])
    with refused(path):
        decide_rule([path]).read(path)
    assert not "".join(capfd.readouterr())


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_deep_planar_tiffs_are_no_masks(tmp_path, kind):
    path = tmp_path / "planar.tif"
    cv2.imwrite(path, gradient().astype(kind), [cv2.IMWRITE_TIFF_COMPRESSION, 1])
    content, tag = path.read_bytes(), TIFF_PLANAR.to_bytes(2, "little") + b"\3\0\1\0\0\0"
    assert content.count(tag + b"\1") == 1
    path.write_bytes(content.replace(tag + b"\1", tag + b"\2"))
    with refused(path):
        decode_mask(path)


@pytest.mark.parametrize("content", [b"", b"text", "half", None])
def test_broken_images_are_named(tmp_path, content):
    path = save(gradient(200, 200), tmp_path / "broken.jpg")
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2] if content == "half" else content or b"")
    if content is None:
        path.unlink()
    for read in (read_image, decode_mask, lambda path: PICTURES.read(path, (9, 9)), read_map):
        with refused(path):
            read(path)


def test_images_have_up_to_a_billion_pixels(tmp_path, monkeypatch):
    for number, size in enumerate([(1 << 15, 1 << 15), ((1 << 15) + 1, 1 << 15)]):
        (tmp_path / "header.png").write_bytes(png_header(*size))
        with refused("header.png") if number else nullcontext():
            assert read_orientation(tmp_path / "header.png")[0] == size[::-1]
    path = save(gradient(60, 71), tmp_path / "photo.png")
    deep = save(gradient(60, 71)[..., 0].astype(np.uint16), tmp_path / "deep.tif")  # not read by PIL
    rule = decide_rule([deep])
    monkeypatch.setattr(images, "MOST_PIXELS", 4000)
    for file, reads in ((path, (read_image, decode_mask)), (deep, (rule.read, decode_mask))):
        for read in reads:
            with refused(file, 4000):
                read(file)
    monkeypatch.setattr(images, "MOST_PIXELS", 1 << 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL's own limit
    assert read_image(path).shape == (3, 60, 71)


def test_no_picture_runs_another_program(tmp_path, monkeypatch):
    """PIL would have gs draw EPS, whatever the file is called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg", format="EPS")
    for read in (read_image, decode_mask, read_orientation):
        with refused("photo.jpg"):
            read(tmp_path / "photo.jpg")
    assert not (tmp_path / "ran").exists()
    for kind in ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM"):
        Image.new("RGB", (9, 8), "red").save(tmp_path / "picture", format=kind)
        assert read_image(tmp_path / "picture").shape == (3, 8, 9)


@pytest.mark.parametrize(("ending", "kind"), [
    ("png", np.uint8), ("png", np.uint16), ("tif", np.uint8), ("tif", np.uint16), ("tif", np.int8),
    ("tif", np.float32)])
def test_pictures_are_what_they_hold_whatever_they_are_called(tmp_path, kind, ending):
    values = (gradient()[..., 0] // 9 - 3 * (kind == np.int8)).astype(kind)
    path, other = tmp_path / f"right.{ending}", tmp_path / f"wrong.{'tif' if ending == 'png' else 'png'}"
    save(values, path) if ending == "png" else write_tiff(path, values[None])
    shutil.copy(path, other)
    assert (decode_mask(other).pixels == values).all()
    first, second = (decide_rule([file]).read(file).image for file in (path, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("at_least", [(100, 90), (200, 130), (400, 300), (30, 500)])
def test_a_large_jpeg_is_decoded_smaller_but_never_below_what_is_asked(tmp_path, orientation, at_least):
    rows, columns = np.mgrid[0:403, 0:602]
    pixels = (255 * np.stack([rows / 403, columns / 602, (rows + columns) % 50 / 100], 2)).astype(np.uint8)
    path = save(pixels, tmp_path / "photo.jpg", quality=95, exif=oriented(orientation))
    full, small = read_image(path), PICTURES.read(path, at_least).image
    assert small.shape[1] >= min(at_least[0], full.shape[1])
    assert small.shape[2] >= min(at_least[1], full.shape[2])
    assert (max(small.shape) < 400) == (max(at_least) <= 200)  # half the size where half is enough
    a, b = (F.interpolate(image[None].float(), size=(50, 60), mode="area") for image in (full, small))
    assert (a - b).abs().mean() < 3
    for mask in (save(np.zeros((403, 602), np.uint8), tmp_path / "mask.png"), None):
        image, targets = read_sample(Sample(path, mask), index_table(2), at_least)
        assert torch.equal(image, small) and targets["mask"].shape == full.shape[1:]


# --- orientation ------------------------------------------------------------------------------------------
STORED = {  # pixels of an upright picture as they are stored under an EXIF orientation
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_images_and_their_targets_come_upright(tmp_path, orientation, ending):
    upright, path = gradient(), tmp_path / f"photo.{ending}"
    stored = np.ascontiguousarray(STORED[orientation](upright))
    turn = dict(tiffinfo={EXIF_ORIENTATION: orientation})
    save(stored, path, **(turn if ending == "tif" else dict(exif=oriented(orientation))))
    image, _, size, turn_read, _ = PICTURES.read(path)
    assert (image.permute(1, 2, 0).numpy() == upright).all()
    deep = save(stored[..., 0].astype(np.uint16) * 257, tmp_path / f"deep.{ending}",
                **(turn if ending == "tif" else dict(exif=oriented(orientation))))
    photo = decide_rule([deep], value_range=(0, 65535)).read(deep)
    assert (photo.image[0].numpy() == upright[..., 0]).all()
    assert photo[2:4] == read_orientation(deep) == (size, turn_read)
    assert (size, turn_read) == read_orientation(path) == (stored.shape[:2], orientation)
    mask = upright[..., 0]
    assert (rotate_like(mask, size, orientation) == mask).all()  # made on the upright image: stays
    if orientation >= 5:  # made on the stored pixels: turned with them, whatever its type
        on_stored = np.ascontiguousarray(STORED[orientation](mask))
        for kind in (np.uint8, np.float32):
            assert (rotate_like(on_stored.astype(kind), size, orientation) == mask).all()


@pytest.mark.parametrize("key", ["exif", "late exif", "XML:com.adobe.xmp", "Raw profile type exif"])
def test_the_orientation_of_a_png_is_that_by_which_it_is_read(tmp_path, key):
    """Wherever it stands; the mask is turned by the one, the image by the other."""
    exif, more, path = oriented(6), PngInfo(), tmp_path / "photo.png"
    if key.startswith("XML"):
        more.add_itxt(key, '<rdf:Description tiff:Orientation="6"/>')
    elif key.startswith("Raw"):
        more.add_text(key, f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n")
    Image.new("RGB", (9, 5), "red").save(path, pnginfo=more, exif=exif.tobytes() if key == "exif" else b"")
    if key == "late exif":
        content, body = path.read_bytes(), exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = b"eXIf" + body
        chunk = struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(content[:-12] + chunk + content[-12:])
    assert read_orientation(path) == PICTURES.read(path)[2:4] == ((5, 9), 6)


@pytest.mark.parametrize("big", [False, True])
def test_tags_of_tiffs_are_read(tmp_path, big):
    path = save(gradient(), tmp_path / "turned.tif", tiffinfo={EXIF_ORIENTATION: 6}, big_tiff=big)
    assert images.tiff_tags(path, EXIF_ORIENTATION) == [6]


# --- masks ------------------------------------------------------------------------------------------------
def test_masks_with_alpha_are_read_and_arrays_that_are_no_masks_are_named(tmp_path):
    mask = blocks(20, 33, (0, 1, 2))
    assert (decode_mask(save(np.dstack([mask, 255 - mask]), tmp_path / "alpha.png")).values == mask).all()
    np.save(tmp_path / "integers.npy", mask.astype(np.float32))
    assert (decode_mask(tmp_path / "integers.npy").values == mask).all()
    np.save(tmp_path / "halves.npy", mask / 2)
    np.save(tmp_path / "deep.npy", np.zeros((3, 4, 5)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "integers.npy").read_bytes()[:150])
    for name in ("halves.npy", "deep.npy", "cut.npy", "missing.npy"):
        with refused(name):
            decode_mask(tmp_path / name)


def test_a_mask_value_outside_the_classes_is_named(tmp_path):
    mask = np.zeros((9, 11), np.uint8)
    mask[0, :3], mask[5] = 77, 255
    path = save(mask, tmp_path / "odd.png")
    with refused(path, 77, "3 pixels", "0..4", 255):
        read_mask(path, index_table(5))
    assert ranges([0, 1, 2, 5, 7, 8, 255]) == "0..2, 5, 7..8, 255" and ranges([]) == ""
    assert (read_mask(path, index_table(5, ignored=(77, 255))) == np.where(mask, 255, 0)).all()


def test_color_masks_need_colors(tmp_path):
    path = save(gradient(), tmp_path / "paint.png")
    with pytest.raises(PaintedMask, match="paint.png"):
        read_mask(path, index_table(5))
    assert decode_mask(path).colors[1, 2] == (8 << 16 | 10 << 8 | 251)
    table = readers.value_table({0x0A0B0C: 0, 0xFF0000: 1}, 1 << 24)
    with refused(path, (0, 0, 255), (10, 11, 12)):  # the first wrong color, and the nearest that is listed
        read_mask(path, table)
    with refused(save(np.full((5, 6), 300, np.uint16), path)):
        read_mask(path, table)


# --- other targets ----------------------------------------------------------------------------------------
def test_maps_are_the_numbers_of_their_files(tmp_path):
    values = np.linspace(-3, 900, 77, dtype=np.float32).reshape(7, 11)
    unknown, integers = values.copy(), values.clip(0).astype(np.uint16)
    unknown[2, 3] = np.nan
    np.save(tmp_path / "float.npy", unknown)
    np.save(tmp_path / "double.npy", values.astype(np.float64)[None])
    save(values, tmp_path / "float.tif")
    save(integers, tmp_path / "16 bit.png")
    for name, want in (("float.npy", unknown), ("double.npy", values), ("float.tif", values),
                       ("16 bit.png", integers)):
        numbers = read_map(tmp_path / name)
        assert numbers.dtype == np.float32, name
        assert np.array_equal(numbers, want.astype(np.float32), equal_nan=True), name
    save(gradient(), tmp_path / "color.png")
    Image.fromarray(gradient()).quantize(9).save(tmp_path / "palette.png")
    np.save(tmp_path / "flat.npy", values.ravel())
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    for name in ("color.png", "palette.png", "flat.npy", "text.npy"):
        with refused(name):
            read_map(tmp_path / name)


def test_a_sample_is_read_with_all_its_targets(tmp_path):
    stored = gradient()
    photo, depth = save(stored, tmp_path / "a.png", exif=oriented(6)), tmp_path / "depth.npy"
    ids = blocks(*stored.shape[:2], (0, 1, 2, 255))
    mask = save(ids, tmp_path / "ids.png")
    np.save(depth, ids / 3)
    sample = Sample(photo, mask, (Target("teacher", mask, "labels"), Target("depth", depth)))
    assert sample.files() == [photo, mask, mask, depth]
    _, targets = read_sample(sample, index_table(3))
    upright = np.rot90(ids, -1)
    assert list(targets) == ["mask", "teacher", "depth"]
    assert (targets["mask"].numpy() == upright).all() and (targets["teacher"].numpy() == upright).all()
    assert targets["teacher"].dtype == torch.uint8 and targets["depth"].dtype == torch.float32
    assert np.allclose(targets["depth"].numpy(), upright / 3)
    image, targets = read_sample(Sample(photo), index_table(3))
    assert list(targets) == ["mask"]
    assert targets["mask"].shape == image.shape[1:] and (targets["mask"] == 255).all()
    for path in (photo, depth):  # colors, and numbers that are not class ids
        with refused(path):
            read_sample(Sample(photo, None, (Target("x", path, "labels"),)), index_table(3))
    np.save(depth, np.where(ids == 255, np.nan, ids))  # no data is not labeled
    _, targets = read_sample(Sample(photo, None, (Target("x", depth, "labels"),)), index_table(3))
    assert (targets["x"].numpy() == np.rot90(ids, -1)).all()
    np.save(depth, np.where(ids == 255, -1, ids.astype(int)))
    with refused(depth):
        read_sample(Sample(photo, None, (Target("x", depth, "labels"),)), index_table(3))
    half, swapped = tmp_path / "half.npy", tmp_path / "swapped.npy"
    upright = tuple(image.shape[1:])
    np.save(half, np.zeros([-(-side // 2) for side in upright]))
    np.save(swapped, np.zeros((upright[0], 2 * upright[1])))
    read_sample(Sample(photo, None, (Target("x", half),)), index_table(3))
    with refused(swapped):  # of other proportions it would be stretched over the image
        read_sample(Sample(photo, None, (Target("x", swapped),)), index_table(3))


# --- pairs and lists --------------------------------------------------------------------------------------
def test_files_and_lists_that_cannot_be_paired_are_named(tmp_path):
    images, masks, names = tmp_path / "images", tmp_path / "masks", tmp_path / "list.txt"
    images.mkdir()
    with refused(images):
        pair_files(images, masks)
    write_pair(images / "a.b.png", masks / "a.b_label.PNG", blocks(8, 9, (0, 1)))
    (images / ".hidden.jpg").write_bytes(b"x")
    assert pair_files(images, masks) == [Sample(images / "a.b.png", masks / "a.b_label.PNG")]
    for extra, *others in ((images / "x.png",), (masks / "x.png",), (images / "a.b.jpg", "a.b.png")):
        save(np.zeros((8, 9), np.uint8), extra)
        with refused(extra.name, *others):
            pair_files(images, masks)
        extra.unlink()
    names.write_text("\n")
    with refused(names):
        read_list(names)
