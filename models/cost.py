"""What one ACT step of a model costs: parameters, updates, FLOPs and activation memory.

Nothing is computed: the step runs on tensors of shapes alone (torch's meta device), so that the
largest model is examined on a laptop in seconds. What is counted is the plain path with a flash
attention; compiled and fused steps keep less.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from models.act import ACT
from models.attention import Attention
from models.attention_backends import BACKENDS
from models.build import forward_dtype
from models.config import ModelDims, ReasoningConfig
from models.loss import act_loss


@dataclass(frozen=True)
class Cost:
    """Of one training step of `rows` puzzles; FLOPs count a multiplication and addition as two."""

    parameters: int
    puzzle_numbers: int  # of the puzzle embedding, which is no parameter
    updates: int  # of states, without gradient
    grad_updates: int  # with gradient
    forward_flops: int  # with and without gradient, and the bootstrapped target's
    gradient_flops: int  # of the backward pass, what it recomputes included
    activation_bytes: int  # at most alive during the step, beside parameters and their gradients


def updates_of(config: ReasoningConfig) -> Counter[tuple[str, bool]]:
    """(level, with gradient) → how often one ACT step applies that level."""
    counts: Counter[tuple[str, bool]] = Counter()
    for phase in config.schedule():
        for update in phase.updates:
            counts[update.level, phase.grad] += phase.repeat
    return counts


class _Meter(TorchDispatchMode):
    """FLOPs of products, and bytes of all tensors made since it was entered: alive, at most alive.

    FLOPs by the formulas of torch's `FlopCounterMode`, which keeps tensors alive, and hooks into
    the modules of all threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.alive = self.peak = 0
        self._seen: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.alive -= size
        self._seen.discard(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # the signature is torch's
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for value in tree_leaves(result):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._seen:
                self._seen.add(key)
                self.alive += size
                weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.alive)
        return result


class _ShapedAttention(torch.autograd.Function):
    """What flash attention keeps, and its FLOPs; backward computes the scores once more."""

    flops = 0

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        log_sums = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sums)
        _ShapedAttention.flops += 4 * q.numel() * k.shape[1]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        _ShapedAttention.flops += 10 * q.numel() * k.shape[1]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


BACKENDS["shapes"] = lambda q, k, v, causal: _ShapedAttention.apply(q, k, v)


def cost(config: ReasoningConfig, dims: ModelDims, rows: int, device: torch.device) -> Cost:
    """Examine one training step on `rows` puzzles as it would be on `device`."""
    meta, dtype = torch.device("meta"), forward_dtype(config, device)
    model = config.portable().build(dims, dtype=dtype, generator=torch.Generator())
    model = (model.double() if dtype == torch.float64 else model).to(meta)
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = "shapes"
    act = ACT(model).train()
    tokens = torch.zeros(rows, dims.seq_len, dtype=torch.int32, device=meta)
    ids = torch.zeros(rows, dtype=torch.int32, device=meta)
    batch = {"inputs": tokens, "labels": tokens, "puzzle_ids": ids}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    meter, _ShapedAttention.flops = _Meter(), 0
    with meter:
        carry = act.refill(act.initial_carry(batch), batch)
        puzzle_rows = model.puzzle_rows(ids)
        if puzzle_rows is not None:
            puzzle_rows = puzzle_rows.requires_grad_()
        carry, output = act(carry, puzzle_rows)
        loss, _ = act_loss(carry, output, config.loss)
        forward = meter.flops + _ShapedAttention.flops
        loss.backward()
    total = meter.flops + _ShapedAttention.flops
    table = model.embedding.puzzles
    counts = updates_of(config)
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        puzzle_numbers=0 if table is None else table.numel(),
        updates=sum(n for (_, grad), n in counts.items() if not grad),
        grad_updates=sum(n for (_, grad), n in counts.items() if grad),
        forward_flops=forward,
        gradient_flops=total - forward,
        activation_bytes=meter.peak,
    )
