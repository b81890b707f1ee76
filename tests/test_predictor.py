"""Prediction at an image's own size against loops written out: whole, windows, tiles, views."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load, random_images, refused, tiny, write_folder
from torch import nn

import evaluate
from checkpoint import load_model, pack_checkpoint
from dataio.resizing import resize_image
from inference import predictor as predictor_module
from inference.predictor import (Predictor, Protocol, Tiles, choose_protocol, edge_weights, label_map,
                                 make_protocol, scored_rows, scores_of, slide_logits, views_of)
from models import upsampling
from models.upsampling import geometry_of, pixels
from test_engine import FLOAT32, ConvolutionHead, on_images, pixelwise
from utils import Precision

VIEW_SIZES = (9, 7), (4, 4), (13, 20)  # of logits


class WindowMeanHead(ConvolutionHead):
    """Adds the mean over all it sees, so that windows matter."""

    def forward(self, features):
        logits = super().forward(features)
        return logits + logits.mean((2, 3), keepdim=True)


def neighbors():
    """Return a Segmenter of 3 classes that sees 5x5 pixels and the mean of its window."""
    torch.manual_seed(0)
    net = on_images(WindowMeanHead(nn.Conv2d(3, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, 3, 1))).eval()
    with torch.no_grad():  # so that no class wins everywhere; every logit holds the bias twice
        net.head.layers[2].bias -= net(random_images(1, 3, 40, 40, seed=9)).mean((0, 2, 3)) / 2
    return net


def local():
    """Return a Segmenter of 4 classes whose logits depend on the pixels up to two away."""
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    net = on_images(ConvolutionHead(*layers), num_classes=4).eval()
    with torch.no_grad():
        net.head.layers[0].weight *= 4
    return net


def predictor_of(net, protocol):
    """Return a float32 Predictor on the CPU."""
    classes = [[f"class {number}", [0, 0, number]] for number in range(net.num_classes)]
    predictor = Predictor(net, dict(classes=classes, imgsz=(24, 20)), "cpu", protocol)
    predictor.precision = FLOAT32
    return predictor


def predict(net, images, protocol):
    """Return the label maps (B, H, W) of images (B, 3, H, W), in float32."""
    return predictor_of(net, protocol).label_maps(images)


@pytest.mark.parametrize(("kind", "tta"), [("whole", ""), ("slide", ""), ("whole", "ms,flip"), ("tile", "")])
def test_what_is_begun_in_a_thread_is_what_is_predicted_at_once(kind, tta):
    images = random_images(3, 3, 45, 61)
    predictor = predictor_of(local(), make_protocol(kind, tta, (24, 20)))
    at_once = torch.stack(predictor.predict_at(images, [(45, 61)] * 3))
    with ThreadPoolExecutor(1) as thread:
        begun = [predictor.begin(images[first:], thread.submit) for first in (0, 1)]
        results = [predictor.label_maps(images), *(finish() for finish in begun)]
    for own, expected in zip(results, (at_once, at_once, at_once[1:]), strict=True):
        assert own.shape == expected.shape and (own == expected).float().mean() > 0.999
    with refused("uint8"):
        predictor.begin(images.float())


def resized(values, size):
    """Return (B, K, h, w) at `size`, bilinear."""
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False)


def assert_argmax(preds, values):
    """Assert that preds (..., H, W) are the argmax of (..., K, H, W), but for ties up to rounding."""
    best = values.topk(2, dim=-3).values
    sure = best.select(-3, 0) - best.select(-3, 1) > 1e-5
    preds = torch.as_tensor(preds)
    assert preds.dtype == torch.uint8 and sure.float().mean() > 0.9
    assert len(preds.unique()) > 1 or preds.numel() == 1
    assert torch.equal(preds[sure].long(), values.argmax(-3)[sure])


# --- label maps -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [1, 1000, 1 << 25])
@pytest.mark.parametrize("size", [(31, 22), (5, 40), (1, 1), (9, 7), (200, 3)])
def test_label_map_is_argmax_of_the_upsampled_logits_however_many_rows_at_a_time(size, block, monkeypatch):
    monkeypatch.setitem(upsampling.BLOCK_VALUES, "cpu", block)
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 9, 7)
    pred = label_map(scored_rows([(logits, geometry_of((9, 7)))], size), size)
    assert pred.shape == size
    assert_argmax(pred, resized(logits, size)[0])


@pytest.mark.parametrize(("count", "largest_sum"), [(1, 0), (3, 0), (3, 1 << 28)])
def test_views_are_averaged_as_probabilities_of_which_the_largest_is_the_confidence(count, largest_sum,
                                                                                    monkeypatch):
    monkeypatch.setattr(predictor_module, "LARGE_SUM", largest_sum)
    monkeypatch.setitem(upsampling.BLOCK_VALUES, "cpu", 300)
    torch.manual_seed(0)
    views = [(5 * torch.randn(1, 4, *size), geometry_of(size)) for size in VIEW_SIZES[:count]]
    mean = sum(resized(logits, (30, 21)).softmax(1) for logits, _ in views)[0] / count
    scores = scores_of(scored_rows(views, (30, 21)), (30, 21), every_class=True)
    assert_argmax(scores.pred, mean)
    assert scores.confidence == pytest.approx(mean.amax(0).numpy(), abs=1e-5)
    assert scores.probabilities.astype(float) == pytest.approx(mean.numpy(), abs=1e-3)


@pytest.mark.parametrize("count", [1, 2])
@torch.no_grad()
def test_images_are_predicted_at_other_sizes_than_their_own(count):
    net, images = neighbors(), random_images(count, 3, 23, 31)
    sizes = [(23, 31), (40, 17)][-count:]
    preds = predictor_of(net, Protocol((18, 22), flip=True)).predict_at(images, sizes)
    inputs = resize_image(images, (18, 22))
    views = net(inputs), net(inputs.flip(-1)).flip(-1)
    for index, (pred, size) in enumerate(zip(preds, sizes, strict=True)):
        assert_argmax(pred, sum(resized(view[index:index + 1], size).softmax(1) for view in views)[0])


# --- one label map, whichever script asks -----------------------------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two images as (their samples, the table of their masks)."""
    data = load("folder", write_folder(tmp_path_factory.mktemp("photos"), count=2, size=(50, 90)))
    return [sample for samples in data.splits.values() for sample in samples], data.table


@pytest.fixture(scope="module")
def undecided():
    """A Segmenter of 100 classes with scores close to each other, the last ten twins of the first ten."""
    net = tiny(num_classes=100, head="detail").eval()
    for values in net.head.parameters():
        if len(values) == 100:
            values.data[90:] = values.data[:10]
    return net


@pytest.mark.parametrize("tta", ["", "flip"])
@pytest.mark.parametrize("kind", ["whole", "slide", "tile"])
@pytest.mark.parametrize("precision", ["off", "bf16"])
def test_what_evaluate_scores_is_what_infer_image_writes(photos, undecided, precision, kind, tta):
    """Bit by bit where as many images or windows pass the network at once; else but for near ties."""
    samples, table = photos
    predictor = predictor_of(undecided, make_protocol(kind, tta, (42, 56)))
    predictor.precision = Precision(precision, predictor.device)
    images = [predictor.read(sample.image).image[None] for sample in samples]
    written = [predictor(image)[0] for image in images]
    scores = [predictor.scores(image, every_class=True) for image in images]
    assert all((score.pred == pred).all() for score, pred in zip(scores, written, strict=True))
    for batch_size in (1, 2, 8):
        loader = evaluate.make_batches(samples, table, predictor.protocol, batch_size, predictor.rule)
        scored = [pred.numpy() for batch, targets, _ in loader
                  for pred in predictor.predict_at(batch, [(50, 90)] * len(batch), batch_size)]
        if batch_size == (1 if kind == "whole" else 8):
            assert all((pred == other).all() for pred, other in zip(scored, written, strict=True))
        for pred, other, score in zip(scored, written, scores, strict=True):
            chances = np.take_along_axis(score.probabilities, pred[None].astype(int), 0)[0]
            assert (pred == other).mean() > 0.97 and (chances > 0.98 * score.confidence).all()


def test_a_convolution_gets_an_image_in_one_layout_however_it_lies_in_memory():
    net, layouts, image = neighbors(), set(), random_images(1, 3, 24, 40)
    net.head.layers[0].register_forward_pre_hook(lambda layer, inputs: layouts.add(inputs[0].stride()))
    as_read = image[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]
    batch = torch.cat([image] * 2).contiguous(memory_format=torch.channels_last)
    for lying in (image, as_read, batch[:1], image.mT.contiguous().mT, image.flip(-1)):
        for protocol in (Protocol((24, 40)), Protocol((12, 20)), make_protocol("slide", "", (24, 40))):
            list(views_of(net, lying, protocol, FLOAT32))
    assert len(layouts) == 2  # of two sizes


def test_images_are_resized_where_they_are_whatever_device_the_model_is_on(monkeypatch):
    """As dataloaders do: a GPU would round some pixels of uint8 in the other direction."""
    devices, net = [], neighbors().to("meta")
    monkeypatch.setattr(predictor_module, "resize_image",
                        lambda images, size: devices.append(images.device.type) or resize_image(images, size))
    logits, _ = next(views_of(net, random_images(1, 3, 50, 40), Protocol((24, 20)), FLOAT32))
    assert devices == ["cpu"] and logits.device.type == "meta"


@pytest.mark.parametrize("kind", ["whole", "slide", "tile"])
def test_arrays_of_any_size_and_layout_are_predicted_and_others_refused(kind):
    predictor = predictor_of(local(), make_protocol(kind, "", (24, 20)))
    for size in ((1, 1), (5, 400), (400, 5), (24, 20)):
        assert predictor.predict(np.zeros((*size, 3), np.uint8)).shape == size
    image = random_images(40, 60, 3).numpy()
    want, given = predictor.predict(image), image.copy()
    given.setflags(write=False)
    mirrored_twice = image[:, ::-1].copy()[:, ::-1]
    for other in (given, np.repeat(image, 2, 1)[:, ::2], mirrored_twice, np.asfortranarray(image)):
        assert (predictor.predict(other) == want).all()
    gray = predictor.predict(image[..., 0])
    assert (gray == predictor.predict(np.dstack([image[..., 0]] * 3))).all()
    for wrong in (np.zeros((0, 5, 3), np.uint8), image[None], image[..., :1], None, []):
        with refused("image", "H, W"):
            predictor.predict(wrong)
    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    for wrong in (images / 255, images[0], images[:0]):
        for method in (predictor, predictor.scores):
            with refused("uint8"):
                method(wrong)


# --- windows and views ------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@torch.no_grad()
def test_slide_equals_a_loop_over_windows(batch_size):
    net, images = neighbors(), random_images(2, 3, 23, 31)
    total, count = torch.zeros(2, 3, 23, 31), torch.zeros(23, 31)
    for top in (0, 7, 13):  # 13 = 23 - 10, shifted in
        for left in (0, 9, 18, 19):
            rows, columns = slice(top, top + 10), slice(left, left + 12)
            total[..., rows, columns] += net(images[..., rows, columns])
            count[rows, columns] += 1
    logits = slide_logits(net, images, (10, 12), (7, 9), batch_size)
    assert torch.allclose(logits, total / count, atol=1e-5)


@torch.no_grad()
def test_slide_with_a_window_as_large_as_the_image_equals_whole():
    net, images = neighbors(), random_images(2, 3, 23, 31)
    for window in ((23, 31), (40, 50)):
        assert torch.equal(slide_logits(net, images, window, (5, 5), 8), net(images))
    square = random_images(1, 3, 30, 30)
    slide, resized = make_protocol("slide", "", (20, 20)), make_protocol("whole", "", (20, 20))
    assert torch.equal(predict(net, square, slide), predict(net, square, resized))


@torch.no_grad()
def test_flip_of_a_symmetric_network_changes_nothing_and_of_another_one_does():
    images, symmetric, other = random_images(2, 3, 20, 30), pixelwise().eval(), neighbors()
    plain, flip = Protocol((20, 30)), Protocol((20, 30), flip=True)
    assert torch.equal(predict(symmetric, images, plain), predict(symmetric, images, flip))
    straight, mirrored = (pixels(*view) for view in views_of(other, images, flip, FLOAT32))
    assert torch.equal(straight, other(images))
    assert torch.equal(mirrored, other(images.flip(-1)).flip(-1))
    assert not torch.allclose(straight, mirrored, atol=1e-3)


@torch.no_grad()
def test_windows_of_a_mirrored_image_are_mirrored_back():
    net, images = neighbors(), random_images(2, 3, 20, 30)
    protocol = Protocol((20, 18), True, (20, 7), flip=True)
    straight, mirrored = (pixels(*view) for view in views_of(net, images, protocol, FLOAT32))
    assert torch.equal(straight, slide_logits(net, images, (20, 18), (20, 7), 8))
    assert torch.equal(mirrored, slide_logits(net, images.flip(-1), (20, 18), (20, 7), 8).flip(-1))


@torch.no_grad()
def test_multi_scale_equals_its_views_written_out():
    net, images, total = neighbors(), random_images(1, 3, 26, 34), 0
    for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        inputs = resize_image(images, (round(20 * scale), round(24 * scale)))
        for logits in (net(inputs), net(inputs.flip(-1)).flip(-1)):
            total = total + resized(logits, (26, 34)).softmax(1)
    assert_argmax(predict(net, images, make_protocol("whole", "ms,flip", (20, 24))), total)


def test_sizes_of_the_protocols():
    assert Protocol((64, 48)).sizes(100, 300) == [(64, 48)]
    assert Protocol((64, 48), scales=(0.5, 1.75)).sizes(100, 300) == [(32, 24), (112, 84)]
    slide = make_protocol("slide", "ms,flip", (512, 512))
    assert slide.stride == (341, 341) and slide.flip and slide.scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    assert slide.sizes(375, 500)[2] == (512, 683)  # the short side fits the window
    assert Protocol((20, 60), True, (10, 10)).sizes(100, 100) == [(60, 60)]  # covers the window
    assert make_protocol("whole", "", (7, 9)) == Protocol((7, 9))
    assert make_protocol("tile", "", (24, 20), 0.5, overlap=8).stride == (40, 32)  # tiles of 48x40
    for protocol, words in ((slide, "512x512 341x341 1.25 flip"), (Protocol((7, 9)), "7x9")):
        assert all(word in str(protocol) for word in words.split())


# --- tiles ------------------------------------------------------------------------------------------------
def tiled(net, image, **options):
    """Return the probabilities (1, K, H, W) of an image in tiles of 24x20 or of the `window` in options."""
    protocol = make_protocol("tile", "", **{"imgsz": (24, 20), **options})
    rows = predictor_of(net, protocol).rows(image, tuple(image.shape[-2:]))
    return torch.cat([values for _, values, _ in rows], 2)


@pytest.mark.parametrize(("size", "window", "overlap"), [
    ((61, 83), (24, 20), 8), ((61, 83), (24, 20), 0.5), ((24, 20), (24, 20), 0.25), ((25, 20), (24, 20), 8),
    ((100, 31), (20, 31), 10), ((200, 40), (33, 27), 13), ((61, 83), (24, 20), 0.9)])
@torch.no_grad()
def test_a_field_of_view_within_a_quarter_of_the_overlap_sees_the_whole_image(size, window, overlap):
    net, image = local(), random_images(1, 3, *size)
    probabilities = tiled(net, image, imgsz=window, overlap=overlap)
    torch.testing.assert_close(probabilities, net(image).softmax(1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_less_overlap_than_the_field_of_view_changes_the_seams():
    """Which the test above would not see if tiles were the whole image."""
    net, image = local(), random_images(1, 3, 61, 83)
    assert (tiled(net, image, overlap=2) - net(image).softmax(1)).abs().max() > 0.01


@pytest.mark.parametrize("size", [(61, 83), (5, 7), (1, 1), (24, 100), (23, 19)])
def test_what_is_constant_has_no_seams_at_any_size(size):
    shares = torch.tensor([0.5, 0.3, 0.2]).view(1, 3, 1, 1)
    tiles = Tiles(lambda crops: shares.expand(len(crops), 3, 24, 20), random_images(1, 3, *size), (24, 20),
                  (17, 13), 3, batch_size=3)
    probabilities = torch.cat([values for _, values in tiles.rows()], 2)
    torch.testing.assert_close(probabilities, shares.expand(1, 3, *size))


def test_the_weights_of_neighbors_are_a_straight_line_that_adds_up_to_one():
    before, after = edge_weights([0, 16], 0, 24)[16:], edge_weights([0, 16], 1, 24)[:8]  # 8 are shared
    torch.testing.assert_close(before + after, torch.ones(8))
    torch.testing.assert_close(after, torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]))


def test_memory_is_a_row_of_tiles_however_high_the_image():
    batch_sizes, height = [], 0

    def probabilities(crops):
        batch_sizes.append(len(crops))
        return torch.full((len(crops), 5, 32, 32), 0.2)

    image = torch.zeros(1, 3, 3000, 100, dtype=torch.uint8)
    tiles = Tiles(probabilities, image, (32, 32), (24, 24), 5, batch_size=2)
    for rows, values in tiles.rows():
        assert rows.start == height and values.shape == (1, 5, rows.stop - height, 100)
        assert tiles.sums.shape == (5, 32, 100) and tiles.weights.shape == (32, 100)
        height = rows.stop
    assert height == 3000 and max(batch_sizes) == 2


@pytest.mark.parametrize("scale", [0.5, 2.0])
@torch.no_grad()
def test_tile_scale_is_pixels_of_the_network_per_pixel_of_the_image(scale):
    """Of an image of the size of a tile, tiles are the whole image at --imgsz."""
    net, side = local(), tuple(round(length / scale) for length in (24, 20))
    image, tiles = random_images(1, 3, *side), make_protocol("tile", "flip", (24, 20), scale)
    assert tiles.side == side
    resized = predict(net, image, make_protocol("whole", "flip", (24, 20)))
    assert torch.equal(predict(net, image, tiles), resized)


@torch.no_grad()
def test_tiles_give_scores_and_other_sizes_of_every_image_of_a_batch():
    net, images = local(), random_images(2, 3, 61, 83)
    predictor = predictor_of(net, make_protocol("tile", "", (24, 20)))
    probabilities = torch.cat([tiled(net, image) for image in images.split(1)])
    assert_argmax(predictor(images), probabilities)
    scores = predictor.scores(images[:1], every_class=True)
    assert_argmax(scores.pred, probabilities[0])
    assert scores.confidence == pytest.approx(probabilities[0].amax(0).numpy(), abs=1e-5)
    assert scores.probabilities.astype(float) == pytest.approx(probabilities[0].numpy(), abs=1e-3)
    preds = predictor.predict_at(images, [(30, 41), (61, 83)])
    assert_argmax(preds[0], resized(probabilities[:1].log(), (30, 41))[0])
    assert_argmax(preds[1], probabilities[1])


def test_a_raster_is_0_where_it_has_no_data():
    class Raster:
        shape = (3, 61, 83)

        def read(self, top, left, height, width):
            return None if top < 20 else torch.full((1, 3, height, width), top % 256, dtype=torch.uint8)

    shares = torch.tensor([0.4, 0.6]).view(1, 2, 1, 1)
    tiles = Tiles(lambda crops: shares.expand(len(crops), 2, 24, 20), Raster(), (24, 20), (18, 15), 2)
    probabilities = torch.cat([values for _, values in tiles.rows()], 2)
    assert probabilities.shape == (1, 2, 61, 83) and not probabilities[..., :30, :].any()
    torch.testing.assert_close(probabilities[..., 42:, :], shares.expand(1, 2, 19, 83))


@pytest.mark.long
def test_a_converted_model_takes_tiles_of_small_images_too(tmp_path):
    """Every tile has the size that it was converted for."""
    pytest.importorskip("openvino")
    checkpoint = pack_checkpoint(tiny().eval(), [(name, (0, 0, 0)) for name in "abc"], (42, 42))
    torch.save(checkpoint, tmp_path / "m.pth")
    net, facts = load_model(tmp_path / "m.pth")
    protocol = choose_protocol(facts, kind="tile")
    plain, other = predictor_of(net, protocol), Predictor(net, facts, "cpu", protocol, "openvino")
    for size in ((30, 61), (90, 33)):
        images = random_images(1, 3, *size)
        assert (plain(images) == other(images)).mean() > 0.99
