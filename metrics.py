"""Segmentation metrics, all from one confusion matrix over the whole data set.

    matrix = ConfusionMatrix(num_classes=21)
    matrix.update(preds, masks)                # any number of times, any sizes
    matrix.miou(), matrix.per_class_iou(), matrix.pixel_accuracy()
    low, high = bootstrap_interval(counts)     # counts (N, 3, K) of every image: 95 % interval of the mIoU

A class that occurs in neither truth nor prediction has no IoU: NaN per class, left out of every mean.
"""
import math
import os
import re
from pathlib import Path

import cv2
import numpy as np
import torch

from config import IGNORE, InputError

FEW = 10  # images or groups below which a bootstrap interval is much too narrow to claim anything
BOUNDARY_TOLERANCE = 0.0075  # of the image's diagonal, as Csurka et al. use
BOUNDARY_BAND = 0.02  # of the diagonal: ignored pixels up to this wide between two classes are their border


class ConfusionMatrix:
    """counts[t, p] = pixels of true class t predicted as p, int64, never averaged over batches."""

    def __init__(self, num_classes, device="cpu"):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, preds, masks):
        """Add predictions and truth of the same shape: class ids 0..K-1; masks may hold 255 = ignore.

        Raises ValueError where the shapes differ.
        """
        if preds.shape != masks.shape:
            raise ValueError(f"preds {tuple(preds.shape)} and masks {tuple(masks.shape)} differ in shape")
        size = self.num_classes ** 2
        pairs = masks.long() * self.num_classes + preds.long()
        pairs = torch.where(masks == IGNORE, size, pairs).flatten()  # ignored pixels fall into one extra bin
        # scatter_add_, because bincount looks at its values first and so makes the GPU wait
        bins = torch.zeros(size + 1, dtype=torch.int64, device=pairs.device)
        self.counts += bins.scatter_add_(0, pairs, torch.ones_like(pairs))[:size].view_as(self.counts)

    def merge(self, other):
        """Add the counts of another matrix over the same classes."""
        self.counts += other.counts.to(self.counts.device)

    def sums(self):
        """Return right, true and predicted pixels of every class, (K,) float64 each, on the CPU."""
        counts = self.counts.cpu().double()  # MPS has no float64
        return counts.diag(), counts.sum(1), counts.sum(0)

    def per_class_iou(self):
        """Intersection over union per class, (K,) float64; NaN where the class is absent. Jaccard (1912)."""
        right, true, predicted = self.sums()
        return right / (true + predicted - right)

    def per_class_dice(self):
        """Dice coefficient (F1) per class, (K,) float64; NaN where the class is absent. Dice (1945)."""
        right, true, predicted = self.sums()
        return 2 * right / (true + predicted)

    def miou(self):
        """Mean IoU over the classes that occur in truth or prediction; NaN where no pixel counted."""
        return self.per_class_iou().nanmean().item()

    def mean_dice(self):
        """Mean Dice over the classes that occur in truth or prediction; NaN where no pixel counted."""
        return self.per_class_dice().nanmean().item()

    def pixel_accuracy(self):
        """Share of counted pixels that are right; NaN where no pixel counted."""
        right, true, _ = self.sums()
        return (right.sum() / true.sum()).item()

    def per_class_recall(self):
        """Share of every class's true pixels that are right, (K,) float64; NaN where it has none."""
        right, true, _ = self.sums()
        return right / true

    def per_class_precision(self):
        """Share of every class's predicted pixels that are right, (K,) float64; NaN where never predicted."""
        right, _, predicted = self.sums()
        return right / predicted

    def mean_class_accuracy(self):
        """Mean recall over the classes that occur in the truth; NaN where no pixel counted."""
        return self.per_class_recall().nanmean().item()

    def frequency_weighted_iou(self):
        """Mean IoU weighted by each class's share of the true pixels; NaN where no pixel counted."""
        _, true, _ = self.sums()
        return (true / true.sum() * self.per_class_iou().nan_to_num(0.0)).sum().item()

    def absent(self):
        """Ids of the classes that occur in neither truth nor prediction: left out of the means."""
        _, true, predicted = self.sums()
        return torch.nonzero(true + predicted == 0).flatten().tolist()


def best_row(history):
    """Return the row of a history with the best val_miou, the first of equals; NaN counts as worst."""
    return max(history, key=lambda row: row["val_miou"] if math.isfinite(row["val_miou"]) else -1.0)


def has_stalled(history, patience):
    """Return whether the last `patience` epochs of a history (0: never) brought no better val_miou."""
    return bool(patience and history) and len(history) - best_row(history)["epoch"] >= patience


# --- boundaries -------------------------------------------------------------------------------------------
def boundary_f1(pred, truth, num_classes):
    """Return the boundary F1 of one image, (K,) float64; NaN for a class in neither pred nor truth, or
    without a known border in both: as for an absent class, agreeing on nothing earns no score.

    pred, truth: (H, W) uint8 class ids, truth with 255 = ignore. A class that is in only one of them scores
    0. Boundaries as in boundary_pixels; pred is ignored where truth is. Precision is the share of predicted
    boundary pixels within BOUNDARY_TOLERANCE of a true one, recall the reverse. Csurka et al., What is a
    good evaluation measure for semantic segmentation?, BMVC 2013.
    """
    pred = np.where(truth == IGNORE, IGNORE, pred).astype(np.uint8)
    pred_edges, truth_edges = boundary_pixels(pred), boundary_pixels(truth)
    radius = max(1.0, BOUNDARY_TOLERANCE * math.hypot(*truth.shape))
    scores = np.full(num_classes, np.nan)
    for id in np.union1d(pred, truth).tolist():
        if id >= num_classes:
            continue
        in_pred, in_truth = pred == id, truth == id
        if in_pred.any() and in_truth.any():
            scores[id] = class_boundary_f1(in_pred & pred_edges, in_truth & truth_edges, radius)
        else:
            scores[id] = 0.0
    return scores


def label_range(labels, window):
    """Return the highest and the lowest label around each pixel, (H, W) uint8 each, within a `window`.

    labels: (H, W) uint8. 255 = ignore does not count: where there is nothing else, they are 0 and 255.
    """
    lowered = np.where(labels == IGNORE, 0, labels).astype(np.uint8)  # 255 is already neutral in a minimum
    return cv2.dilate(lowered, window), cv2.erode(labels, window)


def boundary_pixels(labels):
    """Return (H, W) bool: pixels that touch (4 neighbors) another class, or that touch an ignored pixel and
    have another class within BOUNDARY_BAND: VOC and Pets draw an ignored line around every object.

    labels: (H, W) uint8, 255 = ignore.
    """
    ignored = labels == IGNORE
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    side = 2 * max(1, int(BOUNDARY_BAND * math.hypot(*labels.shape))) + 1

    def has_other_class(window):
        highest, lowest = label_range(labels, window)
        return (highest != labels) | (lowest != labels)

    edges = has_other_class(cross)
    if ignored.any():
        touches_ignored = cv2.dilate(ignored.astype(np.uint8), cross) > 0
        edges |= touches_ignored & has_other_class(np.ones((side, side), np.uint8))
    return edges & ~ignored


def class_boundary_f1(pred_edges, truth_edges, radius):
    """Return the F1 of predicted and true boundary pixels of a class, (H, W) bool, within `radius` pixels.

    NaN where neither has any, 0 where only one has.
    """
    if not (pred_edges.any() and truth_edges.any()):
        return 0.0 if pred_edges.any() or truth_edges.any() else math.nan
    rows, columns = np.nonzero(pred_edges | truth_edges)  # no pixel outside of their box matters
    box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    pred_edges, truth_edges = pred_edges[box], truth_edges[box]

    def near(edges):
        distance = cv2.distanceTransform((~edges).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return distance <= radius + 1e-4

    precision, recall = near(truth_edges)[pred_edges].mean(), near(pred_edges)[truth_edges].mean()
    return 2 * precision * recall / max(precision + recall, 1e-12)


# --- images and groups of images ---------------------------------------------------------------------------
def counts_per_image(records, num_classes):
    """Return (N, 3, K) int64: correct, true and predicted pixels of every record and class.

    records: of evaluate.py's metrics.json, whose `cells` are [[truth, prediction, pixels], ...].
    """
    counts = np.zeros((len(records), 3, num_classes), np.int64)
    for row, record in zip(counts, records, strict=True):
        for truth, pred, pixels in record["cells"]:
            row[0, truth] += pixels if truth == pred else 0
            row[1, truth] += pixels
            row[2, pred] += pixels
    return counts


def nan_mean(values):
    """Return the mean of the values that are not NaN; NaN where there is none (np.nanmean warns of that)."""
    values = np.asarray(values, float)
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def nan_mean_per_class(values):
    """Return the mean of each column of values (N, K) without its NaN: (K,), NaN where a column has no value.
    """
    return np.array([nan_mean(column) for column in np.asarray(values, float).T])


def group_images(names, pattern):
    """Return the group of each image file, a list of texts: what the first bracket of the regular expression
    matches in its path below the folder that all images share, or the entire match; the names themselves
    where there is no pattern.

    Raises InputError for an invalid pattern, for one that does not match a path or makes a single group.
    """
    if not pattern:
        return list(names)
    base = os.path.commonpath([os.path.dirname(name) for name in names])
    groups = []
    for name in names:
        path = Path(os.path.relpath(name, base)).as_posix()
        try:
            match = re.search(pattern, path)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"--group-by {pattern} is not a regular expression ({error})") from None
        if match is None:
            raise InputError(f"--group-by {pattern} does not match {path}: every image needs a group")
        groups.append(match[1 if match.re.groups else 0] or "")
    if len(set(groups)) == 1:
        raise InputError(f"--group-by {pattern} puts all images in one group, {groups[0]!r}; at least two "
                         "are needed")
    return groups


def sum_groups(counts, groups):
    """Return (G, 3, K): counts (N, 3, K) of images summed over their groups, in the order of the groups."""
    _, numbers = np.unique(groups, return_inverse=True)
    summed = np.zeros((numbers.max() + 1, *np.shape(counts)[1:]), np.int64)
    np.add.at(summed, numbers, counts)
    return summed


# --- how certain a score is -------------------------------------------------------------------------------
def miou_from_counts(counts):
    """Return the mIoU (...) of counts (..., 3, K): correct, true and predicted pixels; NaN where nothing
    counted.
    """
    correct, truth, pred = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    union = truth + pred - correct
    present = union > 0
    ious = np.divide(correct, union, out=np.zeros_like(correct), where=present)
    classes = present.sum(-1)
    return np.divide(ious.sum(-1), classes, out=np.full(classes.shape, np.nan), where=classes > 0)


def resampled_mious(counts, samples, seed):
    """Return the mIoU of `samples` sets of images drawn with replacement, (samples,); counts (..., N, 3, K).

    Of several models (seeds) along the first dimensions, the mean of their mIoU.
    """
    counts = np.asarray(counts, np.float64)
    (images, *shape), generator = counts.shape[-3:], np.random.default_rng(seed)
    flat = counts.reshape(-1, images, math.prod(shape))  # (models, N, 3 * K)
    mious = []
    for start in range(0, samples, 100):  # 100 at a time: memory must not grow with samples x images
        size = min(100, samples - start)
        draws = generator.multinomial(images, np.full(images, 1 / images), size=size)  # (size, N)
        sums = (draws.astype(np.float64) @ flat).reshape(-1, size, *shape)  # (models, size, 3, K)
        mious.append(miou_from_counts(sums).mean(0))
    return np.concatenate(mious)


def bootstrap_interval(counts, samples=2000, seed=0):
    """Return the 95 % percentile bootstrap interval (low, high) of the mIoU over images (Efron, 1979).

    counts: (N, 3, K) correct, true and predicted pixels of every image and class, or of every group of images
    that are not independent of each other (sum_groups); (S, N, 3, K) for the mean mIoU of S models.
    """
    low, high = np.nanpercentile(resampled_mious(counts, samples, seed), [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(counts_a, counts_b, samples=10_000, seed=0):
    """Compare two models on the same images: return dict(difference, low, high, p).

    difference = mIoU of b - mIoU of a with its 95 % interval; p = share of resampled image sets in which the
    difference does not have the sign of `difference`, doubled (two-sided). counts as in bootstrap_interval.
    """
    miou_a, miou_b = (np.mean(miou_from_counts(np.sum(counts, -3))) for counts in (counts_a, counts_b))
    difference = float(miou_b - miou_a)
    resampled = resampled_mious(counts_b, samples, seed) - resampled_mious(counts_a, samples, seed)
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    opposite = np.mean(resampled <= 0) if difference > 0 else np.mean(resampled >= 0)
    return dict(difference=difference, low=float(low), high=float(high), p=float(min(1.0, 2 * opposite)))
