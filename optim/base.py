"""What the optimizers share: a step that never waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from optim.checks import check_grad, check_kept, check_scalar
from optim.clip import clip_scale, global_grad_norm
from optim.groups import DeviceState, Fused, Half, Params, work_dtype
from optim.kernels import available
from optim.rounding import stochastic_round

if TYPE_CHECKING:
    from optim.ema import EMA

__all__ = [
    "DeviceOptimizer",
    "Fused",
    "GroupStep",
    "Half",
    "Params",
    "bias_correction",
    "scalar",
    "work_dtype",
    "write_gated",
]

GroupStep = Callable[[Tensor | None, Tensor | None], None]  # of grad_scale, found_inf


def bias_correction(step: Tensor, beta: float) -> Tensor:
    """`1 - beta ** step` for a 0-dim `step`, in float64 (float32 where the device has none).

    Written as `-expm1(step * log(beta))`, which loses no digits to the subtraction: the relative
    error is that of the product, at any step and for any beta.
    """
    dtype = torch.float32 if step.device.type == "mps" else torch.float64
    if beta == 0.0:
        return torch.ones_like(step, dtype=dtype)
    return -torch.expm1(step.to(dtype) * math.log(beta))


class DeviceOptimizer(DeviceState):
    """An optimizer whose step never waits for the device.

    * Moments, `step` (0-dim float32 per parameter) and `lr` (0-dim per group) are device tensors,
      created with the group; their addresses never change, so a step can be captured in a graph.
    * `group["lr"]` takes a float or a tensor at any time; its value is copied into the group's own
      tensor (float64 on the CPU or beside float64 parameters, else float32). `set_lr` does so
      at once; with a captured step, use that.
    * A group's `half` says how float16 and bfloat16 parameters take an update: rounded to the
      "nearest"; rounded up or down by chance ("stochastic", bfloat16 only; a function of the
      step, so runs repeat); or as a copy of a float32 "master" in the state.
    * A subclass names its moments and implements `_rule`, the pure update of one parameter. What
      is here applies that rule in place; `_update` may be overridden with something faster.

    Args:
        params: tensors, (name, tensor) pairs or group dictionaries, as torch's optimizers take.
        defaults: hyperparameters of a group, `lr` and `weight_decay` among them.
        fused: Triton kernels: "off"; "auto": on CUDA where Triton is installed; "on": an error
            without Triton (and the interpreter on the CPU, for tests). None: the class's own.

    Raises:
        ValueError, TypeError: one sentence that names the parameter or the option.
    """

    accepts_sparse: ClassVar[bool] = False
    ema: EMA | None = None  # set by EMA.attach
    _step_supports_amp_scaling = True

    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> float | None:
        """One update of every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
            grad_scale: one-element tensor gradients are divided by inside the update.
            found_inf: one-element tensor; where it is nonzero (or NaN) nothing changes: neither
                parameters nor moments nor step. Read on the device.
                Both default to the attributes of these names, which torch.amp.GradScaler sets.

        Returns:
            What the closure returned, if there is one.
        """
        if _observed(self):
            return self._profiled_step(closure, grad_scale=grad_scale, found_inf=found_inf)
        return self._plain_step(closure, grad_scale=grad_scale, found_inf=found_inf)

    # torch would wrap `step` in what its hooks and its profiler need; that takes longer than all
    # the rest here, so it is done only where there is one.
    step.hooked = True

    def _plain_step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._sync_lr()
        grad_scale = getattr(self, "grad_scale", None) if grad_scale is None else grad_scale
        found_inf = getattr(self, "found_inf", None) if found_inf is None else found_inf
        # everything is checked before anything changes
        check_scalar("grad_scale", grad_scale)
        check_scalar("found_inf", found_inf)
        work = [
            self._ready(i, group) or partial(self._group_step, group, self._buckets(group))
            for i, group in enumerate(self.param_groups)
        ]
        for group_step in work:
            group_step(grad_scale, found_inf)
        return loss

    _profiled_step = torch.optim.Optimizer.profile_hook_step(_plain_step)

    def _ready(self, index: int, group: dict[str, Any]) -> GroupStep | None:
        """The step of a group at once, where all checks of the last one still hold."""
        return None

    @torch.no_grad()
    def _group_step(
        self,
        group: dict[str, Any],
        buckets: dict[torch.device, list[Tensor]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        for device, params in buckets.items():
            scale, found = scalar(grad_scale, device), scalar(found_inf, device)
            lr = scalar(group["lr"], device)
            if self._uses_kernels(device):
                params = self._launch(group, params, lr, scale, found)
            if params:
                found = None if found is None else found != 0
                self._update(group, params, lr, scale, found)

    def _buckets(self, group: dict[str, Any]) -> dict[torch.device, list[Tensor]]:
        """The parameters of a group that have a gradient, by device."""
        buckets: dict[torch.device, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                check_grad(p, type(self).__name__, sparse_ok=self.accepts_sparse)
                check_kept(p, self.state[p])
                buckets.setdefault(p.device, []).append(p)
        return buckets

    def _uses_kernels(self, device: torch.device) -> bool:
        if self.fused == "off" or (self.fused == "auto" and device.type != "cuda"):
            return False
        if self.fused == "on" and not available():
            raise RuntimeError("fused='on' needs Triton, which is not installed")
        return available()

    @torch.no_grad()
    def clip(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """The norm of all gradients of this optimizer, and the `grad_scale` that clips it.

        `optimizer.step(grad_scale=optimizer.clip(1.0)[1])` is two kernels where it is fused: no
        gradient is rewritten. `max_norm=0` switches clipping off (the scale is 1).

        Returns:
            Two 0-dim tensors, as of `global_grad_norm` and `clip_scale`; where it is fused, the
            next call overwrites them.
        """
        found = [p.grad for g in self.param_groups for p in g["params"]]
        grads = [g for g in found if g is not None]
        if grads and max_norm >= 0 and self._uses_kernels(grads[0].device):
            if "_norms" not in self.__dict__:
                from optim.kernels.launch import NormLaunches

                self._norms = NormLaunches()
            fused = self._norms.run(grads, max_norm)
            if fused is not None:
                return fused
        norm = global_grad_norm(grads)
        return norm, clip_scale(norm, max_norm)

    def _launch(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[Tensor]:
        """Update with Triton kernels what they take; returns the parameters they do not."""
        return params

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update the parameters of one group on one device, in place.

        `lr`, `grad_scale` and the boolean `found_inf` are 0-dim tensors on that device.
        """
        if found_inf is not None and found_inf.device.type == "cpu":
            if found_inf:  # host memory: reading it waits for nothing
                return
            found_inf = None
        for p in params:
            self._update_one(group, p, lr, grad_scale, found_inf)

    def _update_one(
        self,
        group: dict[str, Any],
        p: Tensor,
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Apply `_rule` to one parameter; where `found_inf` is true every bit stays."""
        state = self.state[p]
        grad = p.grad.to(work_dtype(p.dtype))
        grad = grad if grad_scale is None else grad / grad_scale
        if self.counts_steps:
            state["step"] += 1 if found_inf is None else ~found_inf
        new = self._rule(group, self._wide(group, p), grad, state, lr)
        writes = self._narrow(group, p, new[0])
        writes += zip((state[m] for m in self._moments(group)), new[1:], strict=True)
        write_gated(writes, found_inf)

    def _wide(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """What an update starts from: `p`, its master, or `p` in float32 to be rounded later."""
        stochastic = group.get("half") == "stochastic" and p.dtype == torch.bfloat16
        return self.state[p].get("master", p.float() if stochastic else p)

    def _narrow(self, group: dict[str, Any], p: Tensor, new: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What is to be written for `new`, an update of what `_wide` gave: (target, value) pairs.

        Called when the step has been counted.
        """
        if "master" in self.state[p]:
            return [(self.state[p]["master"], new), (p, new.to(p.dtype))]
        if new.dtype != p.dtype:
            new = stochastic_round(new, self._number(p), self.state[p]["step"])
        return [(p, new)]

    def _number(self, p: Tensor) -> int:
        """The place of a parameter among all of this optimizer: the seed of its noise."""
        numbers = self.__dict__.setdefault("_numbers", {})
        if p not in numbers:
            every = (q for g in self.param_groups for q in g["params"])
            numbers.update({q: i for i, q in enumerate(every)})
        return numbers[p]

    def _rule(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        lr: Tensor,
    ) -> tuple[Tensor, ...]:
        """The new parameter and the new moments, in the order of `_moments`; changes nothing."""
        raise NotImplementedError


def write_gated(writes: Iterable[tuple[Tensor, Tensor]], found_inf: Tensor | None) -> None:
    """Copy each value into its target; where `found_inf` is true every bit stays."""
    for target, value in writes:
        target.copy_(value if found_inf is None else torch.where(found_inf, target, value))


def _observed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a profiler or a hook wants to see the step."""
    return bool(
        torch.autograd._profiler_enabled()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    """A one-element tensor as 0-dim on `device`."""
    if value is None or (value.ndim == 0 and value.device == device and not value.requires_grad):
        return value
    return value.detach().reshape(()).to(device, non_blocking=True)
