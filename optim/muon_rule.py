"""Muon's rule as a pure function of one matrix, and the pieces of one that holds several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from optim.base import work_dtype
from optim.orthogonal import Coefficients, newton_schulz

Scaling = Literal["moonlight", "keller"]


def update_scale(rows: int, columns: int, scaling: Scaling) -> float:
    """What an orthogonalized (rows, columns) matrix is multiplied by, beside the learning rate.

    "moonlight": 0.2 * sqrt(max(rows, columns)), so that an update is as large as one of AdamW and
    one learning rate serves both; "keller": sqrt(max(1, rows / columns)).
    """
    if scaling == "moonlight":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def muon_update(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    lr: float | Tensor,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    scaling: Scaling = "moonlight",
    ns_steps: int = 5,
    coefficients: Coefficients = "quintic",
    pieces: int = 1,
) -> tuple[Tensor, Tensor]:
    """The rule, as a pure function of one matrix.

        M = momentum * M + G
        U = G + momentum * M       (nesterov, else M)
        P = P * (1 - lr * weight_decay) - lr * scale * newton_schulz(U)

    Args:
        param: (rows, columns).
        grad: of that shape.
        momentum_buffer: M, of that shape, in the dtype of the arithmetic.
        lr: a number or a 0-dim tensor.
        momentum: decay of M, in [0, 1).
        nesterov: whether to look one step ahead.
        weight_decay: decoupled.
        scaling: see `update_scale`.
        ns_steps: iterations of `newton_schulz`.
        coefficients: of `newton_schulz`.
        pieces: matrices stacked along the rows, each orthogonalized (and scaled) on its own.

    Returns:
        New (param, M).
    """
    dtype = work_dtype(param.dtype)
    p, g = param.to(dtype), grad.to(dtype)
    m = momentum_buffer * momentum + g
    u = g + momentum * m if nesterov else m
    u = u.reshape(pieces, -1, param.shape[1])
    o = newton_schulz(u, ns_steps, coefficients=coefficients, fused="off")
    size = lr * update_scale(*u.shape[1:], scaling)
    p = p * (1.0 - lr * weight_decay) - size * o.to(dtype).reshape(param.shape)
    return p.to(param.dtype), m


def check_pieces(group: Mapping[str, Any]) -> None:
    """Raise ValueError unless there is a fitting number of pieces for every matrix of a group."""
    if group["kind"] not in ("muon", "orthogonal") or group["pieces"] is None:
        return
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    params = [p[1] if isinstance(p, tuple) else p for p in params]
    if len(group["pieces"]) != len(params):
        raise ValueError(
            f"pieces must give one number per parameter, got {len(group['pieces'])} for "
            f"{len(params)} parameters"
        )
    for p, n in zip(params, group["pieces"], strict=True):
        # a saved state has numbers in place of its parameters
        if n < 1 or (isinstance(p, Tensor) and p.shape[0] % n):
            shape = tuple(p.shape) if isinstance(p, Tensor) else "that was saved"
            raise ValueError(f"a matrix {shape} has no {n} equal pieces")
