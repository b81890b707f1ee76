"""The training step, schedules, optimizers, objectives of other kinds, the state of a run, validation."""

import io
import math
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import build, tiny
from sklearn.metrics import jaccard_score
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import engine
from engine import (LOG_EVERY, OPTIMIZERS, SCHEDULERS, Objective, TrainState, backbone_scale, evaluate,
                    lr_lambda, parameter_groups, set_learning_rates, train_one_epoch)
from losses import LOSSES, Criterion
from model import ModelSpec, Segmenter
from models.backbones import Backbone
from models.heads import Head, logits_of
from utils import Precision

FLOAT32 = Precision("off", torch.device("cpu"))


# --- models of a few convolutions, for test_predictor.py too ----------------------------------------------
class ImageBackbone(Backbone):
    """A backbone whose map is the image itself."""

    def __init__(self):
        super().__init__(nn.Identity(), size_divisor=1, layers=[], channels=[3])

    def maps(self, images):
        return [images]


class ConvolutionHead(Head):
    """Convolutions on the image."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, features):
        return self.layers(features.maps[0])


def on_images(head, num_classes=3):
    """Return a Segmenter whose head reads images as RGB in 0..1."""
    return Segmenter(ImageBackbone(), head, ModelSpec(num_classes=num_classes, normalize="none"))


def pixelwise(head=ConvolutionHead):
    """Return a Segmenter without BatchNorm that looks at one pixel at a time."""
    torch.manual_seed(0)
    head = head(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 3, 1))
    with torch.no_grad():  # starts as "the brightest channel", so that predictions differ
        head.layers[0].weight[:3] = 2 * torch.eye(3)[..., None, None]
        head.layers[2].weight[:, :3] = 2 * torch.eye(3)[..., None, None]
        head.layers[2].bias.zero_()
    return on_images(head)


def batches_of(images, masks, size, **targets):
    """Return a bar over batches of `size`: (images, {"mask": ..., and the further targets}, names)."""
    targets, batches = {"mask": masks, **targets}, []
    for start in range(0, len(images), size):
        rows = slice(start, start + size)
        names = [f"image_{number}.png" for number in range(len(images))[rows]]
        batches.append((images[rows], {name: values[rows] for name, values in targets.items()}, names))
    return tqdm(batches, disable=True)


def random_batch(count, height=11, width=13, seed=0):
    """Return images (count, 3, H, W) uint8 and masks whose share of ignored pixels differs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    masks = images.float().argmax(1).to(torch.uint8)
    for number in range(count):
        masks[number, : number % 5] = 255
    return images, masks


def state_of(net, lr=0.1, optimizer=None, precision=FLOAT32):
    """Return a TrainState, with plain SGD where no optimizer is named."""
    groups = parameter_groups(net, lr, 0.0)
    optimizer = OPTIMIZERS[optimizer](groups) if optimizer else torch.optim.SGD(groups, lr=lr)
    return TrainState(net, optimizer, precision)


def run_epoch(net, batches, criterion=None, accumulate=1, **options):
    """Train one epoch; return the scores of train_one_epoch and the TrainState. options: of state_of."""
    state, objective = state_of(net, **options), Objective(net, criterion or Criterion("ce"))
    return train_one_epoch(objective, batches, state, lambda step: 1.0, accumulate), state


def weights_of(module):
    """Return a copy of all parameters as a vector."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).clone()


# --- the step ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("count", "size", "accumulate"), [(8, 2, 4), (7, 2, 2), (5, 2, 3)])
@pytest.mark.parametrize(("optimizer", "loss"), [("sgd", "ce"), ("adamw", "ce+focal")])
def test_accumulated_steps_equal_the_large_batch(count, size, accumulate, optimizer, loss):
    images, masks = random_batch(count)
    small, large = pixelwise(), pixelwise()
    options = dict(criterion=Criterion(loss, torch.tensor([0.3, 1.0, 2.5])), optimizer=optimizer)
    _, accumulated = run_epoch(small, batches_of(images, masks, size), accumulate=accumulate, **options)
    _, at_once = run_epoch(large, batches_of(images, masks, size * accumulate), **options)
    assert accumulated.step == at_once.step == math.ceil(count / size / accumulate)
    assert torch.allclose(weights_of(small), weights_of(large), atol=1e-5)


def test_the_numbers_of_an_epoch_are_those_of_the_data():
    images, masks = random_batch(6)
    net = pixelwise()
    with torch.no_grad():
        logits = net(images)
    losses = [F.cross_entropy(logits[rows], masks[rows].long(), ignore_index=255).item()
              for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    scores, _ = run_epoch(net, batches_of(images, masks, 2), lr=1e-12)
    assert scores["loss"] == scores["loss_ce"] == pytest.approx(np.mean(losses), rel=1e-5)
    counted, preds = masks != 255, logits.argmax(1)
    assert scores["accuracy"] == pytest.approx((preds == masks)[counted].float().mean().item())
    assert scores["miou"] == pytest.approx(
        jaccard_score(masks[counted], preds[counted], average="macro"), abs=1e-6)


@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
def test_training_learns_in_every_precision_alike(precision):
    images, masks = random_batch(16)
    plain, net, precision = pixelwise(), pixelwise(), Precision(precision, torch.device("cpu"))
    run_epoch(plain, batches_of(images[:4], masks[:4], 2))
    run_epoch(net, batches_of(images[:4], masks[:4], 2), precision=precision)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert torch.allclose(weights_of(net), weights_of(plain), atol=2e-3)
    losses = [run_epoch(net, batches_of(images, masks, 4), lr=0.5)[0]["loss"] for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_loss_that_is_not_finite_names_its_files():
    images, masks = random_batch(24)

    def criterion(logits, labels):
        is_bad = torch.equal(labels, masks[4:6].long())
        return logits.float().mean() * 0 + (float("nan") if is_bad else 1), {}

    with pytest.raises(FloatingPointError, match="step 2 .*image_4.png image_5.png") as error:
        run_epoch(pixelwise(), batches_of(images, masks, 2), criterion=criterion)
    assert "image_6" not in str(error.value)
    net = pixelwise()
    objective = Objective(net, lambda logits, labels: (logits.float().mean() * float("nan"), {}))
    with pytest.raises(FloatingPointError, match="validation .*image_0.png") as error:
        engine.evaluate(net, batches_of(images, masks, 2), Precision("off", torch.device("cpu")), objective)
    assert "step" not in str(error.value)


def test_gradients_are_clipped():
    net, before = pixelwise(), weights_of(pixelwise())
    run_epoch(net, batches_of(*random_batch(2), 2), lr=1.0,
              criterion=lambda logits, labels: (1e4 * logits.square().mean(), {}))
    assert (weights_of(net) - before).norm() == pytest.approx(engine.MAX_GRAD_NORM, rel=1e-3)


def test_gradients_beyond_fp16_are_skipped_and_the_scale_falls():
    net, precision = pixelwise(), Precision("fp16", torch.device("cpu"))
    before, scale = weights_of(net), precision.scaler.get_scale()
    scores, _ = run_epoch(net, batches_of(*random_batch(2), 2), precision=precision,
                          criterion=lambda logits, labels: (1e36 * logits.float().mean(), {}))
    assert math.isfinite(scores["loss"]) and precision.scaler.get_scale() < scale
    assert torch.equal(weights_of(net), before)


@pytest.mark.parametrize("loss", [*LOSSES, "ce+dice", "focal+lovasz"])
def test_batches_of_a_single_class_and_without_labels_keep_the_loss_finite(loss):
    images, masks = random_batch(5)
    net, before = pixelwise(), weights_of(pixelwise())
    run_epoch(net, batches_of(images, torch.full_like(masks, 255), 2), criterion=Criterion(loss))
    assert torch.equal(weights_of(net), before)  # nothing counts, nothing changes
    masks[0], masks[2:4], masks[4, 0, 0] = 1, 255, 2
    for size in (1, 2, 5):
        scores, _ = run_epoch(net, batches_of(images, masks, size), criterion=Criterion(loss))
        assert math.isfinite(scores["loss"]) and weights_of(net).isfinite().all()
    assert not torch.equal(weights_of(net), before)


# --- schedules --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_is_a_function_of_the_step_that_trains_short_runs_too(name):
    for total in (1, 2, 3, 4, 50):
        factors = [lr_lambda(name, total, 2)(step) for step in range(total)]
        assert all(math.isfinite(factor) and factor >= 0 for factor in factors) and max(factors) > 0
        assert factors[::-1] == [lr_lambda(name, total, 2)(step) for step in reversed(range(total))]


def test_schedules_warm_up_and_fall_by_their_formulas():
    assert {lr_lambda("none", 100, 1)(step) for step in range(100)} == {1.0}
    for name in ("cosine", "poly"):
        factors = [lr_lambda(name, 100, 1)(step) for step in range(101)]
        assert factors[0] == pytest.approx(0.2) and max(factors) == 1.0 and factors[100] == pytest.approx(0.0)
        assert factors[5:] == sorted(factors[5:], reverse=True)
    assert lr_lambda("cosine", 100, 1)(5 + 95 // 2) == pytest.approx(0.5, abs=0.02)
    assert lr_lambda("poly", 100, 1)(24) == pytest.approx((1 - 19 / 95) ** 0.9)
    linear = lr_lambda("linear", 40_000, 1)  # DINOv2's: 1,500 steps of warm-up on a line from 1 to 0
    assert linear(749) == pytest.approx(0.5 * (1 - 749 / 40_000)) and linear(30_000) == pytest.approx(0.25)


@pytest.mark.parametrize(("total", "per_epoch"), [(100, 7), (11, 3), (2000, 100)])
def test_schedules_equal_torchs(total, per_epoch):
    """Exponential steps once an epoch, one-cycle at every optimizer step."""
    schedulers = torch.optim.lr_scheduler
    for name, every, make in (
        ("exponential", per_epoch, lambda optimizer: schedulers.ExponentialLR(optimizer, 0.98)),
        ("onecycle", 1, lambda optimizer: schedulers.OneCycleLR(optimizer, max_lr=3.0, total_steps=total)),
    ):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0)
        scheduler, rates = make(optimizer), []
        for step in range(total):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if (step + 1) % every == 0 and step + 1 < total:
                scheduler.step()
        own_rates = [3.0 * lr_lambda(name, total, per_epoch)(step) for step in range(total)]
        assert own_rates == pytest.approx(rates, rel=1e-9), name


# --- optimizers -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss_and_continues_from_its_saved_state(name):
    def start():
        layer = nn.Linear(4, 3)
        for parameter in layer.parameters():
            nn.init.ones_(parameter)
        return layer, OPTIMIZERS[name](parameter_groups(layer, 1e-3, 0.1))

    def train(layer, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            sum(parameter.square().sum() for parameter in layer.parameters()).backward()
            optimizer.step()

    layer, optimizer = start()
    train(layer, optimizer, 5)
    assert weights_of(layer).square().sum() < 15  # of 15 ones
    file = io.BytesIO()
    torch.save([layer.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    resumed_layer, resumed_optimizer = start()
    weights, state = torch.load(file, weights_only=True)  # as a checkpoint is read
    resumed_layer.load_state_dict(weights)
    resumed_optimizer.load_state_dict(state)
    train(layer, optimizer, 3)
    train(resumed_layer, resumed_optimizer, 3)
    assert torch.equal(weights_of(layer), weights_of(resumed_layer))


FIRST_STEPS = {  # f(weights, gradient, learning rate, weight decay) -> weights after the first step
    "sgd": lambda old, grad, lr, decay: old - lr * 1.937 * (grad + decay * old),  # Nesterov
    "adam": lambda old, grad, lr, decay: old - lr * (grad + decay * old).sign(),
    "adamw": lambda old, grad, lr, decay: old * (1 - lr * decay) - lr,
}


@pytest.mark.parametrize("name", FIRST_STEPS)
def test_optimizers_take_the_step_of_their_formula(name):
    net = tiny(unfreeze=1)
    optimizer = OPTIMIZERS[name](parameter_groups(net, 1e-2, 0.1, backbone_scale(net, 0.5)))
    before = {parameter: parameter.detach().clone() for parameter in net.parameters()}
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.3)
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            expected = FIRST_STEPS[name](before[parameter], 0.3, group["base_lr"], group["weight_decay"])
            assert torch.allclose(parameter, expected, atol=1e-6)


@pytest.mark.parametrize("options", [dict(backbone="vit_tiny", unfreeze=2),
                                     dict(arch="segformer_b0", unfreeze="all")], ids=str)
def test_parameter_groups_hold_what_trains_once_and_decay_neither_norms_nor_biases(options):
    net = build(**options)
    groups = parameter_groups(net, 1e-3, 0.1, backbone_scale(net, 0.5))
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == {parameter for parameter in net.parameters() if parameter.requires_grad}
    head, norms = set(net.head.parameters()), set()
    for module in net.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            norms |= set(module.parameters())
    for group in groups:
        assert group["base_lr"] == group["lr"] == (1e-3 if set(group["params"]) <= head else 5e-4)
        assert not (group["weight_decay"] and set(group["params"]) & norms)
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim > 1 else 0.0)
    assert len(parameter_groups(net, 1e-3, 0.1)) == 3  # few, for few kernels: weights, norms, biases


def test_the_lower_rate_is_of_the_backbone_and_of_copies_of_its_blocks_whatever_they_are_called():
    net = tiny(head="split", unfreeze=2)
    net.head.tail = nn.Conv2d(3, 3, 1)  # a new head may call its own layers so
    copied = {f"head.split.tail.{name}" for name, _ in net.head.split.tail.named_parameters()}
    backbone = {name for name, _ in net.named_parameters() if name.startswith("backbone.")}
    assert copied and net.pretrained().keys() == copied | backbone
    rate = backbone_scale(net, 0.5)
    assert rate("head.tail.weight") == 1 and {rate(name) for name in copied | backbone} == {0.5}


def test_layer_decay_counts_the_blocks_that_follow():
    net = tiny(head="split", unfreeze="all")
    depth, rate = len(net.backbone.blocks), backbone_scale(net, 0.5, 0.8)
    for name, _ in net.named_parameters():
        block = re.match(r"(.*)\.blocks\.(\d+)\.", name)
        if block:  # copies are numbered from 0
            count = depth if block[1] == "backbone.net" else len(net.head.split.tail.blocks)
            expected = 0.5 * 0.8 ** (count - 1 - int(block[2]))
        elif name.startswith("backbone.") and "norm" not in name:
            expected = 0.5 * 0.8 ** depth  # of the patches and their positions
        else:
            expected = 0.5 if "norm" in name and name in net.pretrained() else 1
        assert rate(name) == pytest.approx(expected), name


@pytest.mark.parametrize(("options", "scale", "expected"), [
    (dict(), 0.5, {"lr": 0.2}),
    (dict(unfreeze=2), 0.5, {"lr": 0.2, "backbone_lr": 0.1}),
    (dict(unfreeze=2, head="linear"), 1.0, {"lr": 0.2}),  # whose norms are the backbone's alone
    (dict(unfreeze=2, head="split"), 0.5, {"lr": 0.2, "backbone_lr": 0.1}),  # copies of blocks at 0.1 too
    (dict(head="split"), 0.5, {"lr": 0.2}),
], ids=str)
def test_learning_rates_are_those_of_the_head_and_of_a_backbone_that_differs(options, scale, expected):
    net = tiny(**options)
    groups = parameter_groups(net, 0.4, 0.0, backbone_scale(net, scale))
    state = TrainState(net, OPTIMIZERS["sgd"](groups), FLOAT32)
    set_learning_rates(state.optimizer, 0.5)
    assert state.learning_rates() == pytest.approx(expected)


# --- objectives of other kinds ----------------------------------------------------------------------------
class Distillation(Objective):
    """Follows a teacher on every image, labeled or not."""

    def __init__(self, model, teacher, weight=1.0):
        super().__init__(model, Criterion("ce"))
        self.teacher, self.weight = teacher.requires_grad_(False), weight

    def forward(self, images, targets):
        assert self.model.training and not self.teacher.training
        logits, _ = self.model.logits(images)
        loss = (logits - self.teacher.logits(images)[0]).square().mean()
        weight = self.weight * torch.tensor(float(len(images)))
        return loss, {"distillation": loss}, logits.argmax(1).to(torch.uint8), weight


@pytest.fixture
def process_group(tmp_path):
    """A torchrun of a single process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def other_pixelwise():
    """Return a Segmenter like pixelwise() with other weights."""
    net = pixelwise()
    with torch.no_grad():
        net.head.layers[2].bias += 1.0
    return net


@pytest.mark.parametrize("distributed", [False, True])
def test_an_objective_with_a_weight_of_its_own_learns_from_images_without_labels(distributed, request):
    """The teacher stays in eval mode."""
    images, masks = random_batch(6)
    net, teacher = pixelwise(), other_pixelwise()
    fixed = weights_of(teacher)
    before = (weights_of(net) - weights_of(teacher)).norm()
    objective, state = Distillation(net, teacher), state_of(net)
    if distributed:
        request.getfixturevalue("process_group")
        objective = DistributedDataParallel(objective)
    batches = batches_of(images, torch.full_like(masks, 255), 2)
    scores = train_one_epoch(objective, batches, state, lambda step: 1.0)
    assert scores["loss"] == scores["loss_distillation"] > 0
    assert (weights_of(net) - weights_of(teacher)).norm() < 0.99 * before
    assert torch.equal(weights_of(teacher), fixed)


def test_a_loss_without_a_weight_ends_the_run_soon():
    objective = Distillation(pixelwise(), other_pixelwise(), weight=0.0)
    state = state_of(objective.model)
    with pytest.raises(ValueError):
        train_one_epoch(objective, batches_of(*random_batch(40), 1), state, lambda step: 1.0)
    assert state.step <= LOG_EVERY


def test_an_objective_returns_loss_terms_predictions_and_the_images_that_count():
    images, masks = random_batch(3)
    net = pixelwise()
    loss, terms, preds, weight = Objective(net, Criterion("ce+dice"))(images, {"mask": masks})
    assert terms.keys() == {"ce", "dice"} and loss.item() == pytest.approx(sum(terms.values()).item())
    assert torch.equal(preds.long(), net(images).argmax(1)) and preds.dtype == torch.uint8
    assert weight.item() == pytest.approx((masks != 255).sum().item() / (11 * 13))


def depth_errors(output, targets):
    """Return (B, H, W): how far the first logits, taken for depths, are from those of the targets."""
    return (logits_of(output)[:, 0] - targets["depth"]).abs()


class DepthHead(ConvolutionHead):
    def scores(self, output, targets, geometry):
        error = depth_errors(output, targets)
        return {"depth_error": (error.sum(), error.numel())}


class DepthObjective(Objective):
    """Trains depths beside the classes."""

    def loss(self, output, targets, geometry):
        loss, terms, preds = super().loss(output, targets, geometry)
        terms["depth"] = depth_errors(output, targets).mean()
        return loss + terms["depth"], terms, preds


def test_further_targets_reach_the_objective_and_the_scores_of_the_head():
    images, masks = random_batch(5)
    depths = torch.rand(masks.shape, generator=torch.Generator().manual_seed(1))
    net = pixelwise(DepthHead)
    with torch.no_grad():
        error = (net(images)[:, 0] - depths).abs().mean().item()
    objective, batches = DepthObjective(net, Criterion("ce")), batches_of(images, masks, 2, depth=depths)
    trained = train_one_epoch(objective, batches, state_of(net, lr=1e-12), lambda step: 1.0)
    assert trained["loss_depth"] == pytest.approx(error, rel=1e-5)
    for size in (1, 2, 4):
        batches = batches_of(images, masks, size, depth=depths)
        scores, _ = evaluate(net, batches, FLOAT32, objective)
        assert scores["depth_error"] == pytest.approx(error, rel=1e-5)
        assert scores["loss_depth"] == pytest.approx(error, rel=1e-5)


# --- validation -------------------------------------------------------------------------------------------
def test_evaluate_scores_every_mask_at_its_own_size():
    """With the loss at the network's size, or by a function that predicts at any."""
    net = pixelwise().train()
    images, _ = random_batch(5, 12, 18)
    generator, masks = torch.Generator().manual_seed(1), []
    for size in ((24, 36), (13, 17), (12, 18), (50, 20), (9, 9)):
        masks.append(torch.randint(0, 3, size, dtype=torch.uint8, generator=generator))
    masks[1][:4] = 255
    preds = []
    for image, mask in zip(images, masks, strict=True):
        preds.append(F.interpolate(net(image[None]), size=mask.shape, mode="bilinear").argmax(1)[0])
    truth = torch.cat([mask[mask != 255] for mask in masks])
    guess = torch.cat([pred[mask != 255] for pred, mask in zip(preds, masks, strict=True)])
    miou = jaccard_score(truth, guess, average="macro")

    names, batches_done = [], []
    scores, matrix = evaluate(net, batches_of(images, masks, 3), FLOAT32, Objective(net, Criterion("ce")),
                              on_image=lambda name, pred, mask, own_matrix: names.append(name),
                              after_batch=lambda: batches_done.append(1))
    assert scores["miou"] == pytest.approx(miou, abs=1e-9) and scores["loss"] == scores["loss_ce"] > 0
    assert matrix.counts.sum() == len(truth) and not net.training
    assert names == [f"image_{number}.png" for number in range(5)] and len(batches_done) == 2

    asked_sizes, remaining = [], list(preds)

    def predict(images, sizes):
        asked_sizes.extend(sizes)
        return [remaining.pop(0).to(torch.uint8) for _ in sizes]

    scores, _ = evaluate(net, batches_of(images, masks, 3), FLOAT32, predict=predict)
    assert scores["miou"] == pytest.approx(miou, abs=1e-9)
    assert asked_sizes == [tuple(mask.shape) for mask in masks]
