"""From groups of parameters to launches: buckets, their tables, the arguments of the kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import triton.language as tl
from torch import Tensor

from optim.kernels.adam import adam_kernel
from optim.kernels.norm import norm_kernel
from optim.kernels.table import TensorTable
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
    ema_rate: float = 1.0,
) -> tuple[float, ...]:
    """The numbers of `adam_kernel`, in its order.

    AdamW's betas are rounded to float32 before anything is worked out from them, as torch does.
    """
    if rule == "adamw":
        betas = tuple(torch.tensor(betas, dtype=torch.float32).tolist())
    logs = [math.log(x) if x > 0.0 else -1e30 for x in betas]
    return (*logs, *betas, *(1.0 - x for x in betas), weight_decay, eps, a, b, 1.0 - ema_rate)


class AdamLaunch:
    """The launch of one bucket: parameters of one dtype on one device, with their states.

    Args:
        params: as `supported` says, all with gradients of their memory order at `run`.
        states: per parameter `exp_avg`, `exp_avg_sq` (float32) and `step` (float32, 0-dim), which
            keep their addresses.
        shadows: per parameter its float32 EMA, or none.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        shadows: Sequence[Tensor] | None = None,
    ) -> None:
        self.params, self.shadows = list(params), list(shadows or ())
        names = ("exp_avg", "exp_avg_sq", "step")
        self.kept = [[state[name] for state in states] for name in names]
        self.fixed = [t.data_ptr() for column in self.kept for t in column]
        device = self.params[0].device
        self.tile = tile_for(device)
        self.table = TensorTable([p.numel() for p in self.params], self.tile.block, device)
        self.tickets = torch.zeros(len(self.params), dtype=torch.int32, device=device)
        self.ready = torch.zeros(len(self.params), 3, dtype=torch.float32, device=device)
        self.known: tuple[str, tuple[float, ...]] | None = None
        self.numbers = torch.zeros(11, dtype=torch.float64, device=device)
        self.flat: list[int] = []
        self.aligned = False

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
        flat = [p.data_ptr() for p in self.params]
        flat += [g.data_ptr() for g in grads]
        flat += self.fixed
        flat += [s.data_ptr() for s in self.shadows]
        if flat != self.flat:
            self.flat, n = flat, len(self.params)
            self.aligned = not any(x % 16 for x in flat[: 4 * n] + flat[5 * n :])
        adam_kernel[(self.table.chunks,)](
            self.table.chunk_tensor,
            self.table.chunk_index,
            self.table.addresses(flat),
            self.table.sizes,
            self.table.counts,
            self.tickets,
            self.ready,
            self.numbers,
            len(self.params),
            lr,
            lr if grad_scale is None else grad_scale,
            lr if found_inf is None else found_inf,
            RULE=rule,
            DTYPE=DTYPES[self.params[0].dtype],
            HAS_SCALE=grad_scale is not None,
            HAS_FOUND=found_inf is not None,
            HAS_EMA=bool(self.shadows),
            ALIGNED=self.aligned,
            POWF=lr.is_cuda,
            BLOCK=self.tile.block,
            num_warps=self.tile.warps,
            enable_fp_fusion=True,  # as torch's kernels are compiled
        )

    def _set_numbers(self, rule: str, values: tuple[float, ...]) -> None:
        """Upload the numbers; the bias corrections that the kernel keeps belong to the old ones."""
        on_cuda = self.numbers.is_cuda
        if on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("an option changed: take one optimizer step before the capture")
        host = torch.tensor(values, dtype=torch.float64, pin_memory=on_cuda)
        self.numbers.copy_(host, non_blocking=True)
        self.ready.zero_()
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
        block = self.tile.norm_block
        self.tables = [TensorTable([like[i].numel() for i in r], block, device) for r in self.rows]
        self.partials = torch.zeros(self.tile.norm_programs * len(self.rows), device=device)
        self.ticket = torch.zeros((), dtype=torch.int32, device=device)
        self.out = torch.zeros(2, dtype=torch.float32, device=device)

    def run(self, grads: Sequence[Tensor], max_norm: float = 0.0) -> tuple[Tensor, Tensor]:
        """The norm and its `clip_scale`, 0-dim float32, in tensors that the next run overwrites."""
        programs = self.tile.norm_programs
        for k, (rows, table) in enumerate(zip(self.rows, self.tables, strict=True)):
            flat = [grads[i].data_ptr() for i in rows]
            last = k == len(self.rows) - 1
            norm_kernel[(programs,)](
                table.chunk_tensor,
                table.chunk_index,
                table.addresses(flat),
                table.sizes,
                self.partials,
                self.ticket,
                self.out,
                k * programs,
                table.chunks,
                float(max_norm),
                ROUNDS=-(-table.chunks // programs),
                COUNT=self.partials.numel() if last else 0,
                DTYPE=DTYPES[grads[rows[0]].dtype],
                ALIGNED=not any(x % 16 for x in flat),
                BLOCK=self.tile.norm_block,
                num_warps=self.tile.norm_warps,
                enable_fp_fusion=True,
            )
        return self.out[0], self.out[1]


def fused_norm(
    launches: dict[tuple[int, ...], NormLaunch], params: Sequence[Tensor], max_norm: float
) -> tuple[Tensor, Tensor] | None:
    """Norm and clip scale of the gradients of `params`; None where the kernel cannot take one.

    Args:
        launches: of earlier calls, by the parameters; filled here.
        params: all with a gradient.
        max_norm: of `clip_scale`.
    """
    key = tuple(map(id, params))
    grads = [p.grad for p in params]
    device = params[0].device
    for p, g in zip(params, grads, strict=True):
        if g.layout != torch.strided or g.dtype not in DTYPES or g.device != device:
            return None
        if g.stride() != p.stride() and not supported(g):
            return None
    if key not in launches:
        if not all(map(supported, params)):
            return None
        launches[key] = NormLaunch(params)
    return launches[key].run(grads, max_norm)
