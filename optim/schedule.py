"""Learning-rate schedule: linear warm-up, then a cosine. Needs no torch."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, base_lr: float, warmup_steps: int, total_steps: int, min_ratio: float
) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: number of the step, counted from 1; past the end it keeps the last value.
        base_lr: rate at the end of the warm-up.
        warmup_steps: while `step < warmup_steps` the rate is `base_lr * step / warmup_steps`.
        total_steps: where the cosine ends.
        min_ratio: the rate at the end, as a fraction of `base_lr`.

    Raises:
        ValueError: if `step` is smaller than 1.

    Source: the cosine of Loshchilov & Hutter 2017 (SGDR, eq. 5) in the form HRM and TRM train with.
    """
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    if step < warmup_steps:
        return base_lr * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return base_lr * (min_ratio + max(0.0, (1.0 - min_ratio) * cosine))
