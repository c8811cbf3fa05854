"""An optimizer whose state is spread over the ranks of a data-parallel run (ZeRO, stage 1).

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
arXiv:1910.02054. Every rank keeps the moments of its share of the parameters only: gradients are
reduce-scattered, the share is updated, parameters are all-gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from optim.base import DeviceOptimizer, Params
from optim.clip import clip_scale

_BYTES = 8 << 20  # of a bucket that is cut anywhere
_ALIGN = 256  # bytes between the starts of two tensors
# torch 2.13 gives them new names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Piece(NamedTuple):
    """A part of an optimizer's state that this rank keeps."""

    param: Tensor  # whose state it is
    moment: str
    tensor: Tensor  # this rank's part, in place
    start: int | None  # its first element in the flattened moment; None: the whole


@dataclass
class _Bucket:
    """Tensors side by side in flat buffers of `world` equal regions, one for each rank."""

    members: list[Tensor]
    starts: list[int]  # first element of each
    region: int  # elements
    params: Tensor  # (world * region,); the members are views of it
    grads: Tensor  # likewise; their gradients are views of it
    mine: Tensor  # (region,) sums of gradients of this rank's region
    local: list[tuple[Tensor, Tensor | None]]  # what is updated here; its member, if it is whole


class ShardedOptimizer(torch.optim.Optimizer):
    """`ShardedOptimizer(model.parameters(), AdamW, lr=1e-3)` after `init_process_group`.

    Makes parameters and gradients views of flat buffers; gradients keep their addresses and are
    cleared in place. `step` reduces them, unless `arm` let the backward do so as they came, updates
    this rank's share and gathers the parameters. What is equal on all ranks before is after it.

    Args:
        params: tensors, (name, tensor) pairs or groups: the same on every rank, equal in value.
        cls: an optimizer's class, or what makes one of (name, tensor) pairs or groups, `options`.
        group: of processes; None: all.
        cut: whether a tensor may be cut anywhere: every element is updated on its own, as in
            AdamW. Else whole tensors go to ranks, the largest first to the emptiest. None: as
            `cls.elementwise` says, else not cut, which is right for any optimizer.
        mean: average the gradients (as DistributedDataParallel does), else add them up.
        options: for `cls`.

    Raises:
        ValueError: for a parameter that is not contiguous, or not on the device of the others.
    """

    def __init__(
        self,
        params: Params,
        cls: Callable[..., torch.optim.Optimizer],
        *,
        group: dist.ProcessGroup | None = None,
        cut: bool | None = None,
        mean: bool = False,
        **options: Any,
    ) -> None:
        self.group, self.mean = group, mean
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.cut = getattr(cls, "elementwise", False) if cut is None else cut
        super().__init__(params, dict(options))
        self._buckets: list[_Bucket] = []
        self._works: list[dist.Work] = []
        self._armed = self._reduced = False
        self._loads = [0] * self.world
        inner = [self._share(g) for g in self.param_groups]
        self.inner = cls([g for g in inner if g["params"]], **options) if any(
            g["params"] for g in inner) else None  # fmt: skip
        self._missing = [len(b.members) for b in self._buckets]

    # Layout

    def _share(self, group: dict[str, Any]) -> dict[str, Any]:
        """Lay out the parameters of a group; returns the group of what this rank updates."""
        names = group.get("param_names") or [""] * len(group["params"])
        named = dict(zip(map(id, group["params"]), names, strict=True))
        local: list[tuple[str, Tensor]] = []
        for members in _by_kind(group["params"]):
            for some in _chunks(members[::-1]) if self.cut else [members]:
                bucket = self._lay_out(some)
                for part, member in bucket.local:
                    local.append(("" if member is None else named[id(member)], part))
        named_all = all(name for name, _ in local)
        own = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        return {**own, "params": local if named_all else [part for _, part in local]}

    def _lay_out(self, members: list[Tensor]) -> _Bucket:
        first = members[0]
        rooms = [_room(p) for p in members]
        if self.cut:
            total = sum(rooms)
            region = _round(-(-total // self.world), first.element_size())
            starts = [sum(rooms[:i]) for i in range(len(rooms))]
            owners = None
        else:
            owners, fill = [0] * len(members), [0] * self.world
            starts = [0] * len(members)
            for i in sorted(range(len(members)), key=lambda i: -rooms[i]):
                owners[i] = min(range(self.world), key=lambda r: (self._loads[r], r))
                starts[i] = fill[owners[i]]
                fill[owners[i]] += rooms[i]
                self._loads[owners[i]] += rooms[i]
            region = max(fill)
            starts = [o * region + s for o, s in zip(owners, starts, strict=True)]
        flat = torch.zeros(self.world * region, dtype=first.dtype, device=first.device)
        grads, mine = torch.zeros_like(flat), torch.zeros_like(flat[:region])
        number = len(self._buckets)
        for p, start in zip(members, starts, strict=True):
            self._take(p, flat[start : start + p.numel()], grads, start, number)
        bucket = _Bucket(members, starts, region, flat, grads, mine, [])
        bucket.local = self._local(bucket, owners)
        self._buckets.append(bucket)
        return bucket

    @torch.no_grad()
    def _take(self, p: Tensor, place: Tensor, grads: Tensor, start: int, number: int) -> None:
        if not p.is_contiguous():
            raise ValueError(f"a parameter of shape {tuple(p.shape)} is not contiguous")
        place.copy_(p.reshape(-1))
        p.data = place.view(p.shape)
        p.grad = grads[start : start + p.numel()].view(p.shape)
        p.register_post_accumulate_grad_hook(lambda _: self._ready(number))

    def _local(
        self, bucket: _Bucket, owners: list[int] | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Views of this rank's region, with their gradients: all of it, or whole tensors."""
        low = self.rank * bucket.region
        if owners is None:
            end = bucket.starts[-1] + bucket.members[-1].numel()
            size = min(bucket.region, end - low)
            places = [(low, size, (size,), None)] if size > 0 else []
        else:
            places = [
                (start, p.numel(), p.shape, p)
                for p, start, owner in zip(bucket.members, bucket.starts, owners, strict=True)
                if owner == self.rank
            ]
        found = []
        for start, size, shape, member in places:
            part = bucket.params[start : start + size].view(shape)
            part.grad = bucket.mine[start - low : start - low + size].view(shape)
            found.append((part, member))
        return found

    # Gradients

    def arm(self) -> None:
        """The next backward is the last one before `step`: reduce what it completes."""
        self._missing = [len(b.members) for b in self._buckets]
        self._works = []
        self._armed, self._reduced = True, False

    def _ready(self, number: int) -> None:
        if self._armed:
            self._missing[number] -= 1
            while len(self._works) < len(self._buckets) and not self._missing[len(self._works)]:
                self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[len(self._works)]
        work = _reduce_scatter(bucket.mine, bucket.grads, group=self.group, async_op=True)
        self._works.append(work)

    def finish(self) -> None:
        """Reduce what the backward has not, and let the current stream wait for it."""
        self._armed, self._reduced = False, True
        while len(self._works) < len(self._buckets):
            self._launch()
        for work, bucket in zip(self._works, self._buckets, strict=True):
            work.wait()
            if self.mean:
                bucket.mine.div_(self.world)
        self._works = []

    def zero(self) -> None:
        """Clear all gradients, in place."""
        self._reduced = False
        for bucket in self._buckets:
            bucket.grads.zero_()

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear all gradients; always in place, for they are views."""
        self.zero()

    @torch.no_grad()
    def clip(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """The norm of all gradients, and the `grad_scale` that clips it (see `clip_scale`)."""
        if not self._reduced:
            self.finish()
        wide = torch.promote_types(self._buckets[0].mine.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=self._buckets[0].mine.device)
        for bucket in self._buckets:
            total += torch.linalg.vector_norm(bucket.mine, dtype=wide).square()
        dist.all_reduce(total, group=self.group)
        norm = total.sqrt()
        return norm, clip_scale(norm, max_norm)

    # The step

    def set_lr(self, value: float | Tensor) -> None:
        """Set the learning rate of every group now, without a synchronization."""
        for group in self.param_groups:
            group["lr"] = value
        if isinstance(self.inner, DeviceOptimizer):
            self.inner.set_lr(value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, **settings: Any) -> float | None:
        """Update this rank's share, then gather all parameters.

        Args:
            closure: evaluates the model again and returns the loss.
            settings: for the step of `cls`, such as `grad_scale` and `found_inf`, which must be
                the same on all ranks.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._reduced:
            self.finish()
        if self.inner is not None:
            self._pass_options()
            self.inner.step(**settings)
        works = []
        for b in self._buckets:
            mine = b.params[self.rank * b.region : (self.rank + 1) * b.region]
            works.append(_all_gather(b.params, mine, group=self.group, async_op=True))
        for work in works:
            work.wait()
        return loss

    def _pass_options(self) -> None:
        """What a scheduler has set in the groups goes to the groups of this rank's share."""
        if isinstance(self.inner, DeviceOptimizer):
            return
        for group in self.inner.param_groups:
            group["lr"] = self.param_groups[0]["lr"]

    # State

    def pieces(self) -> list[Piece]:
        """What this rank keeps, in terms of the parameters that were handed over."""
        found: list[Piece] = []
        if self.inner is None:
            return found
        for bucket in self._buckets:
            for part, member in bucket.local:
                for moment, value in self.inner.state[part].items():
                    if member is not None:
                        found.append(Piece(member, moment, value, None))
                    else:
                        found += self._cut_pieces(bucket, moment, value)
        return found

    def _cut_pieces(self, bucket: _Bucket, moment: str, value: Tensor) -> list[Piece]:
        low = self.rank * bucket.region
        found = []
        for p, start in zip(bucket.members, bucket.starts, strict=True):
            if value.ndim == 0:  # a count of steps: of the tensors that begin here
                if low <= start < low + bucket.region:
                    found.append(Piece(p, moment, value, None))
                continue
            a, b = max(low, start), min(low + value.numel(), start + p.numel())
            if a < b:
                found.append(Piece(p, moment, value[a - low : b - low], a - start))
        return found


def _by_kind(params: list[Tensor]) -> list[list[Tensor]]:
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in params:
        kinds.setdefault((p.dtype, p.device), []).append(p)
    return list(kinds.values())


def _round(elements: int, element_size: int) -> int:
    step = _ALIGN // element_size
    return -(-elements // step) * step


def _room(p: Tensor) -> int:
    """Elements that a tensor takes, with what aligns the next one."""
    return _round(p.numel(), p.element_size())


def _chunks(params: list[Tensor]) -> list[list[Tensor]]:
    """Neighbours, in groups of about `_BYTES`."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for p in params:
        if size >= _BYTES:
            groups.append([])
            size = 0
        groups[-1].append(p)
        size += _room(p) * p.element_size()
    return [group for group in groups if group]
