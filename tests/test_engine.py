"""Training step, accumulation, schedules, prediction at native size, non-finite losses."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score
from torch import nn
from tqdm import tqdm

import engine
from models import logits as logits_module
from dataio.resizing import resize_image
from engine import (
    OPTIMIZERS,
    SCHEDULERS,
    Objective,
    Optimization,
    backbone_scale,
    lr_lambda,
    parameter_groups,
    train_one_epoch,
)
from inference.predictor import (
    Protocol,
    label_map,
    make_protocol,
    predict,
    slide_logits,
    views_of,
)
from inference.tiles import window_starts
from losses import Criterion
from conftest import build, tiny
from model import SegmentationModel
from models.heads import Head
from models.logits import Logits, geometry_of
from utils import Precision

CPU = torch.device("cpu")


class Pixelwise(SegmentationModel):
    """A network without BatchNorm that looks at one pixel at a time: (B, 3, H, W) -> (B, 3, H, W) logits."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = Head()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 3, 1))
        with torch.no_grad():  # starts as "the brightest channel", so that predictions differ
            self.layers[0].weight[:3] = 2 * torch.eye(3)[..., None, None]
            self.layers[2].weight[:, :3] = 2 * torch.eye(3)[..., None, None]
            self.layers[2].bias.zero_()

    def forward(self, images):
        return self.layers(images.float() / 255)

    def output(self, images):
        return self(images), geometry_of(images.shape[-2:], 1)


def batches_of(images, masks, size):
    """Return a bar over batches of `size` with names."""
    names = [f"image_{number}.png" for number in range(len(images))]
    return tqdm(
        [
            (images[i : i + size], {"mask": masks[i : i + size]}, names[i : i + size])
            for i in range(0, len(images), size)
        ],
        disable=True,
    )


def random_batch(count, height=11, width=13, seed=0):
    """Return images (count, 3, H, W) uint8 and masks whose share of ignored pixels differs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    masks = images.float().argmax(1).to(torch.uint8)
    for number in range(count):
        masks[number, : number % 5] = 255
    return images, masks


def run_epoch(net, batches, lr=0.1, accumulate=1, precision="off", criterion=None, optimizer=None):
    """Train one epoch, with plain SGD unless told otherwise; return what train_one_epoch returns."""
    groups = parameter_groups(net, lr, 0.0)
    optimizer = OPTIMIZERS[optimizer](groups) if optimizer else torch.optim.SGD(groups, lr=lr)
    precision = Precision(precision, CPU) if isinstance(precision, str) else precision
    optimization = Optimization(optimizer, precision, accumulate=accumulate)
    return train_one_epoch(Objective(net, criterion or Criterion("ce")), batches, optimization, 0)


@pytest.mark.parametrize(("count", "size", "accumulate"), [(8, 2, 4), (7, 2, 2), (5, 2, 3)])
@pytest.mark.parametrize(("optimizer", "loss"), [(None, "ce"), ("sgd", "ce"), ("adamw", "ce+focal")])
def test_accumulated_steps_equal_the_large_batch(count, size, accumulate, optimizer, loss):
    images, masks = random_batch(count)
    small, large = Pixelwise(), Pixelwise()
    options = dict(criterion=Criterion(loss, torch.tensor([0.3, 1.0, 2.5])), optimizer=optimizer)
    taken = run_epoch(small, batches_of(images, masks, size), accumulate=accumulate, **options)["step"]
    assert taken == run_epoch(large, batches_of(images, masks, size * accumulate), **options)["step"]
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_epoch_numbers_are_those_of_the_data():
    images, masks = random_batch(6)
    net = Pixelwise()
    with torch.no_grad():
        logits = net(images)
        want = [
            F.cross_entropy(logits[i : i + 2], masks[i : i + 2].long(), ignore_index=255).item()
            for i in (0, 2, 4)
        ]
    result = run_epoch(net, batches_of(images, masks, 2), lr=1e-12)
    assert result["loss"] == result["loss_ce"] == pytest.approx(np.mean(want), rel=1e-5)
    counted = masks != 255
    assert result["accuracy"] == pytest.approx(
        (logits.argmax(1)[counted] == masks[counted]).float().mean().item()
    )
    assert result["miou"] == pytest.approx(
        jaccard_score(masks[counted], logits.argmax(1)[counted], average="macro"), abs=1e-6
    )


def test_training_learns():
    images, masks = random_batch(16)
    net = Pixelwise()
    losses = [run_epoch(net, batches_of(images, masks, 4), lr=0.5)["loss"] for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_training_stays_close(precision):
    images, masks = random_batch(4)
    plain, half = Pixelwise(), Pixelwise()
    run_epoch(plain, batches_of(images, masks, 2))
    run_epoch(half, batches_of(images, masks, 2), precision=precision)
    for a, b in zip(plain.parameters(), half.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.allclose(a, b, atol=2e-3)


def test_a_loss_that_is_not_finite_names_its_files():
    images, masks = random_batch(24)

    def criterion(logits, labels):
        loss = logits.float().mean() * 0 + 1
        bad = torch.equal(labels, masks[4:6].long())
        return (loss * float("nan"), {}) if bad else (loss, {})

    with pytest.raises(FloatingPointError, match="image_4.png image_5.png") as error:
        run_epoch(Pixelwise(), batches_of(images, masks, 2), criterion=criterion)
    assert "step 2" in str(error.value) and "image_6" not in str(error.value)


def test_gradients_are_clipped():
    images, masks = random_batch(2)
    net = Pixelwise()
    before = [p.clone() for p in net.parameters()]
    run_epoch(
        net,
        batches_of(images, masks, 2),
        lr=1.0,
        criterion=lambda logits, labels: (1e4 * logits.square().mean(), {}),
    )
    moved = math.sqrt(
        sum((a - b).square().sum().item() for a, b in zip(net.parameters(), before, strict=True))
    )
    assert moved == pytest.approx(engine.MAX_GRAD_NORM, rel=1e-3)


def test_a_batch_without_valid_pixels_changes_nothing():
    images, masks = random_batch(2)
    net = Pixelwise()
    before = [p.clone() for p in net.parameters()]
    run_epoch(net, batches_of(images, torch.full_like(masks, 255), 2))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_gradients_beyond_fp16_are_skipped_and_the_scale_falls():
    images, masks = random_batch(2)
    net, precision = Pixelwise(), Precision("fp16", torch.device("cpu"))
    before, scale = [p.clone() for p in net.parameters()], precision.scaler.get_scale()
    result = run_epoch(
        net,
        batches_of(images, masks, 2),
        precision=precision,
        criterion=lambda logits, labels: (1e36 * logits.float().mean(), {}),
    )
    assert math.isfinite(result["loss"]) and precision.scaler.get_scale() < scale
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("loss", ["ce", "focal", "dice", "lovasz", "ce+dice", "focal+lovasz"])
def test_batches_of_one_of_one_class_and_without_labels_keep_the_loss_finite(loss):
    images, masks = random_batch(5)
    masks[0], masks[2:4], masks[4, 0, 0] = 1, 255, 2
    net = Pixelwise()
    for size in (1, 2, 5):
        result = run_epoch(net, batches_of(images, masks, size), criterion=Criterion(loss), lr=0.1)
        assert math.isfinite(result["loss"])
        assert all(p.isfinite().all() for p in net.parameters())


def test_schedules_are_pure_functions_of_the_step():
    assert {lr_lambda("none", 100, 1)(step) for step in range(100)} == {1.0}
    for scheduler in ("cosine", "poly"):
        factors = [lr_lambda(scheduler, 100, 1)(step) for step in range(101)]
        assert factors[0] == pytest.approx(0.2) and max(factors) == 1.0 and factors[100] == pytest.approx(0.0)
        assert factors[5:] == sorted(factors[5:], reverse=True)
        assert lr_lambda(scheduler, 1, 1)(1) >= 0  # one step in all
    assert lr_lambda("cosine", 100, 1)(5 + 95 // 2) == pytest.approx(0.5, abs=0.02)
    assert lr_lambda("poly", 100, 1)(24) == pytest.approx((1 - 19 / 95) ** 0.9)


@pytest.mark.parametrize(("total", "per_epoch"), [(100, 7), (11, 3), (2000, 100)])
def test_schedules_equal_torchs(total, per_epoch):
    """Exponential steps once an epoch, one-cycle at every optimizer step."""

    def rates(make, every):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0)
        scheduler, found = make(optimizer), []
        for step in range(total):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if (step + 1) % every == 0 and step + 1 < total:
                scheduler.step()
        return found

    schedulers = torch.optim.lr_scheduler
    for name, every, make in (
        ("exponential", per_epoch, lambda o: schedulers.ExponentialLR(o, 0.98)),
        ("onecycle", 1, lambda o: schedulers.OneCycleLR(o, max_lr=3.0, total_steps=total)),
    ):
        got = [3.0 * lr_lambda(name, total, per_epoch)(step) for step in range(total)]
        assert got == pytest.approx(rates(make, every), rel=1e-9), name


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_short_runs_have_a_rate(scheduler):
    for total in (1, 2, 3, 4):
        assert all(0 < lr_lambda(scheduler, total, 1)(step) <= 1 for step in range(total))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_the_step_of_their_formula(name):
    net = tiny(unfreeze=1)
    optimizer = OPTIMIZERS[name](parameter_groups(net, 1e-2, 0.1, backbone_scale(net, 0.5)))
    before = {id(p): p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
    for p in net.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 0.3)
    optimizer.step()
    for group in optimizer.param_groups:
        decay, lr = group["weight_decay"], group["base_lr"]
        for p in group["params"]:
            old, grad = before[id(p)], 0.3
            if name == "sgd":  # first Nesterov step: grad + momentum * grad
                want = old - lr * 1.937 * (grad + decay * old)
            elif name == "adamw":
                want = old * (1 - lr * decay) - lr
            else:
                want = old - lr * (grad + decay * old).sign()
            assert torch.allclose(p, want, atol=1e-6)


def test_norms_and_biases_are_not_decayed_and_groups_are_three_at_one_rate():
    net = build(arch="segformer_b0", unfreeze="all")
    groups = parameter_groups(net, 1e-3, 0.1)
    assert [group["weight_decay"] for group in groups].count(0.1) == 1 and len(groups) == 3
    norms = [m for m in net.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))]
    kept = {id(p) for m in norms for p in m.parameters()}
    kept |= {id(p) for name, p in net.named_parameters() if name.endswith("bias")}
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in net.parameters()} - kept
    biases = {id(p) for name, p in net.named_parameters() if name.endswith("bias")}
    assert sum({id(p) for p in group["params"]} == biases for group in groups) == 1


def test_parameter_groups_cover_what_trains_once():
    net = tiny(unfreeze=2)
    groups = parameter_groups(net, lr=1e-3, weight_decay=0.1, lr_scale=backbone_scale(net, 0.5))
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in net.parameters() if p.requires_grad}
    head = {id(p) for p in net.head.parameters()}
    for group in groups:
        assert group["base_lr"] == (1e-3 if {id(p) for p in group["params"]} <= head else 5e-4)
        assert (
            all(p.ndim > 1 for p in group["params"])
            if group["weight_decay"]
            else all(p.ndim == 1 for p in group["params"])
        )


def test_the_lower_rate_is_of_the_backbone_and_of_copies_of_its_blocks_whatever_they_are_called():
    net = tiny(head="split", unfreeze=2)
    net.head.tail = nn.Conv2d(3, 3, 1)  # a new head may call its own layers so
    copied = {f"head.split.tail.{name}" for name, _ in net.head.split.tail.named_parameters()}
    backbone = {name for name, _ in net.named_parameters() if name.startswith("backbone.")}
    assert copied and net.pretrained() == copied | backbone
    rate = backbone_scale(net, 0.5)
    assert rate("head.tail.weight") == 1 and {rate(name) for name in copied | backbone} == {0.5}


# --- prediction -------------------------------------------------------------------------------------------
FLOAT32 = Precision("off", CPU)


def sure(logits):
    """Return where the best of logits (..., K, H, W) is not a tie up to rounding."""
    best = logits.topk(2, dim=-3).values
    return best.select(-3, 0) - best.select(-3, 1) > 1e-5


@pytest.mark.parametrize("block", [1, 1000, 1 << 25])
@pytest.mark.parametrize("size", [(31, 22), (5, 40), (1, 1), (9, 7), (200, 3)])
def test_label_map_is_argmax_of_the_upsampled_logits_however_many_rows_at_a_time(size, block, monkeypatch):
    monkeypatch.setitem(logits_module.BLOCK, "cpu", block)
    torch.manual_seed(0)
    logits = torch.randn(4, 9, 7)
    whole = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    pred = label_map([Logits(logits[None])], size)
    assert pred.shape == size and pred.dtype == torch.uint8
    assert torch.equal(pred[sure(whole)].long(), whole.argmax(0)[sure(whole)])


def test_views_are_averaged_as_probabilities():
    torch.manual_seed(0)
    views = [5 * torch.randn(4, *size) for size in ((9, 7), (4, 4), (13, 20))]
    total = sum(F.interpolate(v[None], size=(30, 21), mode="bilinear")[0].softmax(0) for v in views)
    got = label_map([Logits(v[None]) for v in views], (30, 21))
    assert torch.equal(got[sure(total)].long(), total.argmax(0)[sure(total)])


def test_predict_gives_the_images_own_size_in_order():
    net = Pixelwise().eval()
    images, _ = random_batch(3, 4, 6)
    images = F.interpolate(images, size=(20, 31))  # patches, so that a smaller image is not plain gray
    preds = predict(net, images, Protocol((20, 31)), FLOAT32)
    assert torch.equal(preds.long(), net(images).argmax(1)) and len(preds.unique()) == 3
    small = predict(net, images, Protocol((10, 15)), FLOAT32)
    logits = F.interpolate(net(resize_image(images, (10, 15))), size=(20, 31), mode="bilinear")
    assert small.shape == (3, 20, 31)
    assert torch.equal(small[sure(logits)].long(), logits.argmax(1)[sure(logits)])
    assert torch.equal(small[1], predict(net, images[1:2], Protocol((10, 15)), FLOAT32)[0])


# --- protocols --------------------------------------------------------------------------------------------
class Neighbors(Pixelwise):
    """A network that sees 5x5 pixels and the mean of its window, so that windows and their edges matter."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, 3, 1))

    def forward(self, images):
        logits = super().forward(images)
        return logits + logits.mean((2, 3), keepdim=True)


def test_windows_cover_everything_and_the_last_is_shifted_in():
    for length, window, stride in ((10, 4, 3), (9, 4, 3), (4, 4, 3), (3, 4, 3), (100, 7, 7), (5, 4, 2)):
        starts = window_starts(length, window, stride)
        covered = {p for start in starts for p in range(start, min(start + window, length))}
        assert covered == set(range(length)) and starts[0] == 0
        assert all(b - a <= stride for a, b in zip(starts, starts[1:], strict=False))
        assert starts[-1] + min(window, length) == length and len(set(starts)) == len(starts)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_slide_equals_a_loop_over_windows(batch_size):
    net = Neighbors().eval()
    images = torch.randint(0, 256, (2, 3, 23, 31), dtype=torch.uint8)
    total, count = torch.zeros(2, 3, 23, 31), torch.zeros(23, 31)
    with torch.no_grad():
        for top in (0, 7, 13):  # 13 = 23 - 10, shifted in
            for left in (0, 9, 18, 19):
                rows, columns = slice(top, top + 10), slice(left, left + 12)
                total[..., rows, columns] += net(images[..., rows, columns])
                count[rows, columns] += 1
        got = slide_logits(net, images, (10, 12), (7, 9), batch_size)
    assert torch.allclose(got, total / count, atol=1e-5)


@pytest.mark.parametrize("window", [(23, 31), (40, 50)])
def test_slide_with_a_window_as_large_as_the_image_equals_whole(window):
    net = Neighbors().eval()
    images = torch.randint(0, 256, (2, 3, 23, 31), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(slide_logits(net, images, window, (5, 5), 8), net(images))
    square = torch.randint(0, 256, (1, 3, 30, 30), dtype=torch.uint8)
    slide, whole = make_protocol("slide", "", (20, 20)), make_protocol("whole", "", (20, 20))
    assert torch.equal(predict(net, square, slide, FLOAT32), predict(net, square, whole, FLOAT32))


def test_flip_of_a_symmetric_network_changes_nothing_and_of_another_one_does():
    images = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    symmetric, other = Pixelwise().eval(), Neighbors().eval()
    plain, flip = Protocol((20, 30)), Protocol((20, 30), flip=True)
    assert torch.equal(predict(symmetric, images, plain, FLOAT32), predict(symmetric, images, flip, FLOAT32))
    a, b = views_of(other, images, flip, FLOAT32)
    with torch.no_grad():
        assert torch.equal(a.pixels(), other(images))
        assert torch.equal(b.pixels(), other(images.flip(-1)).flip(-1))
    assert not torch.allclose(a.pixels(), b.pixels(), atol=1e-3)


def test_sizes_of_the_protocols():
    assert Protocol((64, 48)).sizes(100, 300) == [(64, 48)]
    assert Protocol((64, 48), scales=(0.5, 1.75)).sizes(100, 300) == [(32, 24), (112, 84)]
    slide = make_protocol("slide", "ms,flip", (512, 512))
    assert slide.stride == (341, 341) and slide.flip and slide.scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    assert slide.sizes(375, 500)[2] == (512, 683)  # the short side fits the window
    assert Protocol((20, 60), True, (10, 10)).sizes(100, 100) == [(60, 60)]  # covers the window
    assert make_protocol("whole", "", (7, 9)) == Protocol((7, 9))
    text = "window 512x512, stride 341x341, scales 0.5 0.75 1 1.25 1.5 1.75, flip"
    assert str(slide) == text and str(Protocol((7, 9))) == "whole image at 7x9"


def test_multi_scale_equals_its_views_written_out():
    net = Neighbors().eval()
    images = torch.randint(0, 256, (1, 3, 26, 34), dtype=torch.uint8)
    total = 0
    with torch.no_grad():
        for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
            seen = resize_image(images, (round(20 * scale), round(24 * scale)))
            for one in (net(seen), net(seen.flip(-1)).flip(-1)):
                total = total + F.interpolate(one, size=(26, 34), mode="bilinear").softmax(1)
    pred = predict(net, images, make_protocol("whole", "ms,flip", (20, 24)), FLOAT32)
    assert torch.equal(pred[sure(total)].long(), total.argmax(1)[sure(total)])


def test_evaluate_scores_every_mask_at_its_own_size():
    net = Pixelwise().train()
    images, _ = random_batch(5, 12, 18)
    generator = torch.Generator().manual_seed(1)
    masks = [
        torch.randint(0, 3, size, dtype=torch.uint8, generator=generator)
        for size in ((24, 36), (13, 17), (12, 18), (50, 20), (9, 9))
    ]
    masks[1][:4] = 255
    names = list("abcde")
    bar = tqdm([(images[:3], {"mask": masks[:3]}, names[:3]), (images[3:], {"mask": masks[3:]}, names[3:])],
               disable=True)
    scores, matrix = engine.evaluate(net, bar, Precision("off", CPU), Criterion("ce"))
    preds = [
        F.interpolate(net(one[None]), size=mask.shape, mode="bilinear").argmax(1)[0]
        for one, mask in zip(images, masks, strict=True)
    ]
    truth = torch.cat([mask[mask != 255] for mask in masks])
    guess = torch.cat([pred[mask != 255] for pred, mask in zip(preds, masks, strict=True)])
    assert scores["miou"] == pytest.approx(jaccard_score(truth, guess, average="macro"), abs=1e-9)
    assert matrix.counts.sum() == len(truth) and scores["loss"] == scores["loss_ce"] and not net.training
