"""The ways to compute attention: FlashAttention 3 and 2, torch's own, and plain products.

All take q, k and v as (B, L, H, D) and return (B, L, H, D), equal within the dtype's rounding.
Sources: Dao 2023, arXiv:2307.08691 (FlashAttention 2); Shah et al. 2024, arXiv:2407.08608 (3).
"""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING

from models.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKAGES = {"fa3": "flash_attn_interface", "fa2": "flash_attn"}  # what has to be importable
_HEADS = 256  # the largest head that FlashAttention takes; a multiple of 8


def missing_package(backend: str) -> str | None:
    """The package that `backend` needs and that is not installed, or None. Free of torch."""
    package = PACKAGES.get(backend)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return package


def check_installed(backend: str) -> None:
    """Raise ModelError if a package for `backend` is missing."""
    if package := missing_package(backend):
        raise ModelError(
            f"attention_backend={backend} needs the package {package}, which is not installed; "
            "install it, or use attention_backend=auto"
        )


def resolve_backend(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that `requested` means here; ModelError if it is one that cannot work.

    `auto` is the first of fa3 (Hopper only), fa2 and sdpa that is installed and fits.
    """
    import torch

    if requested in ("sdpa", "math"):
        return requested
    check_installed(requested)
    half = dtype in (torch.float16, torch.bfloat16)
    fits = device.type == "cuda" and half and head_dim <= _HEADS and head_dim % 8 == 0
    if requested == "auto":
        if fits:
            hopper = torch.cuda.get_device_capability(device)[0] == 9
            for backend in ("fa3", "fa2") if hopper else ("fa2",):
                if missing_package(backend) is None:
                    return backend
        return "sdpa"
    if not fits:
        raise ModelError(
            f"attention_backend={requested} needs a CUDA device, bfloat16 or float16, and heads of "
            f"a multiple of 8 up to {_HEADS}, but here are {device.type}, "
            f"{str(dtype).removeprefix('torch.')} and {head_dim}; use attention_backend=auto"
        )
    return requested


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, backend: str) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v by one of the resolved backends."""
    return BACKENDS[backend](q, k, v, causal)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    import torch

    from models.layers import norm_dtype

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores_BHLL = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).to(norm_dtype(q.dtype))
    if causal:
        length = q.shape[2]
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores_BHLL = scores_BHLL.masked_fill(later, -torch.inf)
    return (scores_BHLL.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def _flash(module: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    import torch

    function = importlib.import_module(module).flash_attn_func
    deterministic = torch.are_deterministic_algorithms_enabled()
    mixed = function(q, k, v, causal=causal, deterministic=deterministic)
    return mixed[0] if isinstance(mixed, tuple) else mixed  # some versions add the log-sum-exp


def _fa3(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return _flash(PACKAGES["fa3"], q, k, v, causal)


def _fa2(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return _flash(PACKAGES["fa2"], q, k, v, causal)


BACKENDS = {"fa3": _fa3, "fa2": _fa2, "sdpa": _sdpa, "math": _math}
