"""Cross entropy against torch's own, with ignored pixels, half precision and nothing to count."""

import pytest
import torch
import torch.nn.functional as F

from config import LOSSES
from losses import FUNCTIONS, build_loss, cross_entropy


def test_cross_entropy_equals_torch_on_counted_pixels():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 5, 13, 9), torch.randint(0, 5, (2, 13, 9))
    masks[:, :4] = 255
    counted = masks != 255
    flat = logits.permute(0, 2, 3, 1)[counted]  # (N, K)
    assert torch.allclose(cross_entropy(logits, masks), F.cross_entropy(flat, masks[counted]))


def test_a_batch_without_valid_pixels_gives_zero_loss_and_gradient():
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0.0 and logits.grad.abs().sum() == 0.0


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(1, 3, 300, 300)
    masks = torch.randint(0, 3, (1, 300, 300))
    half = cross_entropy(logits.half(), masks)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(cross_entropy(logits, masks).item(), rel=1e-3)


def test_terms_are_named_and_names_are_known_to_the_command_line():
    loss, terms = build_loss("ce")(torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64))
    assert list(terms) == ["ce"] and loss == terms["ce"]
    assert {part for name in LOSSES for part in name.split("+")} == set(FUNCTIONS)
