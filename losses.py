"""Losses by name. Every loss takes logits (B, K, H, W) and masks (B, H, W), ignores 255, computes in float32.

    criterion = Criterion("focal+dice")
    loss, terms = criterion(logits, masks)               # a scalar, {"focal": ..., "dice": ...}
    weights = class_weights(pixels, "enet")              # (K,), for Criterion("ce", weights)
    loss = distillation(logits, teacher_logits, temperature=2.0)

A batch without a labeled pixel gives a loss of 0 with a gradient of 0.
"""
import torch
import torch.nn.functional as F

from config import IGNORE, InputError

FOCAL_GAMMA = 2.0
ERROR_BINS = 1024  # of lovasz
MASK_WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}  # of mask_classification
NO_OBJECT_WEIGHT = 0.1  # of the class loss of a query that matches no class


def at_least_float32(logits):
    """Return half precision logits as float32; float32 and float64 as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def uses_class_weights(loss):
    """Decorator of a loss that applies class weights; with others only, --class-weights is refused."""
    loss.uses_class_weights = True
    return loss


def per_pixel(loss):
    """Decorator of a loss that is a mean over pixels and applies class weights: it can be computed a block of
    rows at a time.
    """
    loss.per_pixel = True
    return uses_class_weights(loss)


@per_pixel
def cross_entropy(logits, masks, class_weights=None):
    """Mean cross entropy over the labeled pixels.

    logits (B, K, H, W) of any float type, masks (B, H, W) int64 with 255 = ignore, class_weights (K,) or
    None. Returns a scalar. Weights multiply a pixel's loss; the mean is over pixels, not over weights, so
    that a batch of common classes does not count as much as one of rare ones.
    """
    total = F.cross_entropy(at_least_float32(logits), masks, class_weights, ignore_index=IGNORE,
                            reduction="sum")
    return total / (masks != IGNORE).sum().clamp(min=1)


@per_pixel
def focal(logits, masks, class_weights=None):
    """Mean focal loss -(1 - p)^2 log p over the labeled pixels, p = softmax probability of the true class.

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

    Shapes as cross_entropy; class_weights are not used. After Milletari et al., V-Net, 3DV 2016, with a
    linear denominator (p + g, not p^2 + g^2), as in segmentation_models_pytorch.
    """
    labeled = masks != IGNORE  # (B, H, W)
    probabilities = at_least_float32(logits).softmax(1) * labeled[:, None]  # (B, K, H, W)
    truth = torch.zeros_like(probabilities)
    truth.scatter_(1, torch.where(labeled, masks, 0)[:, None], labeled[:, None].to(truth.dtype))
    overlap = (probabilities * truth).sum((0, 2, 3))  # (K,)
    total = (probabilities + truth).sum((0, 2, 3))  # (K,)
    present = truth.sum((0, 2, 3)) > 0  # (K,)
    score = 2 * overlap / total.clamp(min=1e-7)
    return ((1 - score) * present).sum() / present.sum().clamp(min=1)


def lovasz(logits, masks, class_weights=None):
    """Lovasz-Softmax: the convex extension of 1 - IoU, mean over the classes present in the batch.

    Shapes as cross_entropy; class_weights are not used. Berman et al., The Lovasz-Softmax loss, CVPR
    2018 (per batch, classes present, as in the paper's own code). The paper sorts the errors of all pixels;
    here they are counted in ERROR_BINS, and those of a bin taken as equal, which is several times as fast.
    """
    probabilities = at_least_float32(logits).softmax(1)  # (B, K, H, W)
    labeled = masks != IGNORE
    present = masks[labeled].unique().tolist()
    # The loss is the sum of error * weight: `at_zero` where all probabilities are 0, rising by the slopes.
    at_zero, slopes = 0.0, torch.zeros_like(probabilities)
    with torch.no_grad():
        for id in present:
            truth, share = masks == id, probabilities[:, id]  # (B, H, W)
            errors = torch.where(truth, 1 - share, share)
            bins = ((1 - errors) * ERROR_BINS).long().clamp(0, ERROR_BINS - 1)  # largest errors first
            bins = torch.where(labeled, bins + ERROR_BINS * truth, 2 * ERROR_BINS)
            counts = torch.bincount(bins.flatten(), minlength=2 * ERROR_BINS + 1).cpu()  # for float64
            negatives, positives = counts[:-1].view(2, ERROR_BINS)
            others, own = lovasz_weights(negatives, positives)
            at_zero += (positives * own).sum().item()
            slopes[:, id] = torch.cat([others, -own, own.new_zeros(1)]).to(slopes)[bins]
    return (at_zero + (probabilities * slopes).sum()) / max(len(present), 1)


def lovasz_weights(negatives, positives):
    """Return (2, N) float64: the gradient of the Lovasz extension of 1 - IoU to the error of each pixel of
    other classes, and of the class, in a bin.

    negatives, positives: (N,) pixels of other classes and of the class in each bin, largest errors first.
    """
    found, wrong = positives.cumsum(0).double(), negatives.cumsum(0).double()
    total = found[-1]
    jaccard = 1 - (total - found) / (total + wrong)
    steps = torch.diff(jaccard, prepend=jaccard.new_zeros(1))  # of all pixels of a bin together
    missing, union = total - found + positives / 2, total + wrong - negatives / 2  # in the middle of a bin
    weights = torch.stack([missing / union ** 2, 1 / union])
    together = negatives * weights[0] + positives * weights[1]
    return weights * steps / together.clamp(min=1e-300)


# A new loss is one function f(logits, masks, class_weights) above and one line here.
LOSSES = {
    "ce": cross_entropy,
    "lovasz": lovasz,
    "focal": focal,
    "dice": dice,
}


class Criterion:
    """criterion(logits (B, K, H, W), masks (B, H, W)) -> (loss, {name: term}), the sum of its terms.

    loss: a name of LOSSES, or several joined by `+`; class_weights: (K,) or None. names: of the terms;
    per_pixel: whether all of them are means over pixels.
    """

    def __init__(self, loss, class_weights=None):
        self.names, self.class_weights = loss.split("+"), class_weights
        self.per_pixel = all(getattr(LOSSES[name], "per_pixel", False) for name in self.names)

    def __call__(self, logits, masks):
        terms = {name: LOSSES[name](logits, masks, self.class_weights) for name in self.names}
        return sum(terms.values()), terms


def check_class_weights(loss, name):
    """Raise InputError where class weights called `name` would have no effect on the loss called `loss`."""
    names = [key for key, function in LOSSES.items() if getattr(function, "uses_class_weights", False)]
    if name != "none" and not set(names) & set(loss.split("+")):
        raise InputError(f"--class-weights {name} has no effect on --loss {loss}: leave it out, or add a "
                         f"loss that uses them ({', '.join(names)}), such as --loss {names[0]}+dice")


# --- a teacher --------------------------------------------------------------------------------------------
def distillation(logits, teacher, temperature):
    """Return the Kullback-Leibler divergence of softened softmax probabilities, a teacher's from a student's,
    times temperature squared, mean over all points: a scalar.

    logits, teacher: (B, K, h, w). Hinton et al., Distilling the Knowledge in a Neural Network, 2015: the
    factor keeps the gradients as large at any temperature.
    """
    student = (at_least_float32(logits) / temperature).log_softmax(1)
    target = (at_least_float32(teacher) / temperature).log_softmax(1)
    divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(1)  # (B, h, w)
    return temperature ** 2 * divergence.mean()


# --- mask classification -----------------------------------------------------------------------------------
def mask_classification(masks, classes, truth):
    """Return {"class": ..., "mask": ..., "dice": ...}, the loss of queries that each stand for one class.

    masks (B, Q, h, w) and classes (B, Q, K + 1), the last of which means no object: logits; truth (B, h, w)
    int64, 255 = ignore. Every class in an image is matched with the query that fits it best (Hungarian
    algorithm); the other queries should predict no object. Cheng et al., Masked-attention Mask Transformer,
    CVPR 2022, with its weights; at all labeled pixels where theirs draws 12,544 points.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and inference has no use for it
    masks, classes = at_least_float32(masks), at_least_float32(classes)
    no_object = classes.shape[2] - 1
    weights = torch.ones(no_object + 1, device=classes.device)
    weights[no_object] = NO_OBJECT_WEIGHT
    sums = dict.fromkeys(("class", "mask", "dice"), 0 * (masks.sum() + classes.sum()))
    match_count, weight_sum = 0, 0.0
    for mask_logits, class_logits, labels in zip(masks, classes, truth, strict=True):
        labeled = labels != IGNORE
        present = labels[labeled].unique()  # (T,) ids
        if not len(present):
            continue
        shapes = (labels[labeled] == present[:, None]).to(mask_logits.dtype)  # (T, P)
        costs = {"class": -class_logits.softmax(-1)[:, present],
                 **mask_costs(mask_logits[:, labeled], shapes)}
        total_cost = sum(MASK_WEIGHTS[name] * cost.detach() for name, cost in costs.items())  # (Q, T)
        queries, columns = map(torch.as_tensor, linear_sum_assignment(total_cost.nan_to_num(1e9).cpu()))
        targets = torch.full((len(class_logits),), no_object, device=class_logits.device)  # (Q,)
        targets[queries] = present[columns]
        match_count += len(queries)
        weight_sum = weight_sum + weights[targets].sum()
        sums["class"] = sums["class"] + F.cross_entropy(class_logits, targets, weights, reduction="sum")
        for name in ("mask", "dice"):
            sums[name] = sums[name] + costs[name][queries, columns].sum()
    divisors = {"class": weight_sum, "mask": match_count, "dice": match_count}
    return {name: MASK_WEIGHTS[name] * total / max(divisors[name], 1e-6) for name, total in sums.items()}


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
    """1 / frequency, the share of a class in the pixels of the images it occurs in: pixels (N, K) -> (K,).

    Median frequency balancing, Eigen & Fergus, ICCV 2015; the median itself cancels out in class_weights.
    """
    pixels_of_its_images = ((pixels > 0) * pixels.sum(1, keepdim=True)).sum(0)
    return pixels_of_its_images / pixels.sum(0).clamp(min=1)


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
