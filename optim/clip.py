"""Clipping by the global gradient norm, on the device, without a host synchronization.

Inside a `DeviceOptimizer` gradients are not rewritten: hand the factor to the update,
`optimizer.step(grad_scale=clip_scale(global_grad_norm(params), max_norm))`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def _gradients(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The gradients meant: `.grad` of a parameter, if it has one; other tensors themselves."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for t in tensors:
        if not isinstance(t, Tensor):
            raise TypeError(f"gradients are clipped of tensors, got {type(t).__name__}")
    found = [t.grad if t.requires_grad and t.is_leaf else t for t in tensors]
    return [g for g in found if g is not None]


@torch.no_grad()
def global_grad_norm(grads_or_params: Tensor | Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all elements of all gradients.

    Args:
        grads_or_params: tensors of any shapes; of a leaf that requires a gradient its `.grad` is
            meant (skipped where None). A sparse gradient counts with its duplicates summed.

    Returns:
        0-dim tensor on the device of the first gradient: float64 if any gradient is, else float32;
        0 if there is no gradient. Deterministic. Squares are summed in that dtype, so float32
        overflows to inf for elements above 1.8e19, as torch's own norm does.
    """
    grads = [g.coalesce().values() if g.is_sparse else g for g in _gradients(grads_or_params)]
    if not grads:
        return torch.zeros(())
    wide = any(g.dtype == torch.float64 for g in grads)
    dtype = torch.float64 if wide else torch.float32
    device = grads[0].device
    # One norm per tensor, then the norm of the norms: the order torch.nn.utils uses.
    norms = [torch.linalg.vector_norm(g, dtype=dtype) for g in grads]
    return torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """The number gradients are divided by so that their norm is at most `max_norm`.

    `max((norm + 1e-6) / max_norm, 1)`: the reciprocal, to rounding, of the factor of
    `torch.nn.utils.clip_grad_norm_`, including its 1e-6. A NaN norm gives NaN.

    Args:
        norm: 0-dim tensor, see `global_grad_norm`.
        max_norm: largest norm wanted; 0 switches clipping off (the result is 1).

    Raises:
        ValueError: if `max_norm` is negative or NaN.
    """
    if isinstance(max_norm, str) or not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0 (0 switches clipping off), got {max_norm!r}")
    if max_norm == 0:
        return torch.ones_like(norm)
    return ((norm + 1e-6) / max_norm).clamp(min=1.0)


@torch.no_grad()
def clip_grad_norm(params: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Divide the gradients of `params` in place so that their global norm is at most `max_norm`.

    Returns:
        The norm before clipping, 0-dim (see `global_grad_norm`). `max_norm=0` changes nothing.
    """
    grads = _gradients(params)
    norm = global_grad_norm(grads)
    if max_norm != 0 and grads:
        scale = clip_scale(norm, max_norm)
        for g in grads:
            g.div_(scale.to(g.device))
    return norm
