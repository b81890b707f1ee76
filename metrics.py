"""Segmentation metrics, all from one confusion matrix over the whole data set.

    matrix = ConfusionMatrix(num_classes=21)
    matrix.update(preds, masks)        # any number of times, any sizes
    matrix.miou(), matrix.per_class_iou(), matrix.pixel_accuracy()

A class that occurs in no truth and no prediction has no IoU: it is NaN per class and left out of every mean.
"""
import torch

from config import IGNORE


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

    def _overlap_and_total(self):
        """Pixels right, and pixels of truth plus prediction, per class: (K,) float64 on the CPU."""
        counts = self.counts.cpu()  # MPS has no float64
        return counts.diag().double(), (counts.sum(0) + counts.sum(1)).double()

    def per_class_iou(self):
        """Intersection over union per class, (K,) float64; NaN where the class is absent. Jaccard (1912)."""
        overlap, total = self._overlap_and_total()
        return overlap / (total - overlap)

    def per_class_dice(self):
        """Dice coefficient (F1) per class, (K,) float64; NaN where the class is absent. Dice (1945)."""
        overlap, total = self._overlap_and_total()
        return 2 * overlap / total

    def miou(self):
        """Mean IoU over the classes that occur in truth or prediction; NaN where no pixel counted."""
        return self.per_class_iou().nanmean().item()

    def mean_dice(self):
        """Mean Dice over the classes that occur in truth or prediction; NaN where no pixel counted."""
        return self.per_class_dice().nanmean().item()

    def pixel_accuracy(self):
        """Share of counted pixels that are right; NaN where no pixel counted."""
        overlap, total = self._overlap_and_total()
        return (2 * overlap.sum() / total.sum()).item()

    def absent(self):
        """Ids of the classes that occur in no truth and no prediction: left out of the means."""
        return torch.nonzero(self._overlap_and_total()[1] == 0).flatten().tolist()
