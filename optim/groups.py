"""Groups of parameters and what an optimizer keeps for them, in device tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from optim.checks import (
    check_lr,
    check_names,
    check_options,
    check_param,
    match_groups,
    options_of,
    pair,
)

Fused = Literal["off", "auto", "on"]
Half = Literal["nearest", "stochastic", "master"]
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


def _unwrapped(name: str) -> Callable[..., Any]:
    """A method of torch's Optimizer without its wrapper, which keeps torch's compiler out of it.

    The wrapper imports the compiler, whether anything is compiled or not: seconds at each start.
    """
    method = getattr(torch.optim.Optimizer, name)
    return getattr(method, "__wrapped__", method)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an update computes in: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


class DeviceState(torch.optim.Optimizer):
    """The half of a `DeviceOptimizer` that is there between steps; see there."""

    moments: ClassVar[tuple[str, ...]] = ()
    counts_steps: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False  # an update of an element looks at no other
    own_options: ClassVar[tuple[str, ...]] = ()  # of a group, beside the defaults
    fused: Fused = "auto"

    def __init__(
        self, params: Params, defaults: dict[str, Any], fused: Fused | None = None
    ) -> None:
        if fused not in (None, "off", "auto", "on"):
            raise ValueError(f"fused must be 'off', 'auto' or 'on', got {fused!r}")
        self.fused = type(self).fused if fused is None else fused
        self._lr_tensors: list[Tensor] = []
        if "betas" in defaults:
            defaults = {**defaults, "betas": pair(defaults["betas"])}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group (see torch.optim.Optimizer), with its state; on an error nothing is added."""
        if not isinstance(param_group, Mapping) or "params" not in param_group:
            raise TypeError("a parameter group must be a dictionary with the key 'params'")
        group = dict(param_group)
        check_names(group, (*self.defaults, *self.own_options), type(self).__name__)
        params = group["params"]
        if not isinstance(params, (Tensor, set)):
            params = list(params)
        group["params"] = params
        for item in [params] if isinstance(params, Tensor) else params:
            check_param(item)
        names = [id(p[1] if isinstance(p, tuple) else p) for p in group["params"]]
        if len(set(names)) != len(names):
            raise ValueError("a parameter appears twice in one parameter group")
        self._check_options({**self.defaults, **group})
        if "betas" in group:
            group["betas"] = pair(group["betas"])
        _unwrapped("add_param_group")(self, group)
        group = self.param_groups[-1]
        self._lr_tensors.append(self._own_lr(group))
        for p in group["params"]:
            self.state[p] = self._new_state(group, p)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients (see torch.optim.Optimizer), or set them to zero in place."""
        _unwrapped("zero_grad")(self, set_to_none)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the tensors that a parameter of this group keeps beside its step."""
        return self.moments

    def _new_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        if self.counts_steps:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        for name in self._moments(group):
            state[name] = torch.zeros_like(
                param, dtype=work_dtype(param.dtype), requires_grad=False
            ).detach()
        return state | self._master(group, param)

    def _master(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        """The float32 copy of a half-precision parameter, where the group asks for one."""
        if group.get("half") != "master" or param.dtype == work_dtype(param.dtype):
            return {}
        return {"master": param.detach().float()}

    def _own_lr(self, group: dict[str, Any]) -> Tensor:
        """Make `group["lr"]` a tensor that belongs to this group alone; returns it."""
        params, lr = group["params"], group["lr"]
        device = params[0].device if params else torch.device("cpu")
        wide = device.type == "cpu" or any(p.dtype == torch.float64 for p in params)
        own = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)
        group["lr"] = self._write_lr(own, lr)
        return own

    @staticmethod
    @torch.no_grad()
    def _write_lr(own: Tensor, value: float | Tensor) -> Tensor:
        check_lr(value)
        if isinstance(value, Tensor):
            return own.copy_(value.detach().reshape(()), non_blocking=True)
        return own.fill_(value)

    def set_lr(self, value: float | Tensor) -> None:
        """Copy `value` into the learning rate of every group now, without a synchronization."""
        for group, own in zip(self.param_groups, self._lr_tensors, strict=True):
            group["lr"] = self._write_lr(own, value)

    def _sync_lr(self) -> None:
        """Copy learning rates that were assigned since the last step into the groups' tensors."""
        for group, own in zip(self.param_groups, self._lr_tensors, strict=True):
            if group["lr"] is own:
                continue
            if own.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "lr was assigned before the step was captured and would be frozen into the "
                    "graph: use set_lr() before and between replays"
                )
            group["lr"] = self._write_lr(own, group["lr"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "fused": self.fused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lr_tensors = [self._own_lr(g) for g in self.param_groups]

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise for hyperparameters out of range; subclasses check their own and call this."""
        check_options(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state into the tensors of this optimizer, in place (addresses stay).

        Options of the groups are taken from the saved ones; every tensor keeps the dtype and the
        device it has here.

        Raises:
            ValueError: if groups, names or shapes differ; then nothing has been loaded.
        """
        saved = dict(state_dict) if isinstance(state_dict, Mapping) else {}
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            saved = hook(self, saved) or saved
        copies = match_groups(saved, self.param_groups, self.state, self._check_options)
        for theirs, ours in zip(saved["param_groups"], self.param_groups, strict=True):
            ours.update(deepcopy(options_of(theirs, ours)))
            if "betas" in ours:  # JSON has no tuples
                ours["betas"] = tuple(ours["betas"])
        with torch.no_grad():
            for target, value in copies:
                target.copy_(value)
        self._sync_lr()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)
