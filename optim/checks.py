"""What is wrong with a parameter, a gradient, an option or a saved state, in one sentence each."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda", "mps", "xpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What a group may hold besides options: its parameters, and what torch's schedulers write there.
NO_OPTIONS = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr")
# Options of torch's AdamW that a saved state of it has, and what they must be to mean the same.
_OF_TORCH = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}
_OF_TORCH |= dict.fromkeys(("foreach", "capturable", "differentiable", "fused"))


def warn(message: str) -> None:
    """A UserWarning that points at the first line outside of this package and torch.optim."""
    homes = {Path(__file__).parent, Path(torch.optim.__file__).parent}
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and Path(frame.f_code.co_filename).parent in homes:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def check_param(item: Tensor | tuple[str, Tensor]) -> None:
    """Raise ValueError or TypeError for what cannot be optimized."""
    name, p = item if isinstance(item, tuple) else ("", item)
    if not isinstance(p, Tensor):
        raise TypeError(f"an optimizer takes tensors, got {type(p).__name__}")
    what = f"parameter {name!r}" if name else f"the parameter of shape {tuple(p.shape)}"
    if not p.is_leaf:
        raise ValueError(f"{what} is not a leaf tensor: pass the tensor it was computed from")
    if p.layout != torch.strided:
        raise ValueError(f"{what} has layout {p.layout}: parameters must be dense")
    if p.is_complex():
        raise ValueError(f"{what} is complex, which no optimizer here supports")
    if p.device.type not in DEVICES:
        raise ValueError(f"{what} is on {p.device}: supported are {', '.join(DEVICES)}")
    if p.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"{what} is {p.dtype}: supported are {names}")


def check_number(name: str, value: Any, *, above: bool = False, below: float = math.inf) -> None:
    """Raise ValueError unless `value` is a number of at least (`above`: more than) 0, < `below`."""
    sound = isinstance(value, Real) and not isinstance(value, bool)
    sound = sound or (isinstance(value, Tensor) and value.numel() == 1)
    if sound and (0.0 < value < below if above else 0.0 <= value < below):
        return
    if below != math.inf:
        wanted = f"in [0, {below:g})"
    else:
        wanted = "a finite number above 0" if above else "a finite number of at least 0"
    raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is an integer of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_lr(lr: float | Tensor) -> None:
    """Raise ValueError unless `lr` is a finite number of at least 0 or a one-element tensor.

    The value of a tensor is looked at on the CPU only, where that waits for nothing.
    """
    if not isinstance(lr, Tensor):
        check_number("lr", lr)
    elif lr.numel() != 1 or not lr.is_floating_point() or lr.device.type not in DEVICES:
        raise ValueError("lr as a tensor must hold one floating-point number")
    elif lr.device.type == "cpu":
        check_number("lr", float(lr))


def pair(betas: Any) -> tuple[Any, ...]:
    """`betas` as a tuple; ValueError unless they are a sequence."""
    if isinstance(betas, str) or not isinstance(betas, Iterable):
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    return tuple(betas)


def check_names(group: Mapping[str, Any], known: Iterable[str], optimizer: str) -> None:
    """Raise ValueError for an option that the optimizer does not have."""
    known = sorted(known)
    for name in group.keys() - {*known, *NO_OPTIONS}:
        raise ValueError(
            f"{optimizer} has no option {name!r} for a group: it has {', '.join(known)}"
        )


def check_options(group: Mapping[str, Any]) -> None:
    """Raise ValueError for hyperparameters out of range."""
    check_lr(group["lr"])
    for name in ("weight_decay", "eps"):
        check_number(name, group.get(name, 0.0))
    if group.get("half", "nearest") not in ("nearest", "stochastic", "master"):
        raise ValueError(f"half must be 'nearest', 'stochastic' or 'master', got {group['half']!r}")
    betas = pair(group.get("betas", (0.0, 0.0)))
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta, below=1.0)


def check_scalar(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is None or a tensor of one element."""
    if value is not None and not (isinstance(value, Tensor) and value.numel() == 1):
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} must be a tensor of one element, got {what}")


def check_grad(p: Tensor, optimizer: str, *, sparse_ok: bool) -> None:
    """Raise RuntimeError unless `p.grad` is a gradient of `p` that the optimizer can apply."""
    grad = p.grad
    what = f"the gradient of the parameter of shape {tuple(p.shape)}"
    if grad.layout != torch.strided and not (sparse_ok and grad.is_sparse):
        raise RuntimeError(
            f"{what} is sparse, which {optimizer} does not support: use SparseSignSGD or a dense "
            "embedding"
        )
    if grad.shape != p.shape:
        raise RuntimeError(f"{what} has shape {tuple(grad.shape)}")
    if grad.dtype != p.dtype:
        raise RuntimeError(f"{what} is {grad.dtype}, the parameter {p.dtype}")
    if grad.device != p.device:
        raise RuntimeError(f"{what} is on {grad.device}, the parameter on {p.device}")


def check_kept(p: Tensor, state: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError where `p` is not any more what its state was made for.

    A kernel would read moments on another device, or of another size, by their addresses.
    """
    what = f"the parameter of shape {tuple(p.shape)}"
    hint = "change the model before the optimizer is made"
    for name, kept in state.items():
        if kept.device != p.device:
            raise RuntimeError(f"{what} is on {p.device}, its state on {kept.device}: {hint}")
        if name in ("exp_avg", "momentum_buffer") and kept.numel() != p.numel():
            raise RuntimeError(f"{what} has a state of {kept.numel()} elements: {hint}")
        wide = torch.float64 in (p.dtype, kept.dtype)  # moments are as wide as what they update
        if name in ("exp_avg_sq", "momentum_buffer") and wide and kept.dtype != p.dtype:
            raise RuntimeError(f"{what} is {p.dtype}, its state {kept.dtype}: {hint}")


def match_state(
    index: int, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (own tensor, saved value) of one parameter's state; ValueError if they do not fit."""
    if saved.keys() != own.keys():
        raise ValueError(
            f"the saved state of parameter {index} has {sorted(saved)}, expected {sorted(own)}"
        )
    for name, value in own.items():
        theirs = torch.as_tensor(saved[name])
        if theirs.shape != value.shape:
            raise ValueError(
                f"the saved {name} of parameter {index} has shape {tuple(theirs.shape)}, expected "
                f"{tuple(value.shape)}"
            )
    return [(value, torch.as_tensor(saved[name])) for name, value in own.items()]


def options_of(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved group says beside its parameters, without what only torch's AdamW has."""
    return {k: v for k, v in saved.items() if k != "params" and (k in own or k not in _OF_TORCH)}


def match_groups(
    saved: Mapping[str, Any],
    own_groups: Sequence[Mapping[str, Any]],
    own_state: Mapping[Tensor, Mapping[str, Tensor]],
    check: Callable[[dict[str, Any]], None],
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (own tensor, saved value) of a whole optimizer; ValueError if they do not fit."""
    if not isinstance(saved, Mapping) or not {"param_groups", "state"} <= saved.keys():
        raise ValueError("a saved optimizer must have 'param_groups' and 'state'")
    groups = saved["param_groups"]
    sizes, own = [len(g["params"]) for g in groups], [len(g["params"]) for g in own_groups]
    if sizes != own:
        raise ValueError(f"the saved optimizer has groups of {sizes} parameters, this one of {own}")
    copies: list[tuple[Tensor, Tensor]] = []
    for theirs, ours in zip(groups, own_groups, strict=True):
        for name, only in _OF_TORCH.items():
            if name not in ours and only is not None and theirs.get(name, only) != only:
                raise ValueError(
                    f"the saved optimizer has {name}={theirs[name]}, which is another rule"
                )
        check({**ours, **theirs})
        for i, p in zip(theirs["params"], ours["params"], strict=True):
            copies += match_state(i, saved["state"].get(i, {}), own_state[p])
    return copies
