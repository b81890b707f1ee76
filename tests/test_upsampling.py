"""Logits that become pixels a block at a time, against torch's own interpolation, argmax and autograd."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_images, tiny
from torch import nn

from losses import LOSSES, Criterion
from models import upsampling
from models.heads import logits_of
from models.upsampling import (Geometry, block_slices, class_ids, class_map, geometry_of, label_maps,
                               pixel_loss, pixels)


def values(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [(5, 7), (1, 1), (46, 33), (9, 300)])
@pytest.mark.parametrize("covered", [(14, 20), (644, 460), (3, 2), "grid"])
@pytest.mark.parametrize("size", [(31, 17), (9, 50), None])
@pytest.mark.parametrize("mirrored", [False, True])
def test_resizing_cropping_and_resizing_again_equal_interpolate(grid, covered, size, mirrored):
    coarse, covered = values(2, 3, *grid), grid if covered == "grid" else covered
    top, left = min(1, covered[0] - 1), 0
    inside = max(1, covered[0] - 2), max(1, covered[1] - 1)
    want = F.interpolate(coarse, size=covered, mode="bilinear")
    want = want[..., top:top + inside[0], left:left + inside[1]]
    want = want.flip(-1) if mirrored else want
    want = F.interpolate(want, size=size, mode="bilinear") if size else want
    geometry = Geometry(inside, covered, covered, top, left, mirrored)
    got = pixels(coarse, geometry, size)
    assert got.dtype == torch.float32 and torch.allclose(got, want, atol=1e-4)
    rows = slice(1, max(2, want.shape[2] // 2))
    assert torch.allclose(pixels(coarse, geometry, size, rows), want[:, :, rows], atol=1e-4)


@pytest.mark.parametrize(("size", "divisor", "multiple"),
                         [((30, 45), 14, 1), ((30, 45), 14, 4), ((8, 9), 1, 1)])
def test_images_lie_in_the_middle_of_what_logits_cover(size, divisor, multiple):
    geometry = geometry_of(size, divisor, multiple)
    for outer, side, first in zip(geometry.covered, size, geometry[3:5], strict=True):
        assert outer % multiple == 0 and outer >= side and abs((outer - side) / 2 - first) <= 1
    assert all(side % divisor == 0 for side in geometry.padded)
    stretched = geometry_of(size, divisor, stretched=True)
    assert stretched.covered == size and stretched.padded == geometry.padded and stretched[3:5] == (0, 0)


@pytest.mark.parametrize("block", [1, 500, 4000, 1 << 20])
def test_blocks_cover_every_pixel_once(block, monkeypatch):
    monkeypatch.setitem(upsampling.BLOCK_VALUES, "cpu", block)
    times = torch.zeros(5, 13, dtype=int)
    for images, rows in block_slices((5, 3, 13, 22), torch.device("cpu")):
        times[images, rows] += 1
        count = len(range(5)[images]) * len(range(13)[rows]) * 3 * 22
        assert count <= max(block, 3 * 22)
    assert (times == 1).all()


@pytest.mark.parametrize("classes", [1, 2, 21, 254])
def test_class_ids_are_argmax(classes):
    logits = values(2, classes, 9, 11)
    assert torch.equal(class_ids(logits).long(), logits.argmax(1))
    ties = logits.round()
    assert torch.equal(class_ids(ties).long(), ties.argmax(1))  # the first of equals
    assert class_ids(torch.full((1, classes, 2, 2), float("nan"))).max() < classes


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_label_maps_are_the_argmax_of_each_image_at_its_size(block, monkeypatch):
    monkeypatch.setitem(upsampling.BLOCK_VALUES, "cpu", block)
    logits, geometry, sizes = values(2, 4, 5, 6), geometry_of((28, 42), 14), [(28, 42), (61, 35)]
    want = F.interpolate(logits, size=(28, 42), mode="bilinear")
    for index, pred in enumerate(label_maps(logits, geometry, sizes)):
        expected = F.interpolate(want[index:index + 1], size=sizes[index], mode="bilinear").argmax(1)[0]
        assert pred.shape == sizes[index] and (pred.long() == expected).float().mean() > 0.999


@pytest.mark.parametrize("grid", [(5, 7), (1, 1), (46, 33), "pixels"])
@pytest.mark.parametrize(("stretched", "mirrored"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("size", [(45, 61), (90, 122), (31, 17), (300, 777)])
@pytest.mark.parametrize("classes", [1, 2, 21])
def test_class_maps_class_by_class_are_label_maps(grid, stretched, mirrored, size, classes):
    geometry = geometry_of((45, 61), 14, 4, stretched)._replace(mirrored=mirrored)
    logits = values(1, classes, *(geometry.covered if grid == "pixels" else grid))
    expected, (pred,) = pixels(logits, geometry, size), label_maps(logits, geometry, [size])
    best = expected[0].topk(min(2, classes), 0).values
    sure = best[0] - best[-1] > 1e-4 if classes > 1 else torch.ones(size, dtype=bool)
    own = class_map(logits, geometry, size)
    assert own.dtype == torch.uint8 and own.shape == size and sure.float().mean() > 0.99
    assert torch.equal(own[sure], pred[sure])
    assert (class_map(torch.zeros_like(logits), geometry, size) == 0).all()  # the first of equals


@pytest.mark.parametrize("head", ["bn", "unet", "deconv", "deconv-resize"])
@pytest.mark.parametrize("size", [(30, 45), (56, 42), (5, 9)])
def test_the_model_resizes_and_crops_as_interpolate_does(head, size):
    net, images = tiny(head=head).eval(), random_images(2, 3, *size)
    with torch.no_grad():
        padded = tuple(side + -side % 14 for side in size)
        want = F.interpolate(logits_of(net.head(net.features(images))), size=padded, mode="bilinear")
        top, left = (padded[0] - size[0]) // 2, (padded[1] - size[1]) // 2
        want = want[..., top:top + size[0], left:left + size[1]]
        assert torch.allclose(net(images), want, atol=1e-5)
        net.stretched = True  # as mmsegmentation stretches the logits of its padded images
        want = F.interpolate(logits_of(net.head(net.features(images))), size=size, mode="bilinear")
        assert torch.allclose(net(images), want, atol=1e-5)


@pytest.mark.parametrize("name", [*LOSSES, "ce+focal", "focal+dice"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [1, 700, 1 << 20])
def test_loss_in_blocks_equals_the_loss_of_all_pixels(name, weighted, block, monkeypatch):
    monkeypatch.setitem(upsampling.BLOCK_VALUES, "cpu", block)
    torch.manual_seed(3)
    layer, inputs, geometry = nn.Conv2d(4, 5, 3, padding=1), values(3, 4, 7, 9), geometry_of((29, 41), 7)
    masks = torch.randint(0, 5, (3, 29, 41), generator=torch.Generator().manual_seed(1))
    masks[0, :20], masks[1] = 255, 255
    criterion = Criterion(name, torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0]) if weighted else None)
    upsampled = F.interpolate(layer(inputs), size=geometry.padded, mode="bilinear")
    upsampled = upsampled[..., geometry.top:geometry.top + 29, geometry.left:geometry.left + 41]
    want, want_terms = criterion(upsampled, masks)
    expected = torch.autograd.grad(3 * want, list(layer.parameters()))
    loss, terms, preds = pixel_loss(criterion, layer(inputs), geometry, masks)
    got = torch.autograd.grad(3 * loss, list(layer.parameters()))
    assert loss.item() == pytest.approx(want.item(), rel=1e-5) and terms.keys() == want_terms.keys()
    for term in terms:
        assert terms[term].item() == pytest.approx(want_terms[term].item(), rel=1e-5)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert (preds.long() == upsampled.argmax(1)).float().mean() > 0.999
    with torch.inference_mode():
        loss, _, _ = pixel_loss(criterion, layer(inputs), geometry, masks)
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)
