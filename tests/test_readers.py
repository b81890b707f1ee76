"""Files of every kind come out right, broken ones give one line that names them."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blocks, real_data, write_pair
from PIL import Image

from config import InputError
from dataio import readers
from dataio.layout import list_images, pair_files, read_list
from dataio.readers import (
    TIFF_PLANAR,
    Sample,
    index_table,
    ranges,
    read_image,
    read_mask,
    read_orientation,
    read_pair,
    read_upright,
    decode_mask,
    rotate_like,
)


def gradient(height=31, width=47):
    """Return an RGB picture (height, width, 3) uint8 whose corners all differ."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 8, columns * 5, 255 - rows * 4], 2).clip(0, 255).astype(np.uint8)


def test_gray_rgba_palette_and_16_bit_images(tmp_path):
    pixels = gradient()
    gray = pixels[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert (read_image(tmp_path / "gray.png").numpy() == gray).all()
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png").numpy() == gray).all()
    for name, deep in (("float", (gray / 255).astype(np.float32)), ("wide", gray.astype(np.int32))):
        Image.fromarray(deep).save(tmp_path / f"{name}.tif")
        assert np.abs(read_image(tmp_path / f"{name}.tif")[0].numpy().astype(int) - gray).max() <= 1
    alpha = np.full(gray.shape, 255, np.uint8)
    alpha[:5] = 0
    Image.fromarray(np.dstack([pixels, alpha])).save(tmp_path / "rgba.png")
    clear = read_image(tmp_path / "rgba.png").permute(1, 2, 0).numpy()
    assert (clear[5:] == pixels[5:]).all() and (clear[:5] == 255).all()
    Image.fromarray(pixels).quantize(32).save(tmp_path / "palette.png")
    assert (
        np.abs(read_image(tmp_path / "palette.png").permute(1, 2, 0).numpy().astype(int) - pixels).mean() < 12
    )


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_deep_images_are_scaled_by_their_own_depth(tmp_path, bits, ending):
    want, top = gradient(64, 64), 2**bits - 1
    want[0, 0], want[0, 1] = 255, 0
    deep = np.round(want / 255 * top).astype(np.uint16)
    alpha = np.full((64, 64, 1), 65535, np.uint16)
    alpha[:9] = 0
    gray, color, clear = (tmp_path / f"{name}.{ending}" for name in ("gray", "color", "clear"))
    cv2.imwrite(gray, deep[..., 0])
    cv2.imwrite(color, deep[..., ::-1])
    cv2.imwrite(clear, np.dstack([deep[..., ::-1], alpha]))
    for path, pixels in ((gray, want[..., :1]), (color, want), (clear, np.where(alpha, want, 255))):
        image, size, orientation, depth = read_upright(path)
        assert (size, orientation, depth) == ((64, 64), 1, bits), path
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - pixels).max() <= 1, path
    exif = Image.Exif()
    exif[0x0112] = 6
    turn = dict(exif=exif) if ending == "png" else dict(tiffinfo={274: 6})
    Image.fromarray(deep[..., 0]).save(gray, **turn)
    turned, size, orientation, _ = read_upright(gray)
    assert (orientation, read_orientation(gray)) == (6, ((64, 64), 6))
    assert np.abs(turned[0].numpy().astype(int) - np.rot90(want[..., 0], -1)).max() <= 1


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_color_tiffs_that_only_opencv_reads_are_images_but_no_masks(tmp_path, capfd):
    want, path = gradient(), tmp_path / "float.tif"
    for kind in (np.float32, np.float64):
        cv2.imwrite(path, (want[..., ::-1] / 255).astype(kind))
        assert np.abs(read_image(path).permute(1, 2, 0).numpy().astype(int) - want).max() <= 1
        assert read_orientation(path) == (want.shape[:2], 1)
        with pytest.raises(InputError, match="float.tif is not a readable image"):
            decode_mask(path)
    whole = path.read_bytes()
    for cut in (5, 60, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:cut])
        for read in (read_image, read_orientation, decode_mask):
            with pytest.raises(InputError, match="float.tif") as error:
                read(path)
            assert "\n" not in str(error.value)
    cv2.imwrite(path, np.dstack([want, want[..., 0]]).astype(np.float32))  # alpha or infrared?
    with pytest.raises(InputError, match="float.tif is not a readable image"):
        read_image(path)
    assert not "".join(capfd.readouterr())


def test_deep_planar_tiffs_are_refused_not_misread(tmp_path):
    path = tmp_path / "planar.tif"
    kinds = {np.uint16: "16-bit channel after the other", np.float32: "not a readable image"}
    for kind, message in kinds.items():
        cv2.imwrite(path, gradient().astype(kind), [cv2.IMWRITE_TIFF_COMPRESSION, 1])
        content = path.read_bytes()
        tag = TIFF_PLANAR.to_bytes(2, "little") + b"\3\0\1\0\0\0"
        assert content.count(tag + b"\1") == 1
        path.write_bytes(content.replace(tag + b"\1", tag + b"\2"))
        for read in (read_image, decode_mask):
            with pytest.raises(InputError, match=f"planar.tif.*{message}"):
                read(path)


def test_a_turned_tiff_keeps_its_stored_size(tmp_path):
    upright = gradient()
    stored = np.ascontiguousarray(np.rot90(upright))
    Image.fromarray(stored).save(tmp_path / "photo.tif", tiffinfo={274: 6})
    image, size, orientation, depth = read_upright(tmp_path / "photo.tif")
    assert (image.permute(1, 2, 0).numpy() == upright).all() and depth == 8
    assert (size, orientation) == read_orientation(tmp_path / "photo.tif") == (stored.shape[:2], 6)
    for mask in (stored[..., 0], upright[..., 0]):
        assert (rotate_like(mask, size, orientation) == upright[..., 0]).all()


def test_pixels_that_are_no_numbers_are_black_and_leave_the_others_alone(tmp_path):
    values = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    Image.fromarray(values).save(tmp_path / "whole.tif")
    values[1, 2], values[3, 4], values[4, 4] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "holes.tif")
    whole, holes = (read_image(tmp_path / name) for name in ("whole.tif", "holes.tif"))
    bad = torch.from_numpy(~np.isfinite(values))
    assert (holes[:, bad] == 0).all() and torch.equal(holes[:, ~bad], whole[:, ~bad])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotated_images_come_out_upright_and_masks_follow(tmp_path, orientation):
    upright = gradient()
    stored = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored(upright))).save(tmp_path / "photo.png", exif=exif)
    assert (read_image(tmp_path / "photo.png").permute(1, 2, 0).numpy() == upright).all()
    mask = upright[..., 0]
    # drawn upright: stays
    assert (rotate_like(mask, *read_orientation(tmp_path / "photo.png")) == mask).all()
    if orientation >= 5:  # drawn on the stored pixels: turned with them
        drawn = np.ascontiguousarray(stored(mask))
        assert (rotate_like(drawn, *read_orientation(tmp_path / "photo.png")) == mask).all()


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "missing"])
def test_broken_images_are_named(tmp_path, damage):
    path = tmp_path / "broken.jpg"
    Image.fromarray(gradient(200, 200)).save(path)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "text": b"no picture", "truncated": whole[: len(whole) // 2]}[damage])
    with pytest.raises(InputError, match="broken.jpg") as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_index_palette_bilevel_and_16_bit_masks_give_their_values(tmp_path):
    mask = blocks(20, 33, (0, 1, 2))
    palette = Image.fromarray(mask)
    palette.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10])
    palette.save(tmp_path / "p.png")
    Image.fromarray(mask).save(tmp_path / "l.png")
    Image.fromarray(mask.astype(np.uint16) * 1000).save(tmp_path / "i16.png")
    Image.fromarray(mask > 0).save(tmp_path / "one.png")
    Image.fromarray(np.dstack([mask] * 3)).save(tmp_path / "rgb.png")
    for name, want in (
        ("p", mask),
        ("l", mask),
        ("rgb", mask),
        ("i16", mask.astype(np.int32) * 1000),
        ("one", mask > 0),
    ):
        assert (decode_mask(tmp_path / f"{name}.png").values == want.astype(np.int32)).all(), name


def test_a_mask_value_outside_the_classes_is_named(tmp_path):
    mask = np.zeros((9, 11), np.uint8)
    mask[0, :3], mask[5] = 77, 255
    Image.fromarray(mask).save(tmp_path / "odd.png")
    with pytest.raises(
        InputError, match=r"odd.png has the value 77 \(3 pixels\).*classes are 0..4, ignored: 255"
    ):
        read_mask(tmp_path / "odd.png", index_table(5))
    assert (
        read_mask(tmp_path / "odd.png", index_table(5, ignored=(77, 255))) == np.where(mask, 255, 0)
    ).all()


def test_color_masks_need_colors(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "paint.png")
    with pytest.raises(InputError, match="paint.png is painted in colors"):
        read_mask(tmp_path / "paint.png", index_table(5))
    assert decode_mask(tmp_path / "paint.png").colors[1, 2] == (8 << 16 | 10 << 8 | 251)


def test_pairs_by_stem_with_suffixes_and_inner_dots(tmp_path):
    mask = blocks(8, 9, (0, 1))
    for stem in ("a.b.c", "site 1", "ünï"):
        write_pair(tmp_path / f"images/{stem}.jpg", tmp_path / f"masks/{stem}_label.PNG", mask)
    (tmp_path / "images/.DS_Store").write_bytes(b"x")
    (tmp_path / "images/.hidden.jpg").write_bytes(b"x")
    pairs = pair_files(tmp_path / "images", tmp_path / "masks")
    assert [(pair.image.stem, pair.mask.stem) for pair in pairs] == [
        (stem, f"{stem}_label") for stem in sorted(("a.b.c", "site 1", "ünï"))
    ]


@pytest.mark.parametrize("lonely", ["images/x.png", "masks/x.png"])
def test_a_file_without_partner_is_named(tmp_path, lonely):
    write_pair(tmp_path / "images/a.png", tmp_path / "masks/a.png", blocks(8, 9, (0, 1)))
    Image.new("L", (9, 8)).save(tmp_path / lonely)
    with pytest.raises(InputError, match=f"{lonely} has no "):
        pair_files(tmp_path / "images", tmp_path / "masks")


def test_empty_folders_lists_and_ambiguous_names(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(InputError, match="no images in .*images"):
        pair_files(tmp_path / "images", tmp_path / "masks")
    write_pair(tmp_path / "images/a.png", tmp_path / "masks/a.png", blocks(8, 9, (0, 1)))
    Image.new("L", (9, 8)).save(tmp_path / "images/a.jpg")
    with pytest.raises(InputError, match="same name"):
        pair_files(tmp_path / "images", tmp_path / "masks")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa\r\n\r\nb \r\na\r\n")
    assert read_list(tmp_path / "list.txt") == ["a", "b"]
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(InputError, match="lists no images"):
        read_list(tmp_path / "list.txt")


def test_beyond_the_limit_of_pil_only_what_fills_its_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LIMIT", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 71, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(np.zeros((800, 900), np.uint8)).save(tmp_path / "flat.png")  # some 900 bytes
    assert (read_image(tmp_path / "photo.png").permute(1, 2, 0).numpy() == pixels).all()
    with pytest.raises(InputError, match=r"flat\.png claims more pixels than its bytes can hold"):
        read_image(tmp_path / "flat.png")
    assert read_mask(tmp_path / "flat.png", index_table(2)).shape == (800, 900)  # masks are flat
    monkeypatch.setattr(readers, "LARGEST", 5000)
    assert read_image(tmp_path / "photo.png").shape == (3, 60, 71)
    with pytest.raises(InputError, match="claims more pixels"):
        read_mask(tmp_path / "flat.png", index_table(2))
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_no_picture_runs_another_program(tmp_path, monkeypatch):
    """PIL would have gs draw EPS, whatever the file is called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg", format="EPS")
    for reader in (read_image, lambda path: read_mask(path, index_table(3)), readers.read_orientation):
        with pytest.raises(InputError, match=r"photo\.jpg is not a readable image \(not a known image"):
            reader(tmp_path / "photo.jpg")
    assert not (tmp_path / "ran").exists()
    for kind in ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM"):
        Image.new("RGB", (9, 8), "red").save(tmp_path / "picture", format=kind)
        assert read_image(tmp_path / "picture").shape == (3, 8, 9)


@pytest.mark.parametrize("key", ["exif", "late exif", "XML:com.adobe.xmp", "Raw profile type exif"])
def test_the_orientation_of_a_png_is_that_by_which_it_is_read(tmp_path, key):
    """Wherever it stands; the mask is turned by the one, the image by the other."""
    from PIL.PngImagePlugin import PngInfo
    exif, more, path = Image.Exif(), PngInfo(), tmp_path / "photo.png"
    exif[readers.EXIF_ORIENTATION] = 6
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
    assert readers.read_orientation(path) == readers.read_upright(path)[1:3] == ((5, 9), 6)


@pytest.mark.parametrize("kind", ["II", "MM", "II+"])
def test_the_tags_of_every_kind_of_tiff_are_read(kind):
    """Classic and BigTIFF (PIL knows it in one order of bytes alone): one tag, the orientation."""
    order, big = ("<" if kind[:2] == "II" else ">"), kind.endswith("+")
    head = kind[:2].encode() + (struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else
                                struct.pack(order + "HI", 42, 8))
    entry = struct.pack(order + ("HHQ" if big else "HHI"), readers.EXIF_ORIENTATION, 3, 1)
    entry += struct.pack(order + "H", 6).ljust(8 if big else 4, b"\0")
    page = struct.pack(order + ("Q" if big else "H"), 1) + entry + bytes(8 if big else 4)
    assert readers.tiff_tags(io.BytesIO(head + page))[readers.EXIF_ORIENTATION] == 6


def test_ranges_as_text():
    assert ranges([0, 1, 2, 5, 7, 8, 255]) == "0..2, 5, 7..8, 255" and ranges([]) == ""


def test_real_person_photos_are_read():
    for path in list_images(real_data("person_sample/images"))[:20]:
        image = read_image(path)
        assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.float().std() > 1


# --- reduced decoding -------------------------------------------------------------------------------------
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("at_least", [(100, 90), (200, 130), (400, 300), (30, 500)])
def test_a_large_jpeg_is_decoded_smaller_but_never_below_what_is_asked(tmp_path, orientation, at_least):
    rows, columns = np.mgrid[0:403, 0:602]
    pixels = np.stack([rows / 403, columns / 602, (rows + columns) % 50 / 100], 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    Image.fromarray((255 * pixels).astype(np.uint8)).save(path, quality=95, exif=exif)
    whole, small = read_image(path), read_image(path, at_least)
    assert small.shape[1] >= min(at_least[0], whole.shape[1])
    assert small.shape[2] >= min(at_least[1], whole.shape[2])
    assert (max(small.shape) < 400) == (max(at_least) <= 200)  # half the size where half is enough
    a, b = (F.interpolate(x[None].float(), size=(50, 60), mode="area") for x in (whole, small))
    assert (a - b).abs().mean() < 3
    mask = Image.fromarray(np.zeros((403, 602), np.uint8))
    mask.save(tmp_path / "mask.png")
    image, mask = read_pair(Sample(path, tmp_path / "mask.png"), index_table(2), at_least)
    assert torch.equal(image, small) and mask.shape == whole.shape[1:]  # the mask turns as its image does
