"""Losses and metric sums of one ACT step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.act import IGNORE_LABEL, ACTOutput, Carry
from models.config import LossConfig
from models.layers import norm_dtype


def log_stablemax(logits: Tensor) -> Tensor:
    """log(s(x) / Σ s(x)) over the last dimension, s(x) = x + 1 for x ≥ 0, else 1 / (1 - x).

    Source: Prieto et al. 2025, "Grokking at the Edge of Numerical Stability", arXiv:2501.04697.
    log s(x) = sign(x) log1p(|x|), so this is a log-softmax of that, accurate in float32 already.
    """
    below, above = logits.clamp(max=0), logits.clamp(min=0)
    return F.log_softmax(torch.where(logits < 0, -torch.log1p(-below), torch.log1p(above)), -1)


def token_loss(logits: Tensor, labels: Tensor, kind: str, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy per token (B, L), 0 where the label is ignored; float32 at least.

    With `smoothing` s the target is 1 - s at the label and s spread evenly over the vocabulary
    (Szegedy et al. 2016, arXiv:1512.00567).
    """
    wide = logits.to(norm_dtype(logits.dtype))
    log_p = log_stablemax(wide) if kind == "stablemax" else F.log_softmax(wide, dim=-1)
    # a sum with one term, not a gather, whose gradient would be a scatter
    kinds = torch.arange(log_p.shape[-1], device=labels.device, dtype=labels.dtype)
    loss = -torch.where(labels.unsqueeze(-1) == kinds, log_p, 0).sum(-1)
    if not smoothing:
        return loss
    even = torch.where(labels == IGNORE_LABEL, 0, log_p.mean(-1))
    return (1 - smoothing) * loss - smoothing * even


def act_loss(
    carry: Carry, output: ACTOutput, config: LossConfig, present: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss summed over rows, and metric sums over the rows that halted.

    Loss of a row: token loss averaged over its labelled tokens + weighted halting losses, and with
    `cycle_weight` the mean token loss of the answers after earlier cycles. A row
    without labels has nothing to get wrong: its halting target is 1, as in the reference, but it
    counts in no metric. `present` (B,) bool leaves other rows (padding) out altogether. All values
    stay on the device. Keys: count, accuracy, exact_accuracy, q_halt_accuracy, steps (sums over
    halted rows), lm_loss, q_halt_loss and, where learned, q_continue_loss (sums over all rows).
    """
    labels = carry.batch["labels"]
    with torch.no_grad():
        valid = labels != IGNORE_LABEL
        tokens = valid.sum(-1)
        divisor = tokens.clamp(min=1)
        correct = (valid & (output.logits.argmax(-1) == labels)).sum(-1)
        exact = correct == tokens
        counted = carry.halted & (tokens > 0)
        if output.winner is not None:
            counted = counted & output.winner
        metrics = {
            "count": counted.sum(),
            "accuracy": torch.where(counted, correct.float() / divisor, 0).sum(),
            "exact_accuracy": (counted & exact).sum(),
            "q_halt_accuracy": (counted & ((output.q_halt >= 0) == exact)).sum(),
            "steps": torch.where(counted, carry.steps, 0).sum(),
        }

    def total(loss: Tensor) -> Tensor:
        """Over rows; of those of one puzzle the winner's stands for all."""
        if output.winner is None:
            return loss.sum()
        return torch.where(output.winner, loss, 0).sum() * output.chains

    def halting_loss(logit: Tensor, target: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(logit, target.to(logit.dtype), reduction="none")
        loss = loss if present is None else torch.where(present, loss, 0)
        return total(loss.to(norm_dtype(output.logits.dtype)))  # halting logits are float32

    if config.blanks_only:
        labels = torch.where(carry.batch["inputs"] == labels, IGNORE_LABEL, labels)
        divisor = (labels != IGNORE_LABEL).sum(-1).clamp(min=1)

    def lm_loss_of(logits: Tensor) -> Tensor:
        per_token = token_loss(logits, labels, config.kind, config.label_smoothing)
        return total((per_token / divisor.unsqueeze(-1)).sum(-1))

    lm_loss = lm_loss_of(output.logits)
    q_halt_loss = halting_loss(output.q_halt, exact)
    loss = config.token_weight * lm_loss + config.halt_weight * q_halt_loss
    for logits in output.earlier:
        loss = loss + config.cycle_weight / len(output.earlier) * lm_loss_of(logits)
    metrics |= {"lm_loss": lm_loss.detach(), "q_halt_loss": q_halt_loss.detach()}
    if output.target_q_continue is not None:
        q_continue_loss = halting_loss(output.q_continue, output.target_q_continue)
        loss = loss + config.continue_weight * q_continue_loss
        metrics["q_continue_loss"] = q_continue_loss.detach()
    return loss, metrics
