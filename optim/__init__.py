"""Optimizers for small models: exact, resumable, free of host synchronization.

Usable on its own in any PyTorch project. Names are resolved on first use, so that importing the
package (and validating a configuration) does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optim.adam_atan2 import AdamATan2, adam_atan2_update
    from optim.adam_mini import AdamMini, adam_mini_update
    from optim.adamw import AdamW, adamw_update
    from optim.base import DeviceOptimizer
    from optim.clip import clip_grad_norm, clip_scale, global_grad_norm
    from optim.config import (
        OPTIMIZERS,
        AdamATan2Config,
        AdamMiniConfig,
        AdamWConfig,
        MuonConfig,
        OptimizerConfig,
    )
    from optim.ema import EMA
    from optim.muon import Muon
    from optim.muon_rule import muon_update
    from optim.orthogonal import newton_schulz
    from optim.partition import partition_parameters
    from optim.schedule import learning_rate
    from optim.sharded import ShardedOptimizer
    from optim.sparse_signsgd import SparseSignSGD, sparse_signsgd_update
    from optim.telemetry import Telemetry

_HOME = {
    "AdamATan2": "adam_atan2",
    "adam_atan2_update": "adam_atan2",
    "AdamMini": "adam_mini",
    "adam_mini_update": "adam_mini",
    "AdamW": "adamw",
    "adamw_update": "adamw",
    "DeviceOptimizer": "base",
    "clip_grad_norm": "clip",
    "clip_scale": "clip",
    "global_grad_norm": "clip",
    "OPTIMIZERS": "config",
    "AdamATan2Config": "config",
    "AdamMiniConfig": "config",
    "AdamWConfig": "config",
    "OptimizerConfig": "config",
    "MuonConfig": "config",
    "EMA": "ema",
    "Muon": "muon",
    "muon_update": "muon_rule",
    "newton_schulz": "orthogonal",
    "partition_parameters": "partition",
    "learning_rate": "schedule",
    "ShardedOptimizer": "sharded",
    "SparseSignSGD": "sparse_signsgd",
    "sparse_signsgd_update": "sparse_signsgd",
    "Telemetry": "telemetry",
}

__all__ = [
    "EMA",
    "OPTIMIZERS",
    "AdamATan2",
    "AdamATan2Config",
    "AdamMini",
    "AdamMiniConfig",
    "AdamW",
    "AdamWConfig",
    "DeviceOptimizer",
    "Muon",
    "MuonConfig",
    "OptimizerConfig",
    "ShardedOptimizer",
    "SparseSignSGD",
    "Telemetry",
    "adam_atan2_update",
    "adam_mini_update",
    "adamw_update",
    "clip_grad_norm",
    "clip_scale",
    "global_grad_norm",
    "learning_rate",
    "muon_update",
    "newton_schulz",
    "partition_parameters",
    "sparse_signsgd_update",
]


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in _HOME:
        raise AttributeError(f"module 'optim' has no attribute {name!r}")
    value = getattr(import_module(f"optim.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
