"""From groups of parameters to launches: buckets, their tables, the arguments of the kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import ReferenceType, ref

import torch
import triton.language as tl
from torch import Tensor

from optim.kernels.adam import STEPS, adam_kernel
from optim.kernels.formats import ELEMENTS, FORMATS
from optim.kernels.launcher import Launcher
from optim.kernels.norm import norm_kernel
from optim.kernels.table import TensorTable, addresses_of, same_objects
from optim.kernels.tiles import tile_for

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def supported(p: Tensor) -> bool:
    """Whether the kernels take this tensor: a known dtype, one gapless run of memory."""
    return p.dtype in DTYPES and torch.empty_like(p, device="meta").stride() == p.stride()


def numbers(
    rule: str,
    betas: tuple[float, float],
    weight_decay: float,
    *,
    eps: float = 0.0,
    a: float = 1.0,
    b: float = 1.0,
    lr_scale: float = 1.0,
    ema_rate: float = 1.0,
) -> tuple[float, ...]:
    """The numbers of `adam_kernel`, in its order.

    AdamW's betas are rounded to float32 before anything is worked out from them, as torch does.
    """
    if rule == "adamw":
        betas = tuple(torch.tensor(betas, dtype=torch.float32).tolist())
    logs = [math.log(x) if x > 0.0 else -1e30 for x in betas]
    tail = (weight_decay, eps, a, b, lr_scale, 1.0 - ema_rate)
    return (*logs, *betas, *(1.0 - x for x in betas), *tail)


@lru_cache(maxsize=16)
def torch_powers(beta1: float, beta2: float, device: torch.device) -> Tensor:
    """(2, STEPS) float32: 1 - beta^t as torch's fused AdamW works it out, by t."""
    steps = torch.arange(STEPS.value, dtype=torch.float32, device=device)
    return torch.stack([1.0 - torch.full_like(steps, b).pow(steps) for b in (beta1, beta2)])


class AdamLaunch:
    """The launch of one bucket: parameters of one dtype on one device, with their states.

    Args:
        params: as `supported` says, all with gradients of their memory order at `run`.
        states: per parameter `exp_avg`, `exp_avg_sq` (float32) and `step` (float32, 0-dim), and
            for half precision perhaps its `master` (float32), which keep their addresses.
        shadows: per parameter its float32 EMA, or none.
        seeds: per parameter a number for stochastic rounding, or none: to the nearest.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        shadows: Sequence[Tensor] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.params, self.shadows = list(params), list(shadows or ())
        names = ("exp_avg", "exp_avg_sq", "step")
        self.kept = [[state[name] for state in states] for name in names]
        self.masters = [state["master"] for state in states if "master" in state]
        self.moments = addresses_of([t for column in self.kept[:2] for t in column])
        self.rest = addresses_of([*self.kept[2], *self.shadows, *self.masters])
        device = self.params[0].device
        self.seeds = torch.tensor(list(seeds or [0]), dtype=torch.int32).to(device)
        self.stochastic = seeds is not None
        numels = [p.numel() for p in self.params]
        self.tile = tile_for(device, sum(numels))
        self.table = TensorTable(numels, self.tile.block, device)
        self.tickets = torch.zeros(len(self.params), dtype=torch.int32, device=device)
        self.ready = torch.zeros(len(self.params), 3, dtype=torch.float32, device=device)
        self.known: tuple[str, tuple[float, ...]] | None = None
        self.numbers = torch.zeros(12, dtype=torch.float64, device=device)
        self.powers = self.ready  # not read, but for AdamW on CUDA
        self.pointers: tuple[int, ...] = ()
        self.flat: tuple[int, ...] = ()
        self.aligned = False
        self.launchers: dict[tuple[Any, ...], Launcher] = {}

    def run(
        self,
        grads: Sequence[Tensor],
        rule: str,
        values: tuple[float, ...],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update everything in place.

        Args:
            grads: per parameter, of its dtype and memory order.
            rule: "adamw", "atan2_outside" or "atan2_inside".
            values: from `numbers`.
            lr: 0-dim on the device, as the following.
            grad_scale: divides the gradients.
            found_inf: where it is nonzero or NaN nothing is written.
        """
        if (rule, values) != self.known:
            self._set_numbers(rule, values)
        self.repeat(addresses_of(self.params) + addresses_of(grads), lr, grad_scale, found_inf)

    def repeat(
        self,
        pointers: tuple[int, ...],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """`run` with the rule and the values of the last time.

        Args:
            pointers: of all parameters and then of all gradients.
            lr, grad_scale, found_inf: see `run`.
        """
        if pointers != self.pointers:
            self.pointers = pointers
            self.flat = pointers + self.moments + self.rest
            shadows = self.rest[len(self.params) :]
            self.aligned = not any(x % 16 for x in pointers + self.moments + shadows)
        addresses = self.table.addresses(self.flat)
        key = (self.known[0], grad_scale is not None, found_inf is not None, self.aligned, lr.dtype)
        if key not in self.launchers:
            self.launchers[key] = self._launcher(*key[:4], powf=lr.is_cuda)
        self.launchers[key](
            addresses,
            lr,
            lr if grad_scale is None else grad_scale,
            lr if found_inf is None else found_inf,
            self.powers,
        )

    def _launcher(
        self, rule: str, has_scale: bool, has_found: bool, aligned: bool, powf: bool
    ) -> Launcher:
        fixed = {
            "chunk_tensor": self.table.chunk_tensor,
            "chunk_index": self.table.chunk_index,
            "sizes": self.table.sizes,
            "counts": self.table.counts,
            "tickets": self.tickets,
            "ready": self.ready,
            "numbers": self.numbers,
            "seeds": self.seeds,
            "tensors": len(self.params),
            "RULE": rule,
            "FORMAT": FORMATS[self.params[0].dtype],
            "DTYPE": ELEMENTS[FORMATS[self.params[0].dtype]],
            "HAS_MASTER": bool(self.masters),
            "STOCHASTIC": self.stochastic,
            "HAS_SCALE": has_scale,
            "HAS_FOUND": has_found,
            "HAS_EMA": bool(self.shadows),
            "ALIGNED": aligned,
            "POWF": powf,
            "BLOCK": self.tile.block,
        }
        # fusing products and sums: as torch's kernels are compiled
        options = {"num_warps": self.tile.warps, "enable_fp_fusion": True}
        return Launcher(adam_kernel, (self.table.chunks,), self.numbers.device, fixed, **options)

    def _set_numbers(self, rule: str, values: tuple[float, ...]) -> None:
        """Upload the numbers; the bias corrections that the kernel keeps belong to the old ones."""
        on_cuda = self.numbers.is_cuda
        if on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("an option changed: take one optimizer step before the capture")
        host = torch.tensor(values, dtype=torch.float64, pin_memory=on_cuda)
        self.numbers.copy_(host, non_blocking=True)
        self.ready.zero_()
        if rule == "adamw" and on_cuda:
            self.powers = torch_powers(values[2], values[3], self.numbers.device)
        self.known = (rule, values)


class NormLaunch:
    """The norm of gradients of fixed sizes on one device: one launch per dtype.

    Args:
        like: tensors with the sizes, dtypes and device of the gradients.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        device = like[0].device
        self.tile = tile_for(device)
        rows = [[i for i, g in enumerate(like) if g.dtype == dtype] for dtype in DTYPES]
        self.rows = [r for r in rows if r]
        self.dtypes = [like[r[0]].dtype for r in self.rows]
        block = self.tile.norm_block
        self.tables = [TensorTable([like[i].numel() for i in r], block, device) for r in self.rows]
        self.partials = torch.zeros(self.tile.norm_programs * len(self.rows), device=device)
        self.ticket = torch.zeros((), dtype=torch.int32, device=device)
        self.out = torch.zeros(2, dtype=torch.float32, device=device)
        self.results = (self.out[0], self.out[1])
        self.max_norm: float | None = None
        self.launchers: dict[tuple[int, bool], Launcher] = {}

    def run(self, grads: Sequence[Tensor], max_norm: float = 0.0) -> tuple[Tensor, Tensor]:
        """The norm and its `clip_scale`, 0-dim float32, in tensors that the next run overwrites."""
        if max_norm != self.max_norm:
            self.max_norm = max_norm
            self.launchers.clear()
        for k, (rows, table) in enumerate(zip(self.rows, self.tables, strict=True)):
            flat = addresses_of([grads[i] for i in rows])
            key = (k, not any(x % 16 for x in flat))
            if key not in self.launchers:
                self.launchers[key] = self._launcher(*key)
            self.launchers[key](table.addresses(flat))
        return self.results

    def _launcher(self, k: int, aligned: bool) -> Launcher:
        table, programs = self.tables[k], self.tile.norm_programs
        last = k == len(self.rows) - 1
        fixed = {
            "chunk_tensor": table.chunk_tensor,
            "chunk_index": table.chunk_index,
            "sizes": table.sizes,
            "partials": self.partials,
            "ticket": self.ticket,
            "out": self.out,
            "first": k * programs,
            "chunks": table.chunks,
            "max_norm": float(self.max_norm),
            "ROUNDS": -(-table.chunks // programs),
            "COUNT": self.partials.numel() if last else 0,
            "DTYPE": DTYPES[self.dtypes[k]],
            "ALIGNED": aligned,
            "BLOCK": self.tile.norm_block,
        }
        options = {"num_warps": self.tile.norm_warps, "enable_fp_fusion": True}
        return Launcher(norm_kernel, (programs,), self.out.device, fixed, **options)


class NormLaunches:
    """Norms of changing sets of gradients: one `NormLaunch` for each layout seen."""

    def __init__(self) -> None:
        self.launches: dict[tuple[Any, ...], NormLaunch] = {}
        self.seen: list[ReferenceType[Tensor]] = []
        self.last: NormLaunch | None = None

    def run(self, grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor] | None:
        """Norm and clip scale; None where the kernel cannot take a gradient.

        Args:
            grads: at least one.
            max_norm: of `clip_scale`.
        """
        if same_objects(grads, self.seen):  # so are dtypes, shapes and layouts
            return self.last.run(grads, max_norm)
        self.seen = []
        if any(g.layout != torch.strided for g in grads):
            return None
        key = tuple([(g.device, g.dtype, g.shape, g.stride()) for g in grads])
        if key not in self.launches:
            if not all(supported(g) and g.device == grads[0].device for g in grads):
                return None
            self.launches[key] = NormLaunch(grads)
        self.last, self.seen = self.launches[key], [ref(g) for g in grads]
        return self.last.run(grads, max_norm)
