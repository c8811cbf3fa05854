"""From a configuration and a dataset's dimensions to a model on a device."""

from __future__ import annotations

import torch

from models import fp8
from models.attention import Attention
from models.attention_backends import resolve_backend
from models.config import ModelDims, ReasoningConfig
from models.layers import Linear
from models.reasoning import ReasoningModel


def forward_dtype(config: ReasoningConfig, device: torch.device) -> torch.dtype:
    """`auto` means bfloat16 on CUDA and float32 elsewhere."""
    if config.forward_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.forward_dtype)


def build_model(
    config: ReasoningConfig, dims: ModelDims, *, seed: int, device: torch.device
) -> ReasoningModel:
    """Initialize on the CPU from `seed` (the same weights on every device), then move.

    Parameters are float32, or float64 where the forward pass is. ModelError: the configuration
    asks for what this device does not have.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = forward_dtype(config, device)
    if config.fp8:
        fp8.check_schedule(config.schedule())
        fp8.check_device(device, dtype)
    backend = "sdpa"
    if config.has_attention:
        head_dim = config.hidden_size // config.num_heads
        backend = resolve_backend(config.attention_backend, device, dtype, head_dim)
    model = config.build(dims, dtype=dtype, generator=generator)
    for module in model.levels.modules():
        if isinstance(module, Attention):
            module.backend = backend
        elif isinstance(module, Linear) and config.fp8:
            module.fp8 = fp8.fits(module.weight)
    if dtype == torch.float64:
        model = model.double()
    return model.to(device)
