"""Losses by name. Every loss takes logits (B, K, H, W) and masks (B, H, W), leaves out 255, works in float32.

    criterion = build_loss("focal+dice")
    loss, terms = criterion(logits, masks)               # a scalar, {"focal": ..., "dice": ...}
    loss, terms, preds = score(criterion, logits, masks)  # the same of Logits, without full-size copies

A batch in which no pixel counts gives 0 with a gradient of 0. A new loss is one function
f(logits, masks, class_weights), entered in FUNCTIONS (and its name in config.py).
"""
import torch
import torch.nn.functional as F

from config import IGNORE
from upsample import class_ids

FOCAL_GAMMA = 2.0


def at_least_float32(logits):
    """Return half precision logits as float32; float32 and float64 as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits, masks, class_weights=None):
    """Mean cross entropy over the pixels that count.

    logits (B, K, H, W) of any float type, masks (B, H, W) int64 with 255 = ignore, class_weights (K,) or
    None. Returns a scalar. Weights multiply a pixel's loss; the mean is over pixels, not over weights, so
    that a batch of common classes does not count as much as one of rare ones.
    """
    total = F.cross_entropy(at_least_float32(logits), masks, class_weights, ignore_index=IGNORE,
                            reduction="sum")
    return total / (masks != IGNORE).sum().clamp(min=1)


def focal(logits, masks, class_weights=None):
    """Mean focal loss -(1 - p)^2 log p over the pixels that count, p = softmax probability of the true class.

    Shapes as cross_entropy. Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5.
    """
    logits = at_least_float32(logits)
    log_p = -F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="none")  # (B, H, W)
    loss = -(1 - log_p.exp()).clamp(min=0) ** FOCAL_GAMMA * log_p  # 0 where ignored: log_p is 0 there
    if class_weights is not None:
        loss = loss * class_weights[torch.where(masks == IGNORE, 0, masks)]
    return loss.sum() / (masks != IGNORE).sum().clamp(min=1)


def dice(logits, masks, class_weights=None):
    """1 - soft Dice coefficient, mean over the classes present in the batch; sums run over the whole batch.

    Shapes as cross_entropy; class_weights have no part in it. After Milletari et al., V-Net, 3DV 2016, with a
    linear denominator (p + g, not p^2 + g^2), as in segmentation_models_pytorch.
    """
    counts = masks != IGNORE  # (B, H, W)
    probabilities = at_least_float32(logits).softmax(1) * counts[:, None]  # (B, K, H, W)
    truth = torch.zeros_like(probabilities)
    truth.scatter_(1, torch.where(counts, masks, 0)[:, None], counts[:, None].to(truth.dtype))
    overlap = (probabilities * truth).sum((0, 2, 3))  # (K,)
    total = (probabilities + truth).sum((0, 2, 3))  # (K,)
    present = truth.sum((0, 2, 3)) > 0  # (K,)
    score = 2 * overlap / total.clamp(min=1e-7)
    return ((1 - score) * present).sum() / present.sum().clamp(min=1)


def lovasz(logits, masks, class_weights=None):
    """Lovasz-Softmax: the convex extension of 1 - IoU, mean over the classes present in the batch.

    Shapes as cross_entropy; class_weights have no part in it. Berman et al., The Lovasz-Softmax loss, CVPR
    2018 (per batch, classes present, as in the paper's own code).
    """
    probabilities = at_least_float32(logits).softmax(1).movedim(1, -1)  # (B, H, W, K)
    counts = masks != IGNORE
    probabilities, labels = probabilities[counts], masks[counts]  # (P, K), (P,)
    losses = []
    for id in labels.unique().tolist():
        truth = (labels == id).to(probabilities.dtype)  # (P,)
        errors, order = (truth - probabilities[:, id]).abs().sort(descending=True)
        losses.append((errors * lovasz_gradient(truth[order])).sum())
    return torch.stack(losses).mean() if losses else logits.sum() * 0.0


def lovasz_gradient(truth):
    """Gradient of the Lovasz extension of 1 - IoU: truth (P,) of 0 and 1, sorted by falling error -> (P,)."""
    positives = truth.sum()
    intersection = positives - truth.cumsum(0)
    union = positives + (1 - truth).cumsum(0)
    jaccard = 1 - intersection / union
    return torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])


def score(criterion, logits, masks):
    """Return (loss, {name: term}, preds (B, H, W) uint8) of a criterion on Logits (upsample.py).

    masks (B, H, W) int64. A loss that is a mean over pixels is taken a block of rows at a time together with
    its gradient, so that no full-size logits, probabilities or gradients exist; others see them whole.
    """
    if not getattr(criterion, "per_pixel", False):
        pixels = logits.pixels()
        loss, terms = criterion(pixels, masks)
        return loss, terms, class_ids(pixels.detach())
    loss, terms, preds = BlockLoss.apply(logits.values, logits, masks, criterion)
    return loss, dict(zip(criterion.names, terms, strict=True)), preds


class BlockLoss(torch.autograd.Function):
    """The mean over pixels of a criterion, with its gradient to the coarse logits computed on the way."""

    @staticmethod
    def forward(ctx, values, logits, masks, criterion):
        """values = logits.values (B, K, h, w) -> loss, terms (T,), preds (B, H, W) uint8."""
        counted = (masks != IGNORE).sum().clamp(min=1)
        loss, terms = values.new_zeros(()), values.new_zeros(len(criterion.names))
        gradient = torch.zeros_like(values) if ctx.needs_input_grad[0] else None
        preds = torch.empty(masks.shape, dtype=torch.uint8, device=masks.device)
        for images, rows in logits.slices():
            truth = masks[images, rows]
            share = (truth != IGNORE).sum() / counted
            part = logits[images]
            with torch.inference_mode(False), torch.set_grad_enabled(gradient is not None):
                part.values = part.values.detach().requires_grad_(gradient is not None)
                pixels = part.pixels(rows)  # (b, K, r, W)
                total, named = criterion(pixels, truth)
                total = total * share
                if gradient is not None:
                    gradient[images] += torch.autograd.grad(total, part.values)[0]
            loss += total.detach()
            terms += torch.stack([named[name].detach() for name in criterion.names]) * share
            preds[images, rows] = class_ids(pixels.detach())
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(terms, preds)
        return loss, terms, preds

    @staticmethod
    def backward(ctx, of_loss, of_terms, of_preds):
        """Chain rule: the gradient to the loss, a scalar, times the saved one."""
        return ctx.saved_tensors[0] * of_loss, None, None, None


FUNCTIONS = {"ce": cross_entropy, "lovasz": lovasz, "focal": focal, "dice": dice}


PER_PIXEL = {"ce", "focal"}  # means over the pixels that count


def build_loss(name, class_weights=None):
    """Return criterion(logits, masks) -> (loss, {name: term}). A name may be a sum: "a+b" adds both terms.

    criterion.names: of the terms; criterion.per_pixel: whether all of them are means over pixels.
    """
    def criterion(logits, masks):
        terms = {part: FUNCTIONS[part](logits, masks, class_weights) for part in criterion.names}
        return sum(terms.values()), terms

    criterion.names = name.split("+")
    criterion.per_pixel = PER_PIXEL.issuperset(criterion.names)
    return criterion


def class_weights(pixels, name):
    """Return the weights (K,) float32 of the classes, or None for `none`; their mean over all pixels is 1.

    pixels: (N, K) pixel counts of every class in every training image. enet: 1 / ln(1.02 + share of the
    pixels) (Paszke et al., ENet, 2016). median: 1 / frequency, the share of a class in the pixels of the
    images that show it (median frequency balancing, Eigen & Fergus, ICCV 2015; the median itself cancels out
    here). A class without a pixel gets the weight 1.
    """
    if name == "none":
        return None
    pixels = torch.as_tensor(pixels, dtype=torch.float64)
    totals = pixels.sum(0)  # (K,)
    seen = totals > 0
    shares = totals / totals.sum().clamp(min=1)
    if name == "enet":
        weights = 1 / torch.log(1.02 + shares)
    else:
        where_seen = ((pixels > 0) * pixels.sum(1, keepdim=True)).sum(0)  # pixels of the images that show it
        weights = where_seen / totals.clamp(min=1)
    weights = weights / (weights * shares).sum().clamp(min=1e-12)
    return torch.where(seen, weights, 1.0).float()
