"""Logits that become pixels a block at a time, against torch's own interpolation, argmax and autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import logits as logits_module
from conftest import random_images, tiny
from losses import LOSSES, Criterion
from models.logits import pixel_loss
from models.logits import Logits, class_ids


def values(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("old", [(5, 7), (1, 1), (46, 33), (9, 300)])
@pytest.mark.parametrize("first", [(14, 20), (644, 460), (3, 2)])
@pytest.mark.parametrize("second", [(31, 17), (9, 50)])
def test_two_resizes_and_a_crop_equal_interpolate(old, first, second):
    coarse = values(2, 3, *old)
    padded = F.interpolate(coarse, size=first, mode="bilinear")
    assert torch.allclose(Logits(coarse).at(first).pixels(), padded, atol=1e-5)
    top, left, height, width = 1, 0, first[0] - 2, first[1] - 1
    want = padded[..., top : top + height, left : left + width]
    got = Logits(coarse).at(first).crop(top, left, height, width)
    assert got.shape == want.shape and torch.allclose(got.pixels(), want, atol=1e-4)
    assert got.values.shape == coarse.shape  # nothing was made large
    want = F.interpolate(want, size=second, mode="bilinear")
    assert torch.allclose(got.at(second).pixels(), want, atol=1e-4)
    assert torch.allclose(got.at(second).flip().pixels(), want.flip(-1), atol=1e-4)
    assert torch.allclose(Logits(coarse).flip().pixels(), coarse.flip(-1))


@pytest.mark.parametrize("block", [1, 500, 4000, 1 << 20])
def test_blocks_cover_every_pixel_once(block, monkeypatch):
    monkeypatch.setitem(logits_module.BLOCK, "cpu", block)
    logits = Logits(values(5, 3, 4, 6)).at((13, 22))
    whole = logits.pixels()
    seen, got = torch.zeros(5, 13, dtype=int), torch.full_like(whole, float("nan"))
    for images, rows, pixels in logits.blocks():
        seen[images, rows] += 1
        got[images, :, rows] = pixels
        assert pixels.numel() <= max(block, 3 * 22)
    assert (seen == 1).all() and torch.allclose(got, whole, atol=1e-6)


@pytest.mark.parametrize("classes", [1, 2, 21, 254])
def test_class_ids_are_argmax(classes):
    pixels = values(2, classes, 9, 11)
    assert torch.equal(class_ids(pixels).long(), pixels.argmax(1))
    ties = pixels.round()
    assert torch.equal(class_ids(ties).long(), ties.argmax(1))  # the first of equals
    assert class_ids(torch.full((1, classes, 2, 2), float("nan"))).max() < classes


@pytest.mark.parametrize("head", ["bn", "unet", "deconv", "deconv-resize"])
@pytest.mark.parametrize("size", [(30, 45), (56, 42), (5, 9)])
def test_the_model_resizes_and_crops_as_interpolate_does(head, size):
    net, images = tiny(head=head).eval(), random_images(2, 3, *size)
    with torch.no_grad():
        maps = net.features(images)
        padded = tuple(side + -side % 14 for side in size)
        want = F.interpolate(net.head(maps, padded), size=padded, mode="bilinear")
        top, left = (padded[0] - size[0]) // 2, (padded[1] - size[1]) // 2
        want = want[..., top : top + size[0], left : left + size[1]]
        assert torch.allclose(net(images), want, atol=1e-5)


class Coarse(nn.Module):
    """A 3x3 convolution whose logits belong to images of another size."""

    def __init__(self, size):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.size = nn.Conv2d(4, 5, 3, padding=1), size

    def logits(self, features):
        return Logits(self.conv(features)).at(self.size)


@pytest.mark.parametrize("name", [*LOSSES, "ce+focal", "focal+dice"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [1, 700, 1 << 20])
def test_loss_in_blocks_equals_the_loss_of_all_pixels(name, weighted, block, monkeypatch):
    monkeypatch.setitem(logits_module.BLOCK, "cpu", block)
    net, features = Coarse((29, 41)), values(3, 4, 7, 9)
    masks = torch.randint(0, 5, (3, 29, 41), generator=torch.Generator().manual_seed(1))
    masks[0, :20], masks[1] = 255, 255
    criterion = Criterion(name, torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0]) if weighted else None)
    pixels = F.interpolate(net.conv(features), size=(29, 41), mode="bilinear")
    want, want_terms = criterion(pixels, masks)
    expected = torch.autograd.grad(3 * want, list(net.parameters()))
    loss, terms, preds = pixel_loss(criterion, net.logits(features), masks)
    got = torch.autograd.grad(3 * loss, list(net.parameters()))
    assert loss.item() == pytest.approx(want.item(), rel=1e-5) and terms.keys() == want_terms.keys()
    for term in terms:
        assert terms[term].item() == pytest.approx(want_terms[term].item(), rel=1e-5)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert (preds.long() == pixels.argmax(1)).float().mean() > 0.999
    with torch.inference_mode():
        loss, _, _ = pixel_loss(criterion, net.logits(features), masks)
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["ce", "ce+focal"])
def test_a_batch_in_which_no_pixel_counts_has_no_gradient(name):
    net = Coarse((20, 30))
    loss, _, _ = pixel_loss(Criterion(name), net.logits(values(2, 4, 5, 5)), torch.full((2, 20, 30), 255))
    loss.backward()
    assert loss.item() == 0 and all(p.grad.eq(0).all() for p in net.parameters())
