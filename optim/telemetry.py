"""What each block of each parameter did in a step, on request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from optim.base import DeviceOptimizer
from optim.moments import block_amax, from_fp8
from optim.partition import Segment

_FIRST = ("exp_avg", "momentum_buffer")


@dataclass(frozen=True)
class Record:
    """One block in one step.

    Attributes:
        step: number of the observed step, from 1.
        name: of the parameter, or its place "group.index".
        block: number within the parameter (always 0 but for AdamMini).
        max_update: largest |change| of the parameter, decay included.
        norm: Euclidean norm of that change.
        max_m: largest |first moment| after the step, as stored; 0 without one.
        scale: what a stored first moment is over the true one (1 but for fp8).
        dtype: of the first moment, "" without one.
    """

    step: int
    name: str
    block: int
    max_update: float
    norm: float
    max_m: float
    scale: float
    dtype: str


class Telemetry:
    """Watches the steps of an optimizer, fused or not, from outside of its kernels.

        with Telemetry(optimizer) as telemetry:
            optimizer.step()
        for record in telemetry.records(): ...

    It copies the parameters before each step, so it is for looking, not for long runs; a step that
    is replayed from a CUDA graph is not seen. Nothing waits for the device before `records`.

    Args:
        optimizer: of this package.
        every: watch each n-th step only.
    """

    def __init__(self, optimizer: DeviceOptimizer, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.optimizer, self.every, self.steps = optimizer, every, 0
        self._before: dict[Tensor, Tensor] = {}
        self._rows: list[tuple[int, str, Tensor, str]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._start()),
            optimizer.register_step_post_hook(lambda *_: self._finish()),
        ]

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; what was seen stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._before = [], {}

    def records(self) -> list[Record]:
        """Everything seen since the last call, oldest first; waits for the device."""
        rows, self._rows = self._rows, []
        found = []
        for step, name, table, dtype in rows:
            for block, numbers in enumerate(table.tolist()):
                found.append(Record(step, name, block, *numbers, dtype))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """`records` as dictionaries, for a table or JSON."""
        return [asdict(record) for record in self.records()]

    @torch.no_grad()
    def _start(self) -> None:
        self.steps += 1
        if (self.steps - 1) % self.every == 0:
            params = (p for g in self.optimizer.param_groups for p in g["params"])
            self._before = {p: p.detach().clone() for p in params}

    @torch.no_grad()
    def _finish(self) -> None:
        before, self._before = self._before, {}
        for number, group in enumerate(self.optimizer.param_groups):
            names = group.get("param_names") or [f"{number}.{i}" for i in range(len(before))]
            for name, p in zip(names, group["params"], strict=False):
                if p in before and p.numel():
                    self._rows.append((self.steps, name, *self._look(p, before[p])))

    def _look(self, p: Tensor, before: Tensor) -> tuple[Tensor, str]:
        """(blocks, 4) numbers of one parameter, on its device; the dtype of its first moment."""
        find = getattr(self.optimizer, "segments", lambda p: (Segment("tensor", 1, p.numel()),))
        segments, state = find(p), self.optimizer.state.get(p, {})
        change = p.float() - before.float()
        largest = block_amax(change, segments)
        parts = change.reshape(-1).split([s.blocks * s.size for s in segments])
        cut = [x.view(s.blocks, s.size) for x, s in zip(parts, segments, strict=True)]
        norm = torch.cat([x.norm(dim=1) for x in cut])
        moment = next((state[name] for name in _FIRST if name in state), None)
        scale = state.get("exp_avg_scale", torch.ones_like(largest))
        if moment is None:
            return torch.stack([largest, norm, torch.zeros_like(norm), scale], dim=1), ""
        m = from_fp8(moment, scale, segments) if "exp_avg_scale" in state else moment
        numbers = torch.stack([largest, norm, block_amax(m, segments), scale], dim=1)
        return numbers, str(moment.dtype).removeprefix("torch.")
