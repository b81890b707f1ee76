"""What is learned from strokes, on features that are computed once.

    learner = Learner(model, (518, 518), cache.features, [0, 1, 2])     # a Segmenter with the detail head
    learner.learn({0: strokes})                 # {number: (518, 518) uint8 class ids, 255 = not painted}
    shares = learner.shares(1)                  # (1, K, 518, 518), probabilities

The linear part of the detail head is the logistic regression of the painted pixels on their features and on
the lines that they lie on, solved anew each time; all classes weigh alike, however much of each was painted.
A guided filter lets what the features tell, patch by patch, follow the edges of the image; what the lines
tell, pixel by pixel, is added to it.
"""
import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from config import IGNORE
from models.upsampling import pixels

PER_CLASS = 100  # painted pixels of a class in a photo that are learned from
SURE, KNOWN = 0.9, 0.1  # of a trained head: probability of the pixels it keeps; their weight against strokes
PENALTY = 1.0  # by the number of classes: on the squared distance of the weights from where they start
LINE_PENALTY = 0.1  # on the squared weights of lines
SCALES = 0.7, 1.6, 3.5  # pixels: how thick lines are
ITERATIONS = 50  # of L-BFGS, at most
NEAR = 8, 8  # fields of a photo: where one is painted in, the prediction is not doubted
LEAST = 1e-6  # probability that the features leave to a class, for the lines to say more
ABSENT = -30.0  # logit of a class that nobody painted yet
COARSE, RADIUS, SMOOTH = 4, 4, 1e-3  # of the guided filter: pixels per cell, cells, variance that is no edge


@dataclass
class Painted:
    """The pixels of a photo that are learned from: strokes (h, w) uint8 at the size of the network; labels
    (n,) of some of its pixels; values (n, D), the features there, and lines (n, 9); corrections (n, K), what
    a trained head adds to its linear part.
    """

    strokes: np.ndarray
    labels: torch.Tensor
    values: torch.Tensor
    lines: torch.Tensor
    corrections: torch.Tensor


class Learner:
    """Learns the linear part of a Segmenter's detail head from strokes, and weights of lines beside it; all
    else of the Segmenter stays as it is.

    size: (h, w) of the photos as the network sees them, multiples of its patch size; features: f(number) ->
    Features of a photo, as a feature cache gives them; looked_at: numbers of photos that give the statistics
    of the features, or, if the head is_trained, pixels where it is sure, which it goes on to predict as it
    does; seed: of which pixels are learned from.
    """

    def __init__(self, model, size, features, looked_at, is_trained=False, seed=0):
        self.model, self.size, self.features = model.eval().requires_grad_(False), tuple(size), features
        self.linear, self.is_trained = model.head.direct, is_trained
        self.random, self.painted = np.random.default_rng(seed), {}
        layer = self.linear.conv_seg
        self.start = [values.clone() if is_trained else torch.zeros_like(values)
                      for values in (layer.weight[:, :, 0, 0], layer.bias)]
        self.standard = nn.BatchNorm2d(3 * len(SCALES), eps=1e-6, affine=False).to(layer.bias.device)
        self.line_weight = layer.bias.new_zeros(len(layer.bias), 3 * len(SCALES))  # (K, 9)
        self.take_statistics(looked_at)
        self.known = [self.sure_pixels(number) for number in looked_at] if is_trained else []

    @torch.no_grad()
    def take_statistics(self, numbers):
        """Give the BatchNorm of lines, and that of features unless a head is trained, those of photos."""
        norms = [self.standard] if self.is_trained else [self.standard, self.linear.bn]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over what it sees
            norm.train()
        for number in numbers:
            features = self.features(number)
            self.lines(features)
            if not self.is_trained:
                self.linear.bn(torch.cat(self.finished(features).maps, dim=1))
        for norm in norms:
            norm.eval()

    def lines(self, features):
        """Return the lines (1, 9, *size) of a photo, standardized."""
        seen = torch.from_numpy(line_filters(features.image[0].permute(1, 2, 0).cpu().numpy()))
        return self.standard(seen.permute(2, 0, 1)[None].to(self.start[1]))

    def sure_pixels(self, number):
        """Return Painted of pixels of a photo where a trained head is sure."""
        confidence, label = self.shares(number)[0].cpu().max(0)  # (h, w)
        return self.painted_of(number, np.where(confidence >= SURE, label, IGNORE).astype(np.uint8))

    def finished(self, features):
        """Return what the head takes of the Features of a cache."""
        return self.model.finish(features.to(self.model.mean.device))

    # --- learning
    def learn(self, strokes):
        """Learn from {number: strokes (h, w) uint8 at the size of the network, 255 = not painted}."""
        for number, drawn in strokes.items():
            self.take(number, drawn)
        for number in self.painted.keys() - strokes.keys():
            del self.painted[number]
        if self.painted:
            self.fit()
        else:
            self.set_weights(*self.start, torch.zeros_like(self.line_weight))

    @torch.no_grad()
    def set_weights(self, weight, bias, line_weight):
        """Give the linear part its weights (K, D) and biases (K,), and lines theirs (K, 9)."""
        self.linear.conv_seg.weight[:, :, 0, 0] = weight
        self.linear.conv_seg.bias.copy_(bias)
        self.line_weight = line_weight.detach()

    def take(self, number, strokes):
        """Keep what is painted on a photo, and the features there; once for the same strokes."""
        if number in self.painted and np.array_equal(self.painted[number].strokes, strokes):
            return
        self.painted.pop(number, None)
        if (strokes != IGNORE).any():
            self.painted[number] = self.painted_of(number, strokes.copy())  # the caller may paint on

    @torch.no_grad()
    def painted_of(self, number, strokes):
        """Return the Painted of a photo; strokes: (h, w) uint8 at the size of the network."""
        points = [self.some(np.argwhere(strokes == label)) for label in np.unique(strokes[strokes != IGNORE])]
        points = np.concatenate([np.empty((0, 2), int), *points])  # (n, 2)
        grid = torch.from_numpy((points[:, ::-1] + 0.5) / self.size[::-1] * 2 - 1)  # x before y
        grid, bias = grid.to(self.start[1]), self.start[1]

        def at_points(maps):  # (1, D, h, w) -> (n, D)
            values = F.grid_sample(maps.float(), grid[None, None], padding_mode="border", align_corners=False)
            return values[0, :, 0].T.contiguous()

        cached = self.features(number)
        lines = self.lines(cached)[0, :, points[:, 0], points[:, 1]].T
        features = self.finished(cached)
        maps = self.linear.bn(torch.cat(features.maps, dim=1))  # (1, D, h, w)
        corrections = bias.new_zeros(len(points), len(bias))
        if self.is_trained:
            corrections = at_points(self.model.head(features)) - at_points(self.linear.conv_seg(maps))
        labels = torch.from_numpy(strokes[tuple(points.T)]).to(bias.device, torch.int64)
        return Painted(strokes, labels, at_points(maps), lines, corrections)

    def some(self, points):
        """Return PER_CLASS of the points (m, 2), or all of them."""
        return points[self.random.permutation(len(points))[:PER_CLASS]]

    def fit(self):
        """Solve the linear part for all painted points, from where it stands."""
        everything = [*self.painted.values(), *self.known]
        labels, values, lines, corrections = (  # (n,), (n, D), (n, 9), (n, K)
            torch.cat([getattr(painted, name) for painted in everything])
            for name in ("labels", "values", "lines", "corrections"))
        drawn = sum(len(painted.labels) for painted in self.painted.values())
        layer, num_classes = self.linear.conv_seg, len(self.start[1])
        weights = torch.cat([balanced(labels[:drawn], num_classes),
                             KNOWN * balanced(labels[drawn:], num_classes)])  # (n,)
        absent = (torch.bincount(labels, minlength=num_classes) == 0) & (not self.is_trained)
        weight, bias = layer.weight[:, :, 0, 0].clone(), layer.bias.clone()
        bias[bias <= ABSENT] = 0
        line_weight = self.line_weight.clone()
        moving = [values.requires_grad_(True) for values in (weight, bias, line_weight)]
        solver = torch.optim.LBFGS(moving, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss():
            solver.zero_grad()
            logits = values @ weight.T + bias + lines @ line_weight.T + corrections
            logits = logits.masked_fill(absent, ABSENT)
            error = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
            distance = (weight - self.start[0]).square().sum()
            if self.is_trained:  # else biases are free: they say how rare a class is
                distance = distance + (bias - self.start[1]).square().sum()
            error = error + PENALTY / num_classes * distance + LINE_PENALTY * line_weight.square().sum()
            error.backward()
            return error

        solver.step(loss)
        self.set_weights(weight, bias.masked_fill(absent, ABSENT), line_weight)

    # --- what was learned
    def shares(self, number):
        """Return the probabilities (1, K, *size) of a photo."""
        return self.shares_of(self.features(number))

    @torch.inference_mode()
    def shares_of(self, features):
        """Features of a feature cache, of a photo -> probabilities (1, K, *size)."""
        finished = self.finished(features)
        head = self.model.head if self.is_trained else self.linear  # an untrained head adds nothing to it
        coarse = [max(1, side // COARSE) for side in self.size]
        logits = pixels(head(finished).float(), finished.geometry, coarse)
        shares = guided(logits.softmax(1), features.image.to(logits.device).float() / 255)
        of_lines = torch.einsum("ke,behw->bkhw", self.line_weight, self.lines(features))
        absent = self.linear.conv_seg.bias <= ABSENT
        return (shares.clamp(min=LEAST).log() + of_lines + ABSENT * absent[:, None, None]).softmax(1)

    def uncertainty(self, number):
        """Return the mean entropy of the prediction of a photo, 0 to 1, where nothing is painted near."""
        shares = self.shares(number)
        entropy = -(shares * shares.clamp(min=LEAST).log()).sum(1, keepdim=True) / math.log(shares.shape[1])
        if number in self.painted:
            drawn = torch.from_numpy(self.painted[number].strokes != IGNORE).to(entropy)[None, None]
            near = F.adaptive_max_pool2d(drawn, NEAR)
            entropy = F.adaptive_avg_pool2d(entropy, NEAR) * (1 - near)
        return float(entropy.mean())


def at_size(labels, size):
    """Return labels (H, W) uint8 at `size` = (h, w): every one that is not 255 reaches it, however thin."""
    y, x = np.nonzero(labels != IGNORE)
    smaller = np.full(size, IGNORE, np.uint8)
    smaller[y * size[0] // labels.shape[0], x * size[1] // labels.shape[1]] = labels[y, x]
    return smaller


def line_filters(image):
    """Return what tells the lines of an image (H, W, C) uint8 from what is around them, (H, W, 9) float32: at
    each of SCALES the eigenvalues of the second derivatives of its brightness (Frangi et al. 1998), and how
    much brighter it is than its surroundings.
    """
    brightness, seen = image.mean(2, dtype=np.float32) / 255, []
    for scale in SCALES:
        smooth, inner = (cv2.GaussianBlur(brightness, (0, 0), width) for width in (scale, 0.66 * scale))
        xx, xy, yy = (cv2.Sobel(smooth, cv2.CV_32F, *order) for order in ((2, 0), (1, 1), (0, 2)))
        seen += [*eigenvalues(xx, xy, yy), inner - smooth]
    return np.stack(seen, 2)


def eigenvalues(a, b, c):
    """Return both eigenvalues of the symmetric matrices [[a, b], [b, c]], arrays of one shape."""
    middle, half = (a + c) / 2, np.sqrt(((a - c) / 2) ** 2 + b * b)
    return middle + half, middle - half


def balanced(labels, num_classes):
    """Return a weight of every label (n,): each class as much as the others, 1 in all."""
    counts = torch.bincount(labels, minlength=num_classes)
    return 1 / (counts[labels] * (counts > 0).sum())


def guided(shares, guide):
    """Return shares (B, K, h, w) at the size of a guide (B, C, H, W), 0 to 1, along its edges.

    The fast guided filter (He and Sun 2015, arXiv 1505.00996): around every place the shares are a linear
    function of the colors of the guide, fitted on the coarse grid.
    """
    colors, count = F.interpolate(guide, size=shares.shape[-2:], mode="area"), guide.shape[1]
    mean, expected = box(colors), box(shares)
    squares = box((colors[:, :, None] * colors[:, None]).flatten(1, 2)).unflatten(1, (count, count))
    products = box((colors[:, :, None] * shares[:, None]).flatten(1, 2)).unflatten(1, (count, -1))
    covariance = squares - mean[:, :, None] * mean[:, None]  # (B, C, C, h, w)
    with_shares = products - mean[:, :, None] * expected[:, None]  # (B, C, K, h, w)
    noise = SMOOTH * torch.eye(count, device=guide.device)
    slopes = torch.linalg.solve(covariance.movedim((1, 2), (-2, -1)) + noise,
                                with_shares.movedim((1, 2), (-2, -1))).movedim((-2, -1), (1, 2))
    offsets = expected - (slopes * mean[:, :, None]).sum(1)  # (B, K, h, w)
    slopes, offsets = (F.interpolate(box(values), size=guide.shape[-2:], mode="bilinear")
                       for values in (slopes.flatten(1, 2), offsets))
    shares = ((slopes.unflatten(1, (count, -1)) * guide[:, :, None]).sum(1) + offsets).clamp(min=0)
    return shares / shares.sum(1, keepdim=True)


def box(values):
    """(B, C, h, w) -> the mean over the cells within RADIUS."""
    padded = F.pad(values, [RADIUS] * 4, mode="replicate")
    return F.avg_pool2d(padded, 2 * RADIUS + 1, stride=1)
