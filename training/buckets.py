"""Gradients in flat buffers, added up over the ranks while the backward still runs.

Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training",
arXiv:2006.15704 (buckets in the reverse order of the parameters, launched as they become ready).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.shards import by_kind, chunks, room


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
        for params in by_kind(reverse):
            for members in chunks(params):
                self._add(members)
        self._missing = [len(members) for members in self._members]

    def _add(self, members: list[nn.Parameter]) -> None:
        number = len(self.flat)
        sizes = [room(p) for p in members]
        flat = torch.zeros(sum(sizes), dtype=members[0].dtype, device=members[0].device)
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
