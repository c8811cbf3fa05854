"""The token loss, smoothed and not, beside torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.loss import log_stablemax, token_loss

LABELS = torch.tensor([[1, 2, -100, 0], [3, -100, 4, 4]])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_smoothed_softmax_is_torchs(smoothing: float) -> None:
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    ours = token_loss(logits, LABELS, "softmax", smoothing)
    theirs = F.cross_entropy(
        logits.transpose(1, 2), LABELS, reduction="none", label_smoothing=smoothing
    )
    torch.testing.assert_close(ours, theirs)
    (ours_grad,) = torch.autograd.grad(ours.sum(), logits, retain_graph=True)
    (theirs_grad,) = torch.autograd.grad(theirs.sum(), logits)
    torch.testing.assert_close(ours_grad, theirs_grad)


def test_smoothed_stablemax_mixes_with_the_even_target() -> None:
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    log_p = log_stablemax(logits)
    expected = 0.7 * token_loss(logits, LABELS, "stablemax") - 0.3 * log_p.mean(-1)
    expected = torch.where(LABELS == -100, 0, expected)
    torch.testing.assert_close(token_loss(logits, LABELS, "stablemax", 0.3), expected)
