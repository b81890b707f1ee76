"""One rule for all images: a network sees the same by every path, and files that do not fit are named."""
import json
import warnings
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
import torch
from conftest import blocks, refused
from PIL import Image
from rasterio.enums import ColorInterp

import check_data
import evaluate
import export
import infer_image
import train
from checkpoint import load_model, pack_checkpoint
from config import IGNORE, DataOptions
from dataio.dataloader import SegmentationDataset, TileDataset, WindowDataset
from dataio.feature_cache import cache_features
from dataio.image_rule import PICTURES, ImageRule, check_fit, decide_rule, read_image, scale
from dataio.images import READERS, stored_of
from dataio.readers import Sample, index_table
from dataio.transforms import AUGMENTS, augment
from dataio.windows import Raster, WindowReader
from datasets import load_data
from inference.predictor import Predictor, make_protocol
from inference.video import FrameSegmenter
from model import ModelSpec, build_model
from models.backbones import build_backbone
from models.baselines import BASELINES
from models.heads import HEADS
from utils import Precision

pytestmark = pytest.mark.filterwarnings("ignore:.*geotransform|.*identity|.*matmul")
SIZE, TABLE, FLOAT32 = (56, 70), index_table(3), Precision("off", torch.device("cpu"))
TYPES = {"8": ("u1", 255), "12": ("u2", 4095), "16": ("u2", 60000), "signed": ("i2", 9000),
         "float": ("f4", 0.7)}  # of values, and about the largest
ALL = ("all",)


def write_tiff(path, pixels, kinds=None, **options):
    """Write (C, H, W) as a TIFF by rasterio; kinds: ColorInterp of its bands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver="GTiff", dtype=pixels.dtype, width=pixels.shape[2],
                           height=pixels.shape[1], count=len(pixels), **options) as file:
            if kinds:
                file.colorinterp = kinds
            file.write(pixels)
    return path


def bands_of(kind, count, seed=0, size=SIZE):
    """Return noise (count, H, W) of a type of TYPES, none of it 0."""
    dtype, top = TYPES[kind]
    values = np.random.default_rng(seed).uniform(0.2, 1, (count, *size)) * top
    return values.astype(dtype)


def write_set(folder, kind="16", bands=5, count=6, size=SIZE, **options):
    """Write TIFFs whose class 1 is bright in the last band alone, and masks; return the folder."""
    for number in range(count):
        mask = blocks(*size, (0, 1), seed=number)
        pixels = bands_of(kind, bands, number, size)
        pixels[-1] = np.where(mask, pixels[-1] // 4 + TYPES[kind][1] // 2, pixels[-1] // 4)
        write_tiff(folder / f"images/{number}.tif", pixels, **options)
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / f"masks/{number}.png")
    (folder / "classes.txt").write_text("ground\nthing\n")
    return folder


def network(rule, normalize="auto"):
    """Return a small Segmenter for the images of a rule, and a list of what its head is given."""
    model, seen = network_of(rule.channels, rule.colors, normalize)
    model.normalize_bands(rule.mean, rule.std)
    seen.clear()
    return model, seen


@lru_cache
def network_of(channels, colors, normalize):
    """As network, made once."""
    torch.manual_seed(0)
    spec = ModelSpec(num_classes=3, backbone="vit_tiny", head="detail", num_bands=channels, colors=colors,
                     normalize=normalize)
    model, seen = build_model(spec).eval(), []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return model, seen


# --- the same by every path ---------------------------------------------------------------------------------
@pytest.mark.parametrize("marks", ["", "alpha", "nodata", "alpha nodata"])
@pytest.mark.parametrize("bands", [1, 3, 4, 5])
@pytest.mark.parametrize("kind", ["8", "12", "16", "float"])
def test_what_a_network_sees_is_equal_by_every_path(tmp_path, kind, bands, marks):
    """Whole, slide, tile, a Raster, training, its windows, validation tiles and the cache."""
    pixels, size = bands_of(kind, bands), SIZE
    top = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "iu" else 1
    nothing, options, kinds = np.zeros(size, bool), {}, None
    if "nodata" in marks:
        options["nodata"], pixels[:, 5:15, 20:40] = 0, 0
        nothing[5:15, 20:40] = True
    if "alpha" in marks:
        clear = np.zeros(size, bool)
        clear[:, 60:] = True
        alpha = np.where(clear, 0, top)[None].astype(pixels.dtype)
        pixels, nothing = np.concatenate([pixels, alpha]), nothing | clear
        kinds = [ColorInterp.gray, *[ColorInterp.undefined] * (bands - 1), ColorInterp.alpha]
    options.update(tiled=True, blockxsize=16, blockysize=16)
    path = write_tiff(tmp_path / "image.tif", pixels, kinds, **options)
    mask = np.ones(size, np.uint8)
    write_tiff(tmp_path / "mask.tif", mask[None])
    Image.fromarray(mask).save(tmp_path / "mask.png")
    rule = decide_rule([path], ALL)
    assert bool(rule.transparency) == ("alpha" in marks)
    assert rule.channels == (3 if bands == 1 else bands)
    model, seen = network(rule)
    want, ignored = rule.read(path).image, np.where(nothing, IGNORE, 1)
    assert (want[:, nothing] == torch.tensor(rule.fill)[:, None]).all()

    images, masks = [], []
    for mask_path in (tmp_path / "mask.tif", tmp_path / "mask.png"):
        sample = Sample(path, mask_path)
        train_set = SegmentationDataset([sample], TABLE, size, (), rule=rule)
        reader = WindowReader([sample], TABLE, rule=rule)
        assert reader.by_windows == [mask_path.suffix == ".tif"]
        tiles = TileDataset(reader, size)
        cached = cache_features(model, train_set, tmp_path / "cache", FLOAT32)
        for data in (train_set, tiles, SegmentationDataset([sample], TABLE, size, rule=rule)):
            image, targets, _ = data[0]
            images.append(image)
            masks += [targets["mask"], data.targets(0)["mask"]]
        features, targets, _ = cached.collate([cached[0]])
        images.append(features.image[0])
        masks.append(targets["mask"][0])
        parts = [reader.read(0, 0, left, size[0], 35) for left in (0, 35)]
        images.append(torch.cat([image for image, _ in parts], 2))
        masks.append(torch.cat([labels for _, labels in parts], 1))
    with Raster(path, rule) as raster:
        images.append(raster.read(0, 0, *size)[0])
        assert (raster.valid(slice(0, size[0])) == ~nothing).all()
    for image in images:
        assert torch.equal(image, want)
    for labels in masks:
        assert (labels.numpy() == ignored).all()

    stored = json.loads(json.dumps(rule.as_dict()))
    facts = dict(classes=[["a", [0, 0, 0]]] * 3, imgsz=size, image_rule=stored)
    seen.clear()
    for protocol in ("whole", "slide", "tile"):
        predictor = Predictor(model, facts, "cpu", make_protocol(protocol, "", size))
        predictor.predict(path)
        with Raster(path, predictor.rule) as raster:
            if protocol == "tile":
                list(predictor.rows(raster, size))
    assert len(seen) == 4
    normalized = (want.float()[None] - model.mean) / model.std
    for features in seen:
        assert (features.image[..., :size[0], :size[1]] - normalized).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["12", "16", "signed", "float"])
def test_values_are_scaled_from_percentiles_of_the_training_images(tmp_path, kind):
    paths = [write_tiff(tmp_path / f"{number}.tif", bands_of(kind, 3, number)) for number in range(4)]
    rule = decide_rule(paths)
    values = np.stack([bands_of(kind, 3, number) for number in range(4)], 1).reshape(3, -1).astype(float)
    low, high = np.percentile(values, (0.5, 99.5), axis=1)
    assert np.allclose(np.array(rule.ranges).T, [low, high])
    wide = bands_of(kind, 3, 2).astype(float).reshape(3, -1)
    brute = np.rint((255 * (wide - low[:, None]) / (high - low)[:, None]).clip(0, 255)).reshape(3, *SIZE)
    assert np.abs(rule.read(paths[2]).image.numpy() - brute).max() <= 1  # a half may round either way
    fixed = decide_rule(paths, value_range=(0, 1000))
    assert fixed.ranges == ((0.0, 1000.0),) * 3
    assert decide_rule(paths, value_range=("auto",)).ranges == rule.ranges
    scaled = [rule.read(path).image.numpy() for path in paths]
    assert np.allclose(rule.mean, np.concatenate(scaled, 1).mean((1, 2)), atol=0.01)


def test_scaling_by_table_equals_scaling_by_number():
    for dtype in ("u1", "i1", "u2", "i2"):
        ends = np.iinfo(dtype).min, np.iinfo(dtype).max
        values = np.random.default_rng(0).integers(*ends, (40, 50)).astype(dtype)
        assert (scale(values, 3.5, 77.25) == scale(values.astype(float), 3.5, 77.25)).all()


# --- what is decided ----------------------------------------------------------------------------------------
def test_infrared_that_is_marked_as_transparency_is_not_blended(tmp_path):
    """GDAL marks the fourth of four 8-bit bands so."""
    pixels = np.random.default_rng(0).integers(60, 200, (4, *SIZE)).astype(np.uint8)
    path = write_tiff(tmp_path / "rgbn.tif", pixels)
    assert stored_of(path).alpha == 4
    for rule in (decide_rule([path]), replace(PICTURES, strict=False)):
        assert (rule.read(path).image.numpy() == pixels[:3]).all() and rule.read(path).valid is None
    assert replace(PICTURES, strict=False).read(path).doubt and not decide_rule([path]).read(path).doubt
    assert (decide_rule([path], ALL).read(path).image.numpy() == pixels).all()
    infrared = decide_rule([path], (4, 3, 2))
    assert (infrared.read(path).image.numpy() == pixels[[3, 2, 1]]).all() and infrared.colors == (0, 1, 2)
    with refused(path):
        PICTURES.read(path)


def test_bands_are_named_ordered_and_counted(tmp_path):
    pixels = bands_of("16", 5)
    path = write_tiff(tmp_path / "five.tif", pixels)
    with refused(path, "--bands"):
        decide_rule([path])
    with refused(path, "--bands 1 7"):
        decide_rule([path], (1, 7))
    marked = write_tiff(tmp_path / "marked.tif", pixels, [
        ColorInterp.undefined, ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined])
    chosen = decide_rule([path], (4, 3, 2))
    assert torch.equal(decide_rule([marked]).read(marked).image, chosen.read(path).image)
    everything = decide_rule([marked], ALL)
    assert (everything.bands, everything.colors) == ((1, 2, 3, 4, 5), (3, 2, 1))
    assert decide_rule([path], (5, 1, 4, 2)).colors == (0, 1, 2)
    assert decide_rule([path], (2,)).bands == (2, 2, 2) and decide_rule([path], (2, 5)).colors == (0, 1, 1)
    shown = decide_rule([path], ALL, shown=(5, 1, 2))
    image = shown.read(path).image
    assert torch.equal(shown.picture(image), image[[4, 0, 1]]) and shown.colors == (0, 1, 2)
    with refused("--show-bands 6 1 2"):
        decide_rule([path], ALL, shown=(6, 1, 2))
    assert ImageRule.of(json.loads(json.dumps(everything.as_dict())), strict=True) == everything


def test_arrays_pages_and_deep_pictures_have_bands(tmp_path):
    pixels = bands_of("16", 5)
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "b.npy", pixels.transpose(1, 2, 0))
    np.savez(tmp_path / "c.npz", image=pixels.astype(">u2"))
    pages = [Image.fromarray(band) for band in pixels]
    pages[0].save(tmp_path / "d.tif", save_all=True, append_images=pages[1:])
    write_tiff(tmp_path / "e.tif", pixels, interleave="band", compress="deflate")
    rule = decide_rule([tmp_path / "a.npy"], ALL)
    with refused("d.tif", "--bands all"):
        decide_rule([tmp_path / "d.tif"])
    for name in ("a.npy", "b.npy", "c.npz", "d.tif", "e.tif"):
        path = tmp_path / name
        assert (stored_of(path).size, stored_of(path).bands) == (SIZE, 5), name
        assert torch.equal(rule.read(path).image, rule.read(tmp_path / "a.npy").image), name
    color = pixels[:3].transpose(1, 2, 0)
    cv2.imwrite(tmp_path / "color.png", color[..., ::-1])
    cv2.imwrite(tmp_path / "gray.png", color[..., 0])
    clear = np.full((*SIZE, 1), 65535, np.uint16)
    clear[:9] = 0
    cv2.imwrite(tmp_path / "clear.png", np.dstack([color[..., ::-1], clear]))
    rule = decide_rule([tmp_path / "color.png"])
    want = rule.read(tmp_path / "color.png").image
    assert torch.equal(want, decide_rule([tmp_path / "a.npy"], (1, 2, 3)).read(tmp_path / "a.npy").image)
    image = rule.read(tmp_path / "clear.png").image  # transparency of a PNG is laid over white
    assert (image[:, :9] == 255).all() and torch.equal(image[:, 9:], want[:, 9:])
    gray = decide_rule([tmp_path / "gray.png"])
    assert torch.equal(gray.read(tmp_path / "gray.png").image[2], want[0])
    for shape in ((9, 9, 9), (4, 5, 4), (7,), (2, 3, 4, 5)):
        np.save(tmp_path / "odd.npy", np.zeros(shape))
        with refused("odd.npy"):
            stored_of(tmp_path / "odd.npy")
    np.save(tmp_path / "odd.npy", np.zeros((3, 9, 9), complex))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "c.npz").read_bytes()[:90])
    for name in ("odd.npy", "cut.npz", "gone.npy"):
        with refused(name):
            rule.read(tmp_path / name)


def test_a_reader_of_a_new_format_is_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(READERS, ".raw", lambda path: np.fromfile(path, np.uint16).reshape(4, 6, 9))
    bands_of("16", 4, size=(6, 9)).tofile(tmp_path / "image.raw")
    rule = decide_rule([tmp_path / "image.raw"], ALL)
    assert rule.read(tmp_path / "image.raw").image.shape == (4, 6, 9)


def test_numbers_that_are_unknown_are_filled_and_ignored(tmp_path):
    pixels = bands_of("float", 4)
    pixels[:, 3:6], pixels[2, 20:30, 5], pixels[0, 40, 40] = np.nan, np.nan, np.inf
    path = write_tiff(tmp_path / "float.tif", pixels)
    rule = decide_rule([path], ALL)
    photo = rule.read(path)
    assert np.isfinite(rule.ranges).all() and (photo.valid == np.isfinite(pixels).any(0)).all()
    assert (photo.image[:, 3:6] == torch.tensor(rule.fill)[:, None, None]).all()
    assert (photo.image[2, 20:30, 5] == rule.fill[2]).all() and photo.image[0, 40, 40] == rule.fill[0]
    mask = write_tiff(tmp_path / "mask.tif", np.zeros((1, 20, 30), np.uint8))  # of another size
    _, targets, _ = SegmentationDataset([Sample(path, mask)], TABLE, (), rule=rule)[0]
    assert (targets["mask"][1] == IGNORE).all() and (targets["mask"][5:] == 0).all()


def test_palettes_and_inverted_gray_have_no_data_where_they_say(tmp_path):
    ids = blocks(*SIZE, (0, 1, 2))
    for name, options in (("palette.tif", dict(photometric="palette")),
                          ("inverted.tif", dict(photometric="MINISWHITE"))):
        path = write_tiff(tmp_path / name, ids[None], nodata=1, **options)
        if "palette" in name:
            with rasterio.open(path, "r+") as file:
                file.write_colormap(1, {0: (9, 8, 7, 255), 1: (1, 1, 1, 255), 2: (200, 1, 30, 255)})
        rule = decide_rule([path])
        photo = rule.read(path)
        assert (photo.valid == (ids != 1)).all(), name
        colors = np.array([[9, 8, 7], [0, 0, 0], [200, 1, 30]]) if "palette" in name else 255 - ids[..., None]
        want = colors[ids] if "palette" in name else np.broadcast_to(colors, (*SIZE, 3))
        assert (photo.image.permute(1, 2, 0).numpy() == want)[ids != 1].all(), name


def test_masks_inside_a_tiff_are_no_data(tmp_path):
    pixels, valid = bands_of("8", 3), np.ones(SIZE, bool)
    valid[10:20] = False
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write_tiff(tmp_path / "masked.tif", pixels, photometric="RGB")
        with rasterio.open(tmp_path / "masked.tif", "r+") as file:
            file.write_mask(valid)
    rule = decide_rule([write_tiff(tmp_path / "other.tif", pixels, nodata=0)])
    with Raster(tmp_path / "masked.tif", rule) as raster:
        assert (raster.valid(slice(0, SIZE[0])) == valid).all()
    assert (rule.read(tmp_path / "masked.tif").valid == valid).all()


# --- files that do not fit ----------------------------------------------------------------------------------
def test_files_that_do_not_fit_are_refused_in_training_and_doubted_after(tmp_path):
    usual = [write_tiff(tmp_path / f"{number}.tif", bands_of("12", 3, number)) for number in range(3)]
    rule = decide_rule(usual)
    cloud = bands_of("12", 3)
    cloud[:, :12, :12] = 9000
    cloud = write_tiff(tmp_path / "cloud.tif", cloud)
    assert torch.equal(rule.read(cloud).image[:, 12:], rule.read(usual[0]).image[:, 12:])
    plain = bands_of("8", 3)
    odd = {"eight.tif": plain, "four.tif": bands_of("12", 4), "far.tif": bands_of("12", 3) + np.uint16(20000)}
    odd = {name: write_tiff(tmp_path / name, pixels) for name, pixels in odd.items()}
    check_fit(rule, [*usual, cloud])
    lenient = replace(rule, strict=False)
    for name, path in odd.items():
        with refused(name):
            check_fit(rule, [*usual, path])
        if name != "far.tif":  # what its header says
            with refused(name):
                rule.read(path)
            with refused(name):
                WindowReader([Sample(usual[0]), Sample(path)], TABLE, rule=rule)
        if name != "four.tif":  # of which red, green and blue are not known
            with Raster(path, lenient) as raster:
                assert name in lenient.read(path).doubt and name in raster.doubt
    check_fit(decide_rule(usual, value_range=(0, 4000)), [odd["far.tif"]])  # the user knows
    each = decide_rule(usual, value_range=(0, 4000, 5, 9, -1, 1))
    assert each.ranges == ((0, 4000), (5, 9), (-1, 1))
    with refused("--value-range"):
        decide_rule(usual, value_range=(0, 4000, 5, 9))
    border = bands_of("12", 3) + np.uint16(20000)
    border[:, 1:] = 0  # a few bright pixels alone say nothing
    border[:, 0, :50] = 0
    check_fit(rule, [write_tiff(tmp_path / "border.tif", border, nodata=0)])
    numbered = decide_rule(usual, (1, 2, 3))
    for path in (odd["four.tif"], write_tiff(tmp_path / "bgr.tif", bands_of("12", 3), [
            ColorInterp.blue, ColorInterp.green, ColorInterp.red])):
        assert bool(replace(numbered, marks=(1, 2, 3)).misfit(path, stored_of(path)))
    with refused("eight.tif", "several kinds"):
        decide_rule([*usual, odd["eight.tif"]])
    five = decide_rule([write_tiff(tmp_path / "five.tif", bands_of("12", 5))], ALL)
    with refused("0.tif", "3 bands"):
        replace(five, strict=False).read(usual[0])


def test_what_a_user_says_of_other_files_is_done(tmp_path):
    deep = bands_of("16", 4)
    path, lenient = write_tiff(tmp_path / "deep.tif", deep), replace(PICTURES, strict=False)
    photo = lenient.told((3, 2, 1), (0, 65535)).read(path)
    assert not photo.doubt and np.abs(photo.image.numpy() - deep[[2, 1, 0]] / 257).max() <= 0.51
    own = lenient.told((3, 2, 1)).read(path)
    assert own.doubt and (own.image.min(), own.image.max()) == (0, 255)
    with Raster(path, lenient.told((3, 2, 1))) as raster:
        assert torch.equal(raster.read(0, 0, *SIZE)[0], own.image) and raster.doubt
    for bands, value_range in (((1, 2), ()), ((), ("auto",))):
        with refused("--bands" if bands else "--value-range"):
            lenient.told(bands, value_range)
    with refused(path):
        lenient.told((1, 2, 9)).read(path)


def test_frames_and_arrays_are_converted_as_files_are(tmp_path):
    pixels = bands_of("8", 3)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "photo.png")
    frames = torch.from_numpy(pixels)[None]
    for bands, value_range in (((), ()), ((3, 1, 2), ()), ((), (20, 150)), ((2,), (10, 90))):
        rule = decide_rule([tmp_path / "photo.png"], bands, value_range)
        want = rule.read(tmp_path / "photo.png").image
        assert torch.equal(rule.convert_frames(frames)[0], want)
        assert torch.equal(rule.convert_array(pixels.transpose(1, 2, 0)).image, want)
    five = decide_rule([write_tiff(tmp_path / "five.tif", bands_of("16", 5))], ALL)
    with refused("video"):
        five.convert_frames(frames)
    for array in (pixels, bands_of("16", 5), bands_of("8", 5).transpose(1, 2, 0)):
        with refused("(H, W, 5)"):
            five.convert_array(array)
    assert torch.equal(five.convert_array(bands_of("16", 5).transpose(1, 2, 0)).image,
                       five.read(tmp_path / "five.tif").image)


def test_files_with_marks_of_their_own_are_read_by_these(tmp_path):
    """Another value for no data; transparency or a mask that the others do not have."""
    pixels = bands_of("12", 3)
    pixels[:, :9], pixels[:, 40:] = 0, 5
    paths = [write_tiff(tmp_path / f"{value}.tif", pixels, nodata=value) for value in (0, 5)]
    alpha = (pixels[:1] != 5) * np.uint16(65535)
    alpha[0, 20, 20:23] = 9  # as good as clear, and data
    clear = write_tiff(tmp_path / "clear.tif", np.concatenate([pixels, alpha]),
                       [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha])
    masked = write_tiff(tmp_path / "masked.tif", pixels)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(masked, "r+") as file:
        file.write_mask(pixels[0] != 5)
    rule = replace(decide_rule(paths), strict=False)
    for path, value in ((paths[0], 0), (paths[1], 5), (clear, 5), (masked, 5)):
        valid = pixels[0] != value
        assert (rule.read(path).valid == valid).all(), path
        with Raster(path, rule) as raster:
            assert (raster.valid(slice(0, SIZE[0])) == valid).all(), path


def test_no_data_is_about_zero_to_a_network_and_bands_are_normalized(tmp_path):
    """In every band, wherever red, green and blue are."""
    pixels = bands_of("16", 5)
    pixels[:, :9] = 0
    path = write_tiff(tmp_path / "five.tif", pixels, [
        ColorInterp.undefined, ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined],
        nodata=0)
    rule = decide_rule([path], ALL)
    model, seen = network(rule)
    model(rule.read(path).image[None])
    window, _ = WindowReader([Sample(path)], TABLE, rule=rule).read(0, -9, 0, 9, SIZE[1])
    assert torch.equal(window, rule.read(path).image[:, :9])
    image = seen[0].image[0, :, :SIZE[0], :SIZE[1]]
    assert image[:, :9].abs().max() < 0.02
    assert all(abs(image[band, 9:].std() - 1) < 0.05 for band in (0, 4))  # as those of RGB, about


def test_other_types_and_counts_are_read_as_they_are_or_as_a_user_says(tmp_path):
    rule = replace(decide_rule([write_tiff(tmp_path / "deep.tif", bands_of("12", 3))]), strict=False)
    odd = rule.read(write_tiff(tmp_path / "odd.tif", bands_of("float", 3)))
    assert odd.doubt and (odd.image.min(), odd.image.max()) == (0, 255)
    plain = rule.read(write_tiff(tmp_path / "plain.tif", bands_of("8", 3)))
    assert plain.doubt and (plain.image.numpy() == bands_of("8", 3)).all()
    four = write_tiff(tmp_path / "four.tif", bands_of("12", 4))
    assert not rule.told((1, 2, 3)).read(four).doubt
    with refused(four, "--bands"):
        rule.read(four)


def test_images_that_are_not_normalized_are_so_in_every_band(tmp_path):
    rule = decide_rule([write_tiff(tmp_path / "five.tif", bands_of("16", 5))], ALL)
    model, _ = network(rule, normalize="none")
    assert (model.mean == 0).all() and (model.std == 255).all()


def test_all_of_large_images_and_of_the_list_is_looked_at(tmp_path, monkeypatch):
    """A few of the pixels, from everywhere."""
    pixels = np.linspace(2000, 60000, 600 * 700).astype(np.uint16).reshape(1, 600, 700)
    clear = np.full_like(pixels, 65535)
    clear[:, :100], alpha = 0, [ColorInterp.gray, ColorInterp.alpha]
    np.save(tmp_path / "a.npy", pixels)
    cv2.imwrite(str(tmp_path / "b.png"), pixels[0])
    write_tiff(tmp_path / "c.tif", pixels)
    write_tiff(tmp_path / "d.tif", np.concatenate([pixels, clear]), alpha)
    write_tiff(tmp_path / "e.tif", pixels * (clear > 0), nodata=0)
    for name, first in (("a.npy", 0), ("b.png", 0), ("c.tif", 0), ("d.tif", 100), ("e.tif", 100)):
        want = np.percentile(pixels[:, first:], (0.5, 99.5))
        assert np.allclose(decide_rule([tmp_path / name]).ranges[0], want, atol=300), name
    monkeypatch.setattr("dataio.image_rule.LOOKED_AT", 2)
    paths = [write_tiff(tmp_path / f"{number}.tif", bands_of("12", 3) // (4 - number)) for number in range(4)]
    rule = decide_rule(paths)
    assert rule.looked_at == (2, 4) and rule.ranges[0][1] > decide_rule(paths[:2]).ranges[0][1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_is_no_data_is_turned_as_its_image_is(tmp_path, orientation):
    values, path = bands_of("float", 1)[0], tmp_path / "turned.tif"
    values[:7, :30] = np.nan
    Image.fromarray(values).save(path, tiffinfo={0x0112: orientation})
    Image.fromarray(np.isnan(values).astype(np.uint8)).save(tmp_path / "mask.png")
    sample, rule = Sample(path, tmp_path / "mask.png"), decide_rule([path])
    photo = rule.read(path)
    assert (photo.image[0].numpy()[~photo.valid] == rule.fill[0]).all()
    reader = WindowReader([sample], TABLE, rule=rule)
    data = SegmentationDataset([sample], TABLE, reader.sizes[0], rule=rule)
    for mask in (data[0][1]["mask"], data.targets(0)["mask"], reader.read(0, 0, 0, *reader.sizes[0])[1]):
        assert ((mask.numpy() == IGNORE) == ~photo.valid).all()


def test_what_is_kept_of_images_is_kept_for_its_rule(tmp_path):
    """Decoded images, and pixels of classes."""
    pixels = bands_of("16", 4)
    pixels[:, :, :20] = 7
    path, mask = write_tiff(tmp_path / "image.tif", pixels), tmp_path / "mask.png"
    Image.fromarray(np.ones(SIZE, np.uint8)).save(mask)
    first = decide_rule([path], (3, 2, 1))
    for changes in ({}, dict(bands=(1, 2, 3)), dict(ranges=((0.0, 9e4),) * 3), dict(nodata=7.0)):
        rule = replace(first, **changes)
        reader = WindowReader([Sample(path, mask)], TABLE, tmp_path / "cache", rule)
        assert torch.equal(reader.read(0, 0, 0, *SIZE)[0], rule.read(path).image)
        points = reader.points(2, tmp_path / "points")
        assert (points[:, 3] < 20).any() == (rule.nodata is None)
        for data in (TileDataset(reader, SIZE), WindowDataset(reader, SIZE)):
            cached = cache_features(network(rule)[0], data, tmp_path / "features", FLOAT32)
            assert torch.equal(cached.collate([cached[0]])[0].image[0], data[0][0])


def test_frames_of_a_video_are_seen_as_files_are(tmp_path):
    pixels, path = bands_of("8", 3).transpose(1, 2, 0), tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    rule = decide_rule([path], (3, 1, 2), (90, 180))
    facts = dict(classes=[["a", [0, 0, 0]]] * 3, imgsz=SIZE, image_rule=rule.as_dict())
    predictor = Predictor(network(rule)[0], facts, "cpu")
    (_, ids), = FrameSegmenter(predictor)([pixels])()
    assert (ids == predictor.predict(path)).all()
    frames = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    assert (ids != predictor(frames)[0]).any()
    deep = decide_rule([write_tiff(tmp_path / "deep.tif", bands_of("16", 3))])
    assert torch.equal(deep.convert_frames(frames), frames)  # as if they were scaled


def test_pictures_show_the_bands_that_are_chosen(tmp_path, run):
    pixels = np.arange(5, dtype=np.uint8)[:, None, None] * 40 + np.zeros((5, *SIZE), np.uint8)
    path = write_tiff(tmp_path / "five.tif", pixels)
    rule, sample = decide_rule([path], ALL, shown=(5, 3, 1)), Sample(path)
    want, pictures = np.array([160, 80, 0]), []
    with Raster(path, rule) as raster:
        pictures.append(raster.preview())
    for data in (SegmentationDataset([sample], TABLE, SIZE, rule=rule),
                 TileDataset(WindowReader([sample], TABLE, rule=rule), SIZE)):
        pictures.append(data.picture(0).permute(1, 2, 0).numpy())
    classes = [["a", [0, 0, 0]], ["b", [9, 9, 9]], ["c", [99, 9, 9]]]
    packed = pack_checkpoint(network(rule)[0], classes, SIZE, image_rule=rule.as_dict())
    torch.save(packed, tmp_path / "model.pth")
    code, _, err = run(infer_image, "--model", tmp_path / "model.pth", "--input", path, "--alpha", 0.001,
                       "--device", "cpu", "--backend", "torch", "--out-dir", tmp_path)
    assert code == 0, err
    pictures.append(np.array(Image.open(tmp_path / "inference_results_image/five_overlay.jpg")))
    for picture in pictures:
        assert np.abs(picture.astype(int) - want).max() <= 3


# --- models of more bands -----------------------------------------------------------------------------------
def images_of(count, size=(45, 61)):
    """Return noise (2, count, H, W) uint8."""
    return torch.randint(0, 256, (2, count, *size), dtype=torch.uint8,
    generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("head", HEADS)
def test_a_frozen_backbone_sees_three_bands_and_a_stem_all(head):
    """With a stem, the feature cache stays; without, other bands change nothing."""
    torch.manual_seed(0)
    spec = ModelSpec(num_classes=3, backbone="vit_tiny", head=head, num_bands=5, colors=(3, 1, 0))
    model, images = build_model(spec).eval(), images_of(5)
    if hasattr(model.head, "conv_seg"):
        torch.nn.init.normal_(model.head.conv_seg.weight)
    other = images.clone()
    other[:, [2, 4]] = 255 - other[:, [2, 4]]
    with torch.no_grad():
        features, changed = model.features(images), model.features(other)
        assert all(map(torch.equal, features.maps, changed.maps))
        assert (model(images) != model(other)).any() == model.head.reads.image
        three = build_model(replace_spec(spec, num_bands=3, colors=(0, 1, 2)))
        three.backbone.load_state_dict(model.backbone.state_dict())
        maps = three.eval().features(images[:, [3, 1, 0]]).maps
        assert all(map(torch.equal, features.maps, maps))


def replace_spec(spec, **fields):
    """Return a ModelSpec with other fields."""
    return ModelSpec(**{**vars(spec), **fields})


def test_three_bands_in_another_order_are_seen_in_that_of_the_weights():
    spec, images = ModelSpec(num_classes=3, backbone="vit_tiny", head="bn"), images_of(3)
    usual, other = build_model(spec).eval(), build_model(replace_spec(spec, colors=(2, 0, 1))).eval()
    other.backbone.load_state_dict(usual.backbone.state_dict())
    maps = other.features(images[:, [1, 2, 0]]).maps
    assert all(map(torch.equal, usual.features(images).maps, maps))


@pytest.mark.parametrize(("name", "count"), [
    ("vit_tiny", 2), ("vit_tiny", 5), ("timm/convnext_atto", 4), ("timm/eva02_tiny_patch14_224", 5),
    ("fcn_resnet50", 4), ("fpn_efficientnet_lite0", 5), ("fpn_mobilenetv4_small", 2)])
def test_a_widened_backbone_keeps_what_it_knew_and_learns_the_new_bands(name, count):
    torch.manual_seed(0)
    if name in BASELINES:
        old, wide = (BASELINES[name](ModelSpec(arch=name, num_classes=3), "none")[0] for _ in range(2))
    else:
        old, wide = (build_backbone(name, "none", (-1,)) for _ in range(2))
    wide.load_state_dict(old.state_dict())
    colors = (0, 2, 1) if count > 2 else (0, 1, 1)
    wide.widen(colors, count)
    wide.unfreeze(0)
    size = (old.size_divisor * 4,) * 2 if old.size_divisor > 1 else (40, 40)
    gray = torch.randn(1, 1, *size)
    old.eval()
    wide.eval()
    for a, b in zip(old(gray.expand(1, 3, *size))[0], wide(gray.expand(1, count, *size))[0], strict=True):
        assert torch.allclose(a, b, atol=1e-3)  # alike bands give what they gave
    assert wide.trains() and wide.channels_in == count
    images = torch.randn(1, count, *size)
    wide(images)[0][-1].square().mean().backward()
    gradient = wide.net.get_submodule(wide.first_conv).weight.grad
    assert (gradient.abs().sum((0, 2, 3)) > 0).all()
    if count > 2:
        kernels, before = (net.get_submodule(wide.first_conv).weight for net in (wide.net, old.net))
        assert torch.allclose(kernels[:, list(colors)], before * 3 / count)


def test_official_weights_are_widened(hub_cache):
    spec = ModelSpec(num_classes=3, head="bn", num_bands=4, widen=True)
    model = build_model(spec, "auto", 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"backbone.net.patch_embed.proj.weight", "head.conv_seg.weight"} <= trained
    assert not any("blocks" in name for name in trained) and model(images_of(4)).shape == (2, 3, 45, 61)


@pytest.mark.parametrize("count", [1, 2, 4, 5])
@pytest.mark.parametrize("name", AUGMENTS)
def test_augmentations_take_any_number_of_bands(name, count):
    image, mask = images_of(count)[0], torch.from_numpy(blocks(45, 61, (0, 1)))
    torch.manual_seed(1)
    for _ in range(6):
        changed, targets = augment(image, {"mask": mask}, (30, 40), (name,))
        assert changed.shape == (count, 30, 40) and targets["mask"].shape == (30, 40)
    flat = torch.full((count, 30, 40), 100, dtype=torch.uint8)
    flat += torch.arange(count, dtype=torch.uint8)[:, None, None] * 20
    if AUGMENTS[name].of_colors:  # brightness and contrast act on every band
        moved = [augment(flat, {"mask": mask}, (30, 40), (name,))[0][:, 0, 0] for _ in range(9)]
        assert (torch.stack(moved).float().std(0) > 1).all()


# --- as a user runs it --------------------------------------------------------------------------------------
RUN = ["--dataset", "folder", "--backbone", "vit_tiny", "--weights", "none", "--imgsz", 56, 70,
       "--workers", 0, "--device", "cpu", "--batch-size", 2]


@pytest.fixture
def five_bands(tmp_path):
    return write_set(tmp_path / "data")


def test_five_bands_are_trained_scored_exported_and_mapped(tmp_path, run, five_bands):
    out, scores = tmp_path / "out", {}
    where = rasterio.transform.from_origin(691_000, 5_335_000, 0.2, 0.2)
    ortho = write_tiff(tmp_path / "ortho.tif", bands_of("16", 5, size=(120, 150)), crs="EPSG:32632",
                       transform=where)
    code, text, err = run(train, *RUN, "--data-root", five_bands, "--bands", "all", "--epochs", 2,
                          "--show-bands", 5, 2, 1, "--augment", "flip", "color", "--out-dir", out)
    assert code == 0 and "bands 1 2 3 4 5 of 5" in text and "--augment color" in text, err
    rule = json.loads((out / "config.json").read_text())["image_rule"]
    assert rule["bands"] == [1, 2, 3, 4, 5] and rule["shown"] == [4, 1, 0]
    model, checkpoint = load_model(out / "best_model_iou.pth")
    assert checkpoint["image_rule"] == rule and model.mean.shape == (1, 5, 1, 1)
    assert torch.allclose(model.mean[0, 3:, 0, 0], torch.tensor(rule["mean"][3:]))
    for protocol in ("whole", "slide", "tile"):
        code, text, err = run(evaluate, "--model", out / "best_model_iou.pth", "--protocol", protocol,
                              "--report", "--device", "cpu", "--out-dir", tmp_path / protocol)
        assert code == 0 and "warning" not in text, err
        scores[protocol] = json.loads((tmp_path / protocol / "evaluation/metrics.json").read_text())["miou"]
    best = max(json.loads(line)["val_miou"] for line in (out / "history.jsonl").read_text().splitlines())
    assert len(set(scores.values())) == 1 and scores["tile"] == pytest.approx(best)
    code, text, err = run(export, "--model", out / "best_model_iou.pth")
    assert code == 0, err
    masks = []
    for name in ("best_model_iou.pth", "best_model_iou.onnx"):
        code, text, err = run(infer_image, "--model", out / name, "--input", ortho, "--protocol", "tile",
                              "--backend", "torch", "--device", "cpu", "--out-dir", tmp_path / name)
        assert code == 0 and "warning" not in err, err
        with rasterio.open(tmp_path / name / "inference_results_image/ortho_mask.tif") as file:
            masks.append(file.read(1))
            assert file.transform == where
            assert json.loads(file.tags()["images_read_as"])["ranges"] == rule["ranges"]
    assert (masks[0] == masks[1]).mean() > 0.99


def test_a_run_of_bands_is_cached_resumed_and_widened(tmp_path, run, five_bands):
    flags = [*RUN, "--data-root", five_bands, "--bands", "all"]
    cached = [*flags, "--cache-features", tmp_path / "cache", "--out-dir", tmp_path / "cached"]
    code, _, err = run(train, *cached, "--epochs", 2, "--lr", 0.01)
    assert code == 0, err
    code, _, err = run(train, "--resume", "--epochs", 3, "--out-dir", tmp_path / "cached")
    assert code == 0, err
    code, _, err = run(train, "--resume", "--epochs", 4, "--bands", 1, 2, 3, "--out-dir", tmp_path / "cached")
    assert code == 2 and "--bands" in err
    for more in (["--widen"], ["--unfreeze", "all"]):
        code, text, err = run(train, *flags, "--head", "bn", *more, "--epochs", 1,
                              "--out-dir", tmp_path / "wide")
        assert code == 0 and "widened" in text, err
        model, checkpoint = load_model(tmp_path / "wide/last.pth")
        assert model.backbone.channels_in == 5 and checkpoint["spec"].widen
    code, _, err = run(train, *flags, "--widen", "--cache-features", tmp_path / "cache")
    assert code == 2 and "--cache-features" in err


def test_a_rule_is_decided_once_from_all_that_trains_and_is_strict(tmp_path, run, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    extra = write_set(tmp_path / "extra", "12", 3, 2, (42, 56))
    trained, validated = (write_set(data / split, "12", 3, 3) / "images" for split in ("train", "val"))
    (data / "classes.txt").write_text("ground\nthing\n")
    code, _, err = run(train, *RUN, "--data-root", data, "--extra", extra, "--epochs", 1, "--out-dir", out)
    assert code == 0, err
    rule = json.loads((out / "config.json").read_text())["image_rule"]
    want = decide_rule([*trained.iterdir(), *(extra / "images").iterdir()]).as_dict()
    assert rule["looked_at"] == [5, 5] and np.allclose(rule["ranges"], want["ranges"], atol=1e-6)
    monkeypatch.setattr(train, "decide_rule", None)
    code, _, err = run(train, "--resume", "--epochs", 2, "--out-dir", out)
    assert code == 0 and json.loads((out / "config.json").read_text())["image_rule"] == rule, err
    write_tiff(validated / "0.tif", bands_of("12", 3) + np.uint16(20000))
    code, _, err = run(train, "--resume", "--epochs", 3, "--out-dir", out)
    assert code == 2 and "val/images/0.tif" in err


@pytest.mark.parametrize(("flags", "named"), [
    (["--bands", "all", "--head", "bn"], "--widen"), (["--bands", 1, 2, 3, "--widen"], "--widen"),
    ([], "--bands"), (["--bands", "all", 2], "--bands"), (["--bands", 1, 9], "--bands 1 9"),
    (["--bands", 0], "--bands"), (["--bands", "all", "--value-range", 5], "--value-range"),
    (["--bands", "all", "--value-range", 9, 3], "--value-range"),
    (["--bands", "all", "--value-range", "nan", 3], "--value-range"),
    (["--bands", 1, 2, 3, "--show-bands", 1, 2, 4], "--show-bands"),
    (["--bands", "all", "--arch", "fcn_resnet50", "--unfreeze", 0], "--widen")])
def test_flags_of_bands_that_have_no_effect_are_refused(tmp_path, run, five_bands, flags, named):
    usual = [flag for flag in RUN if "--arch" not in flags or flag not in ("--backbone", "vit_tiny")]
    code, _, err = run(train, *usual, "--data-root", five_bands, *flags, "--epochs", 1,
                       "--out-dir", tmp_path / "out")
    assert code == 2 and named in err.splitlines()[-1], err


@pytest.mark.plots
def test_check_data_reports_bands_ranges_and_files_that_do_not_fit(tmp_path, run, five_bands):
    check = partial(run, check_data, "--data-root", five_bands, "--out-dir", tmp_path)
    code, text, _ = check()
    assert code == 1 and "--bands" in text
    code, text, err = check("--bands", "all")
    assert code == 0 and "uint16" in text and "band 5:" in text, err
    assert "--bands all" in text.splitlines()[-1]
    rule = decide_rule(sorted((five_bands / "images").iterdir())[:4], ALL)
    assert Image.open(tmp_path / "check.png").size[1] > 600 and rule.count == 5
    write_tiff(five_bands / "images/2.tif", bands_of("8", 5))
    code, text, _ = check("--bands", "all")
    assert code == 1 and "2.tif" in text


def test_check_data_names_files_of_validation_that_do_not_fit(tmp_path, run):
    for split in ("train", "val"):
        write_set(tmp_path / split, "12", 3, 2)
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    write_tiff(tmp_path / "val/images/1.tif", bands_of("12", 4))
    code, text, _ = run(check_data, "--data-root", tmp_path, "--out-dir", tmp_path / "out")
    assert code == 1 and "val/images/1.tif has 4 bands" in text
    write_tiff(tmp_path / "val/images/1.tif", bands_of("12", 3) + np.uint16(20000))
    code, text, _ = run(check_data, "--data-root", tmp_path, "--out-dir", tmp_path / "out")
    assert code == 1 and "val/images/1.tif has a band" in text


def test_what_a_user_says_is_done_in_tiles_too(tmp_path, run):
    rule = decide_rule([write_tiff(tmp_path / "deep.tif", bands_of("12", 3))])
    classes = [["a", [0, 0, 0]], ["b", [9, 9, 9]], ["c", [99, 9, 9]]]
    packed = pack_checkpoint(network(rule)[0], classes, SIZE, image_rule=rule.as_dict())
    torch.save(packed, tmp_path / "model.pth")
    code, _, err = run(infer_image, "--model", tmp_path / "model.pth", "--input",
                       write_tiff(tmp_path / "odd.tif", bands_of("8", 3)), "--protocol", "tile", "--bands", 3,
                       2, 1, "--value-range", 0, 255, "--device", "cpu", "--out-dir", tmp_path)
    with rasterio.open(tmp_path / "inference_results_image/odd_mask.tif") as file:
        said = json.loads(file.tags()["images_read_as"])
    assert (code, said["bands"], said["ranges"]) == (0, [3, 2, 1], [[0, 255]] * 3) and "warning" not in err


def test_odd_files_are_a_warning_at_inference(tmp_path, run):
    data = write_set(tmp_path / "data", "12", 3)
    code, _, err = run(train, *RUN, "--data-root", data, "--epochs", 1, "--out-dir", tmp_path / "out")
    assert code == 0, err
    infer = partial(run, infer_image, "--model", tmp_path / "out/last.pth", "--backend", "torch",
                    "--device", "cpu", "--out-dir", tmp_path)
    odd = write_tiff(tmp_path / "odd.tif", bands_of("8", 3))
    far = write_tiff(tmp_path / "far.tif", bands_of("12", 3) + np.uint16(30000))
    for protocol in ("whole", "tile"):
        code, _, err = infer("--input", odd, far, data / "images/0.tif", "--protocol", protocol)
        assert code == 0 and err.count("warning: ") == 2 and "odd.tif" in err and "far.tif" in err
    code, _, err = infer("--input", odd, "--value-range", 0, 255)
    assert code == 0 and "warning" not in err
    write_tiff(data / "images/0.tif", bands_of("8", 3))
    code, text, err = run(evaluate, "--model", tmp_path / "out/last.pth", "--device", "cpu", "--split", "all",
                          "--out-dir", tmp_path)
    assert code == 0 and "0.tif" in text, err
    code, _, err = run(train, *RUN, "--data-root", data, "--epochs", 1, "--out-dir", tmp_path / "out")
    assert code == 2 and "several kinds" in err


def test_pictures_of_eight_bit_are_read_as_before(tmp_path):
    """Of any mode: what PIL shows, whatever rule an earlier checkpoint holds."""
    pixels = bands_of("8", 3).transpose(1, 2, 0)
    color, gray = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    for name, image in (("a.png", color), ("b.jpg", color), ("c.png", gray), ("d.tif", color),
                        ("e.png", color.quantize(9)), ("f.tif", color.convert("CMYK")),
                        ("g.tif", color.quantize(9)), ("h.png", gray.point(lambda v: v > 99, "1"))):
        image.save(tmp_path / name)
    paths = sorted(tmp_path.iterdir())
    rule = decide_rule(paths)
    assert rule.is_plain and rule.looked_at == (8, 8) and ImageRule.of(None).is_plain
    for path in paths:
        want = np.array(Image.open(path).convert("RGB"))
        photo = rule.read(path)
        assert (photo.image.permute(1, 2, 0).numpy() == want).all()
        assert photo.valid is None and not photo.doubt
        assert torch.equal(read_image(path), photo.image)


# --- as people have them ------------------------------------------------------------------------------------
def test_ranges_are_of_single_pixels_and_of_data_alone(tmp_path):
    """Overviews are averages; another file has another value for no data."""
    noise = np.random.default_rng(0).normal(2000, 300, (1, 700, 800)).clip(1, 9000).astype(np.uint16)
    with rasterio.open(tmp_path / "cog.tif", "w", driver="COG", dtype="uint16", count=1, width=800,
                       height=700, blocksize=128) as file:
        file.write(noise)
    low, high = np.percentile(noise, (0.5, 99.5))
    assert np.allclose(decide_rule([tmp_path / "cog.tif"]).ranges, (low, high), rtol=0.02)
    paths = []
    for value in (-9999, -32768):
        pixels = bands_of("signed", 3)
        pixels[:, :20] = value
        paths.append(write_tiff(tmp_path / f"{value}.tif", pixels.astype(np.int32), nodata=value))
    rule = decide_rule(paths)
    assert np.min(rule.ranges) > 0 and all((rule.read(path).valid[20:]).all() for path in paths)
    for constant in (1e11, 2.0 ** 63):
        np.save(tmp_path / "constant.npy", np.full((1, 9, 9), constant))
        rule = decide_rule([tmp_path / "constant.npy"])
        assert rule.read(tmp_path / "constant.npy").image.shape == (3, 9, 9)


def test_every_file_says_itself_which_bands_are_colors_and_which_is_transparency(tmp_path):
    """The order of files decides nothing; tiles at a border have transparency and others have not."""
    pixels, clear = bands_of("12", 3), np.full((1, *SIZE), 65535, np.uint16)
    clear[:, :9] = 0
    rgb = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
    usual = write_tiff(tmp_path / "rgb.tif", pixels, rgb)
    turned = write_tiff(tmp_path / "bgr.tif", pixels[::-1], rgb[::-1])
    border = write_tiff(tmp_path / "border.tif", np.concatenate([pixels, clear]), [*rgb, ColorInterp.alpha])
    for paths in ([usual, turned, border], [border, turned, usual]):
        rule = decide_rule(paths)
        images = [rule.read(path).image for path in (usual, turned)]
        assert torch.equal(*images) and torch.equal(rule.read(border).image[:, 9:], images[0][:, 9:])
        assert (rule.read(border).valid == (clear[0] > 0)).all() and rule.read(usual).valid is None
    water = np.concatenate([bands_of("8", 3), np.zeros((1, *SIZE), np.uint8)])  # infrared is 0 there
    land = write_tiff(tmp_path / "land.tif", bands_of("8", 4))
    water = write_tiff(tmp_path / "water.tif", water)
    assert decide_rule([land, land.with_name("land.tif"), water]).read(water).valid is None


def test_a_few_bright_images_are_said_to_make_the_range_wide(tmp_path):
    paths = [write_tiff(tmp_path / f"{number}.tif", bands_of("12", 3, number)) for number in range(9)]
    assert not decide_rule(paths).note
    write_tiff(paths[4], bands_of("12", 3) + np.uint16(50000))
    assert "--value-range" in decide_rule(paths).note


def test_no_data_is_no_class_in_what_is_written(tmp_path, run):
    pixels = bands_of("12", 3)
    pixels[:, :20] = 0
    path = write_tiff(tmp_path / "a.tif", pixels, nodata=0)
    rule = decide_rule([path])
    classes = [["a", [0, 0, 0]], ["b", [9, 9, 9]], ["c", [99, 9, 9]]]
    packed = pack_checkpoint(network(rule)[0], classes, SIZE, image_rule=rule.as_dict())
    torch.save(packed, tmp_path / "m.pth")
    code, _, err = run(infer_image, "--model", tmp_path / "m.pth", "--input", path, "--device", "cpu",
                       "--json", "--min-confidence", 0.01, "--out-dir", tmp_path)
    assert code == 0, err
    results = tmp_path / "inference_results_image"
    for name in ("a_mask.png", "pseudo_labels/masks/a.png"):
        mask = np.array(Image.open(results / name))
        assert (mask[:20] == IGNORE).all() and (mask[20:] != IGNORE).all()
    predictor = Predictor(*load_model(tmp_path / "m.pth"), "cpu")
    for image in (path, pixels.transpose(1, 2, 0)):
        assert (predictor.predict(image) == np.array(Image.open(results / "a_mask.png"))).all()


def test_masks_beside_images_are_copied_with_them(tmp_path, run):
    data = write_set(tmp_path / "data", "8", 3, 4)
    for path in sorted((data / "images").iterdir())[:2]:
        with rasterio.open(path, "r+") as file:
            file.write_mask(np.arange(SIZE[0])[:, None].repeat(SIZE[1], 1) > 9)
    code, text, err = run(check_data, "--data-root", data, "--fix", tmp_path / "clean", "--out-dir", tmp_path)
    assert code == 0, err
    for path in sorted((tmp_path / "clean/images").glob("*.tif")):
        original = data / "images" / path.name
        valid, want = (PICTURES.read(file).valid for file in (path, original))
        assert want is valid is None or (valid == want).all()
    assert (PICTURES.read(tmp_path / "clean/images/0.tif").valid.sum(0) == SIZE[0] - 10).all()


def test_tiffs_that_pil_and_gdal_decode_otherwise_are_read_alike(tmp_path):
    """Integers with a sign, JPEG inside, less than a byte: windows are what the whole is, or are refused."""
    smooth = np.stack([np.mgrid[:64, :80][1] * factor for factor in (1, 2, 3)]).astype(np.uint8)
    jpeg = write_tiff(tmp_path / "jpeg.tif", smooth, compress="jpeg", photometric="YCBCR", tiled=True,
                      blockxsize=16, blockysize=16)
    signed = write_tiff(tmp_path / "signed.tif", (smooth.astype(int) - 100).astype(np.int8))
    for path in (jpeg, signed):
        rule = decide_rule([path])
        with Raster(path, rule) as raster:
            assert torch.equal(raster.read(0, 0, 64, 80)[0], rule.read(path).image), path
    half = write_tiff(tmp_path / "half.tif", smooth[:1] // 16, nbits=4)
    mask = write_tiff(tmp_path / "mask.tif", smooth[:1] // 128)
    with refused(half):
        Raster(half)
    assert WindowReader([Sample(half, mask)], TABLE).by_windows == [False]


def test_statistics_that_a_program_writes_beside_images_change_no_fingerprint(tmp_path):
    data = write_set(tmp_path / "data", "12", 3, 4)
    options = DataOptions(dataset="folder", data_root=str(data))
    before = load_data(options, tmp_path).fingerprints()
    with rasterio.open(data / "images/0.tif") as file:
        file.statistics(1)
    assert (data / "images/0.tif.aux.xml").exists()
    assert load_data(options, tmp_path).fingerprints() == before


def test_what_files_beside_images_say_of_their_pixels_changes_the_fingerprint(tmp_path):
    data = write_set(tmp_path / "data", "12", 3, 4)
    options = DataOptions(dataset="folder", data_root=str(data))
    seen = [load_data(options, tmp_path).fingerprints()["data_fingerprint"]]
    path = data / "images/0.tif"
    for row in (0, 1):
        valid = np.full(stored_of(path).size, 255, np.uint8)
        valid[row] = 0
        write_tiff(data / "images/0.tif.msk", valid[None])
        seen.append(load_data(options, tmp_path).fingerprints()["data_fingerprint"])
    for value in (7, 8):
        Path(f"{path}.aux.xml").write_text("<PAMDataset><PAMRasterBand band='1'><NoDataValue>"
                                           f"{value}</NoDataValue></PAMRasterBand></PAMDataset>")
        seen.append(load_data(options, tmp_path).fingerprints()["data_fingerprint"])
    assert len(set(seen)) == 5
