"""What the inference scripts write on demand: polygons, probabilities, shares, cutouts, pseudo-labels."""
import csv
import json
import os
import shutil
import signal

import cv2
import numpy as np
import pytest
import torch
from conftest import load, random_images, tiny, write_folder
from PIL import Image
from pycocotools import mask as coco_mask

import demo
import infer_image
import infer_video
from checkpoint import pack_checkpoint
from dataio.image_rule import read_image
from dataio.readers import read_sample
from inference.outputs import (Background, ClassShares, ShareTable, coco_entries, coco_of, find_regions,
                               result_names)
from inference.predictor import Predictor
from inference.video import VideoReader
from test_video import write_clip

CLASSES = [("background", (0, 0, 0)), ("cat", (255, 0, 0)), ("big dog", (0, 255, 0))]


@pytest.fixture
def photos(tmp_path):
    """A folder of photos, and a model of three classes that predicts all of them."""
    folder = write_folder(tmp_path / "data", count=3) / "images"
    net = tiny().eval()
    torch.nn.init.normal_(net.head.conv_seg.weight, std=0.1)
    with torch.no_grad():
        logits = torch.cat([net(read_image(path)[None]) for path in folder.iterdir()])
        net.head.conv_seg.bias -= logits.mean((0, 2, 3))
    torch.save(pack_checkpoint(net, CLASSES, (42, 56)), tmp_path / "model.pth")
    return folder


@pytest.fixture
def segment(photos, run):
    """Return a function that calls infer_image.py with flags; it returns the folder of the results."""
    def call(*flags):
        root = photos.parents[1]
        code, text, err = run(infer_image, "--model", root / "model.pth", "--input", photos, "--device",
                              "cpu", "--out-dir", root, *flags)
        assert code == 0, err
        return root / "inference_results_image", text
    return call


def inside(rings, size):
    """Return (H, W) bool: centers of pixels within an odd number of the outlines, an edge at a time."""
    rows, columns = np.mgrid[:size[0], :size[1]] + 0.5
    mask = np.zeros(size, bool)
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, 0), strict=True):
            if y0 != y1:
                mask ^= ((y0 <= rows) != (y1 <= rows)) & (columns < x0 + (rows - y0) * (x1 - x0) / (y1 - y0))
    return mask


@pytest.mark.parametrize("seed", range(12))
def test_outlines_filled_are_the_pixels_again(seed):
    generator = np.random.default_rng(seed)
    size = tuple(generator.integers(1, 30, 2)) if seed else (1, 1)
    pred = generator.integers(0, 3, size).astype(np.uint8)
    if seed % 2:  # larger shapes, with holes
        pred = cv2.resize(pred[:9, :7], size[::-1], interpolation=cv2.INTER_NEAREST)
    regions = find_regions(pred)
    for id in range(3):
        masks = [inside(region.rings, size) for region in regions if region.id == id]
        assert (np.sum([*masks, np.zeros(size, int)], 0) == (pred == id)).all()
        assert [mask.sum() for mask in masks] == [region.area for region in regions if region.id == id]
    assert all(region.id != 2 for region in find_regions(pred, keep=2))


def test_coco_json_read_as_annotations_gives_the_masks_again(photos, segment, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, _ = segment("--polygons", "coco", "geojson")
    again = tmp_path / "again"
    shutil.copytree(photos, again / "images")
    shutil.copy(folder / "coco.json", again)
    source = load("folder", again, val_fraction=0)
    assert [name for name, _ in source.classes] == [name for name, _ in CLASSES]
    for sample in source.splits["train"]:
        mask = np.array(Image.open(folder / f"{sample.image.stem}_mask.png"))
        assert (read_sample(sample, source.table)[1]["mask"].numpy() == mask).all()
        collection = json.loads((folder / f"{sample.image.stem}.geojson").read_text())
        drawn = np.zeros(mask.shape, int)
        for feature in collection["features"]:
            rings = [np.array(ring[:-1]) for ring in feature["geometry"]["coordinates"]]
            drawn += inside(rings, mask.shape) * feature["properties"]["id"]
        assert (drawn == mask).all()


def test_regions_with_holes_and_islands_in_them_come_back_from_coco_json(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = sorted(photos.iterdir())[0]
    pred = np.zeros(read_image(image).shape[1:], np.uint8)
    pred[5:40, 5:50], pred[10:30, 10:40], pred[15:20, 15:25], pred[40:, 50:] = 1, 2, 1, 2
    pred[32:34, 8:11] = 0
    pair = coco_entries(image, pred.shape, find_regions(pred, keep=0))
    content = coco_of([pair], {1: "cat", 2: "dog"})
    annotations = content["annotations"]
    kinds = {type(annotation["segmentation"]) for annotation in annotations}
    assert kinds == {list, dict}  # without and with holes
    for annotation in annotations:
        shape = annotation["segmentation"]
        runs = coco_mask.frPyObjects(shape, *pred.shape)[0] if isinstance(shape, list) else shape
        assert annotation["bbox"] == coco_mask.toBbox(runs).tolist()
        assert annotation["area"] == coco_mask.area(runs)
    root = tmp_path / "again"
    (root / "images").mkdir(parents=True)
    shutil.copy(image, root / "images")
    (root / "coco.json").write_text(json.dumps(content))
    source = load("folder", root, val_fraction=0)
    (sample,) = source.splits["train"]
    assert (read_sample(sample, source.table)[1]["mask"].numpy() == pred).all()


@pytest.mark.parametrize(("flags", "bits"), [((), 8), (("--tta", "flip", "--protocol", "slide"), 16)],
                         ids=str)
def test_probabilities_masks_and_shares_agree(photos, segment, flags, bits):
    folder, _ = segment("--probabilities", "classes", "--bits", bits, "--json", *flags)
    path = sorted(photos.iterdir())[1]
    stored = [np.array(Image.open(folder / f"{path.stem}_probability_{id}_{name}.png")) / (2**bits - 1)
              for id, name in enumerate(("background", "cat", "big_dog"))]
    assert np.sum(stored, 0) == pytest.approx(1, abs=0.01)
    mask = np.array(Image.open(folder / f"{path.stem}_mask.png"))
    chosen = np.take_along_axis(np.stack(stored), mask[None].astype(int), 0)[0]
    assert (chosen >= np.max(stored, 0) - 0.005).all()
    row = json.loads((folder / "shares.json").read_text())[1]
    assert row["image"] == str(path) and (row["height"], row["width"]) == mask.shape
    assert sum(entry["share"] for entry in row["classes"].values()) == pytest.approx(1, abs=1e-5)
    assert row["confidence"] == pytest.approx(chosen.mean(), abs=0.01)
    for id, (name, _) in enumerate(CLASSES):
        share = row["classes"].get(name, {"share": 0})["share"]
        assert share == pytest.approx((mask == id).mean(), abs=1e-5)


def test_shares_and_confidences_of_blocks_are_those_of_the_image():
    generator = np.random.default_rng(0)
    pred, confidence = generator.choice([0, 2, 255], (30, 20)), generator.random((30, 20))
    shares = ClassShares(CLASSES)
    for rows in (slice(0, 7), slice(7, 9), slice(9, 30)):
        shares.add(pred[rows], confidence[rows])
    entry = shares.entry("a.tif", pred.shape)
    assert entry["classes"].keys() == {"background", "big dog"}
    assert entry["confidence"] == pytest.approx(confidence[pred != 255].mean(), abs=1e-3)
    for id, name in ((0, "background"), (2, "big dog")):
        share, mean = (pred == id).sum() / (pred != 255).sum(), confidence[pred == id].mean()
        assert entry["classes"][name] == pytest.approx(dict(share=share, confidence=mean), abs=1e-4)


def test_a_cutout_is_the_image_without_its_background(photos, segment):
    folder, _ = segment("--cutout")
    for path in photos.iterdir():
        pixels, mask = (np.array(Image.open(folder / f"{path.stem}_{kind}.png"))
                        for kind in ("cutout", "mask"))
        assert (pixels[..., :3] == np.array(Image.open(path).convert("RGB"))).all()
        assert ((pixels[..., 3] == 0) == (mask == 0)).all() and set(np.unique(pixels[..., 3])) <= {0, 255}


def test_nothing_is_cut_out_by_a_model_without_a_background(run, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "photo.png")
    clip = write_clip(tmp_path / "clip.mp4", count=2, size=(48, 64))
    classes = [("sky", (0, 0, 0)), *CLASSES[1:]]
    torch.save(pack_checkpoint(tiny(), classes, (42, 56)), tmp_path / "m.pth")
    for script, *flags in ((infer_image, "--input", tmp_path / "photo.png", "--cutout"),
                           (infer_video, "--input", clip, "--cutout", "green")):
        code, _, err = run(script, *flags, "--model", tmp_path / "m.pth", "--out-dir", tmp_path / "out")
        assert code == 2 and "--cutout" in err and "sky" in err and err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_pseudo_labels_are_a_folder_to_train_on_and_never_mix(photos, segment, run, tmp_path):
    folder, text = segment("--min-confidence", 0.4, "--probabilities", "max")
    labels = folder / "pseudo_labels"
    source = load("folder", labels, val_fraction=0)
    assert source.classes == [(name, tuple(color)) for name, color in CLASSES]
    labeled = []
    for sample in source.splits["train"]:
        name = sample.image.stem
        assert sample.image.read_bytes() == (photos / sample.image.name).read_bytes()
        pred, confidence = (np.array(Image.open(folder / f"{name}_{kind}.png"))
                            for kind in ("mask", "confidence"))
        mask = read_sample(sample, source.table)[1]["mask"].numpy()
        clear = abs(confidence / 255 - 0.4) > 0.003  # 8 bits round
        assert ((mask == np.where(confidence / 255 >= 0.4, pred, 255)) | ~clear).all()
        labeled.append((mask != 255).mean())
    assert f"{100 * np.mean(labeled):.1f} %" in text and 0.05 < np.mean(labeled) < 0.95
    (labels / "masks/of_another_model.png").touch()
    segment("--min-confidence", 0.4)
    assert len(list((labels / "masks").iterdir())) == len(list(photos.iterdir())) == 3
    assert (folder / "pseudo_labels_1/masks/of_another_model.png").exists()
    code, _, err = run(infer_image, "--model", tmp_path / "model.pth", "--min-confidence", 0.4, "--input",
                       labels / "images", "--out-dir", tmp_path)
    assert code == 2 and "--min-confidence" in err and "--out-dir" in err and err.count("\n") == 1
    assert len(list((labels / "images").iterdir())) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_done_is_written_after_a_signal(photos, run, tmp_path, monkeypatch, number):
    """The signal comes while the second of three images is at hand."""
    calls, scores = [], Predictor.scores

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return scores(*args)

    monkeypatch.setattr(Predictor, "scores", interrupted)
    code, text, _ = run(infer_image, "--model", tmp_path / "model.pth", "--input", photos, "--device", "cpu",
                        "--json", "--polygons", "coco", "--out-dir", tmp_path)
    assert code == 128 + number and "2 of 3" in text
    folder = tmp_path / "inference_results_image"
    assert len(json.loads((folder / "shares.json").read_text())) == 2
    assert len(json.loads((folder / "coco.json").read_text())["images"]) == 2
    assert len(list(folder.glob("*_mask.png"))) == 2


@pytest.mark.parametrize(("flags", "named"), [
    ("--bits 16", "--probabilities"),
    ("--protocol slide --overlap 0.5", "--overlap"),
    ("--protocol whole --tile-scale 2", "--tile-scale"),
    ("--protocol tile --tta ms,flip", "--tta ms"),
    ("--protocol tile --cutout", "photo.tif"),
    ("--value-range 5", "--value-range"),
    ("--backend openvino --tta ms", "--tta ms"),
    ("--backend openvino --device cuda:0", "--device cpu"),
])
@pytest.mark.parametrize("script", [infer_image, infer_video, demo], ids=lambda script: script.__name__)
def test_flags_that_contradict_each_other_are_refused_before_a_model_is_loaded(run, script, tmp_path, flags,
                                                                               named):
    photo = tmp_path / "photo.tif"
    Image.new("RGB", (9, 9)).save(photo)
    if script is not infer_image and {"--bits", "--cutout", "--value-range"} & set(flags.split()):
        pytest.skip("a flag of infer_image.py alone")
    source = [] if script is demo else ["--input", photo]
    code, _, err = run(script, *source, "--model", "gone.pth", *flags.split())
    assert code == 2 and named in err.splitlines()[-1] and "gone.pth" not in err


@pytest.mark.parametrize(("flags", "named"), [
    ("--protocol tile --overlap 56", "--overlap 56"), ("--bands 1 2", "--bands")])
def test_flags_that_do_not_fit_the_model_are_refused(photos, run, tmp_path, flags, named):
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.tif")
    code, _, err = run(infer_image, "--input", tmp_path / "photo.tif", "--model", tmp_path / "model.pth",
                       "--out-dir", tmp_path / "out", *flags.split())
    assert code == 2 and named in err.splitlines()[-1] and not (tmp_path / "out").exists()


# --- video ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["green", "blur", "beach.png"])
def test_a_clip_before_another_background(photos, run, tmp_path, kind):
    """Objects keep their colors; behind them, away from the seam, stands what was asked for."""
    clip = write_clip(tmp_path / "clip.mp4", count=4, fps=10, size=(48, 64))
    Image.new("RGB", (90, 30), (250, 220, 40)).save(tmp_path / "beach.png")
    flags = ["--input", clip, "--model", tmp_path / "model.pth", "--device", "cpu", "--out-dir", tmp_path]
    kind = tmp_path / kind if kind == "beach.png" else kind
    code, text, err = run(infer_video, *flags, "--cutout", kind, "--csv")
    assert code == 0, err
    folder = tmp_path / "inference_results_video"
    assert "clip_cutout.mp4" in text and "clip_cutout.csv" in text
    frames = list(VideoReader(folder / "clip_cutout.mp4"))
    with open(folder / "clip_cutout.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["frame", "seconds", "background", "cat", "big dog"]
    assert len(rows) == 5 == len(frames) + 1
    assert [float(row[1]) for row in rows[1:]] == pytest.approx([0, 0.1, 0.2, 0.3], abs=0.002)
    for row in rows[1:]:
        assert sum(map(float, row[2:])) == pytest.approx(1, abs=1e-4)
    if kind == "green":
        green = np.mean([(np.abs(frame.astype(int) - (0, 255, 0)).max(2) < 40).mean() for frame in frames])
        assert green == pytest.approx(np.mean([float(row[2]) for row in rows[1:]]), abs=0.15)


def test_a_table_of_shares_appears_completely_or_not_at_all(tmp_path):
    path = tmp_path / "clip.csv"
    path.write_text("earlier")
    with pytest.raises(KeyboardInterrupt), ShareTable(path, CLASSES):
        raise KeyboardInterrupt
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt), ShareTable(path, CLASSES) as table:
        table.add(np.array([[0, 1], [1, 1]], np.uint8), 0.5)
        raise KeyboardInterrupt
    assert path.read_text().splitlines()[1] == "0,0.500,0.25000,0.75000,0.00000"
    assert list(tmp_path.iterdir()) == [path]


def test_what_stands_behind_is_exact(tmp_path):
    """Objects and green as they are, blur without a halo of the objects, a picture cropped to the frame."""
    frame = random_images(1, 3, 90, 130)[0].permute(1, 2, 0).numpy().copy()
    behind = np.ones((90, 130), bool)
    behind[20:70, 30:80] = False
    frame[~behind] = (255, 0, 0)
    frame[behind] = frame[behind] // 4  # dark
    green = Background("green", (90, 130)).replace(frame, behind)
    assert (green[behind] == (0, 255, 0)).all() and (green[~behind] == frame[~behind]).all()
    blur = Background("blur", (90, 130)).replace(frame, behind)
    core = cv2.erode(behind.astype(np.uint8), np.ones((5, 5))).astype(bool)
    assert blur[core].max() < 70  # nothing of the red object
    assert blur[core].std() < 0.3 * frame[core].std()
    assert (blur[25:65, 35:75] == frame[25:65, 35:75]).all()
    ramp = np.linspace(0, 250, 260).astype(np.uint8)[None, :, None].repeat(90, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    drawn = Background(str(tmp_path / "ramp.png"), (90, 130)).replace(frame, behind).astype(int)
    assert (np.abs(drawn - ramp[:, 65:195])[core] <= 2).all()  # its middle half


@pytest.mark.parametrize("background", ["gone.jpg", "clip.mp4"])
def test_a_background_that_is_not_an_image_is_one_line_before_a_model_is_loaded(run, tmp_path, monkeypatch,
                                                                                background):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4", count=2, size=(48, 64))
    code, _, err = run(infer_video, "--input", "clip.mp4", "--model", "gone.pth", "--cutout", background)
    assert code == 2 and background in err and err.count("\n") == 1 and not (tmp_path / "outputs").exists()


# --- names of results -------------------------------------------------------------------------------------
def test_names_of_results_hold_the_ending_where_stems_repeat_and_are_the_same_in_every_run(tmp_path):
    want = {"a.mp4": "a_mp4", "a.mkv": "a__mkv", "a_mkv.mp4": "a_mkv", "b.MOV": "b_MOV", "b.mov": "b_mov",
            "c.mp4": "c", "d": "d_file", "d.mp4": "d"}
    paths = [tmp_path / name for name in want]
    for path in [*paths, tmp_path / "c.txt", tmp_path / ".c.mkv"]:
        path.touch()
    endings = {".mp4", ".mkv", ".mov"}
    assert result_names(paths, endings) == list(want.values())
    assert [result_names([path], endings)[0] for path in paths] == list(want.values())
    assert result_names([tmp_path / "x/a.mp4"], endings) == ["a"]  # of a folder that cannot be listed


def test_images_of_the_same_name_in_runs_of_their_own_do_not_replace_each_other(tmp_path, photos, run):
    for name, shade in (("a.jpg", 10), ("a.png", 200), ("b.png", 90)):
        Image.fromarray(np.full((30, 40, 3), shade, np.uint8)).save(tmp_path / name)
    np.save(tmp_path / "b.npy", np.zeros((3, 30, 40), np.uint8))  # more likely a result than an input
    flags = ("--model", tmp_path / "model.pth", "--out-dir", tmp_path, "--backend", "torch")
    for name in ("a.jpg", "a.png", "b.png"):
        assert run(infer_image, "--input", tmp_path / name, *flags)[0] == 0
    masks = {path.name for path in (tmp_path / "inference_results_image").glob("*_mask.png")}
    assert masks == {"a_jpg_mask.png", "a_png_mask.png", "b_mask.png"}
    assert run(infer_image, "--input", tmp_path, *flags)[0] == 0
    assert {path.name for path in (tmp_path / "inference_results_image").glob("*_mask.png")} == masks


def test_clips_of_the_same_name_do_not_replace_each_other_and_replaced_ones_are_named(tmp_path, photos, run):
    first = write_clip(tmp_path / "a.mp4", 3)
    flags = ("--model", tmp_path / "model.pth", "--out-dir", tmp_path, "--backend", "torch", "--csv")
    folder = tmp_path / "inference_results_video"
    code, text, _ = run(infer_video, "--input", first, *flags)
    assert code == 0 and "replaced" not in text
    code, text, _ = run(infer_video, "--input", first, *flags)
    assert code == 0 and f"replaced {folder / 'a.mp4'} and {folder / 'a.csv'}" in text
    shutil.copy(first, tmp_path / "a.mkv")
    for name in ("a.mkv", "a.mp4"):
        code, text, _ = run(infer_video, "--input", tmp_path / name, *flags)
        assert code == 0 and "replaced" not in text
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.{ending}" for name in ("a", "a_mp4", "a_mkv") for ending in ("mp4", "csv")}


@pytest.mark.parametrize("stem", ["n" * 245, "é" * 120, "n" * 180])
def test_results_of_long_names_have_names_of_their_own_that_fit(tmp_path, stem):
    paths = [tmp_path / f"{stem}.png", tmp_path / f"{stem[:-1]}x.png"]
    for path in paths:
        path.touch()
    names = result_names(paths, {".png"})
    assert len(set(names)) == 2 and names[:1] == result_names(paths[:1], {".png"})
    for name in names:
        (tmp_path / f".4194304.{name}_probability_100_{'c' * 40}.png").touch()
    assert (names[0] == stem) == (len(stem) == 180)
