"""The launches of Adam-mini: one bucket's tables and the arguments of its kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.kernels.adam_mini import adam_mini_kernel
from optim.kernels.formats import ELEMENTS, FORMATS
from optim.kernels.large_blocks import large_blocks_kernel
from optim.kernels.launcher import Launcher
from optim.kernels.mini_tiles import MiniTiles
from optim.kernels.table import TensorTable, addresses_of
from optim.kernels.tiles import mini_tile_for
from optim.partition import Segment

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
        self.states = [dict(s) for s in states]  # whose addresses are noted here
        device, n = self.params[0].device, len(self.params)
        self.param = FORMATS[self.params[0].dtype]
        self.moment = FORMATS[states[0]["exp_avg"].dtype]
        self.scaled, self.has_master = self.moment == "fp8", "master" in states[0]
        if self.scaled and device.type == "cuda":  # an older GPU keeps no e4m3
            self.moment = "fp8_cvt"
        # columns after parameters and gradients; what there is not repeats the moments
        moments = [s["exp_avg"] for s in states]
        columns = [moments, [s["exp_avg_sq"] for s in states], [s["step"] for s in states]]
        columns.append([s["master"] for s in states] if self.has_master else moments)
        columns.append(self.shadows or moments)
        columns.append([s["exp_avg_scale"] for s in states] if self.scaled else moments)
        self.fixed = addresses_of([t for column in columns for t in column])
        vectors = self.fixed[:n] + self.fixed[3 * n : 5 * n]  # read in runs of 16 bytes
        self.fixed_aligned = not any(x % 16 for x in vectors)
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
        self.pointers: tuple[int, ...] = ()
        self.aligned = False
        self.launchers: dict[tuple[bool, ...], tuple[Launcher | None, Launcher]] = {}

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
        self.repeat(addresses_of(self.params) + addresses_of(grads), lr, grad_scale, found_inf)

    def repeat(
        self,
        pointers: tuple[int, ...],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """`run` with the values of the last time; `pointers` of all parameters, then gradients."""
        if pointers != self.pointers:
            self.pointers = pointers
            self.aligned = self.fixed_aligned and not any(x % 16 for x in pointers)
        addresses = self.table.addresses(pointers + self.fixed)
        key = (grad_scale is not None, found_inf is not None, self.aligned)
        if key not in self.launchers:
            self.launchers[key] = self._launchers(*key)
        first, second = self.launchers[key]
        scale = lr if grad_scale is None else grad_scale
        found = lr if found_inf is None else found_inf
        if first is not None:
            first(addresses, scale, found)
        second(addresses, lr, scale, found)

    def _launchers(
        self, has_scale: bool, has_found: bool, aligned: bool
    ) -> tuple[Launcher | None, Launcher]:
        """Of `large_blocks_kernel`, where there are any, and of `adam_mini_kernel`."""
        cut, device = self.cut, self.numbers.device
        flags = {"MOMENT": self.moment, "SCALED": self.scaled, "HAS_SCALE": has_scale}
        flags |= {"HAS_FOUND": has_found, "ALIGNED": aligned, "TILE": self.tile.block}
        options = {"num_warps": self.tile.warps, "enable_fp_fusion": True}
        fixed = {
            "tiles": cut.tiles,
            "larges": cut.larges,
            "partials": self.partials[0],
            "peaks": self.partials[1],
            "tickets": self.large_tickets,
            "next_scales": self.next_scales,
            "numbers": self.numbers,
            "tensors": len(self.params),
            "GRAD": self.param,
            "GRAD_DTYPE": ELEMENTS[self.param],
        }
        fixed = _in_order(large_blocks_kernel, fixed | flags)
        first = Launcher(large_blocks_kernel, (cut.large_programs,), device, fixed, **options)
        fixed = {
            "tiles": cut.tiles,
            "larges": cut.larges,
            "counts": cut.counts,
            "tickets": self.tickets,
            "large_tickets": self.large_tickets,
            "ready": self.ready,
            "next_scales": self.next_scales,
            "seeds": self.seeds,
            "numbers": self.numbers,
            "tensors": len(self.params),
            "PARAM": self.param,
            "PARAM_DTYPE": ELEMENTS[self.param],
            "MOMENT_DTYPE": ELEMENTS[self.moment],
            "HAS_MASTER": self.has_master,
            "HAS_EMA": bool(self.shadows),
            "STOCHASTIC": self.stochastic,
            "SHAPES": cut.shapes,
        }
        fixed = _in_order(adam_mini_kernel, fixed | flags)
        second = Launcher(adam_mini_kernel, (cut.programs,), device, fixed, **options)
        return (first if cut.large_programs else None), second

    def _set_numbers(self, values: tuple[float, ...]) -> None:
        """Upload the numbers; the bias corrections that the kernel keeps belong to the old ones."""
        on_cuda = self.numbers.is_cuda
        if on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("an option changed: take one optimizer step before the capture")
        host = torch.tensor(values, dtype=torch.float64, pin_memory=on_cuda)
        self.numbers.copy_(host, non_blocking=True)
        self.ready.zero_()
        self.known = values


def _in_order(kernel: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that do not change, in the order of the kernel."""
    return {name: values[name] for name in kernel.arg_names if name in values}
