"""Losses by name. Every loss takes logits (B, K, H, W) and masks (B, H, W), leaves out 255, works in float32.

    criterion = build_loss("ce")
    loss, terms = criterion(logits, masks)     # scalar to call backward on; {"ce": scalar} to log
"""
import torch.nn.functional as F

from config import IGNORE


def cross_entropy(logits, masks):
    """Mean cross entropy over the pixels that count; 0 (with a gradient of 0) where a batch has none.

    logits (B, K, H, W) of any float type, masks (B, H, W) int64 with 255 = ignore. Returns a float32 scalar.
    """
    total = F.cross_entropy(logits.float(), masks, ignore_index=IGNORE, reduction="sum")
    return total / (masks != IGNORE).sum().clamp(min=1)


FUNCTIONS = {"ce": cross_entropy}


def build_loss(name):
    """Return criterion(logits, masks) -> (loss, {name: term}). A name may be a sum: "a+b" adds both terms."""
    def criterion(logits, masks):
        terms = {part: FUNCTIONS[part](logits, masks) for part in name.split("+")}
        return sum(terms.values()), terms

    return criterion
