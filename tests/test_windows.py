"""--train-scale native: windows are crops of the images, tiles cover them once, caches know them."""
import json
import os
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from conftest import blocks, refused, tiny, write_folder, write_pair
from PIL import Image

import evaluate
import infer_image
import train
from config import IGNORE
from dataio import windows
from dataio.dataloader import TileDataset, WindowDataset
from dataio.feature_cache import plan_files
from dataio.image_rule import decide_rule
from dataio.images import EXIF_ORIENTATION
from dataio.readers import NODATA, Sample, Target, index_table, read_sample, value_table
from dataio.resizing import PADDING_COLOR, resize_mask
from dataio.windows import (POINTS, Raster, WindowReader, check_room, draw_points, native_mask,
                            native_pair)
from utils import Precision

TABLE, FLOAT32 = index_table(5), Precision("off", torch.device("cpu"))
BOXES = [(0, 0, 45, 61), (7, 11, 20, 33), (-6, 30, 30, 50), (40, 55, 20, 20), (-9, -9, 80, 90),
         (60, 70, 8, 8)]


def crop(image, mask, top, left, height, width):
    """Return a window of (3, H, W) and (H, W), beyond them PADDING_COLOR and IGNORE."""
    pad = 100
    around = np.empty((3, image.shape[1] + 2 * pad, image.shape[2] + 2 * pad), np.uint8)
    around[:] = np.array(PADDING_COLOR)[:, None, None]
    around[:, pad:-pad, pad:-pad] = image
    labels = np.pad(mask, pad, constant_values=IGNORE)
    inside = slice(top + pad, top + pad + height), slice(left + pad, left + pad + width)
    return around[:, inside[0], inside[1]], labels[inside]


def samples_of(folder, *endings, size=(45, 61)):
    """Write one pair per image ending; return the Samples."""
    samples = [Sample(folder / f"{number}.{ending}", folder / f"{number}_m.png")
               for number, ending in enumerate(endings)]
    for number, sample in enumerate(samples):
        write_pair(sample.image, sample.mask, blocks(*size, (0, 1, 2, 4), seed=number), seed=number)
    return samples


def read_pair(sample):
    """Return image (3, H, W) and mask (H, W) of a Sample."""
    image, targets = read_sample(sample, TABLE)
    return image, targets["mask"]


def write_tiff(path, pixels, **options):
    """Write (bands, H, W) as a TIFF by rasterio."""
    with rasterio.open(path, "w", driver="GTiff", dtype=pixels.dtype, width=pixels.shape[2],
                       height=pixels.shape[1], count=len(pixels), **options) as file:
        file.write(pixels)
    return path


def deep_pixels(size=(45, 61), top=3000):
    """Return (3, H, W) uint16 noise."""
    return np.random.default_rng(0).integers(300, top, (3, *size)).astype(np.uint16)


# --- windows ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", ["", "cache"])
def test_windows_are_crops_of_the_images(tmp_path, folder, capsys):
    samples = samples_of(tmp_path, "png", "jpg", "tif", "jpg", "png", "png")
    for sample, orientation in zip(samples[3:], (6, 5, 9), strict=True):  # 9 means nothing
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        Image.open(sample.image).save(sample.image, exif=exif)
    Image.open(samples[0].mask).resize((30, 22), 0).save(samples[0].mask)
    reader = WindowReader(samples, TABLE, folder and tmp_path / folder)
    assert reader.sizes == [(45, 61)] * 3 + [(61, 45)] * 2 + [(45, 61)]
    if folder:
        check_room([reader])
        assert "6 of 6" in capsys.readouterr().out
    for _ in range(2):  # the second time from the cache
        for index, sample in enumerate(samples):
            image, mask = read_pair(sample)
            mask = resize_mask(mask, image.shape[1:])
            for box in BOXES:
                wanted = crop(image.numpy(), mask.numpy(), *box)
                for values, want in zip(reader.read(index, *box), wanted, strict=True):
                    assert values.dtype == torch.uint8 and (values.numpy() == want).all()


def test_images_without_mask_have_windows_and_other_targets_are_refused(tmp_path):
    (sample,), deep = samples_of(tmp_path, "png"), write_tiff(tmp_path / "deep.tif", deep_pixels())
    for image in (sample.image, deep):
        rule = decide_rule([image])
        window, labels = WindowReader([Sample(image)], TABLE, rule=rule).read(0, 3, 4, 20, 30)
        assert window.shape == (3, 20, 30) and (labels == IGNORE).all()
    targets = (Target("depth", tmp_path / "depth.npy"),)
    np.save(tmp_path / "depth.npy", np.ones((45, 61)))
    with refused(sample.image, "depth", "--train-scale"):
        WindowReader([sample._replace(targets=targets)], TABLE)


# --- TIFFs ------------------------------------------------------------------------------------------------
def test_tiffs_are_read_by_windows_and_nothing_else_is_decoded(tmp_path, monkeypatch):
    deep, values = deep_pixels(), blocks(45, 61, (0, 1, 2, 4))
    deep[:, 10:20, 5:25] = 0
    mask_path = write_tiff(tmp_path / "mask.tif", values[None])
    samples = [Sample(write_tiff(tmp_path / name, pixels, nodata=0), mask_path)
               for name, pixels in (("deep.tif", deep), ("plain.tif", (deep // 12).astype(np.uint8)))]
    rules = [decide_rule([sample.image]) for sample in samples]
    decoded = [native_pair(sample, TABLE, rule) for sample, rule in zip(samples, rules, strict=True)]
    empty = (deep == 0).all(0)
    assert (decoded[1][..., :3] == (deep // 12).transpose(1, 2, 0))[~empty].all()
    low, high = np.percentile(deep[:, ~empty], (0.5, 99.5), axis=1)
    scaled = 255 * (deep.transpose(1, 2, 0) - low) / (high - low)
    assert np.abs(decoded[0][..., :3] - np.rint(scaled.clip(0, 255)))[~empty].max() <= 1
    monkeypatch.setattr(windows, "native_pair", None)
    for pixels, sample, rule in zip(decoded, samples, rules, strict=True):
        reader = WindowReader([sample], TABLE, rule=rule)
        assert (pixels[empty][:, 3] == IGNORE).all() and (pixels[~empty][:, 3] == values[~empty]).all()
        for top, left, height, width in ((0, 0, 45, 61), (12, 8, 5, 9), (30, 40, 15, 21)):
            image, mask = reader.read(0, top, left, height, width)
            inside = pixels[top:top + height, left:left + width]
            counted = inside[..., 3] != IGNORE
            assert (image.permute(1, 2, 0).numpy() == inside[..., :3])[counted].all()
            assert (mask.numpy() == inside[..., 3]).all()
    values[3, 4] = 9
    write_tiff(mask_path, values[None])
    with refused(mask_path, 9):
        reader.read(0, 0, 0, 20, 20)


def test_one_band_a_palette_and_inverted_gray_look_as_in_other_programs(tmp_path):
    gray = blocks(130, 171, (20, 90, 200, 255))
    write_tiff(tmp_path / "gray.tif", gray[None])
    write_tiff(tmp_path / "white.tif", gray[None], photometric="MINISWHITE")
    Image.fromarray(gray).convert("RGB").quantize(4).save(tmp_path / "palette.tif")
    for path in tmp_path.iterdir():
        with Raster(path) as raster:
            pixels = raster.read(0, 0, 130, 171)[0].permute(1, 2, 0).numpy()
            assert (pixels == np.array(Image.open(path).convert("RGB"))).all(), path
            assert raster.preview().shape == (130, 171, 3)


def test_inverted_masks_others_in_size_and_large_strips_are_not_read_by_windows(tmp_path, monkeypatch):
    """PIL inverts MINISWHITE, rasterio does not: windows must be what the image as a whole is."""
    values = blocks(45, 61, (0, 1, 2))[None]
    image = write_tiff(tmp_path / "image.tif", np.full((3, 45, 61), 99, np.uint8))
    inverted = write_tiff(tmp_path / "mask.tif", 255 - values, photometric="MINISWHITE")
    assert (WindowReader([Sample(image, inverted)], TABLE).read(0, 0, 0, 45, 61)[1].numpy() == values).all()
    sample = Sample(image, write_tiff(tmp_path / "plain.tif", values))
    assert WindowReader([sample], TABLE).by_windows == [True]
    larger = Sample(image, write_tiff(tmp_path / "larger.tif", values.repeat(2, 1).repeat(2, 2)))
    assert (WindowReader([larger], TABLE).read(0, 9, 7, 30, 40)[1].numpy() == values[0, 9:39, 7:47]).all()
    monkeypatch.setattr(windows, "LARGE_BLOCK", 1000)
    assert WindowReader([sample], TABLE).by_windows == [False]


def test_tiffs_that_are_turned_are_decoded_and_pages_refused(tmp_path):
    pictures = [Image.new("RGB", (100, 80), color) for color in ("red", "green")]
    pictures[0].save(tmp_path / "pages.tif", save_all=True, append_images=pictures[1:])
    pictures[0].save(tmp_path / "turned.tif", tiffinfo={EXIF_ORIENTATION: 6})
    pictures[0].save(tmp_path / "fine.tif", tiffinfo={EXIF_ORIENTATION: 1})
    with refused("pages.tif"):
        WindowReader([Sample(tmp_path / "pages.tif")], TABLE)
    write_tiff(tmp_path / "mask.tif", np.zeros((1, 80, 100), np.uint8))
    samples = [Sample(tmp_path / f"{name}.tif", tmp_path / "mask.tif") for name in ("fine", "turned")]
    reader = WindowReader(samples, TABLE)
    assert reader.sizes == [(80, 100), (100, 80)] and reader.by_windows == [True, False]
    with refused("turned.tif"):
        Raster(tmp_path / "turned.tif")


@pytest.mark.parametrize(("dtype", "nodata", "marked"), [
    ("int8", -1, True), ("int16", -100, True), ("int16", -100, False), ("uint16", 65535, True),
    ("int32", 99, True), ("float32", np.nan, True), ("float32", -3.4028234663852886e38, True),
    ("float64", -9999, True), ("float64", np.nan, False), ("uint8", 3, True), ("float32", 0, True)])
def test_pixels_without_data_are_ignored_in_whole_masks_as_in_windows(tmp_path, dtype, nodata, marked):
    """What 8-bit masks mark as no data, and the value 0, are classes like others."""
    values = blocks(45, 61, (0, 1, 2, 3)).astype(dtype)
    if dtype != "uint8" and nodata:
        values[values == 3] = nodata
    image = write_tiff(tmp_path / "image.tif", np.full((3, 45, 61), 99, np.uint8))
    mask = write_tiff(tmp_path / "mask.tif", values[None], nodata=nodata if marked else None)
    table = value_table({0: 0, 1: 1, 2: 2, 3: 3, -100: IGNORE, NODATA: IGNORE})
    sample, reader = Sample(image, mask), WindowReader([Sample(image, mask)], table)
    expected = np.where(np.isin(values, [0, 1, 2, 3]), values, IGNORE).astype(np.uint8)
    assert reader.by_windows == [True] and (expected == IGNORE).any() == (dtype != "uint8" and nodata != 0)
    assert (reader.read(0, 9, 7, 30, 40)[1].numpy() == expected[9:39, 7:47]).all()
    assert (native_mask(sample, table) == expected).all()
    with refused("mask.tif") if (expected == IGNORE).any() else nullcontext():  # of a table without them
        WindowReader([sample], TABLE).read(0, 0, 0, 45, 61)


def test_windows_of_turned_masks_and_fractions(tmp_path):
    image = write_tiff(tmp_path / "image.tif", np.full((3, 45, 61), 99, np.uint8))
    values = blocks(45, 61, (0, 1, 2))
    Image.fromarray(values).save(tmp_path / "turned.tif", tiffinfo={EXIF_ORIENTATION: 3})
    reader = WindowReader([Sample(image, tmp_path / "turned.tif")], TABLE)
    assert (reader.read(0, 0, 0, 45, 61)[1].numpy() == values[::-1, ::-1]).all()
    halves = write_tiff(tmp_path / "halves.tif", values[None] / np.float32(2))
    with refused("halves.tif", "0.5"):
        WindowReader([Sample(image, halves)], TABLE).read(0, 0, 0, 45, 61)


# --- the cache of decoded images --------------------------------------------------------------------------
def test_the_cache_is_of_these_files_this_table_and_this_code(tmp_path, monkeypatch):
    (sample,), folder, points = samples_of(tmp_path, "png"), tmp_path / "cache", tmp_path / "points"

    def read(table=TABLE):
        reader = WindowReader([sample], table, folder)
        reader.points(3, points)
        return reader.read(0, 0, 0, 45, 61)

    before, _ = read()
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:500])  # damaged: decoded again
    assert (read()[0] == before).all()
    table = TABLE.copy()
    table[1] = 3
    assert 3 in read(table)[1] and 1 not in read(table)[1]
    Image.fromarray(255 - before.permute(1, 2, 0).numpy()).save(sample.image)
    assert (read()[0] == 255 - before).all()
    content, stat = sample.mask.read_bytes(), sample.mask.stat()
    sample.mask.write_bytes(content[::-1])  # damaged, and of the same size and time
    os.utime(sample.mask, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with refused(sample.mask):
        WindowReader([sample], TABLE, folder).read(0, 0, 0, 45, 61)
    sample.mask.write_bytes(content)
    read()
    files = [len(list(path.iterdir())) for path in (folder, points)]
    monkeypatch.setattr(windows, "decoding_code", lambda: "changed")
    read()
    assert [len(list(path.iterdir())) for path in (folder, points)] == [count + 1 for count in files]


def test_images_that_are_all_there_are_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    reader = WindowReader(samples_of(tmp_path, "png"), TABLE, tmp_path / "cache")
    check_room([reader])
    reader.read(0, 0, 0, 45, 61)

    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(windows.tempfile, "TemporaryFile", denied)
    monkeypatch.setattr(windows.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    check_room([reader])
    reader.kept_path(0).unlink()
    with refused("--cache-images", tmp_path / "cache", "Permission denied"):
        check_room([reader])


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    (sample,) = samples_of(tmp_path, "png")
    readers = [WindowReader([sample], TABLE, tmp_path / "cache") for _ in range(2)]
    free = windows.SPARE + 4 * 45 * 61 + 100  # enough for one of them
    monkeypatch.setattr(windows.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check_room(readers[:1])
    with refused("--cache-images", tmp_path / "cache"):
        check_room(readers)
    (tmp_path / "file").write_text("")
    with refused("--cache-images", tmp_path / "file/cache"):
        check_room([WindowReader([sample], TABLE, tmp_path / "file/cache")])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(windows, "write_atomically", full)  # nevertheless: it goes on without
    assert (readers[0].read(0, 0, 0, 45, 61)[0] == read_pair(sample)[0]).all()


# --- datasets of windows and tiles ------------------------------------------------------------------------
def test_random_windows_keep_image_and_mask_together(tmp_path):
    """The brightness that write_pair gives every class says which it is, whatever the scale."""
    reader = WindowReader(samples_of(tmp_path, "png", "png", size=(150, 201)), TABLE)
    data = WindowDataset(reader, (40, 53), (), seed=3)
    assert len(data) == 2 * round(150 * 201 / (40 * 53)) and data.images == sorted(data.images)
    right = []
    for item in range(len(data)):
        image, targets, name = data[item]
        assert image.shape == (3, 40, 53) and targets["mask"].shape == (40, 53)
        assert name == str(data.samples[item].image) and IGNORE not in targets["mask"]
        classes = ((image.float().mean(0) - 16) / 32).round()
        right.append((classes == targets["mask"]).float().mean().item())
    assert min(right) > 0.9 and np.mean(right) > 0.97  # edges are mixed where it is scaled
    again = WindowDataset(reader, (40, 53), (), seed=3)
    assert (data[5][0] == again[5][0]).all() and (data[5][1]["mask"] == again[5][1]["mask"]).all()
    for other in (data[5 + len(data)], WindowDataset(reader, (40, 53), (), seed=4)[5]):  # epoch, seed
        assert (data[5][0] != other[0]).any()


def test_windows_have_all_scales_and_positions(tmp_path):
    data = WindowDataset(WindowReader(samples_of(tmp_path, "png", size=(150, 201)), TABLE), (40, 53))
    torch.manual_seed(0)
    boxes = np.array([data.draw_window(0) for _ in range(2000)])
    assert (boxes[:, 2].min(), boxes[:, 2].max()) == (20, 80) and abs(np.mean(40 / boxes[:, 2]) - 1.25) < 0.03
    ends = boxes[:, :2] + boxes[:, 2:]
    assert boxes[:, :2].min(0).tolist() == [0, 0] and ends.max(0).tolist() == [150, 201]
    data = WindowDataset(WindowReader(samples_of(tmp_path, "png", size=(30, 25)), TABLE), (40, 53))
    image, targets, _ = data[0]  # smaller than a window: padded
    assert len(data) == 1 and image.shape == (3, 40, 53)
    assert IGNORE in targets["mask"] and (targets["mask"] != IGNORE).any()


@pytest.mark.parametrize("size", [(45, 61), (40, 53), (80, 53), (30, 25), (81, 107), (30, 107), (1, 1)])
def test_tiles_count_every_pixel_once(tmp_path, size):
    reader = WindowReader(samples_of(tmp_path, "png", "png", size=size), TABLE)
    data, times = TileDataset(reader, (40, 53)), np.zeros((2, *size), int)
    pairs = [read_pair(sample) for sample in reader.samples]
    high, wide = min(40, size[0]), min(53, size[1])
    for item, (index, top, left) in enumerate(data.tiles):
        image, targets, name = data[item]
        mask, (photo, labels) = targets["mask"], pairs[index]
        assert image.shape == (3, 40, 53) and mask.shape == (40, 53)
        assert name == str(reader.samples[index].image)
        assert (data.targets(item)["mask"] == mask).all() and (data.picture(item) == image).all()
        counted = mask != IGNORE
        assert not counted[high:].any() and not counted[:, wide:].any()
        counted = counted[:high, :wide]
        times[index, top:top + high, left:left + wide] += counted.numpy()
        assert (image[:, :high, :wide] == photo[:, top:top + high, left:left + wide]).all()
        assert (mask[:high, :wide] == labels[top:top + high, left:left + wide])[counted].all()
    assert (times == 1).all()


def test_points_are_pixels_of_their_class(tmp_path):
    mask = np.full((70, 91), IGNORE, np.uint8)
    mask[5:9, 10:80], mask[69, 90], mask[30:33] = 1, 2, 0
    rows = draw_points(mask, 7, 3)
    assert (rows[:, 0] == 7).all() and (mask[rows[:, 2], rows[:, 3]] == rows[:, 1]).all()
    assert np.bincount(rows[:, 1]).tolist() == [POINTS, POINTS, 1] and len(np.unique(rows[:16, 3])) > 8
    assert draw_points(np.full((4, 5), IGNORE, np.uint8), 0, 3).shape == (0, 4)
    spread = np.concatenate([draw_points(np.zeros((40, 50), np.uint8), seed, 1) for seed in range(200)])
    assert abs(spread[:, 2].mean() - 19.5) < 1 and abs(spread[:, 3].mean() - 24.5) < 1
    samples, cache = samples_of(tmp_path, "png"), tmp_path / "cache"
    reader = WindowReader(samples, TABLE)
    rows = reader.points(5, cache)
    (path,) = cache.iterdir()
    np.save(path, rows[:3])
    assert len(reader.points(5, cache)) == 3  # read, not drawn
    write_pair(*samples[0][:2], blocks(45, 61, (3, 1), seed=9))
    assert set(WindowReader(samples, TABLE).points(5, cache)[:, 1]) == {1, 3}
    pixels = np.full((3, 45, 61), 99, np.uint8)
    pixels[:, :, 20:] = 0  # no data: no points
    tiff = Sample(write_tiff(tmp_path / "tiff.tif", pixels, nodata=0), samples[0].mask)
    rows = WindowReader([tiff], TABLE).points(5, cache)
    assert len(rows) and rows[:, 3].max() < 20


def test_balance_shows_rare_classes(tmp_path):
    mask = np.zeros((300, 410), np.uint8)
    mask[200:203, 50:53] = 2
    sample = Sample(tmp_path / "0.png", tmp_path / "0_m.png")
    write_pair(sample.image, sample.mask, mask)
    reader = WindowReader([sample], TABLE)
    points = reader.points(5, tmp_path)
    for balance, least, most in ((0.0, 0, 0.1), (0.999, 0.42, 0.62)):
        data = WindowDataset(reader, (40, 53), (), 0, balance, points)
        share = np.mean([2 in data[item][1]["mask"] for item in range(200)])
        assert least <= share <= most, balance


def test_windows_around_a_pixel_show_it_at_every_place(tmp_path):
    reader = WindowReader(samples_of(tmp_path, "png", size=(300, 410)), TABLE)
    data = WindowDataset(reader, (10, 13), (), 0, 0.9999, np.array([[0, 1, 100, 200]]))
    torch.manual_seed(0)
    boxes = np.array([data.draw_window(0) for _ in range(2000)])
    before, after = (100, 200) - boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - (101, 201)  # rows and columns
    assert before.min(0).tolist() == after.min(0).tolist() == [0, 0]


def test_features_of_windows_are_kept_apart(tmp_path):
    """Every choice that changes what a window shows changes the name of the files."""
    reader = WindowReader(samples_of(tmp_path, "png", size=(90, 120)), TABLE)
    points, net = reader.points(5, tmp_path), tiny()
    sets = [WindowDataset(reader, (42, 56), (), 0), WindowDataset(reader, (42, 56), (), 1),
            WindowDataset(reader, (42, 56), (), 0, 0.5, points), WindowDataset(reader, (56, 42), (), 0),
            WindowDataset(reader, (42, 56), ("flip",), 0), TileDataset(reader, (42, 56))]
    table = TABLE.copy()
    table[2] = IGNORE  # other classes, other points
    other = WindowReader(reader.samples, table)
    sets.append(WindowDataset(other, (42, 56), (), 0, 0.5, other.points(5, tmp_path)))
    names = set()
    for data in sets:
        files, _ = plan_files(net, net.cached_parts(), data, tmp_path, FLOAT32, 1)
        names.add(next(iter(files.values())).path)
    assert len(names) == len(sets)


# --- as a user runs it ------------------------------------------------------------------------------------
NATIVE = ["--dataset", "folder", "--backbone", "vit_tiny", "--weights", "none", "--head", "bn", "--imgsz", 42,
          42, "--train-scale", "native", "--workers", 0]


def test_a_native_run_is_validated_and_used_in_tiles(tmp_path, run):
    data, out = write_folder(tmp_path / "data", count=6, size=(90, 121)), tmp_path / "out"
    code, text, err = run(train, *NATIVE, "--data-root", data, "--balance", "--epochs", 1,
                          "--cache-images", tmp_path / "decoded", "--out-dir", out)
    assert code == 0 and "30 random windows" in text and "9 tiles" in text, err
    assert len(list((tmp_path / "decoded").iterdir())) == 6
    assert "42x42" in json.loads((out / "config.json").read_text())["protocol"]
    flags = ["--model", out / "last.pth", "--device", "cpu", "--out-dir", tmp_path]
    code, text, err = run(evaluate, *flags, "--overlap", 0)
    assert code == 0 and "tiles of 42x42" in text, err
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    history = json.loads((out / "history.jsonl").read_text())
    assert metrics["miou"] == pytest.approx(history["val_miou"], abs=0.05)
    assert sum(sum(row) for row in metrics["confusion"]) == 90 * 121
    photo = next((data / "images").iterdir())
    code, text, err = run(infer_image, *flags, "--backend", "torch", "--input", photo)
    assert code == 0 and "tiles of 42x42" in text, err


def test_native_features_can_be_kept(tmp_path, run):
    data, scores = write_folder(tmp_path / "data", count=6, size=(90, 121)), []
    for _ in range(2):
        code, text, err = run(train, *NATIVE, "--data-root", data, "--epochs", 1,
                              "--cache-features", tmp_path / "cache", "--out-dir", tmp_path / "out")
        assert code == 0 and "feature cache of 30 train views" in text, err
        scores.append(json.loads((tmp_path / "out/history.jsonl").read_text())["val_miou"])
    assert scores[0] == scores[1]
