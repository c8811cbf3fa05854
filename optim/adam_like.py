"""What AdamW, AdamATan2 and Muon's smaller half share: two moments, the way to their kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from optim.base import DeviceOptimizer, GroupStep, scalar
from optim.kernels.table import addresses_of, same_objects

if TYPE_CHECKING:
    from optim.ema import EMA
    from optim.kernels.launch import AdamLaunch
    from optim.kernels.mini_launch import MiniLaunch
    from optim.kernels.muon_launch import MuonLaunch

_NO_OPTIONS = ("params", "lr", "param_names")


@dataclass
class Bucket:
    """Parameters of one launch, and the names of their shadows in the attached EMA."""

    params: list[Tensor]
    names: frozenset[str]
    launch: AdamLaunch | MiniLaunch | MuonLaunch

    def __post_init__(self) -> None:
        self.dtypes = [p.dtype for p in self.params]
        self.strides = [p.stride() for p in self.params]
        self.home = addresses_of(self.params)
        self.seen: list[ReferenceType[Tensor]] = []  # gradients that fitted

    def pointers(self) -> tuple[int, ...] | None:
        """Addresses of parameters and gradients; None where the launch does not fit them."""
        grads = [p.grad for p in self.params]
        try:  # None, sparse or otherwise without an address of its own
            given = addresses_of(grads)
        except (TypeError, RuntimeError):
            return None
        if addresses_of(self.params) != self.home:
            return None
        if not same_objects(grads, self.seen):
            if [g.dtype for g in grads] != self.dtypes or [
                g.stride() for g in grads
            ] != self.strides:
                return None
            self.seen = [ref(g) for g in grads]
        return self.home + given


@dataclass
class Plan:
    """How the parameters of a group that had a gradient are launched, and what that rests on."""

    params: list[Tensor]
    ema: EMA | None
    buckets: list[Bucket]
    rest: list[Tensor]

    def holds(self, ema: EMA | None) -> bool:
        """Whether parameters and EMA are those of the plan, where they were."""
        return ema is self.ema and all(addresses_of(b.params) == b.home for b in self.buckets)


@dataclass
class Last:
    """A group's last step, if kernels took all of it: the next one may repeat it."""

    group: dict[str, Any]
    count: int  # parameters of the group
    absent: list[Tensor]  # had no gradient
    read: Callable[[dict[str, Any]], Any]  # the options of the group
    options: Any
    rate: float | None  # of the EMA
    fused: str
    plan: Plan
    device: torch.device


class AdamLike(DeviceOptimizer):
    """An optimizer with `exp_avg` and `exp_avg_sq` whose rule the kernel `adam_kernel` knows.

    A step that differs from the one before in nothing but addresses of gradients repeats its
    launches and checks no more than that (`_ready`).
    """

    moments = ("exp_avg", "exp_avg_sq")

    def _kernel_rule(self, group: dict[str, Any]) -> tuple[str, dict[str, float]]:
        """Name of the rule in the kernel, and its numbers besides betas and weight decay."""
        raise NotImplementedError

    def _ready(self, index: int, group: dict[str, Any]) -> GroupStep | None:
        last: Last | None = self._last.get(index) if "_last" in self.__dict__ else None
        if (
            last is None
            or last.group is not group
            or last.fused != self.fused
            or last.count != len(group["params"])
            or last.plan.ema is not self.ema
            or last.rate != (None if self.ema is None else self.ema.rate)
            or last.options != last.read(group)
            or (last.absent and any(p.grad is not None for p in last.absent))
        ):
            return None
        pointers = [bucket.pointers() for bucket in last.plan.buckets]
        return None if None in pointers else partial(self._repeat, last, pointers)

    def _repeat(
        self,
        last: Last,
        pointers: list[tuple[int, ...]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        scale, found = scalar(grad_scale, last.device), scalar(found_inf, last.device)
        for bucket, addresses in zip(last.plan.buckets, pointers, strict=True):
            if bucket.names:
                self.ema.begin_fused(bucket.names)
            bucket.launch.repeat(addresses, last.group["lr"], scale, found)

    def _launch(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[Tensor]:
        from optim.kernels.launch import numbers

        plan = self._plan_of(group, params)
        rule, extra = self._kernel_rule(group)
        for bucket in plan.buckets:
            if bucket.names:
                extra = {**extra, "ema_rate": self.ema.begin_fused(bucket.names)}
            values = numbers(rule, group["betas"], group["weight_decay"], **extra)
            grads = [same_order(p.grad, p) for p in bucket.params]
            bucket.launch.run(grads, rule, values, lr, grad_scale, found_inf)
        self._remember(group, plan, lr)
        return plan.rest

    def _plan_of(self, group: dict[str, Any], params: list[Tensor]) -> Plan:
        """The plan of these parameters, made where there is none or it does not hold any more."""
        plans: dict[tuple[Any, ...], Plan] = self.__dict__.setdefault("_plans", {})
        key = (*self._plan_options(group), *map(id, params))
        if key not in plans or not plans[key].holds(self.ema):
            plans[key] = self._plan(group, params)
        return plans[key]

    def _plan_options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Options of a group that a plan depends on."""
        return (group.get("half"),)

    def _remember(self, group: dict[str, Any], plan: Plan, lr: Tensor) -> None:
        """Let `_ready` repeat this step, if all of the group's gradients were in it."""
        index = next(i for i, g in enumerate(self.param_groups) if g is group)
        absent = [p for p in group["params"] if p.grad is None]
        whole = len(plan.params) + len(absent) == len(group["params"]) and lr is group["lr"]
        last = self.__dict__.setdefault("_last", {})
        last.pop(index, None)
        if whole and plan.buckets and not plan.rest:
            read = itemgetter(*(k for k in group if k not in _NO_OPTIONS))
            rate = None if self.ema is None else self.ema.rate
            fixed = (
                len(group["params"]),
                absent,
                read,
                deepcopy(read(group)),
                rate,
                self.fused,
                plan,
                lr.device,
            )
            last[index] = Last(group, *fixed)

    def _plan(self, group: dict[str, Any], params: list[Tensor]) -> Plan:
        """The buckets that one launch each takes, and the rest."""
        from optim.kernels.launch import AdamLaunch, supported

        buckets = []
        for some, names, shadows in self._split([p for p in params if supported(p)]):
            states = [self.state[p] for p in some]
            launch = AdamLaunch(some, states, shadows, self._seeds(group, some))
            buckets.append(Bucket(some, names, launch))
        return Plan(params, self.ema, buckets, [p for p in params if not supported(p)])

    def _seeds(self, group: dict[str, Any], params: list[Tensor]) -> list[int] | None:
        """Numbers for stochastic rounding, where the group asks for it and the dtype allows it."""
        if group.get("half") != "stochastic" or params[0].dtype != torch.bfloat16:
            return None
        return [self._number(p) for p in params]

    def _split(
        self, params: list[Tensor]
    ) -> Iterator[tuple[list[Tensor], frozenset[str], list[Tensor]]]:
        """By dtype, and by whether a launch can move the shadow too: (parameters, names, shadows).

        Names and shadows are those of the attached EMA, empty where it does not move them.
        """
        names = {} if self.ema is None else {id(p): n for n, p in self.ema.params.items()}
        shadows: dict[int, Tensor] = {}
        for p in params:
            if id(p) in names:
                shadow = self.ema.shadow[names[id(p)]]
                wanted = (torch.float32, p.stride(), p.device)
                if (shadow.dtype, shadow.stride(), shadow.device) == wanted:
                    shadows[id(p)] = shadow
        for dtype in dict.fromkeys(p.dtype for p in params):
            some = [p for p in params if p.dtype == dtype]
            moved = [p for p in some if id(p) in shadows]
            left = [p for p in some if id(p) not in shadows]
            if moved:
                own = [shadows[id(p)] for p in moved]
                yield moved, frozenset(names[id(p)] for p in moved), own
            if left:
                yield left, frozenset(), []


def same_order(grad: Tensor, p: Tensor) -> Tensor:
    """`grad` with the memory order of `p`."""
    return grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)
