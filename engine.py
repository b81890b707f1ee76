"""One training: optimizer groups, learning rate schedule, the step, the validation pass.

    state = TrainState(model, optimizer, Precision("auto", device))
    scores = train_one_epoch(Objective(model, Criterion("ce")), batches, state, schedule=lambda step: 1.0)
    scores, matrix = evaluate(model, validation_batches, state.precision)

Functions here take models, tensors and numbers, never the config. train.py calls train_one_epoch and
evaluate; evaluate.py calls evaluate with another protocol, so both score by the same loop.
"""
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from config import IGNORE
from dataio.dataloader import collate
from dataio.resizing import resize_targets
from losses import distillation
from metrics import ConfusionMatrix
from models.heads import logits_of
from models.teacher import soft_logits
from models.upsampling import label_maps, pixel_loss
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
def backbone_scale(model, scale, layer_decay=1.0):
    """Return f(parameter name) -> factor on its learning rate: for Segmenter.pretrained() `scale`, times
    `layer_decay` for every block that follows (Bao et al., BEiT, ICLR 2022); else 1.
    """
    pretrained = model.pretrained()
    return lambda name: scale * layer_decay ** pretrained[name] if name in pretrained else 1.0


def parameter_groups(model, lr, weight_decay, lr_scale=lambda name: 1.0):
    """Return optimizer groups of the parameters that train; `base_lr` is what the schedule multiplies.

    lr_scale: a pure function name -> factor on lr, such as that of backbone_scale. Three
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


# --- the objective ----------------------------------------------------------------------------------------
class Objective(nn.Module):
    """A model and its loss as one module, so that DDP sees a whole step.

    Another objective is a subclass with a forward of its own, as Distillation is. Modules it holds beside
    `model`, such as a teacher, stay in eval mode.
    """

    def __init__(self, model, criterion):
        super().__init__()
        self.model, self.criterion, self.num_classes = model, criterion, model.num_classes

    def train(self, mode=True):
        """Switch the model alone to training mode."""
        super().train(False)
        self.training = mode
        self.model.train(mode)
        return self

    def forward(self, images, targets):
        """images (B, 3, H, W) uint8 or Features of a cache, targets {"mask": (B, H, W) uint8, ...} -> loss,
        {name: term}, preds (B, H, W) uint8, weight.

        weight: how many images' worth of pixels the loss is a mean of, so that accumulated batches equal one
        large batch. A loss that is not zero must have a weight.
        """
        output, geometry = self.model.output(images)
        loss, terms, preds = self.loss(output, targets, geometry)
        return loss, terms, preds, counted_images(targets["mask"])

    def loss(self, output, targets, geometry):
        """What the head returned, targets of the images' size -> loss, {name: term}, preds (B, H, W) uint8.

        Pixels of 255 do not count; a batch in which none counts gives 0.
        """
        head, targets = self.model.head, dict(targets, mask=targets["mask"].long())
        if hasattr(head, "loss"):
            terms = head.loss(output, targets, geometry)
            with torch.no_grad():
                preds = label_maps(logits_of(output), geometry, [geometry.size] * len(targets["mask"]))
            return sum(terms.values()), terms, torch.stack(preds)
        loss, terms, preds = pixel_loss(self.criterion, logits_of(output), geometry, targets["mask"])
        for name, weight in head.auxiliary.items():
            if name in output:
                terms[name], _, _ = pixel_loss(self.criterion, output[name], geometry, targets["mask"])
                loss = loss + weight * terms[name]
        return loss, terms, preds


class Distillation(Objective):
    """The Objective of a student: labels, and `weight` times the divergence from its teacher.

    teacher: a Teacher; None where the targets bring its logits (B, K, h, w) as `teacher`, from a cache. The
    loss is a mean over all pixels of all images, in which those without a label have the teacher alone.
    """

    def __init__(self, model, criterion, weight, temperature, teacher=None):
        super().__init__(model, criterion)
        self.weight, self.temperature, self.teacher = weight, temperature, teacher

    def forward(self, images, targets):
        """As of an Objective, with the term `teacher`."""
        targets = dict(targets)
        soft = self.teacher(images) if self.teacher else targets.pop("teacher")
        output, geometry = self.model.output(images)
        loss, terms, preds = self.loss(output, targets, geometry)
        own = soft_logits(logits_of(output), geometry, geometry.size)
        terms["teacher"] = distillation(own, soft, self.temperature)
        labeled = counted_images(targets["mask"]) / len(preds)
        weight = torch.full_like(labeled, len(preds))
        return labeled * loss + self.weight * terms["teacher"], terms, preds, weight


def counted_images(masks):
    """Return the number of pixels of masks (B, H, W) that count, in images: a scalar tensor."""
    return (masks != IGNORE).sum() / masks[0].numel()


# --- the step ---------------------------------------------------------------------------------------------
@dataclass
class TrainState:
    """All that changes while a run trains, and that a resumed run goes on with.

    step: optimizer steps done; history: a dict per epoch; progress: of an epoch that is not at its end,
    dict(batches, images, sums, counts) as EpochLog.progress returns it; kept: objects with a state_dict;
    trained_on: contents_of the images that its weights were trained on before.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    step: int = 0
    history: list = field(default_factory=list)
    progress: dict = None
    kept: dict = field(default_factory=dict)
    live_weights: dict = None
    trained_on: str = ""

    def keep(self, name, item):
        """Save an object with state_dict and load_state_dict, such as an average of weights or a queue, in
        last.pth; a resumed run loads it. Returns the object.
        """
        self.kept[name] = item
        return item

    @contextmanager
    def scored_with(self, average):
        """Context in which the model has the weights of `average`, a module with its state dict: these are
        scored and become best_model_iou.pth. last.pth holds the live ones, whenever it is written.
        """
        self.live_weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        try:
            self.model.load_state_dict(average.state_dict())
            yield
        finally:
            self.model.load_state_dict(self.live_weights)
            self.live_weights = None

    def optimizer_step(self, weight):
        """Divide the summed gradients by `weight`, clip them, step, and clear them."""
        optimizer, scaler = self.optimizer, self.precision.scaler
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_([p.grad for p in parameters], weight)
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def learning_rates(self):
        """Return {"lr": that of the head, "backbone_lr": that of the backbone where it trains at another}."""
        rates = {}
        for name, module in (("lr", self.model.head), ("backbone_lr", self.model.backbone)):
            parameters = set(module.parameters())
            module_rates = [group["lr"] for group in self.optimizer.param_groups
                            if parameters & set(group["params"])]
            if module_rates:  # a head's copies of blocks have a lower one
                rates[name] = max(module_rates)
        rates.setdefault("lr", rates.get("backbone_lr"))
        if rates["lr"] == rates.get("backbone_lr"):
            del rates["backbone_lr"]
        return rates


class EpochLog:
    """Losses of an epoch, kept on the device and read every LOG_EVERY batches, so that no step waits.

    progress: of a TrainState, from which the epoch goes on.
    """

    def __init__(self, bar, progress=None):
        self.bar, self.unread, self.seconds_waited = bar, [], 0.0
        progress = progress if progress and is_main_process() else dict(sums={}, images=0)
        self.sums, self.images = dict(progress["sums"]), progress["images"]
        self.images_before, self.start = self.images, time.perf_counter()

    def timed(self, batches):
        """Yield the batches, adding up the seconds in which none was ready."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, loss, terms, names, step=None, lr=0.0, weight=None):
        """Note a batch: scalar tensors loss, terms and weight, file names, optimizer step (None: of
        validation), learning rate.
        """
        terms = {"loss": loss, **{f"loss_{name}": term for name, term in terms.items()}}
        values = {name: value.detach() for name, value in terms.items()}
        weight = torch.ones_like(values["loss"]) if weight is None else weight.to(values["loss"])
        self.unread.append((values, weight, names, step, lr))
        if len(self.unread) >= LOG_EVERY:
            self.read()

    def read(self):
        """Fetch the losses that were not read yet. Raises FloatingPointError that names the batch whose loss
        is not finite, ValueError for a loss that a weight of 0 leaves without effect.
        """
        if not self.unread:
            return
        rows = [torch.stack([weight, *values.values()]) for values, weight, *_ in self.unread]
        rows = torch.stack(rows).tolist()
        for numbers, (values, _, names, step, lr) in zip(rows, self.unread, strict=True):
            weight, loss = numbers[:2]
            if not math.isfinite(loss):
                where = "in validation" if step is None else f"at step {step} (lr {lr:.2e})"
                raise FloatingPointError(f"the loss is {loss} {where} in the batch {' '.join(names)}: check "
                                         "these files, lower --lr or try --amp off")
            if weight == 0 and loss != 0:
                raise ValueError(f"the objective returned the loss {loss} with the weight 0 at step {step}, "
                                 "which changes nothing: return how many images it is a mean of")
            self.images += len(names)
            for name, value in zip(values, numbers[1:], strict=True):
                self.sums[name] = self.sums.get(name, 0.0) + value * len(names)
        self.unread.clear()
        self.bar.set_postfix_str(f"loss {loss:.3f}, {self.rate():.1f} images/s", refresh=False)

    def seconds(self):
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def rate(self):
        """Images per second, of all processes."""
        return (self.images - self.images_before) * world_size() / self.seconds()

    def totals(self):
        """Return dict(sums={name: sum over the images of all processes}, images), names loss, loss_ce, ..."""
        self.read()
        processes = all_gather((self.sums, self.images))
        names = max((sums for sums, _ in processes), key=len)  # a process without an image has none
        return dict(sums={name: sum(sums.get(name, 0.0) for sums, _ in processes) for name in names},
                    images=sum(images for _, images in processes))

    def means(self):
        """Return the mean over the images of all processes of the loss and its terms."""
        totals = self.totals()
        return {name: value / max(1, totals["images"]) for name, value in totals["sums"].items()}


def train_one_epoch(objective, batches, state, schedule, accumulate=1, after_step=None):
    """Train once over `batches`, a tqdm bar over a dataloader, from where a TrainState stands.

    objective: an Objective, or DDP around one; schedule: f(step) -> factor on the learning rates; accumulate:
    batches per step. after_step(progress) is called after every optimizer step; progress() returns the
    `progress` with which a later call goes on from there, over the batches that are left; it is called in all
    processes or in none.

    Returns a dict: loss and its terms (means over all images: a batch without labels adds 0), accuracy and
    miou on the training images as the network saw them, images_per_s, data_wait (share of the time in which
    the next batch was not ready; both None where `progress` left no batch). Raises FloatingPointError for a
    loss that is not finite.
    """
    device = next(objective.parameters()).device
    matrix = ConfusionMatrix(getattr(objective, "module", objective).num_classes, device)
    batches_before = batches_done = state.progress["batches"] if state.progress else 0
    if state.progress and is_main_process():
        matrix.counts += state.progress["counts"].to(device)
    log, weight_sum = EpochLog(batches, state.progress), 0.0

    def progress():
        return dict(log.totals(), batches=batches_done, counts=all_reduce(matrix.counts).cpu())

    objective.train()
    for images, targets, names in log.timed(batches):
        images = to_device(images, device)  # (B, 3, H, W) uint8, or Features of a cache
        targets = to_device(targets, device)  # {"mask": (B, H, W) uint8, 255 = ignore, ...}
        lr = set_learning_rates(state.optimizer, schedule(state.step))
        with state.precision.autocast():
            loss, terms, preds, weight = objective(images, targets)
        state.precision.scaler.scale(loss * weight).backward()
        weight_sum = weight_sum + weight
        log.add(loss, terms, names, state.step, lr, weight)
        matrix.update(preds, targets["mask"])
        batches_done += 1
        if batches_done % accumulate == 0 or batches_done == len(batches):
            weight_sum = all_reduce(weight_sum) / world_size()  # DDP averages the gradients
            state.optimizer_step(torch.clamp(weight_sum, min=1e-6))
            weight_sum = 0.0
            if after_step:
                after_step(progress)
    broadcast_buffers(objective)
    matrix.counts = all_reduce(matrix.counts)
    means, trained = log.means(), batches_done > batches_before  # the means read the last losses
    return dict(means, accuracy=matrix.pixel_accuracy(), miou=matrix.miou(),
                images_per_s=log.rate() if trained else None,
                data_wait=log.seconds_waited / log.seconds() if trained else None)


def set_learning_rates(optimizer, factor):
    """Set every group's learning rate to factor x its base rate; return the largest."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return max(group["lr"] for group in optimizer.param_groups)


# --- the validation pass ----------------------------------------------------------------------------------
@torch.inference_mode()
def evaluate(model, batches, precision, objective=None, predict=None, on_image=None, after_batch=None):
    """Score a model on the batches of a validation dataloader, each mask at its own size.

    The batches have the network's size, and with an Objective the loss is taken there, as in training; or
    predict(images, sizes) -> label maps brings images of any size to the network, as a Predictor does.
    on_image(name, pred, mask, matrix), pred and mask (H, W), matrix its own ConfusionMatrix, is called for
    every image, after_batch() after every batch.

    Of several processes, each brings its own share of the batches and all get the same scores. Returns (dict
    of loss and its terms, accuracy, miou, dice, the head's own scores; the ConfusionMatrix). Leaves the model
    in eval mode.
    """
    device = next(model.parameters()).device
    matrix, log, head_scores = ConfusionMatrix(model.num_classes, device), EpochLog(batches), {}
    model.eval()
    for images, targets, names in batches:
        masks = targets["mask"]
        sizes = [tuple(mask.shape) for mask in masks]
        if predict:
            preds = predict(images, sizes)
        else:
            with precision.autocast():
                output, geometry = model.output(to_device(images, device))
                if objective:
                    small = to_device(targets_at(targets, geometry.size), device)
                    loss, terms, _ = objective.loss(output, small, geometry)
                    log.add(loss, terms, names)
                    add_head_scores(head_scores, model.head, output, small, geometry)
            preds = label_maps(logits_of(output), geometry, sizes)
        for pred, mask, name in zip(preds, masks, names, strict=True):
            image_matrix = ConfusionMatrix(model.num_classes, device)
            image_matrix.update(pred, mask.to(device))
            matrix.merge(image_matrix)
            if on_image:
                on_image(name, pred, mask, image_matrix)
        if after_batch:
            after_batch()
    matrix.counts = all_reduce(matrix.counts)
    scores = dict(log.means(), accuracy=matrix.pixel_accuracy(), miou=matrix.miou(), dice=matrix.mean_dice(),
                  **mean_head_scores(head_scores))
    return scores, matrix


def targets_at(targets, size):
    """Return validation targets, each of its own size, at `size` = (H, W): {name: (B, H, W)}."""
    images = [resize_targets(dict(zip(targets, values, strict=True)), size)
              for values in zip(*targets.values(), strict=True)]
    return {name: torch.stack([image[name] for image in images]) for name in targets}


def add_head_scores(totals, head, output, targets, geometry):
    """Add what head.scores() says of a batch, where it has any, to totals {name: [sum, count]}."""
    if hasattr(head, "scores"):
        for name, values in head.scores(output, targets, geometry).items():
            total = totals.setdefault(name, [0.0, 0.0])
            for index, value in enumerate(values):
                total[index] += float(value)


def mean_head_scores(totals):
    """Return {name: sum / count} over all processes, NaN where nothing was counted."""
    sums = {}
    for process_totals in all_gather(totals):
        for name, (value, count) in process_totals.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + value, before[1] + count
    return {name: value / count if count else math.nan for name, (value, count) in sums.items()}


@torch.inference_mode()
def predict_examples(model, dataset, precision, count):
    """Return [(image (H, W, 3), mask, pred)] of a few items of a validation dataset, always the same ones.

    mask and pred are label maps (H, W) uint8, of the mask's and of the image's own size.
    """
    rows, device = [], next(model.parameters()).device
    stack = getattr(dataset, "collate", collate)
    for index in evenly_sampled(range(len(dataset)), count):
        images, targets, _ = stack([dataset[index]])
        picture = dataset.picture(index)
        with precision.autocast():
            logits, geometry = model.logits(to_device(images, device))
        (pred,) = label_maps(logits, geometry, [tuple(picture.shape[1:])])
        rows.append((picture.permute(1, 2, 0).numpy(), targets["mask"][0].numpy(), pred.cpu().numpy()))
    return rows
