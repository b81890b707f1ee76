"""--protocol tile: against the whole image at once, without seams, with bounded memory, in every script."""
import json

import numpy as np
import pytest
import torch
from conftest import random_images, tiny, write_folder
from PIL import Image
from torch import nn

import evaluate
import infer_image
import infer_video
import train
from checkpoint import load_model, pack_checkpoint
from config import InputError
from dataio.resizing import window_starts
from inference.predictor import Predictor, choose_protocol, label_map, make_protocol, scores_of, views_of
from inference.tiles import Tiles, edges, ramp
from model import SegmentationModel
from models.logits import Logits
from test_video import write_clip
from utils import Precision

FLOAT32 = Precision("off", torch.device("cpu"))


class Convolution(SegmentationModel):
    """Logits at full size that depend on the pixels up to two away."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
        self.num_classes = 4

    def logits(self, images):
        return Logits(self.layers(images.float() / 64 - 2))


def probabilities(model, image, protocol):
    """Return the probabilities (K, H, W) of a protocol."""
    (view,) = views_of(model, image, protocol, FLOAT32)
    return torch.cat([view.pixels(rows) for _, rows in view.slices()], 2)[0].exp()


@pytest.mark.parametrize(("size", "window", "overlap"), [
    ((61, 83), (24, 20), 8), ((61, 83), (24, 20), 0.5), ((24, 20), (24, 20), 0.25), ((25, 20), (24, 20), 8),
    ((100, 31), (20, 31), 10), ((200, 40), (33, 27), 13), ((61, 83), (24, 20), 0.9)])
@torch.inference_mode()
def test_a_field_of_view_within_a_quarter_of_the_overlap_sees_the_whole_image(size, window, overlap):
    model, image = Convolution().eval(), random_images(1, 3, *size)
    tiled = probabilities(model, image, make_protocol("tile", "", window, overlap=overlap))
    torch.testing.assert_close(tiled, model.logits(image).pixels()[0].softmax(0), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_less_overlap_than_the_field_of_view_changes_the_seams():
    """Which the test above would not see if tiles were the whole image."""
    model, image = Convolution().eval(), random_images(1, 3, 61, 83)
    tiled = probabilities(model, image, make_protocol("tile", "", (24, 20), overlap=2))
    assert (tiled - model.logits(image).pixels()[0].softmax(0)).abs().max() > 0.01


@pytest.mark.parametrize("size", [(61, 83), (5, 7), (1, 1), (24, 100), (23, 19)])
def test_what_is_constant_has_no_seams_at_any_size(size):
    given = torch.tensor([0.5, 0.3, 0.2])
    tiles = Tiles(lambda crops: given[None, :, None, None].expand(len(crops), 3, 24, 20),
                  random_images(1, 3, *size), (24, 20), (17, 13), 3, batch_size=3)
    found = torch.cat([tiles.pixels(rows) for _, rows in tiles.slices()], 2).exp()
    assert found.shape == (1, 3, *size)
    torch.testing.assert_close(found, given[None, :, None, None].expand(1, 3, *size))


@pytest.mark.parametrize(("length", "side", "stride"),
                         [(100, 24, 17), (100, 24, 12), (50, 24, 2), (25, 24, 18)])
def test_weights_of_neighbors_add_up_to_one_and_every_pixel_has_some(length, side, stride):
    starts = window_starts(length, side, stride)
    total = torch.zeros(length)
    for index, start in enumerate(starts):
        total[start:start + side] += edges(starts, index, side)
    assert total.min() > 0.02
    if 2 * stride >= side and (length - side) % stride == 0:
        torch.testing.assert_close(total, torch.ones(length))
    shared = ramp(24, 8, 0)
    assert (shared[:2] == 0).all() and (shared[6:] == 1).all() and shared[4] > shared[3] > shared[2] > 0


def test_memory_is_a_row_of_tiles_however_high_the_image(monkeypatch):
    asked = []

    def seen(crops):
        asked.append(crops.shape)
        return torch.full((len(crops), 5, 32, 32), 0.2)

    tiles = Tiles(seen, torch.zeros(1, 3, 3000, 100, dtype=torch.uint8), (32, 32), (24, 24), 5, batch_size=2)
    rows = 0
    for _, part in tiles.slices():
        rows += tiles.pixels(part).shape[2]
        assert tiles.sums.shape == (5, 32, 100) and tiles.weights.shape == (32, 100)
    assert rows == 3000 and max(len(shape) and shape[0] for shape in asked) == 2


@pytest.mark.parametrize("scale", [0.5, 2.0])
@torch.inference_mode()
def test_tile_scale_is_pixels_seen_per_pixel(scale):
    """Of an image of one tile it is the whole image at --imgsz."""
    model = Convolution().eval()
    side = tuple(round(length / scale) for length in (24, 20))
    image = random_images(1, 3, *side)
    (tiled,) = views_of(model, image, make_protocol("tile", "flip", (24, 20), scale), FLOAT32)
    whole = views_of(model, image, make_protocol("whole", "flip", (24, 20)), FLOAT32)
    assert make_protocol("tile", "", (24, 20), scale).side == side
    assert (label_map([tiled], side) == label_map(whole, side)).all()


@torch.inference_mode()
def test_scores_and_other_sizes_and_batches():
    predictor = Predictor(Convolution().eval(), dict(classes=[["a", [0, 0, 0]]] * 4, imgsz=(24, 20)), "cpu",
                          make_protocol("tile", "", (24, 20)))
    predictor.precision = FLOAT32
    images = random_images(2, 3, 61, 83)
    preds = predictor(images)
    assert (preds[1] == predictor(images[1:])[0]).all() and preds.shape == (2, 61, 83)
    scores = predictor.scores(images[:1], every_class=True)
    assert (scores.pred == preds[0]).all()
    assert scores.probabilities.astype(float).sum(0) == pytest.approx(1, abs=5e-3)
    shares = predictor.probabilities(images, (30, 41))
    assert shares.shape == (2, 4, 30, 41)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 30, 41), atol=1e-4, rtol=1e-4)
    views = views_of(predictor.model, images[:1], predictor.protocol, FLOAT32)
    assert (scores_of(views, (61, 83)).pred == preds[0]).all()


@pytest.mark.parametrize(("given", "says"), [
    (dict(kind="tile", tta="ms"), "--tta ms has no place in --protocol tile"),
    (dict(tile_scale=2.0), "belong to --protocol tile"),
    (dict(kind="slide", overlap=0.0), "belong to --protocol tile"),
    (dict(kind="tile", overlap=20.0), "--overlap 20 is not smaller than the tiles of 24x20 pixels"),
])
def test_flags_that_contradict_each_other(given, says):
    with pytest.raises(InputError, match=says):
        choose_protocol(dict(imgsz=(24, 20)), **given)


def test_scripts_take_tiles_and_score_what_they_write(tmp_path, run):
    """The masks of infer_image.py have the pixels that evaluate.py counts; a clip is taken too."""
    data = write_folder(tmp_path / "data", count=6, size=(90, 121))
    out = tmp_path / "out"
    flags = ["--dataset", "folder", "--data-root", data, "--backbone", "vit_tiny", "--unfreeze", "all"]
    assert run(train, *flags, "--imgsz", 42, 42, "--epochs", 1, "--workers", 0, "--out-dir", out)[0] == 0
    tiles = ["--protocol", "tile", "--overlap", 14, "--model", out / "best_model_iou.pth", "--device", "cpu",
             "--out-dir", out]
    code, text, err = run(evaluate, *tiles)
    assert code == 0 and "tiles of 42x42 pixels, stride 28x28" in text, err
    metrics = json.loads((out / "evaluation" / "metrics.json").read_text())
    for record in metrics["records"]:
        assert run(infer_image, "--input", record["name"], *tiles)[0] == 0
    pred = np.array(Image.open(next((out / "inference_results_image").glob("*_mask.png"))))
    counts = np.bincount(pred.ravel(), minlength=3)
    name = next((out / "inference_results_image").glob("*_mask.png")).name.removesuffix("_mask.png")
    record = next(record for record in metrics["records"] if name in record["name"])
    scored = np.zeros(3)
    for _, found, pixels in record["cells"]:
        scored[found] += pixels
    assert (scored == counts).all()
    clip = write_clip(tmp_path / "clip.mp4", count=3, size=(90, 120))
    code, text, err = run(infer_video, "--input", clip, *tiles)
    assert code == 0 and "tiles of 42x42" in text, err
    code, _, err = run(infer_video, "--input", clip, *tiles, "--smooth")
    assert code == 2 and "--smooth averages at 320 pixels at most" in err


@pytest.mark.long
def test_an_exported_model_takes_tiles_of_small_images_too(tmp_path):
    """Every tile has the size that it was exported for."""
    checkpoint = pack_checkpoint(tiny().eval(), [(name, (0, 0, 0)) for name in "abc"], (42, 42))
    torch.save(checkpoint, tmp_path / "m.pth")
    model, facts = load_model(tmp_path / "m.pth")
    plain = Predictor(model, facts, "cpu", choose_protocol(facts, kind="tile"))
    plain.precision = FLOAT32
    other = Predictor(*load_model(tmp_path / "m.pth"), "cpu", choose_protocol(facts, kind="tile"),
                      "onnxruntime")
    for size in ((30, 61), (90, 33)):
        images = random_images(1, 3, *size)
        assert (plain(images) == other(images)).mean() > 0.99
