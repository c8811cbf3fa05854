"""Where a ShardedOptimizer may cut the parameters of Muon and of Adam-mini."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from optim.cuts import Cuts, anywhere, between
from optim.groups import work_dtype
from optim.partition import Segment, partition_parameters

_TO_ADAM = ("vector", "embedding", "head")
_HALVES = {"kind": "momentum", "pieces": None}, {"kind": "orthogonal"}
Named = Sequence[tuple[str, Tensor]]


def matrices_in(named: Named, options: Mapping[str, Any]) -> list[int]:
    """How many matrices Muon orthogonalizes in each parameter of a group, 0 where Adam takes it.

    Args:
        named: the group's parameters.
        options: of the group. "pieces" are the answer, "kind" is that of all parameters, else
            names and shapes tell; without "split_fused" a parameter is one matrix.

    Raises:
        ValueError: if there is not one of "pieces" for each parameter.
    """
    kind, given = options.get("kind"), options.get("pieces")
    if kind == "adam":
        return [0] * len(named)
    if given is not None:
        if len(given) != len(named):
            raise ValueError(
                f"pieces must give one number per parameter, got {len(given)} for {len(named)} "
                "parameters"
            )
        return list(given)
    if kind == "muon":
        return [1] * len(named)
    split = options.get("split_fused", True)
    return [
        (part.pieces if split else 1) if part.role not in _TO_ADAM and part.param.ndim == 2 else 0
        for part in partition_parameters(named, warn=False)
    ]


def divide_muon(named: Named, options: Mapping[str, Any]) -> list[Cuts]:
    """Between matrices, and anywhere in what goes to Adam, whose state is twice as large.

    The momentum of a matrix may be elsewhere, if a gradient is as precise as what is made of both.
    """
    found = []
    for (_, p), number in zip(named, matrices_in(named, options), strict=True):
        if not number:
            found.append(Cuts(anywhere(p), 2, lambda start, stop: {"pieces": 0}))
            continue
        size = p.numel() // number
        # a part of a single row could no longer be told from a vector
        points = range(size, p.numel(), size) if size > p.shape[1] else ()
        halves = _HALVES if p.dtype == work_dtype(p.dtype) else None
        found.append(Cuts(points, 1, partial(_pieces, size), halves=halves))
    return found


def _pieces(size: int, start: int, stop: int) -> dict[str, int]:
    return {"pieces": (stop - start) // size}


def divide_mini(named: Named, options: Mapping[str, Any]) -> list[Cuts]:
    """Between blocks."""
    heads = (options.get("num_heads"), options.get("num_kv_heads"))
    return [
        Cuts(
            between(part.param, ((s.blocks, s.size) for s in part.segments)),
            1,
            partial(_segments, part.segments),
            partial(_blocks, part.segments),
        )
        for part in partition_parameters(named, *heads, rules=options.get("rules", ()))
    ]


def _segments(
    segments: Sequence[Segment], start: int, stop: int
) -> dict[str, list[tuple[str, int, int]]]:
    """The blocks of elements [start, stop), which begin and end with blocks."""
    found = []
    for s in segments:
        size = s.blocks * s.size
        a, b = max(start, 0), min(stop, size)
        if a < b:
            found.append((s.kind, (b - a) // s.size, s.size))
        start, stop = start - size, stop - size
    return {"segments": found}


def _blocks(segments: Sequence[Segment], element: int) -> int:
    """How many blocks end before an element."""
    count = 0
    for s in segments:
        size = s.blocks * s.size
        count += min(element, size) // s.size
        element = max(element - size, 0)
    return count
