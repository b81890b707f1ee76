"""The confusion matrix against torchmetrics, scikit-learn and a loop; absent classes; ignored pixels."""

import math

import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex
from torchmetrics.functional.classification import multiclass_f1_score

from metrics import ConfusionMatrix


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
    reference = MulticlassConfusionMatrix(6, ignore_index=255)(preds, masks)
    assert torch.equal(matrix.counts, reference)
    counted = masks != 255
    truth, guess = masks[counted].numpy(), preds[counted].numpy()
    assert (matrix.counts.numpy() == confusion_matrix(truth, guess, labels=range(6))).all()
    present = [id for id in range(6) if id not in absent]
    assert matrix.miou() == pytest.approx(
        jaccard_score(truth, guess, labels=present, average="macro"), abs=1e-12
    )
    assert matrix.miou() == pytest.approx(
        MulticlassJaccardIndex(6, ignore_index=255)(preds, masks).item(), abs=1e-6
    )
    dice = multiclass_f1_score(torch.tensor(guess), torch.tensor(truth), 6, average="none")
    assert matrix.per_class_dice()[present].tolist() == pytest.approx(dice[present].tolist(), abs=1e-6)
    assert matrix.pixel_accuracy() == pytest.approx((truth == guess).mean())
    assert matrix.absent() == list(absent)
    assert all(math.isnan(matrix.per_class_iou()[id]) for id in absent)


def test_equals_a_loop_over_pixels():
    preds, masks = random_case(classes=3, seed=4)
    counts = [[0] * 3 for _ in range(3)]
    for pred, mask in zip(preds.flatten().tolist(), masks.flatten().tolist(), strict=True):
        if mask != 255:
            counts[mask][pred] += 1
    matrix = ConfusionMatrix(3)
    matrix.update(preds, masks)
    assert matrix.counts.tolist() == counts


def test_batches_merge_to_the_whole_and_differ_from_the_mean_of_batches():
    preds, masks = random_case(seed=1)
    masks[0, 5:] = 255
    whole, parts, single = ConfusionMatrix(6), ConfusionMatrix(6), []
    whole.update(preds, masks)
    for pred, mask in zip(preds, masks, strict=True):
        one = ConfusionMatrix(6)
        one.update(pred, mask)
        single.append(one.miou())
        parts.merge(one)
    assert torch.equal(whole.counts, parts.counts)
    assert abs(whole.miou() - sum(single) / 3) > 1e-4  # what peers report


def test_nothing_counted_is_nan_and_wrong_shapes_raise():
    matrix = ConfusionMatrix(4)
    matrix.update(torch.zeros(2, 5, 5, dtype=torch.int64), torch.full((2, 5, 5), 255))
    assert (
        math.isnan(matrix.miou()) and math.isnan(matrix.pixel_accuracy()) and matrix.absent() == [0, 1, 2, 3]
    )
    with pytest.raises(ValueError, match="shape"):
        matrix.update(torch.zeros(4, 4), torch.zeros(4, 5))
