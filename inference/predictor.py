"""Prediction at an image's own size: protocols (whole, windows, tiles, views), label maps, the Predictor.

    predictor = Predictor(*load_model("outputs/best_model_iou.pth"))     # checkpoint.load_model
    label_map = predictor.predict("photo.jpg")                           # (H, W) uint8 class ids

evaluate.py scores through the same functions, so a score is of what the inference scripts write. For large
images in tiles, memory grows with the width alone: one row of tiles is in memory, K x side x W values.
"""
import math
import sys
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from config import InputError
from dataio.image_rule import ImageRule
from dataio.resizing import continued, resize_image, window_starts
from inference.backends import ExportedModel, convert, is_installed
from models.upsampling import BLOCK_VALUES, block_slices, class_ids, class_map, geometry_of, pixels
from utils import Precision, pick_device, shortest_time

MS_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of --tta ms
LARGE_SUM = 1 << 27  # probabilities that are summed at full size, 0.5 GB
WORTH_CONVERTING = 200  # images that pay for the seconds OpenVINO takes to start
OVERLAP = 0.25  # of tiles, share of their sides
SMALLEST = 1e-12  # of a probability, so that it has a logarithm


# --- protocols --------------------------------------------------------------------------------------------
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
            height, width = height * fit, width * fit
        else:
            height, width = self.window
        return [(max(1, round(height * scale)), max(1, round(width * scale))) for scale in self.scales]

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
            raise InputError("--tta ms is not for --protocol tile, which has --tile-scale: leave it out")
        protocol = Protocol(tuple(imgsz), flip="flip" in tta, tile=tile_scale)
        stride = tuple(side - (round(overlap * side) if overlap < 1 else math.floor(overlap))
                       for side in protocol.side)
        if min(stride) < 1:
            high, wide = protocol.side
            raise InputError(f"--overlap {overlap:g} is not smaller than the tiles of {high}x{wide} pixels: "
                             "give less")
        return protocol._replace(stride=stride)
    stride = tuple(max(1, round(side * 2 / 3)) for side in imgsz)
    return Protocol(tuple(imgsz), kind == "slide", stride if kind == "slide" else (), scales, "flip" in tta)


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


# --- views ------------------------------------------------------------------------------------------------
# A view of images is (logits (B, K, h, w), their Geometry), of which models/upsampling.py makes pixels.
def in_one_layout(images):
    """Return a copy of images (B, C, H, W) in which the colors of a pixel lie side by side, as they do in the
    batches of a dataloader.

    Convolutions choose their order of sums by the strides, and one image has many: as a file is read, resized
    or cut, it would have other last digits, and here and there another class, than in a batch.
    """
    return images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def slide_logits(model, images, window, stride, batch_size):
    """Average the logits of overlapping windows: images (B, C, H, W) uint8 -> (B, K, H, W) float32."""
    height, width = images.shape[-2:]
    high, wide = min(window[0], height), min(window[1], width)
    corners = [(top, left) for top in window_starts(height, high, stride[0])
               for left in window_starts(width, wide, stride[1])]
    total = count = None
    step = max(1, batch_size // len(images))
    for start in range(0, len(corners), step):
        batch = corners[start:start + step]
        crops = torch.stack([images[..., top:top + high, left:left + wide] for top, left in batch])
        logits = model(in_one_layout(crops.flatten(0, 1))).unflatten(0, crops.shape[:2])  # (n, B, K, H, W)
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[2], height, width)
            count = logits.new_zeros(height, width)
        for (top, left), window_logits in zip(batch, logits, strict=True):
            total[..., top:top + high, left:left + wide] += window_logits
            count[top:top + high, left:left + wide] += 1
    return total.div_(count)


@torch.inference_mode()
def views_of(model, images, protocol, precision, batch_size=8):
    """Yield every view of `images` (B, C, H, W) uint8 under a Protocol without tiles.

    model in eval mode; batch_size: windows per forward pass. A single view is alive at a time, unless the
    caller keeps them.
    """
    device = next(model.parameters()).device
    for size in protocol.sizes(*images.shape[-2:]):
        # where the images are, as dataloaders resize them: processors and GPUs round differently
        resized = resize_image(images, size).to(device, non_blocking=True)
        for mirrored in (False, True)[:1 + protocol.flip]:
            inputs = resized.flip(-1) if mirrored else resized
            with precision.autocast():
                if protocol.slide:
                    logits = slide_logits(model, inputs, protocol.window, protocol.stride, batch_size)
                    geometry = geometry_of(size)
                else:
                    logits, geometry = model.logits(in_one_layout(inputs))
            yield logits, geometry._replace(mirrored=mirrored)


def mean_probabilities(views, size, rows=slice(None)):
    """Return the mean softmax (B, K, h, w) float32 of views at `size` = (h, w), or `rows` (a slice) of it."""
    total = count = 0
    for logits, geometry in views:
        total += pixels(logits, geometry, size, rows).softmax(1)
        count += 1
    return total / count


# --- tiles ------------------------------------------------------------------------------------------------
def edge_weights(starts, index, length):
    """Return the weights (length,) of the tile `index` of those that begin at `starts`, along one side: 0 in
    the outer quarter of what it shares with a neighbor, 1 where it shares nothing, a straight line between.

    The weights of two neighbors add up to 1. What a network says near the edge of a tile, where it sees the
    surroundings of one side alone, counts for nothing.
    """
    shared_before = starts[index - 1] + length - starts[index] if index else 0
    shared_after = starts[index] + length - starts[index + 1] if index + 1 < len(starts) else 0
    centers = torch.arange(length) + 0.5
    weights = torch.ones(length)
    for shared, distance in ((shared_before, centers), (shared_after, length - centers)):
        if shared:
            weights *= ((distance - shared / 4) / (shared / 2)).clamp(0, 1)
    return weights


class Tiles:
    """One image as overlapping tiles, whose probabilities are blended: rows() yields them from the top.

    probabilities: (n, C, h, w) uint8 crops -> (n, K, h, w) float32; image: (1, C, H, W) uint8, on any device,
    or a Raster: an object with its `shape` and read(top, left, h, w) -> (1, C, h, w), None where it has no
    data; side: (h, w) of a tile, stride: (h, w) between two, in pixels of the image.
    """

    def __init__(self, probabilities, image, side, stride, num_classes, batch_size=8):
        self.probabilities, self.num_classes, self.batch_size = probabilities, num_classes, batch_size
        self.image, self.size, self.side = image, tuple(image.shape[-2:]), tuple(side)
        self.width = max(self.size[1], self.side[1])
        self.tops, self.lefts = (window_starts(*lengths) for lengths in
                                 zip(self.size, self.side, stride, strict=True))
        self.top = 0  # the first row of the sums
        self.sums = self.weights = None  # (K, side, W) and (side, W), from the first tile with data on

    def rows(self):
        """Yield (rows, probabilities (1, K, r, W) float32); 0 where the image has no data."""
        count = len(self.tops) * len(self.lefts)  # a bar of a few would only flicker
        with tqdm(total=count, desc="tiles", leave=False, disable=None if count >= 50 else True) as bar:
            for index, top in enumerate(self.tops):
                self.move_to(top)
                self.add_row_of_tiles(index, bar)
                end = self.tops[index + 1] if index + 1 < len(self.tops) else self.size[0]
                step = max(1, BLOCK_VALUES["cpu"] // (self.num_classes * self.width))
                for first in range(top, end, step):
                    rows = slice(first, min(end, first + step))
                    yield rows, self.blended(rows)

    def move_to(self, top):
        """Keep, of the sums over the rows from self.top on, those from `top` on."""
        if self.sums is not None:
            for plane in (*self.sums, self.weights):  # (h, W), one after the other: they are large
                remaining = plane[top - self.top:].clone()
                plane.zero_()
                plane[:len(remaining)] = remaining
        self.top = top

    def crop(self, top, left):
        """Return a tile (1, C, h, w) of the image, which its last pixels continue where it is smaller than
        that; None where it has no data.
        """
        sides = [min(side, length) for side, length in zip(self.side, self.size, strict=True)]
        if isinstance(self.image, torch.Tensor):
            crop = self.image[..., top:top + sides[0], left:left + sides[1]]
        else:
            crop = self.image.read(top, left, *sides)
        return None if crop is None else continued(crop, self.side)

    def add_row_of_tiles(self, row, bar):
        """Add the probabilities of a row of tiles to the sums."""
        high, wide = self.side
        vertical = edge_weights(self.tops, row, high)
        for first in range(0, len(self.lefts), self.batch_size):
            columns = range(first, min(first + self.batch_size, len(self.lefts)))
            crops = {column: self.crop(self.tops[row], self.lefts[column]) for column in columns}
            bar.update(len(columns))
            crops = {column: crop for column, crop in crops.items() if crop is not None}
            if not crops:
                continue
            probabilities = self.probabilities(torch.cat(list(crops.values())))  # (n, K, h, w)
            if self.sums is None:
                self.sums = probabilities.new_zeros(self.num_classes, high, self.width)
                self.weights = probabilities.new_zeros(high, self.width)
            for column, tile in zip(crops, probabilities, strict=True):
                left = self.lefts[column]
                weight = vertical[:, None] * edge_weights(self.lefts, column, wide)  # (h, w)
                weight = weight.to(tile.device)
                self.sums[..., left:left + wide].addcmul_(tile, weight)
                self.weights[:, left:left + wide] += weight

    def blended(self, rows):
        """Return the probabilities (1, K, r, W) of rows that are complete."""
        if self.sums is None:
            return torch.zeros(1, self.num_classes, rows.stop - rows.start, self.size[1])
        inside = slice(rows.start - self.top, rows.stop - self.top)
        weights = self.weights[inside, :self.size[1]].clamp(min=SMALLEST)
        return (self.sums[:, inside, :self.size[1]] / weights)[None]


# --- from views and tiles to label maps -------------------------------------------------------------------
def scored_rows(views, size):
    """Yield (rows, values (1, K, r, W), whether they are probabilities) that cover an image at `size` (H, W).

    views: an iterable, of B = 1. The values are logits of a single view, the mean probabilities of several.
    Logits are upsampled (bilinear) a few rows at a time, so that memory does not grow with H x W x K. Several
    views are summed as probabilities at H x W where that stays below LARGE_SUM, else all of them are kept.
    """
    views = iter(views)
    first, second = next(views), next(views, None)
    logits, geometry = first
    shape = 1, logits.shape[1], *size
    if second is None:
        for _, rows in block_slices(shape, logits.device):
            yield rows, pixels(logits, geometry, size, rows), False
        return
    views = chain([first, second], views)
    if math.prod(shape) <= LARGE_SUM:
        yield slice(0, size[0]), mean_probabilities(views, size), True
        return
    views = list(views)
    for _, rows in block_slices(shape, logits.device):
        yield rows, mean_probabilities(views, size, rows), True


def scored_tile_rows(tiles, size):
    """As scored_rows, of Tiles; at another size than the image's, all of it is kept."""
    if tuple(size) == tiles.size:
        for rows, probabilities in tiles.rows():
            yield rows, probabilities, True
        return
    logits = torch.cat([probabilities.clamp(min=SMALLEST).log() for _, probabilities in tiles.rows()], 2)
    yield from scored_rows([(logits, geometry_of(tiles.size))], size)


def label_map(scored, size):
    """Return class ids (H, W) uint8 from what scored_rows yields."""
    pred = None
    for rows, values, _ in scored:
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


def scores_of(scored, size, every_class=False):
    """Return the Scores of one image from what scored_rows yields."""
    pred, confidence, all_classes = np.empty(size, np.uint8), np.empty(size, np.float32), None
    for rows, values, are_probabilities in scored:
        probabilities = values if are_probabilities else values.softmax(1)
        pred[rows] = class_ids(values)[0].cpu().numpy()
        confidence[rows] = probabilities.amax(1)[0].cpu().numpy()
        if every_class:
            if all_classes is None:
                all_classes = np.empty((probabilities.shape[1], *size), np.float16)
            all_classes[:, rows] = probabilities[0].cpu().numpy()
    return Scores(pred, confidence, all_classes)


def check_images(images):
    """Raise InputError where images are not (B, C, H, W) uint8: 0..1 in float would be taken for black."""
    if images.ndim != 4 or images.dtype != torch.uint8 or not images.numel():
        raise InputError("images are (B, C, H, W) uint8 with values from 0 to 255, not "
                         f"{tuple(images.shape)} of {str(images.dtype).removeprefix('torch.')}")


# --- the predictor ----------------------------------------------------------------------------------------
class Predictor:
    """A model ready to use: predictor(images (B, C, H, W) uint8) -> label maps (B, H, W) uint8 numpy.

    model, checkpoint: as checkpoint.load_model returns them. classes = [[name, [R, G, B]], ...]; rule: the
    ImageRule by which it reads images, not strict; str() says protocol and device. protocol: as
    choose_protocol returns it (default: the checkpoint's); backend: as --backend; expected: about how many
    images will come, None = very many. Raises InputError for a device or backend that does not work.
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
        self.rule = ImageRule.of(checkpoint.get("image_rule"))
        self.protocol = protocol or choose_protocol(checkpoint)
        if not exported and backend != "torch":
            self.model = self.choose_backend(backend, expected)

    def choose_backend(self, backend, expected):
        """Return the model that --backend means: auto tries OpenVINO on a CPU where its start may pay."""
        one_size = self.protocol.scales == (1.0,)
        if backend == "auto":
            worth_it = expected is None or expected >= WORTH_CONVERTING
            if self.device.type != "cpu" or not (worth_it and one_size and is_installed("openvino")):
                return self.model
            other = convert(self.model, self.protocol.window, "openvino")
            images = torch.zeros(1, self.rule.channels, *self.protocol.window, dtype=torch.uint8)
            seconds = [shortest_time(self.run_once, model, images) for model in (self.model, other)]
            return other if seconds[1] < seconds[0] else self.model
        if self.device.type != "cpu" or not one_size:
            raise InputError(f"--backend {backend} runs on the CPU and at one size: add --device cpu, and "
                             "leave out --tta ms; a GPU runs exported .onnx files (export.py)")
        return convert(self.model, self.protocol.window, backend)

    @torch.inference_mode()
    def run_once(self, model, images):
        """Run a model on images (B, C, H, W), for timing."""
        with self.precision.autocast():
            model.logits(images)

    def predict(self, image):
        """Return the label map (H, W) uint8 of an image: a path, or a numpy array (H, W, C) in type and bands
        as the files of the training, of most models (H, W, 3) uint8 RGB, or (H, W) gray.
        """
        if isinstance(image, (str, Path)):
            photo = self.read(image)
        else:
            photo = self.rule.convert_array(np.asarray(image))
        return photo.ignored(self(photo.image[None])[0])

    def read(self, path):
        """Return an image file as a Photo; says on stderr where it does not fit the images of the training.
        Raises InputError.
        """
        photo = self.rule.read(path)
        if photo.doubt:
            tqdm.write(f"warning: {photo.doubt}", file=sys.stderr)
        return photo

    def rows(self, image, size, batch_size=8):
        """Yield what scored_rows yields, of an image (1, C, H, W) uint8 or a Raster, at `size` = (H, W)."""
        protocol = self.protocol
        if not protocol.tile:
            return scored_rows(views_of(self.model, image, protocol, self.precision, batch_size), size)
        resized_tiles = protocol._replace(tile=0.0, stride=())

        def probabilities(crops):
            views = views_of(self.model, crops, resized_tiles, self.precision)
            return mean_probabilities(views, protocol.side)

        num_classes = self.model.num_classes
        return scored_tile_rows(Tiles(probabilities, image, protocol.side, protocol.stride, num_classes,
                                      batch_size), size)

    @torch.inference_mode()
    def scores(self, images, every_class=False):
        """Return the Scores of one image (1, C, H, W) uint8; every_class: with the probabilities of all.
        Raises InputError for other tensors.
        """
        check_images(images)
        size = tuple(images.shape[-2:])
        return scores_of(self.rows(images, size), size, every_class)

    @torch.inference_mode()
    def predict_at(self, images, sizes, batch_size=8):
        """Return the class ids of images (B, C, H, W) uint8, a list of (H, W) uint8 of the `sizes`, on the
        device. Raises InputError for other tensors.
        """
        check_images(images)
        if self.protocol.tile or len(images) == 1:  # the views of a single image need not be kept
            return [label_map(self.rows(image, size, batch_size), size)
                    for image, size in zip(images.split(1), sizes, strict=True)]
        views = list(views_of(self.model, images, self.protocol, self.precision, batch_size))
        preds = []
        for index, size in enumerate(sizes):
            views_of_image = [(logits[index:index + 1], geometry) for logits, geometry in views]
            preds.append(label_map(scored_rows(views_of_image, size), size))
        return preds

    def label_maps(self, images):
        """Predict images at their own size: (B, 3, H, W) uint8 -> (B, H, W) uint8 on the device."""
        return torch.stack(self.predict_at(images, [tuple(images.shape[-2:])] * len(images)))

    def begin(self, images, submit=None):
        """Begin with frames (B, 3, H, W) uint8; return a function that returns their label maps (B, H, W)
        uint8 on the device: those of label_maps, on a CPU by class_map.

        submit: that of an Executor, in whose thread the network runs until then. Raises InputError.
        """
        check_images(images)
        size, protocol = tuple(images.shape[-2:]), self.protocol
        many = protocol.tile or protocol.flip or len(protocol.scales) > 1

        def network():
            if self.device.type != "cpu" or many:
                return self.predict_at(images, [size] * len(images))
            return next(views_of(self.model, images, protocol, self.precision))

        def maps(result):
            if isinstance(result, list):
                return torch.stack(result)
            logits, geometry = result
            return torch.stack([class_map(values, geometry, size) for values in logits.split(1)])

        if submit is None:
            result = network()
            return lambda: maps(result)
        future = submit(network)
        return lambda: maps(future.result())

    def __call__(self, images):
        return self.label_maps(images).cpu().numpy()

    def __str__(self):
        exported = isinstance(self.model, ExportedModel)
        runs_on = self.model.name if exported else f"{self.device}, torch {self.precision}"
        return f"{self.protocol} on {runs_on}"
