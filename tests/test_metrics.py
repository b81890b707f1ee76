"""The confusion matrix against torchmetrics and scikit-learn; boundary F1 and bootstrap against loops."""

import math

import numpy as np
import pytest
import torch
from conftest import blocks
from sklearn.metrics import (balanced_accuracy_score, confusion_matrix, f1_score, jaccard_score,
                             precision_score, recall_score)  # fmt: skip
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

import metrics
from metrics import (ConfusionMatrix, bootstrap_interval, boundary_f1, boundary_pixels, miou_from_counts,
                     paired_bootstrap)  # fmt: skip


def random_case(classes=6, absent=(), seed=0):
    """Return predictions and masks (3, 17, 23) without the absent classes, a fifth of the pixels ignored."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.tensor([id for id in range(classes) if id not in absent])
    preds = present[torch.randint(len(present), (3, 17, 23), generator=generator)]
    masks = present[torch.randint(len(present), (3, 17, 23), generator=generator)]
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = 255
    return preds, masks


@pytest.mark.parametrize("absent", [(), (2,), (0, 5)])
def test_equals_independent_references(absent):
    preds, masks = random_case(absent=absent)
    matrix = ConfusionMatrix(6)
    for pred, mask in zip(preds, masks, strict=True):
        matrix.update(pred.to(torch.uint8), mask)
    counted = masks != 255
    truth, guess = masks[counted].numpy(), preds[counted].numpy()
    present = [id for id in range(6) if id not in absent]
    assert torch.equal(matrix.counts, MulticlassConfusionMatrix(6, ignore_index=255)(preds, masks))
    assert (matrix.counts.numpy() == confusion_matrix(truth, guess, labels=range(6))).all()
    assert matrix.absent() == list(absent)
    miou = jaccard_score(truth, guess, labels=present, average="macro")
    assert matrix.miou() == pytest.approx(miou, abs=1e-12)
    assert matrix.miou() == pytest.approx(MulticlassJaccardIndex(6, ignore_index=255)(preds, masks).item())
    for values, reference in ((matrix.per_class_iou(), jaccard_score), (matrix.per_class_dice(), f1_score),
                              (matrix.per_class_precision(), precision_score),
                              (matrix.per_class_recall(), recall_score)):  # fmt: skip
        assert values[present].numpy() == pytest.approx(reference(truth, guess, labels=present, average=None))
        assert values[list(absent)].isnan().all()
    assert matrix.mean_dice() == pytest.approx(f1_score(truth, guess, labels=present, average="macro"))
    assert matrix.pixel_accuracy() == pytest.approx((truth == guess).mean())
    assert matrix.mean_class_accuracy() == pytest.approx(balanced_accuracy_score(truth, guess))
    assert matrix.frequency_weighted_iou() == pytest.approx(jaccard_score(truth, guess, average="weighted"))


def test_batches_merge_to_the_total_and_differ_from_the_mean_of_batches():
    preds, masks = random_case(seed=1)
    masks[0, 5:] = 255
    total, merged, counts, mious = ConfusionMatrix(6), ConfusionMatrix(6), [], []
    total.update(preds, masks)
    for pred, mask in zip(preds, masks, strict=True):
        matrix = ConfusionMatrix(6)
        matrix.update(pred, mask)
        merged.merge(matrix)
        mious.append(matrix.miou())
        counts.append(torch.stack([matrix.counts.diag(), matrix.counts.sum(1), matrix.counts.sum(0)]).numpy())
    assert torch.equal(total.counts, merged.counts)
    assert abs(total.miou() - np.mean(mious)) > 1e-4  # what peers report
    assert miou_from_counts(counts) == pytest.approx(mious)
    assert miou_from_counts(np.sum(counts, 0)) == pytest.approx(total.miou())
    assert np.isnan(miou_from_counts(np.zeros((3, 6))))


def test_nothing_counted_is_nan_and_wrong_shapes_raise():
    matrix = ConfusionMatrix(4)
    matrix.update(torch.zeros(2, 5, 5, dtype=torch.int64), torch.full((2, 5, 5), 255))
    assert math.isnan(matrix.miou()) and math.isnan(matrix.pixel_accuracy())
    assert matrix.absent() == [0, 1, 2, 3]
    with pytest.raises(ValueError):
        matrix.update(torch.zeros(4, 4), torch.zeros(4, 5))


def test_a_class_that_is_only_predicted_counts_with_an_iou_of_0():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
    assert matrix.miou() == 0.25 and matrix.mean_class_accuracy() == 0.5 and matrix.absent() == [2]


# --- boundaries -------------------------------------------------------------------------------------------
def brute_force_boundary_f1(pred, truth, radius, band):
    """Return {class: boundary F1} by loops over pixels and pairs of boundary pixels; both lengths in pixels.
    """
    pred = np.where(truth == 255, 255, pred)
    height, width = truth.shape

    def boundary(labels, id):
        pixels = []
        for y, x in zip(*np.nonzero(labels == id), strict=True):
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            near = [labels[v, u] for v, u in around if 0 <= v < height and 0 <= u < width]
            window = labels[max(0, y - band) : y + band + 1, max(0, x - band) : x + band + 1].flatten()
            neighbors = [*near, *window] if 255 in near else near
            if any(other not in (id, 255) for other in neighbors):
                pixels.append((y, x))
        return pixels

    scores = {}
    for id in sorted(({*np.unique(pred)} | {*np.unique(truth)}) - {255}):
        predicted, true = boundary(pred, id), boundary(truth, id)

        def share(pixels, others):
            return np.mean([any(math.dist(a, b) <= radius for b in others) for a in pixels])

        if not predicted or not true:
            no_border = id in pred and id in truth and not predicted and not true
            scores[int(id)] = math.nan if no_border else 0.0
            continue
        precision, recall = share(predicted, true), share(true, predicted)
        scores[int(id)] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return scores


def with_ignored_bands(mask, seed):
    """Return a mask with up to three ignored bands and an ignored blob, a few pixels wide, drawn into it."""
    generator, mask = np.random.default_rng(seed), mask.copy()
    for _ in range(generator.integers(0, 4)):
        at, wide = generator.integers(0, max(mask.shape)), generator.integers(1, 5)
        view = mask if generator.random() < 0.5 else mask.T
        view[at : at + wide] = 255
    y, x = generator.integers(0, mask.shape)
    mask[y : y + 3, x : x + 4] = 255
    return mask


@pytest.mark.parametrize("size", [(23, 31), (37, 19), (1, 41), (2, 2)])
@pytest.mark.parametrize("tolerance, band", [(0.0075, 0.02), (0.06, 0.06), (0.15, 0.11)])
@pytest.mark.parametrize("seed", range(4))
def test_boundary_f1_equals_brute_force(seed, tolerance, band, size, monkeypatch):
    monkeypatch.setattr(metrics, "BOUNDARY_TOLERANCE", tolerance)
    monkeypatch.setattr(metrics, "BOUNDARY_BAND", band)
    truth = with_ignored_bands(blocks(*size, (1, 0, 2, 3), seed=seed), seed)
    pred, diagonal = blocks(*size, (0, 1, 2, 3), seed=seed + 10), math.hypot(*size)
    scores = boundary_f1(pred, truth, 5).tolist()
    expected = brute_force_boundary_f1(pred, truth, max(1.0, tolerance * diagonal),
                                       max(1, int(band * diagonal)))  # fmt: skip
    assert scores == pytest.approx([expected.get(id, math.nan) for id in range(5)], nan_ok=True)


def test_boundary_f1_of_equal_and_of_shifted_masks():
    truth = np.zeros((200, 300), np.uint8)
    truth[50:150, 80:220] = 1
    assert np.nanmean(boundary_f1(truth, truth, 2)) == 1.0
    near, far = np.roll(truth, 2, axis=1), np.roll(truth, 40, axis=1)
    assert np.nanmean(boundary_f1(near, truth, 2)) == 1.0  # 0.75 % of the diagonal are 2.7 pixels
    assert np.nanmean(boundary_f1(far, truth, 2)) < 0.75
    zeros, ones = np.zeros_like(truth), np.ones_like(truth)
    assert boundary_f1(zeros, ones, 2).tolist() == [0, 0]
    assert np.isnan(boundary_f1(ones, ones, 2)).all()  # no border, none predicted: nothing to score
    assert boundary_f1(truth, ones, 2).tolist() == [0, 0]
    nothing = np.full_like(truth, 255)
    assert np.isnan(boundary_f1(truth, nothing, 2)).all()


def rectangle(grow=0, object=1, background=0):
    """Return (200, 300) uint8: a background and an object of 100 x 140 pixels, grown by pixels per side."""
    mask = np.full((200, 300), background, np.uint8)
    mask[50 - grow : 150 + grow, 80 - grow : 220 + grow] = object
    return mask


def trimap(wide=5, **ids):
    """Return rectangle() with an ignored band of `wide` pixels around the object, as in Pascal VOC."""
    return np.where(rectangle() != rectangle(wide), 255, rectangle(**ids)).astype(np.uint8)


@pytest.mark.parametrize("ids", [dict(object=1, background=0), dict(object=0, background=3)])
def test_boundary_f1_scores_objects_behind_an_ignored_band(ids):
    truth, both = trimap(**ids), list(ids.values())

    def scores(pred):
        return boundary_f1(pred, truth, 4)[both]

    for exact in (0, 2, 5):  # the object may end anywhere in the band
        assert scores(rectangle(exact, **ids)).tolist() == [1, 1]
    assert (scores(np.roll(rectangle(2, **ids), 2, axis=1)) > 0.95).all()
    assert (scores(np.roll(rectangle(2, **ids), 30, axis=1)) < 0.7).all()
    for grow in (12, -12):
        assert (scores(rectangle(grow, **ids)) < 0.6).all()
    assert scores(np.full_like(truth, ids["background"])).tolist() == [0, 0]


def test_ignored_pixels_give_no_boundary_for_free():
    blob = np.zeros((200, 300), np.uint8)
    blob[90:100, 20:60] = 255  # inside one class
    wide = trimap(30)  # where the border is, nobody knows
    for mask in (blob, wide):
        assert not boundary_pixels(mask).any() and np.isnan(boundary_f1(mask, mask, 2)).all()
    with_object = rectangle()
    expected = boundary_pixels(with_object)
    with_object[10:20, 20:60] = 255
    assert (boundary_pixels(with_object) == expected).all() and expected.sum() == 2 * 476 + 4
    sides = boundary_pixels(trimap())
    assert (sides & (rectangle() == 1)).sum() == 476 and not (sides & (trimap() == 255)).any()


# --- how certain a score is -------------------------------------------------------------------------------
def random_counts(images=40, classes=5, seed=0, quality=0.7):
    """Return (N, 3, K) counts of images whose quality varies."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 500, (images, classes)) * (generator.random((images, classes)) < 0.7)
    share = np.clip(generator.normal(quality, 0.15, (images, classes)), 0, 1)
    right = (truth * share).astype(np.int64)
    return np.stack([right, truth, right + generator.integers(0, 200, (images, classes))], axis=1)


def test_bootstrap_equals_a_loop_that_draws_images():
    counts = random_counts()
    generator = np.random.default_rng(1)
    drawn = []
    for _ in range(2000):
        right, truth, pred = counts[generator.integers(0, 40, 40)].sum(0)
        drawn.append(np.mean(right / (truth + pred - right)))
    low, high = bootstrap_interval(counts)
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=5e-3)
    assert (low, high) == bootstrap_interval(counts) != bootstrap_interval(counts, seed=1)
    assert low < miou_from_counts(counts.sum(0)) < high


def test_paired_bootstrap_knows_better_from_equal():
    a, better = random_counts(quality=0.6), random_counts(quality=0.8)
    result, back = paired_bootstrap(a, better), paired_bootstrap(better, a)
    assert result["difference"] > 0 and result["low"] > 0 and result["p"] < 0.001
    assert back["difference"] == pytest.approx(-result["difference"]) and back["p"] < 0.001
    same = paired_bootstrap(a, a)
    assert same["difference"] == 0 and same["p"] == 1.0
    counts = np.zeros((3, 3, 2), np.int64)  # one image in which b is worse, two in which it is better
    counts[:, 1:, 0] = 100
    worse, good = counts.copy(), counts.copy()
    worse[:, 0, 0], good[:, 0, 0] = [50, 50, 50], [0, 90, 90]
    against = 7 / 27  # of the 27 ways to draw three images, those in which b is not better
    assert paired_bootstrap(worse, good)["p"] == pytest.approx(2 * against, abs=0.02)
    noise = a.copy()
    noise[::2, 0], noise[1::2, 0] = a[::2, 0] * 0.97, np.minimum(a[1::2, 0] * 1.03, a[1::2, 1])
    close = paired_bootstrap(a, noise)
    assert close["low"] < 0 < close["high"] and close["p"] > 0.05
