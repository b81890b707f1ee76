"""Losses against torch, smp and plain loops; ignored pixels, half precision, gradients, class weights."""

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F

from config import InputError
from losses import (CLASS_WEIGHTS, LOSSES, Criterion, check_class_weights, class_weights, cross_entropy,
                    dice, focal, lovasz, uses_class_weights)  # fmt: skip

EVERY = [*LOSSES, "focal+dice", "ce+dice", "lovasz+ce"]


def random_case(classes=5, present=None, height=13, width=9, dtype=torch.float32, seed=0):
    """Return logits (2, K, H, W) and masks of the first `present` classes, a third of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, classes, height, width, generator=generator, dtype=dtype)
    masks = torch.randint(0, present or classes, (2, height, width), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 0.3] = 255
    return logits, masks


def test_cross_entropy_equals_torch_on_counted_pixels():
    logits, masks = random_case()
    counted = masks != 255
    flat = logits.permute(0, 2, 3, 1)[counted]  # (N, K)
    assert torch.allclose(cross_entropy(logits, masks), F.cross_entropy(flat, masks[counted]))
    weights = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])
    expected = F.cross_entropy(flat, masks[counted], weight=weights, reduction="sum") / counted.sum()
    assert torch.allclose(cross_entropy(logits, masks, weights), expected)


@pytest.mark.parametrize("present", [5, 3, 1])
def test_lovasz_and_dice_equal_smp_on_the_classes_present(present):
    logits, masks = random_case(present=present)
    expected = smp.losses.LovaszLoss("multiclass", ignore_index=255)(logits, masks).item()
    assert lovasz(logits, masks).item() == pytest.approx(expected, abs=1e-5)
    expected = smp.losses.DiceLoss("multiclass", ignore_index=255, smooth=0.0)(logits, masks).item()
    assert dice(logits, masks).item() == pytest.approx(expected * 5 / present, abs=1e-5)  # smp: all classes


def test_lovasz_of_many_pixels_and_its_gradient_are_those_of_sorted_errors():
    logits, masks = random_case(classes=3, height=90, width=131)  # a dozen errors in a bin
    masks[0, :40] = 2  # sure and right, sure and wrong
    logits[0, 2, :30] += 9
    gradients = []
    for loss in (lovasz, smp.losses.LovaszLoss("multiclass", ignore_index=255)):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, masks)
        gradients += torch.autograd.grad(value, leaf)
        assert value.item() == pytest.approx(lovasz(logits, masks).item(), abs=1e-5)
    ours, sorted_errors = gradients
    assert (ours - sorted_errors).norm() < 0.02 * sorted_errors.norm()


def test_focal_equals_a_loop_over_pixels():
    logits, masks = random_case()
    weights = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])
    plain, weighted, count = 0.0, 0.0, 0
    for b, y, x in (masks != 255).nonzero().tolist():
        label = masks[b, y, x]
        p = logits[b, :, y, x].softmax(0)[label]
        plain, count = plain - (1 - p) ** 2 * p.log(), count + 1
        weighted = weighted - weights[label] * (1 - p) ** 2 * p.log()
    assert focal(logits, masks).item() == pytest.approx(plain.item() / count, rel=1e-5)
    assert focal(logits, masks, weights).item() == pytest.approx(weighted.item() / count, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_in_float64(name):
    logits, masks = random_case(classes=4, height=2, width=4, dtype=torch.float64)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=torch.float64)
    criterion = Criterion(name, weights)
    assert torch.autograd.gradcheck(lambda z: criterion(z, masks)[0], logits.requires_grad_())


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_without_valid_pixels_gives_zero_loss_and_gradient(name):
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    loss, terms = Criterion(name, torch.ones(5))(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0.0 and logits.grad.abs().sum() == 0.0 and list(terms) == name.split("+")


@pytest.mark.parametrize("name", EVERY)
def test_ignored_pixels_count_for_nothing_and_get_no_gradient(name):
    """Not as truth either: what is ignored may not count as class 0."""
    logits, masks = random_case(height=12, width=20)
    masks[..., 13:] = 255
    other = torch.where((masks == 255)[:, None], 50.0, logits)
    logits.requires_grad_()
    for weights in (None, torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])):
        criterion = Criterion(name, weights)
        loss, logits.grad = criterion(logits, masks)[0], None
        for same in (criterion(other, masks)[0], criterion(logits[..., :13], masks[..., :13])[0]):
            assert loss.item() == pytest.approx(same.item(), rel=1e-5)
        loss.backward()
        assert (logits.grad.movedim(1, -1)[masks == 255] == 0).all()
        assert (logits.grad.movedim(1, -1)[masks != 255] != 0).any()


@pytest.mark.parametrize("name", EVERY)
def test_losses_are_finite_where_the_network_is_sure_and_wrong_or_right(name):
    losses = []
    for guess in (0, 1):
        logits = torch.zeros(1, 2, 6, 6)
        logits[:, guess] = 300.0
        logits.requires_grad_()
        loss, _ = Criterion(name)(logits, torch.ones(1, 6, 6, dtype=torch.int64))
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    if set(name.split("+")) <= {"ce", "focal", "dice", "lovasz"}:
        assert losses[1] < 1e-5


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32_also_under_autocast(name, dtype):
    logits, masks = random_case(classes=3, height=120, width=130)
    logits = logits.to(dtype)
    expected, _ = Criterion(name)(logits.double(), masks)
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = Criterion(name)(logits, masks)
    assert loss.dtype == torch.float32 and all(term.dtype == torch.float32 for term in terms.values())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_class_weights_need_a_loss_that_uses_them(monkeypatch):
    check_class_weights("lovasz+ce", "enet")
    check_class_weights("dice", "none")
    with pytest.raises(InputError, match="--class-weights median .*--loss dice"):
        check_class_weights("dice", "median")
    monkeypatch.setitem(LOSSES, "weighted-dice", uses_class_weights(lambda *args: dice(*args)))
    check_class_weights("weighted-dice", "enet")
    assert not Criterion("weighted-dice+ce").per_pixel and Criterion("ce+focal").per_pixel


# --- class weights ----------------------------------------------------------------------------------------
PIXELS = [[800, 200, 0, 0], [600, 0, 400, 0], [1000, 0, 0, 0]]  # three images of four classes, one unseen


def test_enet_and_median_weights_are_their_formulas_with_mean_one_over_pixels():
    shares = torch.tensor([0.8, 0.0666667, 0.1333333])
    enet = 1 / (1.02 + shares).log()
    median = 0.4 / torch.tensor([0.8, 0.2, 0.4])  # of 2400 / 3000, 200 / 1000, 400 / 1000
    for name, plain in (("enet", enet), ("median", median)):
        weights = class_weights(PIXELS, name)
        assert torch.allclose(weights[:3], plain / (plain * shares).sum(), atol=1e-5)
    assert class_weights(PIXELS, "none") is None
    assert class_weights([[0, 0]], "median").isfinite().all()


@pytest.mark.parametrize("name", CLASS_WEIGHTS)
def test_class_weights_of_any_name_have_a_mean_of_one_over_pixels(name):
    weights, totals = class_weights(PIXELS, name), torch.tensor(PIXELS).sum(0)
    if weights is not None:
        assert (weights * totals).sum().item() == pytest.approx(totals.sum().item(), rel=1e-4)
        assert weights.isfinite().all() and weights[3] == 1.0 and weights.dtype == torch.float32
