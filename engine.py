"""The training step, the validation pass, prediction at native size, and learning rate schedules.

Functions here take models, tensors and numbers, never the config. train.py calls train_one_epoch and
evaluate; the inference scripts call predict, which is the same code that validation scores.
"""
import itertools
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from backbones import shortest_time
from config import IGNORE, InputError
from datasets import resize_image, resize_mask
from metrics import ConfusionMatrix
from losses import score
from processes import gather, is_first, place, share_buffers, sum_over_processes
from readers import read_image
from runtimes import Runtime, convert, is_installed, open_model
from upsample import Logits, class_ids
from utils import Precision, pick_device

MAX_GRAD_NORM = 1.0
MS_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of --tta ms
LARGE = 1 << 28  # probabilities that are summed at full size, 1 GB
MOMENTUM = 0.937  # of sgd
WARMUP = 0.05  # share of all steps in which cosine and poly rise to the full rate
WORTH_CONVERTING = 200  # images that pay for the seconds OpenVINO takes to start
LOG_EVERY = 10  # steps between two looks at the loss; looking makes the GPU wait


# --- optimisation -----------------------------------------------------------------------------------------
def lr_factor(step, total_steps, scheduler, steps_per_epoch=1):
    """Return what every base learning rate is multiplied by at optimizer step `step` (0-based).

    cosine (Loshchilov & Hutter, 2017) and poly (power 0.9; Chen et al., 2018) fall to 0 after a linear
    warm-up; exponential is 0.98 per epoch; onecycle (Smith & Topin, 2018) is the learning rate of torch's
    OneCycleLR with its defaults (momentum stays): from 1/25 up to 1 in 30 % of the steps and down to
    1/250,000, both along cosines.
    """
    if scheduler == "none":
        return 1.0
    if scheduler == "exponential":
        return 0.98 ** (step // steps_per_epoch)
    if scheduler == "onecycle":
        peak, last = 0.3 * total_steps - 1, total_steps - 1
        if step <= peak:
            return cosine_between(1 / 25, 1.0, step / peak if peak else 1.0)
        return cosine_between(1.0, 1 / 25e4, min(1.0, (step - peak) / (last - peak)))
    warmup = max(1, round(WARMUP * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return (1 - progress) ** 0.9 if scheduler == "poly" else cosine_between(1.0, 0.0, progress)


def cosine_between(start, end, progress):
    """Return the point of a half cosine from `start` (progress 0) to `end` (progress 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model, lr, weight_decay, backbone_lr_scale):
    """Return optimizer groups of the parameters that train; `base_lr` is what the schedule multiplies.

    Three groups at each learning rate: weights with weight decay, weights of norms (one dimension) and
    biases without. The head trains at `lr`, the backbone at lr * backbone_lr_scale.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = lr * (backbone_lr_scale if name.startswith("backbone.") else 1.0)
            kind = "bias" if name.endswith("bias") else "weight" if parameter.ndim > 1 else "norm"
            groups.setdefault((rate, kind), []).append(parameter)
    decay = {"weight": weight_decay, "norm": 0.0, "bias": 0.0}
    return [dict(params=parameters, lr=rate, base_lr=rate, weight_decay=decay[kind])
            for (rate, kind), parameters in groups.items()]


def build_optimizer(name, groups):
    """Return the optimizer called `name` (adamw, adam, sgd) over the groups of parameter_groups.

    Weight decay is decoupled in adamw (Loshchilov & Hutter, 2019), an L2 term in adam and sgd; sgd has
    Nesterov momentum 0.937.
    """
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name](groups, fused=True)


def optimizer_step(optimizer, scaler, weight):
    """Divide the summed gradients by `weight`, clip them, step, and clear them."""
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
        progress = progress if progress and is_first() else dict(sums={}, images=0)
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
        return (self.images - self.before) * place()[1] / self.seconds()

    def totals(self):
        """Return dict(sums={name: sum over the images of all processes}, images), names loss, loss_ce, ..."""
        self.read()
        parts = gather((self.sums, self.images))
        keys = max((sums for sums, _ in parts), key=len)  # a process without an image has none
        return dict(sums={key: sum(sums.get(key, 0.0) for sums, _ in parts) for key in keys},
                    images=sum(images for _, images in parts))

    def means(self):
        """Return the mean over the images of all processes of the loss and its terms."""
        totals = self.totals()
        return {key: value / max(1, totals["images"]) for key, value in totals["sums"].items()}


class Objective(nn.Module):
    """A model and its loss as one module, so that DDP sees a whole step.

    model: a Segmenter, or a HeadOnly, which takes feature maps in place of images.
    """

    def __init__(self, model, criterion):
        super().__init__()
        self.model, self.criterion, self.num_classes = model, criterion, model.num_classes

    def forward(self, images, masks):
        """images as the model takes them, masks (B, H, W) int64 -> loss, {name: term}, preds (B, H, W)."""
        return score(self.criterion, self.model.logits(images), masks)


def train_one_epoch(objective, batches, optimizer, precision, schedule, step, accumulate=1, progress=None,
                    after_step=None):
    """Train once over `batches` (a tqdm bar over a loader) from optimizer step `step` on.

    objective: an Objective, or DDP around one. after_step(step, so_far) is called after every optimizer step;
    so_far() returns the `progress` with which a later call goes on from there, over batches without those
    that are done: dict(batches, images, sums, counts). In every process, so_far() must be called or in none.

    Returns a dict: loss and its terms (means over images), accuracy and miou on the training images as the
    network saw them, images_per_s, data_wait (share of the time in which the next batch was not ready), step
    (the next optimizer step). Raises FloatingPointError for a loss that is not finite.
    """
    device = next(objective.parameters()).device
    matrix = ConfusionMatrix(getattr(objective, "module", objective).num_classes, device)
    if progress and is_first():
        matrix.counts += progress["counts"].to(device)
    log, weights, done = LossLog(batches, progress), 0.0, progress["batches"] if progress else 0

    def so_far():
        return dict(log.totals(), batches=done, counts=sum_over_processes(matrix.counts).cpu())

    objective.train()
    for images, masks, names in log.watch(batches):
        images = images.to(device, non_blocking=True)  # (B, 3, H, W) uint8
        masks = masks.to(device, non_blocking=True).long()  # (B, H, W) int64, 255 = ignore
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule(step)
        with precision.autocast():
            loss, terms, preds = objective(images, masks)
        weight = (masks != IGNORE).sum() / masks[0].numel()  # accumulated means over pixels = one large batch
        precision.scaler.scale(loss * weight).backward()
        weights = weights + weight
        log.add(loss, terms, names, step, optimizer.param_groups[0]["lr"])
        matrix.update(preds, masks)
        done += 1
        if done % accumulate == 0 or done == len(batches):
            weights = sum_over_processes(weights) / place()[1]  # DDP averages the gradients
            optimizer_step(optimizer, precision.scaler, torch.clamp(weights, min=1e-6))
            step, weights = step + 1, 0.0
            if after_step:
                after_step(step, so_far)
    share_buffers(objective)
    matrix.counts = sum_over_processes(matrix.counts)
    return dict(log.means(), accuracy=matrix.pixel_accuracy(), miou=matrix.miou(), images_per_s=log.rate(),
                data_wait=log.waited / log.seconds(), step=step)


# --- prediction -------------------------------------------------------------------------------------------
class Protocol(NamedTuple):
    """How images are brought to a network and its outputs back to their own size.

    window: (h, w) pixels the network sees. Without slide, the whole image is resized to it; with slide, the
    image is resized, its proportions kept, until it just covers the window, which then moves over it by
    `stride` (h, w). scales: factors on that size; flip: also the mirrored image. Views are averaged as
    softmax probabilities, overlapping windows as logits, as mmsegmentation does.
    """

    window: tuple
    slide: bool = False
    stride: tuple = ()
    scales: tuple = (1.0,)
    flip: bool = False

    def sizes(self, height, width):
        """Return the sizes (h, w) that an image of height x width is resized to, one a scale."""
        if self.slide:
            fit = max(self.window[0] / height, self.window[1] / width)
            whole = height * fit, width * fit
        else:
            whole = self.window
        return [(max(1, round(whole[0] * scale)), max(1, round(whole[1] * scale))) for scale in self.scales]

    def __str__(self):
        text = f"whole image at {self.window[0]}x{self.window[1]}"
        if self.slide:
            text = f"window {self.window[0]}x{self.window[1]}, stride {self.stride[0]}x{self.stride[1]}"
        if self.scales != (1.0,):
            text += f", scales {' '.join(f'{scale:g}' for scale in self.scales)}"
        return text + (", flip" if self.flip else "")


def make_protocol(kind, tta, imgsz):
    """Return the Protocol of the flags --protocol (whole, slide), --tta and an image size (h, w)."""
    scales = MS_SCALES if "ms" in tta else (1.0,)
    stride = tuple(max(1, round(side * 2 / 3)) for side in imgsz)
    return Protocol(tuple(imgsz), kind == "slide", stride if kind == "slide" else (), scales, "flip" in tta)


def window_starts(length, window, stride):
    """Return where windows start along one side; the last one is shifted in so that it ends at the edge."""
    return [*range(0, length - window, stride), max(0, length - window)]


def slide_logits(model, images, window, stride, batch_size):
    """Average the logits of overlapping windows: images (B, 3, H, W) uint8 -> (B, K, H, W) float32."""
    height, width = images.shape[-2:]
    high, wide = min(window[0], height), min(window[1], width)
    places = [(top, left) for top in window_starts(height, high, stride[0])
              for left in window_starts(width, wide, stride[1])]
    total = count = None
    step = max(1, batch_size // len(images))
    for start in range(0, len(places), step):
        part = places[start:start + step]
        crops = torch.stack([images[..., top:top + high, left:left + wide] for top, left in part])
        logits = model(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])  # (n, B, K, H, W)
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[2], height, width)
            count = logits.new_zeros(height, width)
        for (top, left), one in zip(part, logits, strict=True):
            total[..., top:top + high, left:left + wide] += one
            count[top:top + high, left:left + wide] += 1
    return total.div_(count)


@torch.inference_mode()
def views_of(model, images, protocol, precision, batch_size=8):
    """Yield the Logits of every view of `images` (B, 3, H, W) uint8, B x K x h x w, none mirrored.

    model in eval mode; about batch_size windows go through it at a time. One view is alive at a time, unless
    the caller keeps them.
    """
    images = images.to(next(model.parameters()).device, non_blocking=True)
    for size in protocol.sizes(*images.shape[-2:]):
        resized = resize_image(images, size)
        for mirrored in (False, True)[:1 + protocol.flip]:
            seen = resized.flip(-1) if mirrored else resized
            with precision.autocast():
                if protocol.slide:
                    logits = Logits(slide_logits(model, seen, protocol.window, protocol.stride, batch_size))
                else:
                    logits = model.logits(seen)
            yield logits.flip() if mirrored else logits


def class_map(views, size):
    """Return class ids (H, W) uint8 from the views of one image, an iterable of Logits with B = 1.

    Logits are upsampled (bilinear) a few rows at a time, so that memory does not grow with H x W x K. Several
    views are summed as probabilities at H x W where that stays below LARGE, else all of them are kept.
    """
    views = (view.at(size) for view in views)
    first, second = next(views), next(views, None)
    pred = torch.empty(tuple(size), dtype=torch.uint8, device=first.values.device)
    views = [first] if second is None else itertools.chain([first, second], views)
    if second is None or math.prod(first.shape) > LARGE:
        views = list(views)
        for _, rows in first.slices():
            parts = [view.pixels(rows) for view in views]  # (1, K, r, W)
            pred[rows] = class_ids(parts[0] if len(parts) == 1 else sum(part.softmax(1) for part in parts))[0]
        return pred
    total = torch.zeros(first.shape, device=first.values.device)
    del first, second
    for view in views:
        for _, rows, pixels in view.blocks():
            total[..., rows, :] += pixels.softmax(1)
    return class_ids(total)[0]


def class_maps(views, sizes):
    """Return the class ids of a batch, a list of (H, W) uint8, from an iterable of views (Logits)."""
    if len(sizes) == 1:  # the views of a single image need not be kept
        return [class_map(views, sizes[0])]
    views = list(views)
    return [class_map((view[index:index + 1] for view in views), size) for index, size in enumerate(sizes)]


@torch.inference_mode()
def predict(model, images, protocol, precision, batch_size=8):
    """Predict images at their own size: (B, 3, H, W) uint8 -> (B, H, W) uint8 on the model's device."""
    views = views_of(model, images, protocol, precision, batch_size)
    return torch.stack(class_maps(views, [images.shape[-2:]] * len(images)))


def override(own, asked, imgsz, kind, tta):
    """Return the Protocol `own` with those parts of `asked` that the flags imgsz, kind and tta name."""
    if imgsz:
        own = own._replace(window=asked.window, stride=make_protocol("slide", "", asked.window).stride)
    if kind == "whole":
        own = own._replace(slide=False, stride=())
    if tta:
        own = own._replace(scales=asked.scales, flip=asked.flip)
    return own


class Predictor:
    """A model file ready to use: predictor(images (B, 3, H, W) uint8) -> (B, H, W) uint8 numpy class ids.

    classes = [[name, [R, G, B]], ...]; str() says protocol and device. imgsz, kind (whole, slide) and tta
    (flip, ms, "ms,flip") as the flags --imgsz, --protocol and --tta; runtime: as --engine; expected: about
    how many images will come, None = very many. Raises InputError for a device or file that does not work.
    """

    def __init__(self, path, device="auto", imgsz=None, kind="", tta="", runtime="torch", expected=0):
        self.device = pick_device(device)
        self.precision = Precision("auto", self.device)
        model, checkpoint = open_model(path)
        exported = isinstance(model, Runtime)
        if exported and runtime not in ("auto", "torch"):
            raise InputError(f"--engine {runtime} chooses what runs a .pth, and {path} is an exported file: "
                             "leave it out")
        if exported:
            self.device = torch.device("cpu")
        self.model, self.checkpoint = model.to(self.device), checkpoint
        self.classes = checkpoint["classes"]
        self.protocol = make_protocol(kind, tta, imgsz or checkpoint["imgsz"])
        if "protocol" in checkpoint:  # an official head has its own; what was given replaces its part
            self.protocol = override(Protocol(**checkpoint["protocol"]), self.protocol, imgsz, kind, tta)
        if not exported and runtime != "torch":
            self.model = self.choose_runtime(runtime, expected)

    def choose_runtime(self, runtime, expected):
        """Return the model that --engine means: auto tries OpenVINO on a CPU where its start may pay."""
        one_size = self.protocol.scales == (1.0,)
        if runtime == "auto":
            worth = expected is None or expected >= WORTH_CONVERTING
            if self.device.type != "cpu" or not (worth and one_size and is_installed("openvino")):
                return self.model
            other = convert(self.model, self.protocol.window, "openvino")
            images = torch.zeros(1, 3, *self.protocol.window, dtype=torch.uint8)
            seconds = [shortest_time(self.run_once, model, images) for model in (self.model, other)]
            return other if seconds[1] < seconds[0] else self.model
        if self.device.type != "cpu" or not one_size:
            raise InputError(
                f"--engine {runtime} runs on the CPU and at one size: add --device cpu, and leave "
                "out --tta ms; a GPU runs exported .onnx files (export.py)"
            )
        return convert(self.model, self.protocol.window, runtime)

    @torch.inference_mode()
    def run_once(self, model, images):
        """Run a model on images (B, 3, H, W), for timing."""
        with self.precision.autocast():
            model.logits(images)

    def predict(self, image):
        """Return the class ids (H, W) uint8 of an image: a path, or a numpy array (H, W, 3) uint8 RGB."""
        if isinstance(image, (str, Path)):
            return self(read_image(image)[None])[0]
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InputError(
                f"an image is an array (H, W, 3) of uint8 RGB, not {image.shape} of {image.dtype}"
            )
        return self(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None])[0]

    def __call__(self, images):
        return predict(self.model, images, self.protocol, self.precision).cpu().numpy()

    def __str__(self):
        runs = f"{self.device}, torch {self.precision}"
        return f"{self.protocol} on {self.model.name if isinstance(self.model, Runtime) else runs}"


@torch.inference_mode()
def evaluate(model, batches, criterion, precision, after_batch=None):
    """Score a model (or a HeadOnly) on `batches` of a validation loader, each mask at its own size.

    Of several processes, each brings its own part of the batches and all get the scores of the whole. Returns
    (dict of loss and its terms, accuracy, miou, dice; the ConfusionMatrix). The loss is taken at the
    network's size, as in training. after_batch() is called after every batch. Leaves the model in eval mode.
    """
    device = next(model.parameters()).device
    matrix, log = ConfusionMatrix(model.num_classes, device), LossLog(batches)
    model.eval()
    for images, masks, names in batches:
        with precision.autocast():
            logits = model.logits(images.to(device, non_blocking=True))
            small = torch.stack([resize_mask(mask, logits.shape[-2:]) for mask in masks])  # (B, h, w)
            loss, terms, _ = score(criterion, logits, small.to(device).long())
        log.add(loss, terms, names, 0, 0.0)
        for pred, mask in zip(class_maps([logits], [mask.shape for mask in masks]), masks, strict=True):
            matrix.update(pred, mask.to(device))
        if after_batch:
            after_batch()
    matrix.counts = sum_over_processes(matrix.counts)
    scores = dict(log.means(), accuracy=matrix.pixel_accuracy(), miou=matrix.miou(), dice=matrix.mean_dice())
    return scores, matrix
