"""Losses by name. Every loss takes logits (B, K, H, W) and masks (B, H, W), leaves out 255, works in float32.

    criterion = Criterion("focal+dice")
    loss, terms = criterion(logits, masks)               # a scalar, {"focal": ..., "dice": ...}

A batch in which no pixel counts gives 0 with a gradient of 0. models/logits.py takes the same losses of
logits that are still coarse.
"""
import torch
import torch.nn.functional as F

from config import IGNORE, InputError

FOCAL_GAMMA = 2.0
MASK_WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}  # of mask_classification
NO_OBJECT = 0.1  # weight of a query that is to say nothing


def at_least_float32(logits):
    """Return half precision logits as float32; float32 and float64 as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def weighted(loss):
    """Mark a loss that makes use of class weights: --class-weights is refused for others."""
    loss.weighted = True
    return loss


def per_pixel(loss):
    """Mark a loss as a mean over pixels that is `weighted`: it is taken a block at a time."""
    loss.per_pixel = True
    return weighted(loss)


@per_pixel
def cross_entropy(logits, masks, class_weights=None):
    """Mean cross entropy over the pixels that count.

    logits (B, K, H, W) of any float type, masks (B, H, W) int64 with 255 = ignore, class_weights (K,) or
    None. Returns a scalar. Weights multiply a pixel's loss; the mean is over pixels, not over weights, so
    that a batch of common classes does not count as much as one of rare ones.
    """
    total = F.cross_entropy(at_least_float32(logits), masks, class_weights, ignore_index=IGNORE,
                            reduction="sum")
    return total / (masks != IGNORE).sum().clamp(min=1)


@per_pixel
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


# A new loss is one function f(logits, masks, class_weights) above and one line here.
LOSSES = {
    "ce": cross_entropy,
    "lovasz": lovasz,
    "focal": focal,
    "dice": dice,
}


class Criterion:
    """criterion(logits (B, K, H, W), masks (B, H, W)) -> (loss, {name: term}), the sum of its terms.

    name: of LOSSES, or several joined by `+`. names: of the terms; per_pixel: whether all of them are means
    over the pixels that count. Raises InputError for class weights that none of them uses.
    """

    def __init__(self, name, class_weights=None):
        self.names, self.class_weights = name.split("+"), class_weights
        self.per_pixel = all(hasattr(LOSSES[part], "per_pixel") for part in self.names)

    def __call__(self, logits, masks):
        terms = {name: LOSSES[name](logits, masks, self.class_weights) for name in self.names}
        return sum(terms.values()), terms


def check_class_weights(loss, name):
    """Raise InputError where class weights `name` would have no effect on the loss called `loss`."""
    takers = [key for key, function in LOSSES.items() if hasattr(function, "weighted")]
    if name != "none" and not set(takers) & set(loss.split("+")):
        raise InputError(f"--class-weights acts on {' and '.join(takers)}, and --loss {loss} has none of "
                         f"them: leave it out, or add one (such as --loss {takers[0]}+dice)")


# --- mask classification -----------------------------------------------------------------------------------
def mask_classification(masks, classes, truth):
    """Return {"class": ..., "mask": ..., "dice": ...}, the loss of queries that each stand for one class.

    masks (B, Q, h, w) and classes (B, Q, K + 1), the last of which means nothing: logits; truth (B, h, w)
    int64, 255 = ignore. Every class in an image is matched with the one query that fits it best (Hungarian
    algorithm); the others are to say nothing. Cheng et al., Masked-attention Mask Transformer, CVPR 2022,
    with its weights; at all pixels that count where theirs draws 12,544 points.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and inference has no use for it
    masks, classes = at_least_float32(masks), at_least_float32(classes)
    nothing = classes.shape[2] - 1
    weights = torch.ones(nothing + 1, device=classes.device)
    weights[nothing] = NO_OBJECT
    sums = dict.fromkeys(("class", "mask", "dice"), 0 * (masks.sum() + classes.sum()))
    matched, weight = 0, 0.0
    for queries, scores, image in zip(masks, classes, truth, strict=True):
        counted = image != IGNORE
        present = image[counted].unique()  # (T,)
        if not len(present):
            continue
        shapes = (image[counted] == present[:, None]).to(queries.dtype)  # (T, P)
        costs = {"class": -scores.softmax(-1)[:, present], **mask_costs(queries[:, counted], shapes)}
        total = sum(MASK_WEIGHTS[name] * cost.detach() for name, cost in costs.items())  # (Q, T)
        rows, columns = map(torch.as_tensor, linear_sum_assignment(total.nan_to_num(1e9).cpu()))
        wanted = torch.full((len(scores),), nothing, device=scores.device)
        wanted[rows] = present[columns]
        matched, weight = matched + len(rows), weight + weights[wanted].sum()
        sums["class"] = sums["class"] + F.cross_entropy(scores, wanted, weights, reduction="sum")
        for name in ("mask", "dice"):
            sums[name] = sums[name] + costs[name][rows, columns].sum()
    counts = {"class": weight, "mask": matched, "dice": matched}
    return {name: MASK_WEIGHTS[name] * total / max(counts[name], 1e-6) for name, total in sums.items()}


def mask_costs(queries, shapes):
    """Return {"mask": binary cross entropy, "dice": 1 - Dice}, (Q, T) each, of every query with every shape.

    queries (Q, P): logits at P pixels; shapes (T, P) of 0 and 1.
    """
    inside = queries.sigmoid()
    entropy = (F.softplus(queries).sum(1, keepdim=True) - queries @ shapes.T) / shapes.shape[1]
    overlap = 2 * (inside @ shapes.T) + 1
    return {"mask": entropy, "dice": 1 - overlap / (inside.sum(1, keepdim=True) + shapes.sum(1) + 1)}


# --- class weights ----------------------------------------------------------------------------------------
def enet_weights(pixels):
    """1 / ln(1.02 + share of the pixels) (Paszke et al., ENet, 2016): pixels (N, K) -> (K,)."""
    totals = pixels.sum(0)
    return 1 / torch.log(1.02 + totals / totals.sum().clamp(min=1))


def median_weights(pixels):
    """1 / frequency, the share of a class in the pixels of the images that show it: pixels (N, K) -> (K,).

    Median frequency balancing, Eigen & Fergus, ICCV 2015; the median itself cancels out in class_weights.
    """
    where_seen = ((pixels > 0) * pixels.sum(1, keepdim=True)).sum(0)  # pixels of the images that show it
    return where_seen / pixels.sum(0).clamp(min=1)


CLASS_WEIGHTS = {"none": None, "enet": enet_weights, "median": median_weights}


def class_weights(pixels, name):
    """Return the weights (K,) float32 of the classes, or None for `none`; their mean over all pixels is 1.

    pixels: (N, K) pixel counts of every class in every training image; name: of CLASS_WEIGHTS. A class
    without a pixel gets the weight 1.
    """
    if CLASS_WEIGHTS[name] is None:
        return None
    pixels = torch.as_tensor(pixels, dtype=torch.float64)
    totals = pixels.sum(0)  # (K,)
    shares = totals / totals.sum().clamp(min=1)
    weights = CLASS_WEIGHTS[name](pixels)
    weights = weights / (weights * shares).sum().clamp(min=1e-12)
    return torch.where(totals > 0, weights, 1.0).float()
