"""Prediction at an image's own size: protocols (whole, windows, tiles, views), label maps, the Predictor.

    predictor = Predictor(*load_model("outputs/best_model_iou.pth"))     # checkpoint.load_model
    label_map = predictor.predict("photo.jpg")                           # (H, W) uint8 class ids

evaluate.py scores through the same functions, so a score is of what the inference scripts write.
"""
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import InputError
from dataio.readers import read_image
from dataio.transforms import resize_image, window_starts
from dataio.windows import read_native_image
from inference.backends import ExportedModel, convert, is_installed
from inference.tiles import Tiles, overlap_pixels
from models.logits import Logits, class_ids
from utils import Precision, pick_device, shortest_time

MS_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of --tta ms
LARGE = 1 << 28  # probabilities that are summed at full size, 1 GB
WORTH_CONVERTING = 200  # images that pay for the seconds OpenVINO takes to start
OVERLAP = 0.25  # of tiles, share of their sides


class Protocol(NamedTuple):
    """How images are brought to a network and its outputs back to their own size.

    window: (h, w) pixels the network sees. Without slide, the whole image is resized to it; with slide, the
    image is resized, its proportions kept, until it just covers the window, which then moves over it by
    `stride` (h, w). scales: factors on that size; flip: also the mirrored image. Views are averaged as
    softmax probabilities, overlapping windows as logits, as mmsegmentation does.

    With tile, the image keeps its own resolution: tiles that are resized to the window by the factor `tile`
    move over it by `stride`, in pixels of the image; they are blended as probabilities.
    """

    window: tuple
    slide: bool = False
    stride: tuple = ()
    scales: tuple = (1.0,)
    flip: bool = False
    tile: float = 0.0

    @property
    def side(self):
        """The (h, w) of a tile in pixels of the image."""
        return tuple(max(1, round(length / self.tile)) for length in self.window)

    def sizes(self, height, width):
        """Return the sizes (h, w) that an image of height x width is resized to, one per scale."""
        if self.slide:
            fit = max(self.window[0] / height, self.window[1] / width)
            whole = height * fit, width * fit
        else:
            whole = self.window
        return [(max(1, round(whole[0] * scale)), max(1, round(whole[1] * scale))) for scale in self.scales]

    def __str__(self):
        text = f"whole image at {self.window[0]}x{self.window[1]}"
        if self.tile:
            high, wide = self.side
            text = f"tiles of {high}x{wide} pixels, stride {self.stride[0]}x{self.stride[1]}"
            text += f", seen at {self.window[0]}x{self.window[1]}" if self.tile != 1 else ""
        if self.slide:
            text = f"window {self.window[0]}x{self.window[1]}, stride {self.stride[0]}x{self.stride[1]}"
        if self.scales != (1.0,):
            text += f", scales {' '.join(f'{scale:g}' for scale in self.scales)}"
        return text + (", flip" if self.flip else "")


def make_protocol(kind, tta, imgsz, tile_scale=1.0, overlap=OVERLAP):
    """Return the Protocol of the flags --protocol (whole, slide, tile), --tta and an image size (h, w).

    tile_scale, overlap (share or pixels of the image): of tiles. Raises InputError for flags that contradict
    each other.
    """
    scales = MS_SCALES if "ms" in tta else (1.0,)
    if kind == "tile":
        if "ms" in tta:
            raise InputError("--tta ms has no place in --protocol tile, which has --tile-scale: leave it out")
        protocol = Protocol(tuple(imgsz), flip="flip" in tta, tile=tile_scale)
        stride = [side - less for side, less in zip(protocol.side, overlap_pixels(overlap, protocol.side),
                                                    strict=True)]
        if min(stride) < 1:
            high, wide = protocol.side
            raise InputError(f"--overlap {overlap:g} is not smaller than the tiles of {high}x{wide} pixels: "
                             "give less")
        return protocol._replace(stride=tuple(stride))
    stride = tuple(max(1, round(side * 2 / 3)) for side in imgsz)
    return Protocol(tuple(imgsz), kind == "slide", stride if kind == "slide" else (), scales, "flip" in tta)


def slide_logits(model, images, window, stride, batch_size):
    """Average the logits of overlapping windows: images (B, 3, H, W) uint8 -> (B, K, H, W) float32."""
    height, width = images.shape[-2:]
    high, wide = min(window[0], height), min(window[1], width)
    corners = [(top, left) for top in window_starts(height, high, stride[0])
               for left in window_starts(width, wide, stride[1])]
    total = count = None
    step = max(1, batch_size // len(images))
    for start in range(0, len(corners), step):
        part = corners[start:start + step]
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

    model in eval mode; batch_size: windows per forward pass. One view is alive at a time, unless
    the caller keeps them. Of tiles, B is 1 and the one view is Tiles; images may be a Raster then.
    """
    if protocol.tile:
        whole = protocol._replace(tile=0.0, stride=())

        def probabilities(crops):
            return mean_probabilities(views_of(model, crops, whole, precision), protocol.side)

        yield Tiles(probabilities, images, protocol.side, protocol.stride, model.num_classes, batch_size)
        return
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


def mean_probabilities(views, size):
    """Return the mean softmax (B, K, h, w) float32 of views, an iterable of Logits, at `size` = (h, w)."""
    first, *others = [view.at(size).pixels().softmax(1) for view in views]
    return sum(others, first) / (1 + len(others)) if others else first


def blocks_of(views, size):
    """Yield (rows, logits (1, K, r, W), None) that cover the image of one view, an iterable of Logits with
    B = 1, or (rows, None, probabilities (1, K, r, W)), of Tiles or the mean of several views.

    Logits are upsampled (bilinear) a few rows at a time, so that memory does not grow with H x W x K. Several
    views are summed as probabilities at H x W where that stays below LARGE, else all of them are kept.
    """
    views = (view.at(size) for view in views)
    first, second = next(views), next(views, None)
    if second is None:
        for _, rows in first.slices():
            tiled = isinstance(first, Tiles)
            yield rows, None if tiled else first.pixels(rows), first.shares(rows) if tiled else None
        return
    views = itertools.chain([first, second], views)
    if math.prod(first.shape) > LARGE:
        views = list(views)
        for _, rows in first.slices():
            yield rows, None, sum(view.pixels(rows).softmax(1) for view in views) / len(views)
        return
    total, count = torch.zeros(first.shape, device=first.values.device), 0
    del first, second
    for view in views:
        count += 1
        for _, rows, pixels in view.blocks():
            total[..., rows, :] += pixels.softmax(1)
    yield slice(None), None, total.div_(count)


def label_map(views, size):
    """Return class ids (H, W) uint8 from the views of one image, an iterable of Logits with B = 1."""
    pred = None
    for rows, logits, probabilities in blocks_of(views, size):
        values = probabilities if logits is None else logits
        if pred is None:
            pred = torch.empty(tuple(size), dtype=torch.uint8, device=values.device)
        pred[rows] = class_ids(values)[0]
    return pred


class Scores(NamedTuple):
    """Of one image: pred (H, W) uint8; confidence (H, W) float32, the probability of its class;
    probabilities (K, H, W) float16 of all classes, or None.
    """

    pred: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray


def scores_of(views, size, every_class=False):
    """Return the Scores of one image from its views, as label_map takes them."""
    pred, confidence, probabilities = np.empty(size, np.uint8), np.empty(size, np.float32), None
    for rows, logits, shares in blocks_of(views, size):
        shares = logits.softmax(1) if shares is None else shares
        ids = class_ids(shares if logits is None else logits)
        pred[rows], confidence[rows] = ids[0].cpu().numpy(), shares.amax(1)[0].cpu().numpy()
        if every_class:
            if probabilities is None:
                probabilities = np.empty((shares.shape[1], *size), np.float16)
            probabilities[:, rows] = shares[0].cpu().numpy()
    return Scores(pred, confidence, probabilities)


def label_maps(views, sizes):
    """Return the class ids of a batch, a list of (H, W) uint8, from an iterable of views (Logits)."""
    if len(sizes) == 1:  # the views of a single image need not be kept
        return [label_map(views, sizes[0])]
    views = list(views)
    return [label_map((view[index:index + 1] for view in views), size) for index, size in enumerate(sizes)]


@torch.inference_mode()
def predict(model, images, protocol, precision, batch_size=8):
    """Predict images at their own size: (B, 3, H, W) uint8 -> (B, H, W) uint8 on the model's device."""
    parts = images.split(1) if protocol.tile else [images]
    return torch.stack([pred for part in parts for pred in label_maps(
        views_of(model, part, protocol, precision, batch_size), [images.shape[-2:]] * len(part))])


def choose_protocol(checkpoint, imgsz=None, kind="", tta="", tile_scale=None, overlap=None):
    """Return the Protocol of a checkpoint, with those parts replaced that were given.

    imgsz: (h, w); kind: whole, slide or tile; tta: flip, ms or "ms,flip"; tile_scale, overlap: of tiles. A
    model runs at the size it was trained at, on the whole image, or in tiles where it was trained so; an
    official head has a protocol of its own. Raises InputError for flags that contradict each other.
    """
    if not kind and checkpoint.get("config", {}).get("train_scale") == "native":
        kind = "tile"
    if kind != "tile" and (tile_scale, overlap) != (None, None):
        raise InputError("--tile-scale and --overlap belong to --protocol tile: add it, or leave them out")
    asked = make_protocol(kind, tta, imgsz or checkpoint["imgsz"], tile_scale or 1.0,
                          OVERLAP if overlap is None else overlap)
    if "protocol" not in checkpoint or kind == "tile":
        return asked
    own = Protocol(**checkpoint["protocol"])
    if imgsz:
        own = own._replace(window=asked.window, stride=make_protocol("slide", "", asked.window).stride)
    if kind == "whole":
        own = own._replace(slide=False, stride=())
    if tta:
        own = own._replace(scales=asked.scales, flip=asked.flip)
    return own


class Predictor:
    """A model ready to use: predictor(images (B, 3, H, W) uint8) -> label maps (B, H, W) uint8 numpy.

    model, checkpoint: as checkpoint.load_model returns them. classes = [[name, [R, G, B]], ...]; str() says
    protocol and device. protocol: as choose_protocol returns it (default: the checkpoint's); backend: as
    --backend; expected: about how many images will come, None = very many. Raises InputError for a device or
    backend that does not work.
    """

    def __init__(self, model, checkpoint, device="auto", protocol=None, backend="torch", expected=0):
        self.device = pick_device(device)
        self.precision = Precision("auto", self.device)
        exported = isinstance(model, ExportedModel)
        if exported and backend not in ("auto", "torch"):
            raise InputError(f"--backend {backend} chooses what runs a .pth, and an exported file has its "
                             "own: leave it out")
        if exported:
            self.device = torch.device("cpu")
        self.model, self.checkpoint = model.to(self.device), checkpoint
        self.classes = checkpoint["classes"]
        self.protocol = protocol or choose_protocol(checkpoint)
        if not exported and backend != "torch":
            self.model = self.choose_backend(backend, expected)

    def choose_backend(self, backend, expected):
        """Return the model that --backend means: auto tries OpenVINO on a CPU where its start may pay."""
        one_size = self.protocol.scales == (1.0,)
        if backend == "auto":
            worth = expected is None or expected >= WORTH_CONVERTING
            if self.device.type != "cpu" or not (worth and one_size and is_installed("openvino")):
                return self.model
            other = convert(self.model, self.protocol.window, "openvino")
            images = torch.zeros(1, 3, *self.protocol.window, dtype=torch.uint8)
            seconds = [shortest_time(self.run_once, model, images) for model in (self.model, other)]
            return other if seconds[1] < seconds[0] else self.model
        if self.device.type != "cpu" or not one_size:
            raise InputError(f"--backend {backend} runs on the CPU and at one size: add --device cpu, and "
                             "leave out --tta ms; a GPU runs exported .onnx files (export.py)")
        return convert(self.model, self.protocol.window, backend)

    @torch.inference_mode()
    def run_once(self, model, images):
        """Run a model on images (B, 3, H, W), for timing."""
        with self.precision.autocast():
            model.logits(images)

    def predict(self, image):
        """Return the label map (H, W) uint8 of an image: a path, or a numpy array (H, W, 3) uint8 RGB."""
        if isinstance(image, (str, Path)):
            return self(self.read(image)[None])[0]
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InputError(f"an image is an array (H, W, 3) of uint8 RGB, not {image.shape} of "
                             f"{image.dtype}")
        return self(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None])[0]

    def read(self, path):
        """Return an image file as the protocol wants it, (3, H, W) uint8 RGB. Raises InputError."""
        return read_native_image(path) if self.protocol.tile else read_image(path)

    @torch.inference_mode()
    def scores(self, images, every_class=False):
        """Return the Scores of one image (1, 3, H, W) uint8; every_class: with the probabilities of all."""
        views = views_of(self.model, images, self.protocol, self.precision)
        return scores_of(views, tuple(images.shape[-2:]), every_class)

    @torch.inference_mode()
    def probabilities(self, images, size):
        """Return (n, K, h, w) float32 at `size` = (h, w) of images (n, 3, H, W) uint8, on the device."""
        parts = images.split(1) if self.protocol.tile else [images]
        return torch.cat([mean_probabilities(views_of(self.model, part, self.protocol, self.precision), size)
                          for part in parts])

    def __call__(self, images):
        return predict(self.model, images, self.protocol, self.precision).cpu().numpy()

    def __str__(self):
        own = isinstance(self.model, ExportedModel)
        return f"{self.protocol} on " + (self.model.name if own else f"{self.device}, torch {self.precision}")
