"""An optimizer whose state is spread over the ranks of a data-parallel run (ZeRO, stage 1).

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
arXiv:1910.02054. Every rank keeps the moments of its share of the parameters only: gradients are
reduced to the ranks that need them, the share is updated, parameters are gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from optim.base import DeviceOptimizer, Params
from optim.clip import clip_scale
from optim.cuts import Cuts, Divide
from optim.shards import Bucket, Piece, by_kind, chunks, cut_anywhere, cut_between

# torch 2.13 gives them new names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ShardedOptimizer(torch.optim.Optimizer):
    """`ShardedOptimizer(model.parameters(), AdamW, lr=1e-3)` after `init_process_group`.

    Makes parameters and gradients views of flat buffers; gradients keep their addresses and are
    cleared in place. `step` reduces them, unless `arm` let the backward do so as they came, updates
    this rank's share and gathers the parameters. What is equal on all ranks before is after it.
    Learning rates and other options may be changed in `param_groups`, as a scheduler does.

    Args:
        params: tensors, (name, tensor) pairs or groups: the same on every rank, equal in value.
        cls: an optimizer's class, or what makes one of (name, tensor) pairs or groups, `options`.
        group: of processes; None: all.
        cut: whether a tensor may be cut anywhere: every element is updated on its own, as in
            AdamW. Else tensors go to ranks whole, or in such parts as `divide` allows, so that
            the fullest rank has as little as can be. None: as `cls.elementwise` says, else not
            cut, which is right for any optimizer.
        divide: where parameters, given as (name, tensor) pairs with the options of their group, may
            be cut. None: as `cls.divide` says, else nowhere.
        mean: average the gradients (as DistributedDataParallel does), else add them up.
        options: for `cls`.

    Raises:
        ValueError: for a parameter that is not contiguous.
    """

    def __init__(
        self,
        params: Params,
        cls: Callable[..., torch.optim.Optimizer],
        *,
        group: dist.ProcessGroup | None = None,
        cut: bool | None = None,
        divide: Divide | None = None,
        mean: bool = False,
        **options: Any,
    ) -> None:
        self.inner: torch.optim.Optimizer | None = None
        self._buckets: list[Bucket] = []
        super().__init__(params, dict(options))
        self.group, self.mean = group, mean
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.cut = getattr(cls, "elementwise", False) if cut is None else cut
        self._divide = getattr(cls, "divide", None) if divide is None else divide
        self._unshared = {"params", "param_names"}  # what groups of shares have to themselves
        self._works: list[list[dist.Work]] = []  # of each bucket that is being reduced
        self._gathering: list[dist.Work] = []  # the parameters of a step
        self._armed = self._reduced = False
        loads = [0] * self.world
        shares = [self._share(g, loads) for g in self.param_groups]
        self._numbers = [i for i, share in enumerate(shares) if share["params"]]
        if self._numbers:
            self.inner = cls([shares[i] for i in self._numbers], **options)
        for group, own in self._pairs():
            group |= {k: v for k, v in own.items() if k not in self._unshared | group.keys()}
        self._passed = [g.get("lr") for g in self.param_groups]
        self._missing = [len(b.members) for b in self._buckets]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is made: later, shares would no longer be equal. RuntimeError then."""
        if self._buckets:
            raise RuntimeError("give a ShardedOptimizer all of its parameters when it is made")
        super().add_param_group(param_group)

    def _share(self, group: dict[str, Any], loads: list[int]) -> dict[str, Any]:
        """Lay out the parameters of a group; returns the group of what this rank updates."""
        names = group.get("param_names") or [""] * len(group["params"])
        named = dict(zip(map(id, group["params"]), names, strict=True))
        local: list[tuple[str, Tensor]] = []
        options: list[dict[str, Any]] = []
        for members in by_kind(group["params"]):
            if self.cut:  # the last ones first: their gradients are there first
                found = [cut_anywhere(c, self.rank, self.world) for c in chunks(members[::-1])]
            else:
                cuts = self._cuts([(named[id(p)], p) for p in members], group)
                found = [cut_between(members, cuts, self.rank, loads)]
            for bucket in found:
                self._add(bucket)
                for part in bucket.local:
                    if part.index is None:
                        local.append(("", part.tensor))
                        continue
                    local.append((named[id(bucket.members[part.index])], part.tensor))
                    options.append(bucket.cuts[part.index].options(part.start, part.stop))
        named_all = all(name for name, _ in local)
        keys = {key for some in options for key in some}
        self._unshared |= keys
        own = {k: v for k, v in group.items() if k not in self._unshared}
        own |= {key: [some[key] for some in options] for key in keys}
        return {**own, "params": local if named_all else [part for _, part in local]}

    def _cuts(self, named: list[tuple[str, Tensor]], group: dict[str, Any]) -> list[Cuts]:
        if self._divide is None:
            return [Cuts()] * len(named)
        return self._divide(named, {k: v for k, v in group.items() if k != "params"})

    def _add(self, bucket: Bucket) -> None:
        number = len(self._buckets)
        self._buckets.append(bucket)
        bucket.take()
        for index, p in enumerate(bucket.members):
            p.register_post_accumulate_grad_hook(lambda _, i=index: self._ready(number, i))

    # Gradients

    def arm(self) -> None:
        """The next backward is the last one before `step`: reduce what it completes."""
        self._missing = [len(b.members) for b in self._buckets]
        self._works = []
        self._armed, self._reduced = True, False

    def _ready(self, number: int, index: int) -> None:
        self._buckets[number].mend(index)
        if self._armed:
            self._missing[number] -= 1
            while len(self._works) < len(self._buckets) and not self._missing[len(self._works)]:
                self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[len(self._works)]
        for index in range(len(bucket.members)):
            bucket.mend(index)
        if bucket.cuts is None:
            works = [_reduce_scatter(bucket.mine[0], bucket.grads, group=self.group, async_op=True)]
        else:
            works = self._with_owners(bucket, bucket.grads, dist.reduce)
        self._works.append(works)

    def _with_owners(
        self, bucket: Bucket, flat: Tensor, collective: Callable[..., dist.Work]
    ) -> list[dist.Work]:
        """Reduce every rank's runs to it, or broadcast them from there."""
        works = []
        for rank, start, stop in bucket.runs:
            root = rank if self.group is None else dist.get_global_rank(self.group, rank)
            works.append(collective(flat[start:stop], root, group=self.group, async_op=True))
        return works

    def finish(self) -> None:
        """Reduce what the backward has not, and let the current stream wait for it."""
        self._armed, self._reduced = False, True
        while len(self._works) < len(self._buckets):
            self._launch()
        for works, bucket in zip(self._works, self._buckets, strict=True):
            for work in works:
                work.wait()
            for mine in bucket.mine if self.mean else ():
                mine.div_(self.world)
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
        like = self._buckets[0].params
        wide = torch.promote_types(like.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=like.device)
        for mine in (mine for bucket in self._buckets for mine in bucket.mine):
            total += torch.linalg.vector_norm(mine, dtype=wide).square()
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
            self._passed = [value] * len(self.param_groups)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], float] | None = None, *, wait: bool = True, **settings: Any
    ) -> float | None:
        """Update this rank's share, then gather all parameters.

        Args:
            closure: evaluates the model again and returns the loss.
            wait: else the parameters may be used only after `wait()`; what comes before that
                overlaps the gathering.
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
            self._pass_options(self.inner)
            self.inner.step(**settings)
        for b in self._buckets:
            if b.cuts is None:
                mine = b.params[b.own[0].start : b.own[0].stop]
                work = _all_gather(b.params, mine, group=self.group, async_op=True)
                self._gathering.append(work)
            else:
                self._gathering += self._with_owners(b, b.params, dist.broadcast)
        self._reduced = False
        if wait:
            self.wait()
        return loss

    def wait(self) -> None:
        """Let the current stream wait for the parameters of the last step."""
        for work in self._gathering:
            work.wait()
        self._gathering = []

    def _pairs(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Groups here and of this rank's share; none where `cls` has groups of its own, as Muon."""
        own = [] if self.inner is None else self.inner.param_groups
        ours = [self.param_groups[i] for i in self._numbers]
        if [g.get("kind") for g in own] != [g.get("kind") for g in ours]:
            return []
        return list(zip(ours, own, strict=True))

    def _pass_options(self, inner: torch.optim.Optimizer) -> None:
        """What was changed in the groups here goes to the groups of this rank's share."""
        rates = [g.get("lr") for g in self.param_groups]
        new = [a is not b for a, b in zip(rates, self._passed, strict=True)]
        self._passed = rates
        pairs = self._pairs()
        for group, own in pairs:
            for key in own.keys() & group.keys() - self._unshared - {"lr"}:
                own[key] = group[key]
        if not any(new):  # a step that is captured in a CUDA graph must not be given a number
            return
        for group, own in pairs:
            own["lr"] = group["lr"]
        if not pairs and isinstance(inner, DeviceOptimizer):
            inner.set_lr(rates[0])

    # State

    def state_dict(self) -> dict[str, Any]:
        """This rank's share; for another number of ranks see `pieces`."""
        if self.inner is None:
            return {"rank": self.rank, "world": self.world, "share": None}
        self._pass_options(self.inner)
        return {"rank": self.rank, "world": self.world, "share": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's share. ValueError if it is another rank's, or of another number."""
        there, here = (state_dict["rank"], state_dict["world"]), (self.rank, self.world)
        if there != here:
            raise ValueError(f"this is the share of rank {there[0]} of {there[1]}, "
                             f"needed is that of rank {here[0]} of {here[1]}")  # fmt: skip
        if self.inner is not None:
            self.inner.load_state_dict(state_dict["share"])
            for group, own in self._pairs():
                group |= {k: v for k, v in own.items() if k not in self._unshared}
            self._passed = [g.get("lr") for g in self.param_groups]

    def pieces(self) -> list[Piece]:
        """What this rank keeps, in terms of the parameters that were handed over."""
        if self.inner is None:
            return []
        return [
            piece
            for bucket in self._buckets
            for part in bucket.local
            for moment, value in self.inner.state[part.tensor].items()
            for piece in bucket.pieces(part, moment, value)
        ]
