"""From groups of parameters to launches: buckets, their tables, the arguments of the kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
import triton.language as tl
from torch import Tensor

from optim.kernels.adam import adam_kernel
from optim.kernels.norm import norm_finish_kernel, norm_kernel
from optim.kernels.table import TensorTable, aligned
from optim.kernels.tiles import tile_for

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def supported(p: Tensor) -> bool:
    """Whether the kernels take this parameter: a known dtype, one gapless run of memory."""
    return p.dtype in DTYPES and torch.empty_like(p, device="meta").stride() == p.stride()


def pair(x: float) -> tuple[float, float]:
    """x as the nearest float32 and the float32 nearest to the rest."""
    high = torch.tensor(x, dtype=torch.float32).item()
    return high, x - high


def scalars(
    betas: tuple[float, float],
    weight_decay: float,
    *,
    eps: float = 0.0,
    a: float = 1.0,
    b: float = 1.0,
    ema_rate: float = 1.0,
) -> tuple[float, ...]:
    """The float arguments of `adam_kernel`, in its order."""
    logs = [pair(math.log(x) if x > 0.0 else -1e30) for x in betas]
    mixes = [(*pair(x), *pair(1.0 - x)) for x in betas]
    return (*logs[0], *logs[1], *mixes[0], *mixes[1], weight_decay, eps, a, b, 1.0 - ema_rate)


class AdamLaunch:
    """The launch of one bucket: parameters of one dtype on one device, with their states.

    Args:
        params: as `supported` says, all with gradients of their memory order at `run`.
        states: per parameter `exp_avg`, `exp_avg_sq` (float32) and `step` (float32, 0-dim).
        shadows: per parameter its float32 EMA, or none.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        shadows: Sequence[Tensor] | None = None,
    ) -> None:
        self.params = list(params)
        self.fixed = [
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["step"] for s in states],
        ] + ([list(shadows)] if shadows else [])
        device = self.params[0].device
        self.tile = tile_for(device)
        self.table = TensorTable([p.numel() for p in self.params], self.tile.block, device)
        self.tickets = torch.zeros(len(self.params), dtype=torch.int32, device=device)
        self.ready = torch.zeros(len(self.params), 3, dtype=torch.float32, device=device)

    def run(
        self,
        grads: Sequence[Tensor],
        rule: str,
        numbers: tuple[float, ...],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update everything in place.

        Args:
            grads: per parameter, of its dtype and memory order.
            rule: "adamw", "atan2_outside" or "atan2_inside".
            numbers: from `scalars`.
            lr: 0-dim on the device, as the following.
            grad_scale: divides the gradients.
            found_inf: where it is nonzero or NaN nothing is written.
        """
        wide = [*self.params, *grads, *self.fixed[0], *self.fixed[1], *chain(*self.fixed[3:])]
        adam_kernel[(self.table.chunks,)](
            self.table.chunk_tensor,
            self.table.chunk_index,
            self.table.addresses([self.params, grads, *self.fixed]),
            self.table.sizes,
            self.table.counts,
            self.tickets,
            self.ready,
            len(self.params),
            lr,
            lr if grad_scale is None else grad_scale,
            lr if found_inf is None else found_inf,
            *numbers,
            RULE=rule,
            DTYPE=DTYPES[self.params[0].dtype],
            HAS_SCALE=grad_scale is not None,
            HAS_FOUND=found_inf is not None,
            HAS_EMA=len(self.fixed) == 4,
            ALIGNED=aligned(wide),
            BLOCK=self.tile.block,
            num_warps=self.tile.warps,
            enable_fp_fusion=False,  # what is fused is written so
        )


class NormLaunch:
    """The norm of gradients of fixed sizes on one device: a launch per dtype and one to finish.

    Args:
        like: tensors with the sizes, dtypes and device of the gradients.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        device = like[0].device
        self.tile = tile_for(device)
        self.rows: list[list[int]] = []
        for dtype in DTYPES:
            rows = [i for i, g in enumerate(like) if g.dtype == dtype]
            self.rows += [rows] if rows else []
        block = self.tile.norm_block
        self.tables = [
            TensorTable([like[i].numel() for i in rows], block, device) for rows in self.rows
        ]
        count = self.tile.norm_programs * len(self.rows)
        self.partials = torch.zeros(count, dtype=torch.float32, device=device)
        self.norm = torch.zeros((), dtype=torch.float32, device=device)

    def run(self, grads: Sequence[Tensor]) -> Tensor:
        """The norm, 0-dim float32, in a tensor that the next run overwrites."""
        programs = self.tile.norm_programs
        for k, (rows, table) in enumerate(zip(self.rows, self.tables, strict=True)):
            part = [grads[i] for i in rows]
            norm_kernel[(programs,)](
                table.chunk_tensor,
                table.chunk_index,
                table.addresses([part]),
                table.sizes,
                self.partials[k * programs :],
                table.chunks,
                ROUNDS=-(-table.chunks // programs),
                DTYPE=DTYPES[part[0].dtype],
                ALIGNED=aligned(part),
                BLOCK=self.tile.norm_block,
                num_warps=self.tile.norm_warps,
            )
        norm_finish_kernel[(1,)](self.partials, self.norm, N=self.partials.numel(), BLOCK=1024)
        return self.norm
