"""The launches of Adam-mini: one bucket's tables and the arguments of its kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optim.kernels.adam_mini import adam_mini_kernel, large_blocks_kernel
from optim.kernels.formats import ELEMENTS
from optim.kernels.mini_tiles import MiniTiles
from optim.kernels.table import TensorTable
from optim.kernels.tiles import mini_tile_for
from optim.partition import Segment

FORMATS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    getattr(torch, "float8_e4m3fn", torch.uint8): "fp8",
}
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supported(p: Tensor) -> bool:
    """Whether the kernels take this parameter: a known dtype, contiguous."""
    return p.dtype in PARAM_DTYPES and p.is_contiguous()


def mini_numbers(
    betas: tuple[float, float], weight_decay: float, eps: float, ema_rate: float = 1.0
) -> tuple[float, ...]:
    """The numbers of `adam_mini_kernel`, in its order."""
    logs = [math.log(x) if x > 0.0 else -1e30 for x in betas]
    beta1, beta2 = betas
    return (*logs, beta2, 1.0 - beta1, 1.0 - beta2, weight_decay, eps, 1.0 - ema_rate)


class MiniLaunch:
    """The launches of one bucket: parameters of one dtype and kind of state, on one device.

    Args:
        params: as `supported` says, all with contiguous gradients at `run`.
        states: per parameter `exp_avg`, `exp_avg_sq`, `step`, and where there is one `master` and
            `exp_avg_scale`; they keep their addresses.
        segments: per parameter its blocks.
        shadows: per parameter its float32 EMA, or none.
        seeds: per parameter a number for stochastic rounding, or none: round to nearest.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        segments: Sequence[Sequence[Segment]],
        shadows: Sequence[Tensor] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.params, self.shadows = list(params), list(shadows or ())
        self.states = [dict(s) for s in states]
        device, n = self.params[0].device, len(self.params)
        self.moment = FORMATS[states[0]["exp_avg"].dtype]
        self.scaled = self.moment == "fp8"
        if self.scaled and device.type == "cuda":  # an older GPU keeps no e4m3
            self.moment = "fp8_cvt"
        self.has_master = "master" in states[0]
        # columns after the gradients; what there is not repeats the moments
        names = ["exp_avg", "exp_avg_sq", "step", "master" if self.has_master else "exp_avg"]
        fixed = [[s[name] for s in states] for name in names]
        fixed.append(self.shadows or fixed[0])
        fixed.append([s["exp_avg_scale" if self.scaled else "exp_avg"] for s in states])
        self.fixed = [t.data_ptr() for column in fixed for t in column]
        self.tile = mini_tile_for(device)
        self.cut = MiniTiles(segments, self.tile.block, self.tile.widest, device)
        self.table = TensorTable([0] * n, self.tile.block, device)
        self.tickets = torch.zeros(n, dtype=torch.int32, device=device)
        large = max(1, self.cut.large_blocks)
        self.large_tickets = torch.zeros(large, dtype=torch.int32, device=device)
        self.partials = torch.zeros(2, max(1, self.cut.large_programs), device=device)
        self.next_scales = torch.ones(large, device=device)
        self.ready = torch.zeros(n, 3, device=device)
        self.seeds = torch.tensor(list(seeds or [0] * n), dtype=torch.int32).to(device)
        self.stochastic = seeds is not None
        self.numbers = torch.zeros(8, dtype=torch.float64, device=device)
        self.known: tuple[float, ...] | None = None
        self.flat: list[int] = []
        self.aligned = False

    def run(
        self,
        grads: Sequence[Tensor],
        values: tuple[float, ...],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update everything in place.

        Args:
            grads: per parameter, of its dtype, contiguous.
            values: from `mini_numbers`.
            lr: 0-dim on the device, as the following.
            grad_scale: divides the gradients.
            found_inf: where it is nonzero or NaN nothing is written.
        """
        if values != self.known:
            self._set_numbers(values)
        flat = [p.data_ptr() for p in self.params]
        flat += [g.data_ptr() for g in grads]
        flat += self.fixed
        if flat != self.flat:
            self.flat, n = flat, len(self.params)
            vectors = flat[: 3 * n] + flat[5 * n : 7 * n]  # not the second moments and steps
            self.aligned = not any(x % 16 for x in vectors)
        addresses, cut, n = self.table.addresses(flat), self.cut, len(self.params)
        param = FORMATS[self.params[0].dtype]
        options = {
            "MOMENT": self.moment,
            "SCALED": self.scaled,
            "HAS_SCALE": grad_scale is not None,
            "HAS_FOUND": found_inf is not None,
            "ALIGNED": self.aligned,
            "TILE": self.tile.block,
            "num_warps": self.tile.warps,
            "enable_fp_fusion": True,
        }
        scale = lr if grad_scale is None else grad_scale
        found = lr if found_inf is None else found_inf
        if cut.large_programs:
            large_blocks_kernel[(cut.large_programs,)](
                cut.tiles,
                cut.larges,
                addresses,
                self.partials[0],
                self.partials[1],
                self.large_tickets,
                self.next_scales,
                self.numbers,
                n,
                scale,
                found,
                GRAD=param,
                GRAD_DTYPE=ELEMENTS[param],
                **options,
            )
        adam_mini_kernel[(cut.programs,)](
            cut.tiles,
            cut.larges,
            addresses,
            cut.counts,
            self.tickets,
            self.large_tickets,
            self.ready,
            self.next_scales,
            self.seeds,
            self.numbers,
            n,
            lr,
            scale,
            found,
            PARAM=param,
            PARAM_DTYPE=ELEMENTS[param],
            MOMENT_DTYPE=ELEMENTS[self.moment],
            HAS_MASTER=self.has_master,
            HAS_EMA=bool(self.shadows),
            STOCHASTIC=self.stochastic,
            SHAPES=cut.shapes,
            **options,
        )

    def _set_numbers(self, values: tuple[float, ...]) -> None:
        """Upload the numbers; the bias corrections that the kernel keeps belong to the old ones."""
        on_cuda = self.numbers.is_cuda
        if on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("an option changed: take one optimizer step before the capture")
        host = torch.tensor(values, dtype=torch.float64, pin_memory=on_cuda)
        self.numbers.copy_(host, non_blocking=True)
        self.ready.zero_()
        self.known = values
