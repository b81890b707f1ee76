"""--train-scale native: windows are crops of the images, tiles cover them once, caches know them."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import blocks, tiny, write_folder, write_pair
from PIL import Image

import evaluate
import infer_image
import train
from config import IGNORE, InputError
from dataio import windows
from dataio.feature_cache import plan_files
from dataio.rasters import Raster
from dataio.readers import EXIF_ORIENTATION, OUTSIDE, Sample, index_table, read_pair
from dataio.torch_datasets import NativeDataset, TileDataset, WindowDataset
from dataio.transforms import PADDING_COLOR
from dataio.windows import POINTS, WindowReader, check_room, draw_points, native_pair
from inference.predictor import Predictor
from inference.rasters import segment
from utils import Precision

TABLE, FLOAT32 = index_table(5), Precision("off", torch.device("cpu"))
BOXES = [(0, 0, 45, 61), (7, 11, 20, 33), (-6, 30, 30, 50), (40, 55, 20, 20), (-9, -9, 80, 90),
         (60, 70, 8, 8)]


def brute_force(image, mask, top, left, height, width):
    """Return a window of (3, H, W) and (H, W) pixel by pixel."""
    window = np.empty((3, height, width), np.uint8)
    window[:], labels = np.array(PADDING_COLOR)[:, None, None], np.full((height, width), IGNORE, np.uint8)
    for y in range(height):
        for x in range(width):
            if 0 <= top + y < mask.shape[0] and 0 <= left + x < mask.shape[1]:
                window[:, y, x], labels[y, x] = image[:, top + y, left + x], mask[top + y, left + x]
    return window, labels


def samples_of(folder, *endings, size=(45, 61)):
    """Write one pair per image ending; return the Samples."""
    pairs = []
    for number, ending in enumerate(endings):
        pair = Sample(folder / f"{number}.{ending}", folder / f"{number}_m.png")
        write_pair(*pair, blocks(*size, (0, 1, 2, 4), seed=number), seed=number)
        pairs.append(pair)
    return pairs


@pytest.mark.parametrize("kept", ["", "kept"])
def test_windows_are_crops_of_the_whole(tmp_path, kept, capsys):
    samples = samples_of(tmp_path, "png", "jpg", "tif")
    reader = WindowReader(samples, TABLE, kept and tmp_path / kept)
    assert reader.sizes == [(45, 61)] * 3
    if kept:
        check_room([reader])
        assert "3 of 3 are to be added, 0.00 GB" in capsys.readouterr().out
    for _ in range(2):  # the second time from what is kept
        for index, sample in enumerate(samples):
            image, mask = (part.numpy() for part in read_pair(sample, TABLE))
            for box in BOXES:
                found = reader.read(index, *box)
                for part, want in zip(found, brute_force(image, mask, *box), strict=True):
                    assert part.dtype == torch.uint8 and (part.numpy() == want).all()


def test_a_turned_image_and_a_mask_of_another_size(tmp_path):
    (turned, small) = samples_of(tmp_path, "jpg", "png")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.open(turned.image).save(turned.image, exif=exif)
    Image.open(small.mask).resize((30, 22), 0).save(small.mask)
    reader = WindowReader([turned, small], TABLE)
    assert reader.sizes == [(61, 45), (45, 61)]
    image, mask = read_pair(turned, TABLE)
    found, labels = reader.read(0, 5, 3, 40, 30)
    assert (found == image[:, 5:45, 3:33]).all() and (labels == mask[5:45, 3:33]).all()
    stored = np.array(Image.open(small.mask))
    _, labels = reader.read(1, 0, 0, 45, 61)
    ys, xs = ((np.arange(45) + 0.5) * 22 / 45).astype(int), ((np.arange(61) + 0.5) * 30 / 61).astype(int)
    assert (labels.numpy() == stored[ys][:, xs]).all()


def test_tiffs_are_read_by_windows_and_nothing_else_is_decoded(tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio")
    deep = np.random.default_rng(0).integers(300, 3000, (3, 45, 61)).astype(np.uint16)
    deep[:, 10:20, 5:25] = 0
    values = blocks(45, 61, (0, 1, 2, 4))
    for name, pixels in (("deep", deep), ("plain", (deep // 12).astype(np.uint8)), ("mask", values[None])):
        with rasterio.open(tmp_path / f"{name}.tif", "w", driver="GTiff", dtype=pixels.dtype, width=61,
                           height=45, count=len(pixels), nodata=0 if len(pixels) == 3 else None) as file:
            file.write(pixels)
    samples = [Sample(tmp_path / f"{name}.tif", tmp_path / "mask.tif") for name in ("deep", "plain")]
    wholes = [native_pair(sample, TABLE) for sample in samples]
    assert (wholes[1][..., :3] == (deep // 12).transpose(1, 2, 0)).all()
    low, high = np.percentile(deep[:, (deep > 0).all(0)], (2, 98), axis=1)
    scaled = 255 * (deep.transpose(1, 2, 0) - low) / (high - low)
    assert (wholes[0][..., :3] == np.rint(scaled.clip(0, 255))).all()
    monkeypatch.setattr(windows, "native_pair", None)
    reader = WindowReader(samples, TABLE)
    empty = (deep == 0).all(0)
    for index, whole in enumerate(wholes):
        assert (whole[empty][:, 3] == IGNORE).all() and (whole[~empty][:, 3] == values[~empty]).all()
        for top, left, height, width in ((0, 0, 45, 61), (12, 8, 5, 9), (30, 40, 15, 21)):
            image, mask = reader.read(index, top, left, height, width)
            inside = whole[top:top + height, left:left + width]
            counted = inside[..., 3] != IGNORE
            assert (image.permute(1, 2, 0).numpy() == inside[..., :3])[counted].all()
            assert (mask.numpy() == inside[..., 3]).all()
    values[3, 4] = 9
    with rasterio.open(tmp_path / "mask.tif", "r+") as file:
        file.write(values, 1)
    with pytest.raises(InputError, match=r"mask\.tif has the value 9"):
        reader.read(0, 0, 0, 20, 20)


def test_what_is_kept_is_of_these_files_and_of_this_table(tmp_path):
    (sample,) = samples_of(tmp_path, "png")
    first = WindowReader([sample], TABLE, tmp_path / "kept")
    before, _ = first.read(0, 0, 0, 45, 61)
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_bytes(kept.read_bytes()[:500])  # damaged: decoded again
    assert (WindowReader([sample], TABLE, tmp_path / "kept").read(0, 0, 0, 45, 61)[0] == before).all()
    table = TABLE.copy()
    table[1] = 3
    _, labels = WindowReader([sample], table, tmp_path / "kept").read(0, 0, 0, 45, 61)
    assert 3 in labels and 1 not in labels
    Image.fromarray(255 - before.permute(1, 2, 0).numpy()).save(sample.image)
    again, _ = WindowReader([sample], TABLE, tmp_path / "kept").read(0, 0, 0, 45, 61)
    assert (again == 255 - before).all()


def test_what_is_kept_is_of_the_code_that_read_it(tmp_path, monkeypatch):
    reader = WindowReader(samples_of(tmp_path, "png"), TABLE, tmp_path / "kept")
    paths, points = {reader.kept_path(0)}, tmp_path / "points"
    reader.points(3, points)
    monkeypatch.setattr(windows, "reading_code", lambda: "changed")
    reader.points(3, points)
    assert len({*paths, reader.kept_path(0)}) == 2 == len(list(points.iterdir()))


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    samples = samples_of(tmp_path, "png")
    readers = [WindowReader(samples, TABLE, tmp_path / "kept") for _ in range(2)]
    free = windows.SPARE + 4 * 45 * 61 + 100  # enough for one of them
    monkeypatch.setattr(windows.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check_room(readers[:1])
    with pytest.raises(InputError, match="--cache-images needs 0.00 GB in .*kept"):
        check_room(readers)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--cache-images: cannot write to .*file/kept"):
        check_room([WindowReader(samples, TABLE, tmp_path / "file/kept")])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(windows, "write_atomically", full)  # nevertheless: it goes on without
    image, _ = readers[0].read(0, 0, 0, 45, 61)
    assert (image == read_pair(samples[0], TABLE)[0]).all()


def test_random_windows_keep_image_and_mask_together(tmp_path):
    """The brightness that write_pair gives every class says which it is, whatever the scale."""
    reader = WindowReader(samples_of(tmp_path, "png", "png", size=(150, 201)), TABLE)
    data = WindowDataset(reader, (40, 53), (), seed=3)
    assert len(data) == 2 * round(150 * 201 / (40 * 53)) and data.images == sorted(data.images)
    right, padded = [], 0
    for item in range(2 * len(data)):
        image, mask, name = data[item]
        assert image.shape == (3, 40, 53) and mask.shape == (40, 53)
        assert name == str(data.samples[item % len(data)].image)
        known = mask != IGNORE
        padded += (~known).sum().item()
        classes = ((image.float().mean(0) - 16) / 32).round()
        right.append((classes == mask)[known].float().mean().item())
    assert padded == 0 and min(right) > 0.9 and np.mean(right) > 0.97  # edges are mixed where it is scaled
    other = WindowDataset(reader, (40, 53), (), seed=3)
    assert all((one == two).all() for one, two in zip(data[5][:2], other[5][:2], strict=True))
    assert (data[5][0] != data[5 + len(data)][0]).any()  # another epoch
    assert (data[5][0] != WindowDataset(reader, (40, 53), (), seed=4)[5][0]).any()


def test_windows_have_all_scales_and_places(tmp_path):
    data = WindowDataset(WindowReader(samples_of(tmp_path, "png", size=(150, 201)), TABLE), (40, 53))
    torch.manual_seed(0)
    boxes = np.array([data.draw_window(0) for _ in range(2000)])
    assert (boxes[:, 2].min(), boxes[:, 2].max()) == (20, 80) and abs(np.mean(40 / boxes[:, 2]) - 1.25) < 0.03
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= (150, 201)).all()
    assert boxes[:, :2].min(0).tolist() == [0, 0]
    assert (boxes[:, :2] + boxes[:, 2:]).max(0).tolist() == [150, 201]


def test_images_smaller_than_a_window_are_padded(tmp_path):
    data = WindowDataset(WindowReader(samples_of(tmp_path, "png", size=(30, 25)), TABLE), (40, 53))
    assert len(data) == 1
    image, mask, _ = data[0]
    assert image.shape == (3, 40, 53) and (mask == IGNORE).any() and (mask != IGNORE).any()


@pytest.mark.parametrize("size", [(45, 61), (40, 53), (80, 53), (30, 25), (81, 107), (30, 107), (1, 1)])
def test_tiles_count_every_pixel_once(tmp_path, size):
    reader = WindowReader(samples_of(tmp_path, "png", "png", size=size), TABLE)
    data, seen = TileDataset(reader, (40, 53)), np.zeros((2, *size), int)
    whole = [read_pair(sample, TABLE) for sample in reader.samples]
    for item, (index, top, left) in enumerate(data.tiles):
        image, mask, name = data[item]
        assert image.shape == (3, 40, 53) and mask.shape == (40, 53)
        assert name == str(reader.samples[index].image)
        assert (data.mask(item) == mask).all() and (data.picture(item) == image).all()
        high, wide = (min(side, length) for side, length in zip((40, 53), size, strict=True))
        counted = (mask != IGNORE).numpy()
        assert not counted[high:].any() and not counted[:, wide:].any()
        seen[index, top:top + high, left:left + wide] += counted[:high, :wide]
        inside = slice(top, top + high), slice(left, left + wide)
        assert (image[:, :high, :wide] == whole[index][0][(slice(None), *inside)]).all()
        labels = mask.numpy()[:high, :wide]
        assert (labels == whole[index][1][inside].numpy())[counted[:high, :wide]].all()
    assert (seen == 1).all()


def test_points_are_pixels_of_their_class(tmp_path):
    mask = np.full((70, 91), IGNORE, np.uint8)
    mask[5:9, 10:80], mask[69, 90], mask[30:33] = 1, 2, 0
    rows = draw_points(mask, 7, 3)
    assert (rows[:, 0] == 7).all() and (mask[rows[:, 2], rows[:, 3]] == rows[:, 1]).all()
    assert np.bincount(rows[:, 1]).tolist() == [POINTS, POINTS, 1] and len(np.unique(rows[:16, 3])) > 8
    assert draw_points(np.full((4, 5), IGNORE, np.uint8), 0, 3).shape == (0, 4)
    spread = np.concatenate([draw_points(np.zeros((40, 50), np.uint8), seed, 1) for seed in range(200)])
    assert abs(spread[:, 2].mean() - 19.5) < 1 and abs(spread[:, 3].mean() - 24.5) < 1
    reader = WindowReader(samples_of(tmp_path, "png", "png"), TABLE)
    rows = reader.points(5, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    np.save(kept, rows[:3])
    assert len(reader.points(5, tmp_path / "cache")) == 3  # read, not drawn
    write_pair(*reader.samples[0], blocks(45, 61, (3, 1), seed=9))
    assert set(WindowReader(reader.samples, TABLE).points(5, tmp_path / "cache")[:, 1]) >= {3, 4}


def test_balance_shows_rare_classes(tmp_path):
    mask = np.zeros((300, 410), np.uint8)
    mask[200:203, 50:53] = 2
    pair = Sample(tmp_path / "0.png", tmp_path / "0_m.png")
    write_pair(*pair, mask)
    reader = WindowReader([pair], TABLE)
    points = reader.points(5, tmp_path)
    shares = {}
    for balance in (0.0, 0.5, 0.999):
        data = WindowDataset(reader, (40, 53), (), 0, balance, points)
        found = [(data[item][1] == 2).any().item() for item in range(200)]
        shares[balance] = np.mean(found)
    assert shares[0.0] < 0.1 and abs(shares[0.5] - 0.27) < 0.09 and abs(shares[0.999] - 0.52) < 0.1


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
    names = [plan_files(net, ["map 5"], data, tmp_path, FLOAT32, 1)[0][0].path for data in sets]
    assert len(set(names)) == len(names)


NATIVE = ["--dataset", "folder", "--backbone", "vit_tiny", "--weights", "none", "--imgsz", 42, 42,
          "--train-scale", "native", "--workers", 0]


def test_a_native_run_is_validated_resumed_and_used_in_tiles(tmp_path, run):
    data, out = write_folder(tmp_path / "data", count=6, size=(90, 121)), tmp_path / "out"
    code, text, err = run(train, *NATIVE, "--data-root", data, "--balance", "--unfreeze", "all",
                          "--epochs", 1, "--cache-images", tmp_path / "kept", "--out-dir", out)
    assert code == 0, err
    assert "30 random windows cover the training images once, 9 tiles the validation images" in text
    assert len(list((tmp_path / "kept").iterdir())) == 6
    code, text, err = run(train, "--resume", "--epochs", 2, "--out-dir", out)
    assert code == 0 and "epoch 2/2" in text, err
    code, _, err = run(train, "--resume", "--train-scale", "fit", "--out-dir", out)
    assert code == 2 and "--train-scale is 'fit', but the run to resume has 'native'" in err
    config = json.loads((out / "config.json").read_text())
    assert config["protocol"].startswith("tiles of 42x42 at the image's own resolution")

    flags = ["--model", out / "last.pth", "--device", "cpu", "--out-dir", tmp_path]
    code, text, err = run(evaluate, *flags, "--overlap", 0)
    assert code == 0 and "tiles of 42x42 pixels, stride 42x42" in text, err
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    history = json.loads((out / "history.jsonl").read_text().splitlines()[-1])
    assert metrics["miou"] == pytest.approx(history["val_miou"], abs=0.05)
    assert sum(sum(row) for row in metrics["confusion"]) == 90 * 121
    code, text, err = run(infer_image, *flags, "--input", next((data / "images").iterdir()))
    assert code == 0 and "tiles of 42x42" in text, err
    code, text, err = run(evaluate, *flags, "--protocol", "whole")
    assert code == 0 and "whole image at 42x42" in text, err


def test_native_features_can_be_kept(tmp_path, run):
    data, scores = write_folder(tmp_path / "data", count=6, size=(90, 121)), []
    for _ in range(2):
        code, text, err = run(train, *NATIVE, "--data-root", data, "--head", "bn", "--epochs", 1,
                              "--cache-features", tmp_path / "cache", "--out-dir", tmp_path / "out")
        assert code == 0 and "feature cache of 30 train views" in text, err
        scores.append(json.loads((tmp_path / "out/history.jsonl").read_text())["val_miou"])
    assert scores[0] == scores[1]


@pytest.mark.parametrize(("flags", "says"), [
    (["--balance"], "--balance belongs to windows of large images: add --train-scale native"),
    (["--cache-images"], "--cache-images belongs to windows of large images"),
    (["--train-scale", "native", "--augment", "crop", "flip"], "--augment crop crops, and --train-scale"),
    (["--train-scale", "native", "--balance", "1.5"], "'1.5' is not a number between 0 and 1"),
])
def test_flags_that_do_not_go_together(tmp_path, run, flags, says):
    data = write_folder(tmp_path / "data")
    code, _, err = run(train, "--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", *flags,
                       "--out-dir", tmp_path / "out")
    assert code == 2 and says in err


def test_whole_images_of_tiles_are_scored_as_they_were_trained_on(tmp_path):
    """evaluate.py --protocol tile scales deep TIFFs as training windows did."""
    rasterio = pytest.importorskip("rasterio")
    deep = np.random.default_rng(0).integers(300, 3000, (3, 45, 61)).astype(np.uint16)
    with rasterio.open(tmp_path / "deep.tif", "w", driver="GTiff", dtype="uint16", width=61, height=45,
                       count=3) as file:
        file.write(deep)
    Image.fromarray(blocks(45, 61, (0, 1))).save(tmp_path / "mask.png")
    sample = Sample(tmp_path / "deep.tif", tmp_path / "mask.png")
    image, mask, _ = NativeDataset([sample], TABLE)[0]
    window, labels = WindowReader([sample], TABLE).read(0, 0, 0, 45, 61)
    assert (image == window).all() and (mask == labels).all() and OUTSIDE not in mask
    assert (image.min(), image.max()) == (0, 255)  # by depth it would be at most 187


def write_tiff(path, pixels, **options):
    """Write (bands, H, W) as a TIFF by rasterio."""
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(path, "w", driver="GTiff", dtype=pixels.dtype, width=pixels.shape[2],
                       height=pixels.shape[1], count=len(pixels), **options) as file:
        file.write(pixels)
    return path


def test_inverted_masks_and_large_strips_are_not_read_by_windows(tmp_path, monkeypatch):
    """PIL inverts MINISWHITE, rasterio does not: windows must be what the whole is."""
    image = write_tiff(tmp_path / "image.tif", np.full((3, 45, 61), 99, np.uint8))
    mask = write_tiff(tmp_path / "mask.tif", 255 - blocks(45, 61, (0, 1, 2))[None], photometric="MINISWHITE")
    reader = WindowReader([Sample(image, mask)], TABLE)
    assert (reader.read(0, 0, 0, 45, 61)[1].numpy() == blocks(45, 61, (0, 1, 2))).all()
    plain = write_tiff(tmp_path / "plain.tif", blocks(45, 61, (0, 1, 2))[None])
    assert WindowReader([Sample(image, plain)], TABLE).by_windows == [True]
    monkeypatch.setattr(windows, "LARGE_BLOCK", 1000)
    assert WindowReader([Sample(image, plain)], TABLE).by_windows == [False]


def test_points_lie_where_there_are_data(tmp_path):
    pixels = np.full((3, 60, 80), 99, np.uint8)
    pixels[:, :, 20:] = 0
    sample = Sample(write_tiff(tmp_path / "image.tif", pixels, nodata=0),
                    write_tiff(tmp_path / "mask.tif", blocks(60, 80, (0, 1))[None]))
    rows = WindowReader([sample], TABLE).points(2, tmp_path)
    assert len(rows) and rows[:, 3].max() < 20


def test_tiffs_that_are_turned_or_hold_pages_are_refused(tmp_path):
    pytest.importorskip("rasterio")
    Image.fromarray(np.zeros((80, 100), np.uint8)).save(tmp_path / "mask.png")
    pictures = [Image.new("RGB", (100, 80), color) for color in ("red", "green")]
    pictures[0].save(tmp_path / "pages.tif", save_all=True, append_images=pictures[1:])
    pictures[0].save(tmp_path / "turned.tif", tiffinfo={EXIF_ORIENTATION: 6})
    pictures[0].save(tmp_path / "fine.tif", tiffinfo={EXIF_ORIENTATION: 1})
    for name, says in (("pages", "holds several pages"), ("turned", "is stored turned")):
        with pytest.raises(InputError, match=rf"{name}\.tif {says}"):
            WindowReader([Sample(tmp_path / f"{name}.tif", tmp_path / "mask.png")], TABLE)
    assert WindowReader([Sample(tmp_path / "fine.tif", tmp_path / "mask.png")], TABLE).sizes == [(80, 100)]


@pytest.mark.parametrize("orientation", [0, 5, 8, 9, 65535])
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_orientations_that_mean_nothing_turn_nothing(tmp_path, orientation, ending):
    (sample,) = samples_of(tmp_path, ending)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.open(sample.image).save(sample.image, exif=exif)
    image, mask = read_pair(sample, TABLE)
    found, labels = WindowReader([sample], TABLE).read(0, 0, 0, *image.shape[1:])
    assert (found == image).all() and (labels == mask).all()
    assert image.shape[1:] == ((61, 45) if orientation in (5, 8) else (45, 61))


def test_files_are_read_alike_by_every_script(tmp_path):
    """Of deep TIFFs: a Predictor from Python, and the masks that infer_image.py writes."""
    deep = np.random.default_rng(0).integers(300, 1400, (3, 60, 70)).astype(np.uint16)
    path = write_tiff(tmp_path / "deep.tif", deep, photometric="RGB")
    facts = dict(classes=[["a", [0, 0, 0]]] * 3, imgsz=(42, 42), config=dict(train_scale="native"))
    predictor = Predictor(tiny().eval(), facts, "cpu")
    with Raster(path) as raster:
        whole = raster.read(0, 0, 60, 70)
        parts = [pred for _, pred, _ in segment(raster, predictor)]
    assert (predictor.predict(path) == np.concatenate(parts)).all()
    assert (predictor.read(path) == whole[0]).all() and whole.max() == 255
