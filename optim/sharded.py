"""An optimizer whose state is spread over the ranks of a data-parallel run (ZeRO, stage 1).

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
arXiv:1910.02054. Every rank keeps the moments of its share of the parameters only: gradients are
reduced to the ranks that need them, the share is updated, parameters are gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from optim.base import DeviceOptimizer, Params
from optim.clip import clip_scale
from optim.cuts import Divide
from optim.layout import Group, lay_out
from optim.shards import Bucket, Piece, Run

# torch 2.13 gives them new names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ShardedOptimizer(torch.optim.Optimizer):
    """`ShardedOptimizer(model.parameters(), AdamW, lr=1e-3)` after `init_process_group`.

    Makes parameters and gradients views of flat buffers; gradients keep their addresses and are
    cleared in place. `step` reduces them, unless `arm` let the backward do so as they came, updates
    this rank's share and gathers the parameters. What is equal on all ranks before is after it;
    gradients hold nothing of use then. Learning rates and other options may be changed in
    `param_groups`, as a scheduler does.

    Args:
        params: tensors, (name, tensor) pairs or groups: the same on every rank, equal in value.
        cls: an optimizer's class, or what makes one of (name, tensor) pairs or groups, `options`.
        group: of processes; None: all.
        cut: whether a tensor may be cut anywhere: every element is updated on its own, as in
            AdamW. Else tensors go to ranks whole, or in such parts as `divide` allows, so that
            the fullest rank has as little as can be. None: as `cls.elementwise` says, else not
            cut, which is right for any optimizer.
        divide: where parameters, given as (name, tensor) pairs with the options of their group, may
            be cut, and whose state may be apart from what is updated (see `Cuts`). None: as
            `cls.divide` says, else nowhere.
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
        self._buckets: list[Bucket] = []
        super().__init__(params, dict(options))
        self.group, self.mean = group, mean
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._works: list[list[dist.Work]] = []  # of each bucket that is being reduced
        self._gathering: list[dist.Work] = []  # the parameters of a step
        self._armed = self._reduced = False
        layout = lay_out(
            self.param_groups,
            cut=getattr(cls, "elementwise", False) if cut is None else cut,
            divide=getattr(cls, "divide", None) if divide is None else divide,
            rank=self.rank,
            world=self.world,
        )
        self._source, self._unshared = layout.source, {*layout.unshared, "kind"}
        # of updates in two halves, the first one leaves in the gradient what the second one takes
        self.lead = cls(layout.leads, **options) if layout.leads else None
        self.inner = cls(layout.shares, **options) if layout.shares else None
        for bucket in layout.buckets:
            self._add(bucket)
        for group, own in self._alike():
            group |= {k: v for k, v in own.items() if k not in self._unshared | group.keys()}
        self._passed = [g.get("lr") for g in self.param_groups]
        self._missing = [len(b.members) for b in self._buckets]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is made: later, shares would no longer be equal. RuntimeError then."""
        if self._buckets:
            raise RuntimeError("give a ShardedOptimizer all of its parameters when it is made")
        super().add_param_group(param_group)

    def _add(self, bucket: Bucket) -> None:
        number = len(self._buckets)
        self._buckets.append(bucket)
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
            works = self._rooted(dist.reduce, bucket.grads, bucket.homes)
        self._works.append(works)

    def _rooted(
        self, collective: Callable[..., dist.Work], flat: Tensor, runs: list[Run]
    ) -> list[dist.Work]:
        """Reduce every rank's runs to it, or broadcast them from there."""
        works = []
        for rank, start, stop in runs:
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
        own = self._own()
        if all(isinstance(optimizer, DeviceOptimizer) for optimizer in own):
            for optimizer in own:
                optimizer.set_lr(value)
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
        self._pass_options()
        if self.lead is not None:
            self.lead.step(**settings)
        handed = [self._rooted(dist.broadcast, b.grads, b.moved) for b in self._buckets]
        for work in chain.from_iterable(handed):
            work.wait()
        if self.inner is not None:
            self.inner.step(**settings)
        for b in self._buckets:
            if b.cuts is None:
                mine = b.params[b.own[0].start : b.own[0].stop]
                work = _all_gather(b.params, mine, group=self.group, async_op=True)
                self._gathering.append(work)
            else:
                self._gathering += self._rooted(dist.broadcast, b.params, b.runs)
        self._reduced = False
        if wait:
            self.wait()
        return loss

    def wait(self) -> None:
        """Let the current stream wait for the parameters of the last step."""
        for work in self._gathering:
            work.wait()
        self._gathering = []

    def _own(self) -> list[torch.optim.Optimizer]:
        """The optimizers of this rank's share."""
        return [optimizer for optimizer in (self.lead, self.inner) if optimizer is not None]

    def _pairs(self) -> list[tuple[Group, Group]]:
        """Groups of this rank's share, each behind the one here that its parameters are from."""
        own = [group for optimizer in self._own() for group in optimizer.param_groups]
        return [(self.param_groups[self._source[g["params"][0]]], g) for g in own]

    def _alike(self) -> list[tuple[Group, Group]]:
        """Those of `_pairs` that have the same options: not where `cls`, as Muon, has made groups
        of several kinds of one."""
        return [(ours, own) for ours, own in self._pairs() if ("kind" in ours) == ("kind" in own)]

    def _pass_options(self) -> None:
        """What was changed in the groups here goes to the groups of this rank's share."""
        for group, own in self._alike():
            for key in own.keys() & group.keys() - self._unshared - {"lr"}:
                own[key] = group[key]
        rates = [g.get("lr") for g in self.param_groups]
        if all(a is b for a, b in zip(rates, self._passed, strict=True)):
            return  # a step that is captured in a CUDA graph must not be given a number
        self._passed = rates
        for group, own in self._pairs():
            own["lr"] = group["lr"]

    # State

    def state_dict(self) -> dict[str, Any]:
        """This rank's share; for another number of ranks see `pieces`."""
        self._pass_options()
        lead, share = (o and o.state_dict() for o in (self.lead, self.inner))
        return {"rank": self.rank, "world": self.world, "lead": lead, "share": share}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's share. ValueError if it is another rank's, or of another number."""
        there, here = (state_dict["rank"], state_dict["world"]), (self.rank, self.world)
        if there != here:
            raise ValueError(f"this is the share of rank {there[0]} of {there[1]}, "
                             f"needed is that of rank {here[0]} of {here[1]}")  # fmt: skip
        for optimizer, name in ((self.lead, "lead"), (self.inner, "share")):
            if optimizer is not None:
                optimizer.load_state_dict(state_dict[name])
        for group, own in self._alike():
            group |= {k: v for k, v in own.items() if k not in self._unshared}
        self._passed = [g.get("lr") for g in self.param_groups]

    def pieces(self) -> list[Piece]:
        """What this rank keeps, in terms of the parameters that were handed over."""
        state = {p: some for optimizer in self._own() for p, some in optimizer.state.items()}
        return [
            piece
            for bucket in self._buckets
            for part in (*bucket.leads, *bucket.local, *bucket.follows)
            for moment, value in state[part.tensor].items()
            for piece in bucket.pieces(part, moment, value)
        ]
