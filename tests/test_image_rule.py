"""One rule for all images: what a network sees is the same by every path, and files that do not fit are
named."""
import json
import warnings
from dataclasses import replace
from functools import lru_cache, partial

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
from checkpoint import load_model
from config import IGNORE
from dataio.dataloader import SegmentationDataset, TileDataset
from dataio.feature_cache import cache_features
from dataio.image_rule import PICTURES, ImageRule, decide_rule, read_image, scale
from dataio.images import READERS, stored_of
from dataio.readers import Sample, index_table
from dataio.transforms import AUGMENTS, augment
from dataio.windows import Raster, WindowReader
from inference.predictor import Predictor, make_protocol
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


@lru_cache
def network(channels, colors):
    """Return a small Segmenter for images of so many bands, and a list of what its head is given."""
    torch.manual_seed(0)
    spec = ModelSpec(num_classes=3, backbone="vit_tiny", head="detail", num_bands=channels, colors=colors)
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
    assert rule.alpha == (bands + 1 if "alpha" in marks else 0)
    assert rule.channels == (3 if bands == 1 else bands)
    model, seen = network(rule.channels, rule.colors)
    model.normalize_bands(rule.mean, rule.std)
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
    assert decide_rule([marked]).bands == (4, 3, 2)
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
    assert gray.bands == (1, 1, 1) and torch.equal(gray.read(tmp_path / "gray.png").image[2], want[0])
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
    for name, path in odd.items():
        with refused(name):
            rule.read(path)
        photo = replace(rule, strict=False).read(path)
        assert name in photo.doubt and photo.image.shape == (3, *SIZE)
        if name != "far.tif":  # what its header says
            with refused(name):
                WindowReader([Sample(usual[0]), Sample(path)], TABLE, rule=rule)
    assert torch.equal(replace(rule, strict=False).read(odd["four.tif"]).image, rule.read(
        write_tiff(tmp_path / "same.tif", bands_of("12", 4)[:3])).image)
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
        assert (rule.convert_array(pixels.transpose(1, 2, 0)) == want.numpy()).all()
    five = decide_rule([write_tiff(tmp_path / "five.tif", bands_of("16", 5))], ALL)
    with refused("video"):
        five.convert_frames(frames)
    for array in (pixels, bands_of("16", 5), bands_of("8", 5).transpose(1, 2, 0)):
        with refused("(H, W, 5)"):
            five.convert_array(array)
    assert (five.convert_array(bands_of("16", 5).transpose(1, 2, 0)) ==
            five.read(tmp_path / "five.tif").image.numpy()).all()


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


@pytest.mark.parametrize(("name", "count"), [
    ("vit_tiny", 2), ("vit_tiny", 5), ("timm/convnext_atto", 4), ("timm/eva02_tiny_patch14_224", 5),
    ("resnet", 4)])
def test_a_widened_backbone_keeps_what_it_knew_and_learns_the_new_bands(name, count):
    torch.manual_seed(0)
    if name == "resnet":
        old, wide = (BASELINES["fcn_resnet50"](ModelSpec(arch="fcn_resnet50", num_classes=3), "none")[0]
                     for _ in range(2))
    else:
        old, wide = (build_backbone(name, "none", (-1,)) for _ in range(2))
    wide.load_state_dict(old.state_dict())
    colors = (0, 2, 1) if count > 2 else (0, 1, 1)
    wide.widen(colors, count)
    wide.unfreeze(0)
    size = (40, 40) if name == "resnet" else (old.size_divisor * 4,) * 2
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
    write_tiff(five_bands / "images/4.tif", bands_of("16", 5) // 500 + np.uint16(65000))
    code, text, _ = check("--bands", "all")
    assert code == 1 and "2.tif" in text
    write_tiff(five_bands / "images/2.tif", bands_of("16", 5))
    code, text, _ = check("--bands", "all", "--value-range", 0, 20000)
    assert code == 1 and "4.tif" in text
    with refused("4.tif"):
        decide_rule([five_bands / "images/0.tif"], ALL, (0, 20000)).read(five_bands / "images/4.tif")


def test_odd_files_are_a_warning_at_inference(tmp_path, run):
    data = write_set(tmp_path / "data", "12", 3)
    code, _, err = run(train, *RUN, "--data-root", data, "--epochs", 1, "--out-dir", tmp_path / "out")
    assert code == 0, err
    infer = partial(run, infer_image, "--model", tmp_path / "out/last.pth", "--backend", "torch",
                    "--device", "cpu", "--out-dir", tmp_path)
    odd = write_tiff(tmp_path / "odd.tif", bands_of("8", 3))
    far = write_tiff(tmp_path / "far.tif", bands_of("12", 3) + np.uint16(30000))
    four = write_tiff(tmp_path / "four.tif", bands_of("12", 4))
    for protocol in ("whole", "tile"):
        code, _, err = infer("--input", odd, four, data / "images/0.tif", "--protocol", protocol)
        assert code == 0 and err.count("warning: ") == 2 and "odd.tif" in err and "four.tif" in err
    code, _, err = infer("--input", far)
    assert code == 0 and "far.tif" in err
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
