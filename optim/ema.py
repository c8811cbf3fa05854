"""Exponential moving average of parameters, exchanged with them by pointer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from optim.base import DeviceOptimizer

Parameters = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


def ema_update(shadow: Tensor, param: Tensor, rate: float) -> Tensor:
    """One step of the average: `rate * shadow + (1 - rate) * param`, as `shadow` plus a difference.

    In this form a shadow that equals its parameter stays exactly equal.
    """
    return torch.lerp(shadow, param.to(shadow.dtype), 1.0 - rate)


class EMA:
    """Shadow copies that follow parameters: `shadow = rate * shadow + (1 - rate) * param`.

    Args:
        params: parameters, or (name, parameter) pairs as of `module.named_parameters()`; without
            names they are called "0", "1", … A shadow starts as a copy of its parameter.
        rate: in [0, 1]: 0 copies, 1 keeps the shadow as it is.
        dtype: of the shadows; by default the parameter's, but float32 for half precision, in
            which a small step of the average would be rounded away.

    Raises:
        ValueError: for a rate outside [0, 1], a name given twice or an integer parameter.
        TypeError: for what is not a tensor.

    `shadow` maps names to tensors that keep their addresses outside `applied()`, so a CUDA graph
    may be captured over them.
    """

    def __init__(
        self, params: Parameters, rate: float = 0.999, *, dtype: torch.dtype | None = None
    ) -> None:
        if not isinstance(rate, Real) or not 0.0 <= rate <= 1.0:
            raise ValueError(f"EMA rate must be in [0, 1], got {rate!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"EMA needs a floating-point dtype, got {dtype}")
        self.rate = rate
        self.params: dict[str, Tensor] = {}
        self.shadow: dict[str, Tensor] = {}
        self._applied = False
        self._moved: set[str] = set()  # by a fused optimizer step since the last update
        for i, item in enumerate([params] if isinstance(params, Tensor) else params):
            name, param = item if isinstance(item, tuple) else (str(i), item)
            if not isinstance(param, Tensor):
                raise TypeError(f"EMA takes tensors, got {type(param).__name__}")
            if name in self.params:
                raise ValueError(f"EMA got two parameters named {name!r}")
            if not param.is_floating_point():
                raise ValueError(f"EMA needs floating-point parameters, {name!r} is {param.dtype}")
            wide = dtype or torch.promote_types(param.dtype, torch.float32)
            self.params[name] = param
            self.shadow[name] = param.detach().to(wide, copy=True)

    def attach(self, *optimizers: DeviceOptimizer) -> EMA:
        """Let fused steps of these optimizers move the shadows of their parameters; returns self.

        The average then costs no pass of its own: a step of a Triton kernel moves the shadows with
        the parameters, and the `update` after it leaves those out. Where a step is not fused,
        `update` does everything, so call it after every step either way.

        Raises:
            TypeError: for an optimizer that is none of this package.
        """
        for optimizer in optimizers:
            if not hasattr(optimizer, "ema"):
                name = type(optimizer).__name__
                raise TypeError(f"EMA.attach takes optimizers of this package, got {name}")
            optimizer.ema = self
        return self

    def begin_fused(self, names: Iterable[str]) -> float:
        """Note that a launch moves these shadows (the next `update` will not); returns the rate.

        Raises:
            RuntimeError: inside `applied()`.
        """
        if self._applied:
            raise RuntimeError("a fused step was called while the averages are applied")
        self._moved.update(names)
        return self.rate

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None) -> None:
        """Move every shadow one step toward its parameter, unless a fused step just did.

        Args:
            found_inf: one-element tensor; where it is nonzero nothing changes. It is read on the
                device, without a host synchronization.

        Raises:
            RuntimeError: inside `applied()`.
        """
        if self._applied:
            raise RuntimeError("EMA.update() was called while the averages are applied")
        moved, self._moved = self._moved, set()
        if len(moved) == len(self.params):
            return
        rest = {name: param for name, param in self.params.items() if name not in moved}
        if rest and found_inf is not None:
            found_inf = found_inf.reshape(()) != 0
        for name, param in rest.items():
            shadow = self.shadow[name]
            new = ema_update(shadow, param, self.rate)
            if found_inf is not None:
                new = torch.where(found_inf.to(shadow.device), shadow, new)
            shadow.copy_(new)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the averages and `shadow` the parameters.

        Storage is exchanged by pointer, nothing is copied (except where the dtypes differ: there
        the parameter gets a cast of its shadow for the while). Undone also after an exception.

        Raises:
            RuntimeError: if it is entered twice.
        """
        if self._applied:
            raise RuntimeError("EMA.applied() was entered twice")
        before = {name: param.data for name, param in self.params.items()}
        shadows = dict(self.shadow)
        self._applied = True
        try:
            for name, param in self.params.items():
                param.data = shadows[name].to(param.dtype)  # no copy where the dtype is the same
                self.shadow[name] = before[name]
            yield
        finally:
            for name, param in self.params.items():
                param.data = before[name]
                self.shadow[name] = shadows[name]
            self._applied = False

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name (the tensors themselves, not copies).

        Raises:
            RuntimeError: inside `applied()`, where `shadow` holds the parameters.
        """
        if self._applied:
            raise RuntimeError("EMA.state_dict() was called while the averages are applied")
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy averages by name into the shadows, in place.

        Raises:
            ValueError: if names or shapes differ; then nothing has been loaded.
            RuntimeError: inside `applied()`.
        """
        if self._applied:
            raise RuntimeError("EMA.load_state_dict() was called while the averages are applied")
        missing = sorted(self.shadow.keys() - state.keys())
        unknown = sorted(state.keys() - self.shadow.keys())
        if missing or unknown:
            raise ValueError(
                f"EMA state does not fit the parameters: missing {missing}, unknown {unknown}"
            )
        for name, shadow in self.shadow.items():
            if state[name].shape != shadow.shape:
                raise ValueError(
                    f"EMA state of {name!r} has shape {tuple(state[name].shape)}, "
                    f"its parameter {tuple(shadow.shape)}"
                )
        for name, shadow in self.shadow.items():
            shadow.copy_(state[name])
