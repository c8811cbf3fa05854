"""Gradients in flat buffers, added up over the ranks while the backward still runs.

Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training",
arXiv:2006.15704 (buckets in the reverse order of the parameters, launched as they become ready).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BYTES = 8 << 20  # of a bucket: large enough for the bandwidth, small enough to begin early
_ALIGN = 256  # bytes between the starts of two gradients, at least what kernels like


class GradientBuckets:
    """Makes every `grad` a view of a flat buffer, and sums the buffers over all ranks.

    A step is: any number of backward passes, the last one after `arm()`; `finish()`; the
    optimizer; `zero()`. A bucket's all-reduce begins as soon as its last gradient is there, in the
    same order on every rank. Gradients keep their addresses, nothing waits for the device.

    Args:
        parameters: those with gradients. A parameter that a backward does not reach counts as 0.
        mean: divide by the number of ranks. The loss is scaled by the global batch already, so
            the sum is what one rank alone would compute.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, mean: bool = False) -> None:
        self.mean = mean
        self.flat: list[Tensor] = []
        self._members: list[list[nn.Parameter]] = []
        self._works: list[dist.Work] = []
        self._armed = False
        reverse = [p for p in parameters if p.requires_grad][::-1]
        for (dtype, device), params in _by_kind(reverse).items():
            for members in _cut(params):
                self._add(members, dtype, device)
        self._missing = [len(members) for members in self._members]

    def _add(self, members: list[nn.Parameter], dtype: torch.dtype, device: torch.device) -> None:
        number = len(self.flat)
        sizes = [_room(p) for p in members]
        flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
        start = 0
        for p, size in zip(members, sizes, strict=True):
            p.grad = flat.as_strided(p.size(), p.stride(), start)
            p.register_post_accumulate_grad_hook(lambda _, number=number: self._ready(number))
            start += size
        self.flat.append(flat)
        self._members.append(members)

    def arm(self) -> None:
        """The next backward is the last one of the step: reduce what it completes."""
        self._missing = [len(members) for members in self._members]
        self._works = []
        self._armed = True

    def _ready(self, number: int) -> None:
        if self._armed:
            self._missing[number] -= 1
            while len(self._works) < len(self.flat) and not self._missing[len(self._works)]:
                self._launch()

    def _launch(self) -> None:
        self._works.append(dist.all_reduce(self.flat[len(self._works)], async_op=True))

    def finish(self) -> None:
        """Launch what no gradient has completed, and let the current stream wait for all sums."""
        self._armed = False
        while len(self._works) < len(self.flat):
            self._launch()
        for work, flat in zip(self._works, self.flat, strict=True):
            work.wait()
            if self.mean:
                flat.div_(dist.get_world_size())

    def zero(self) -> None:
        """Clear all gradients, in place."""
        for flat in self.flat:
            flat.zero_()


def _by_kind(
    params: list[nn.Parameter],
) -> dict[tuple[torch.dtype, torch.device], list[nn.Parameter]]:
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in params:
        kinds.setdefault((p.dtype, p.device), []).append(p)
    return kinds


def _room(p: nn.Parameter) -> int:
    """Elements that a gradient takes, with what aligns the next one."""
    step = _ALIGN // p.element_size()
    return -(-p.numel() // step) * step


def _cut(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbours, in groups of about `_BYTES`."""
    groups: list[list[nn.Parameter]] = [[]]
    size = 0
    for p in params:
        if size >= _BYTES:
            groups.append([])
            size = 0
        groups[-1].append(p)
        size += _room(p) * p.element_size()
    return [group for group in groups if group]
