"""One training: optimizer groups, learning rate schedule, the step, the validation pass.

Functions here take models, tensors and numbers, never the config. train.py calls train_one_epoch and
evaluate; evaluate.py calls evaluate with another protocol, so both score by the same loop.
"""
import math
import time
from dataclasses import dataclass
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import default_collate

from config import IGNORE
from dataio.transforms import resize_mask
from inference.predictor import label_maps
from metrics import ConfusionMatrix
from utils import (Precision, all_gather, all_reduce, broadcast_buffers, evenly_sampled, is_main_process,
                   to_device, world_size)

MAX_GRAD_NORM = 1.0
MOMENTUM = 0.937  # of sgd
WARMUP = 0.05  # share of all steps in which cosine and poly rise to the full rate
DINOV2_WARMUP = 1500 / 40_000  # that of DINOv2's published heads
LOG_EVERY = 10  # steps between two looks at the loss; looking makes the GPU wait


# --- learning rate ----------------------------------------------------------------------------------------
# f(step, total_steps, steps_per_epoch) -> what every base learning rate is multiplied by; step is 0-based.
def constant(step, total_steps, steps_per_epoch):
    """Always 1."""
    return 1.0


def exponential(step, total_steps, steps_per_epoch):
    """0.98 per epoch."""
    return 0.98 ** (step // steps_per_epoch)


def onecycle(step, total_steps, steps_per_epoch):
    """The learning rate of torch's OneCycleLR with its defaults (Smith & Topin, 2018); momentum stays.

    From 1/25 up to 1 in 30 % of the steps and down to 1/250,000, both along cosines.
    """
    peak, last = 0.3 * total_steps - 1, total_steps - 1
    if step <= peak:
        return cosine_between(1 / 25, 1.0, step / peak if peak else 1.0)
    return cosine_between(1.0, 1 / 25e4, min(1.0, (step - peak) / (last - peak)))


def cosine(step, total_steps, steps_per_epoch):
    """Linear warm-up, then down to 0 along a half cosine (Loshchilov & Hutter, 2017)."""
    return warmed_up(step, total_steps, lambda progress: cosine_between(1.0, 0.0, progress))


def poly(step, total_steps, steps_per_epoch):
    """Linear warm-up, then (1 - progress) ** 0.9 (Chen et al., 2018)."""
    return warmed_up(step, total_steps, lambda progress: (1 - progress) ** 0.9)


def linear(step, total_steps, steps_per_epoch):
    """A straight line down to 0, times a linear warm-up in 3.75 % of the steps: DINOv2's published heads."""
    warmup = max(1, round(DINOV2_WARMUP * total_steps))
    return (1 - min(step, total_steps) / total_steps) * min(1.0, (step + 1) / warmup)


def warmed_up(step, total_steps, after):
    """Rise linearly to 1 in WARMUP of the steps, then follow after(progress), progress 0..1."""
    warmup = max(1, round(WARMUP * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    return after(min(1.0, (step - warmup) / max(1, total_steps - warmup)))


def cosine_between(start, end, progress):
    """Return the point of a half cosine from `start` (progress 0) to `end` (progress 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


# A new schedule is one function above and one line here.
SCHEDULERS = {
    "cosine": cosine,
    "poly": poly,
    "linear": linear,
    "exponential": exponential,
    "onecycle": onecycle,
    "none": constant,
}


def lr_lambda(scheduler, total_steps, steps_per_epoch):
    """Return f(step) -> factor on every base learning rate, of the scheduler called so."""
    return lambda step: SCHEDULERS[scheduler](step, total_steps, steps_per_epoch)


# --- optimizer --------------------------------------------------------------------------------------------
def backbone_scale(model, scale):
    """Return f(name of a parameter) -> factor on its learning rate: `scale` where it is one of
    Segmenter.pretrained(), else 1.
    """
    pretrained = model.pretrained()
    return lambda name: scale if name in pretrained else 1.0


def parameter_groups(model, lr, weight_decay, lr_scale=lambda name: 1.0):
    """Return optimizer groups of the parameters that train; `base_lr` is what the schedule multiplies.

    lr_scale: a pure function name -> factor on lr, such as that of backbone_scale or a decay per layer. Three
    groups at each learning rate: weights with weight decay, weights of norms (one dimension) and biases
    without.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "bias" if name.endswith("bias") else "weight" if parameter.ndim > 1 else "norm"
            groups.setdefault((lr * lr_scale(name), kind), []).append(parameter)
    decay = {"weight": weight_decay, "norm": 0.0, "bias": 0.0}
    return [dict(params=parameters, lr=rate, base_lr=rate, weight_decay=decay[kind])
            for (rate, kind), parameters in groups.items()]


def adamw(groups):
    """AdamW: weight decay is decoupled (Loshchilov & Hutter, 2019)."""
    return torch.optim.AdamW(groups, fused=True)


def adam(groups):
    """Adam: weight decay is an L2 term."""
    return torch.optim.Adam(groups, fused=True)


def sgd(groups):
    """SGD with Nesterov momentum 0.937; weight decay is an L2 term."""
    return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)


# A new optimizer is one function above, f(groups) -> optimizer, and one line here.
OPTIMIZERS = {
    "adamw": adamw,
    "adam": adam,
    "sgd": sgd,
}


# --- the step ---------------------------------------------------------------------------------------------
@dataclass
class Optimization:
    """How a model is trained: the optimizer, autocast and scaler, f(step) -> factor on the learning rates,
    batches per step.
    """

    optimizer: torch.optim.Optimizer
    precision: Precision
    lr_lambda: Callable = lambda step: 1.0
    accumulate: int = 1

    def step(self, weight):
        """Divide the summed gradients by `weight`, clip them, step, and clear them."""
        optimizer, scaler = self.optimizer, self.precision.scaler
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_([p.grad for p in parameters], weight)
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)


class LossLog:
    """Keeps every step's losses on the device and reads them every LOG_EVERY steps, so that no step waits."""

    def __init__(self, bar, progress=None):
        self.bar, self.waiting, self.waited = bar, [], 0.0
        progress = progress if progress and is_main_process() else dict(sums={}, images=0)
        self.sums, self.images = dict(progress["sums"]), progress["images"]
        self.before, self.start = self.images, time.perf_counter()

    def watch(self, batches):
        """Yield the batches, adding up the seconds in which none was ready."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, loss, terms, names, step, lr):
        """Note one batch: scalar tensors loss and terms, its file names, optimizer step and learning rate."""
        values = {"loss": loss, **{f"loss_{name}": term for name, term in terms.items()}}
        values = {name: value.detach() for name, value in values.items()}
        self.waiting.append((values, names, step, lr))
        if len(self.waiting) >= LOG_EVERY:
            self.read()

    def read(self):
        """Fetch the waiting losses. Raises FloatingPointError naming the batch where one is not finite."""
        if not self.waiting:
            return
        keys = list(self.waiting[0][0])
        table = torch.stack([torch.stack(list(values.values())) for values, *_ in self.waiting]).tolist()
        for values, (_, names, step, lr) in zip(table, self.waiting, strict=True):
            if not math.isfinite(values[0]):
                raise FloatingPointError(f"the loss is {values[0]} at step {step} (lr {lr:.2e}) in the batch "
                                         f"{' '.join(names)}: check these files, lower --lr or try --amp off")
            self.images += len(names)
            for key, value in zip(keys, values, strict=True):
                self.sums[key] = self.sums.get(key, 0.0) + value * len(names)
        self.waiting.clear()
        self.bar.set_postfix_str(f"loss {values[0]:.3f}, {self.rate():.1f} images/s", refresh=False)

    def seconds(self):
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def rate(self):
        """Images per second so far, of all processes."""
        return (self.images - self.before) * world_size() / self.seconds()

    def totals(self):
        """Return dict(sums={name: sum over the images of all processes}, images), names loss, loss_ce, ..."""
        self.read()
        parts = all_gather((self.sums, self.images))
        keys = max((sums for sums, _ in parts), key=len)  # a process without an image has none
        return dict(sums={key: sum(sums.get(key, 0.0) for sums, _ in parts) for key in keys},
                    images=sum(images for _, images in parts))

    def means(self):
        """Return the mean over the images of all processes of the loss and its terms."""
        totals = self.totals()
        return {key: value / max(1, totals["images"]) for key, value in totals["sums"].items()}


class Objective(nn.Module):
    """A model and its loss as one module, so that DDP sees a whole step.

    model: a Segmenter, or a CachedSegmenter, which takes what a cache holds in place of images.
    """

    def __init__(self, model, criterion):
        super().__init__()
        self.model, self.criterion, self.num_classes = model, criterion, model.num_classes

    def forward(self, images, masks):
        """images as the model takes them, masks (B, H, W) int64 -> loss, {name: term}, preds (B, H, W)."""
        return self.model.loss(images, masks, self.criterion)


def train_one_epoch(objective, batches, optimization, step, progress=None, after_step=None):
    """Train once over `batches` (a tqdm bar over a dataloader) from optimizer step `step` on.

    objective: an Objective, or DDP around one. after_step(step, so_far) is called after every optimizer step;
    so_far() returns the `progress` with which a later call continues from there, over batches without those
    that are done: dict(batches, images, sums, counts). In every process, so_far() must be called or in none.

    Returns a dict: loss and its terms (means over images), accuracy and miou on the training images as the
    network saw them, images_per_s, data_wait (share of the time in which the next batch was not ready; both
    None where `progress` left no batch), step (the next optimizer step). Raises FloatingPointError for a loss
    that is not finite.
    """
    device, precision = next(objective.parameters()).device, optimization.precision
    matrix = ConfusionMatrix(getattr(objective, "module", objective).num_classes, device)
    if progress and is_main_process():
        matrix.counts += progress["counts"].to(device)
    log, weights, before = LossLog(batches, progress), 0.0, progress["batches"] if progress else 0
    done = before

    def so_far():
        return dict(log.totals(), batches=done, counts=all_reduce(matrix.counts).cpu())

    objective.train()
    for images, targets, names in log.watch(batches):
        images = to_device(images, device)  # (B, 3, H, W) uint8, or what a cache holds
        masks = targets["mask"].to(device, non_blocking=True).long()  # (B, H, W) int64, 255 = ignore
        lr = set_lr(optimization.optimizer, optimization.lr_lambda(step))
        with precision.autocast():
            loss, terms, preds = objective(images, masks)
        weight = (masks != IGNORE).sum() / masks[0].numel()  # accumulated means over pixels = one large batch
        precision.scaler.scale(loss * weight).backward()
        weights = weights + weight
        log.add(loss, terms, names, step, lr)
        matrix.update(preds, masks)
        done += 1
        if done % optimization.accumulate == 0 or done == len(batches):
            weights = all_reduce(weights) / world_size()  # DDP averages the gradients
            optimization.step(torch.clamp(weights, min=1e-6))
            step, weights = step + 1, 0.0
            if after_step:
                after_step(step, so_far)
    broadcast_buffers(objective)
    matrix.counts = all_reduce(matrix.counts)
    means, trained = log.means(), done > before  # the means read the last losses, which the rate counts
    return dict(means, accuracy=matrix.pixel_accuracy(), miou=matrix.miou(),
                images_per_s=log.rate() if trained else None,
                data_wait=log.waited / log.seconds() if trained else None, step=step)


def set_lr(optimizer, factor):
    """Set every group's learning rate to factor x its base rate; return that of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


# --- the validation pass ----------------------------------------------------------------------------------
@torch.inference_mode()
def evaluate(model, batches, precision, criterion=None, views=None, on_image=None, after_batch=None):
    """Score a SegmentationModel on the batches of a validation dataloader, each mask at its own size.

    The batches have the network's size, and with a criterion the loss is taken there, as in training; or
    views(images) -> iterable of Logits brings images of any size to the network, as views_of does.
    on_image(name, pred, mask, matrix), pred and mask (H, W), matrix its own ConfusionMatrix, is called for
    every image, after_batch() after every batch.

    Of several processes, each brings its own part of the batches and all get the scores of the whole. Returns
    (dict of loss and its terms, accuracy, miou, dice; the ConfusionMatrix). Leaves the model in eval mode.
    """
    device = next(model.parameters()).device
    matrix, log = ConfusionMatrix(model.num_classes, device), LossLog(batches)
    model.eval()
    for images, targets, names in batches:
        masks = targets["mask"]  # (B, H, W) uint8, or a list of (H, W)
        if views:
            logits = views(images)
        else:
            with precision.autocast():
                output, geometry = model.output(to_device(images, device))
                logits = [model.head.logits(output, geometry)]
                if criterion:
                    small = torch.stack([resize_mask(mask, geometry.size) for mask in masks])  # (B, h, w)
                    loss, terms, _ = model.head.loss(output, small.to(device).long(), geometry, criterion)
                    log.add(loss, terms, names, 0, 0.0)
        preds = label_maps(logits, [mask.shape for mask in masks])
        for pred, mask, name in zip(preds, masks, names, strict=True):
            single = ConfusionMatrix(model.num_classes, device)
            single.update(pred, mask.to(device))
            matrix.merge(single)
            if on_image:
                on_image(name, pred, mask, single)
        if after_batch:
            after_batch()
    matrix.counts = all_reduce(matrix.counts)
    scores = dict(log.means(), accuracy=matrix.pixel_accuracy(), miou=matrix.miou(), dice=matrix.mean_dice())
    return scores, matrix


@torch.inference_mode()
def predict_examples(model, dataset, precision, count):
    """Return [(image (H, W, 3), mask, pred)] of a few items of a validation dataset, always the same ones.

    mask and pred are label maps (H, W) uint8, of the mask's and of the image's own size.
    """
    rows, device = [], next(model.parameters()).device
    for index in evenly_sampled(range(len(dataset)), count):
        inputs, targets, _ = dataset[index]
        mask = targets["mask"]
        image = dataset.picture(index)
        with precision.autocast():
            logits = model.logits(to_device(default_collate([inputs]), device))
        (pred,) = label_maps([logits], [image.shape[1:]])
        rows.append((image.permute(1, 2, 0).numpy(), mask.numpy(), pred.cpu().numpy()))
    return rows
