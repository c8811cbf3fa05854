"""What a model is; knows nothing of files, logging and processes.

`ARCHITECTURES` maps an architecture's name to the module that holds its config class. Importing
this package imports no torch: configurations validate in milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from models.config import LossConfig, ModelDims, ReasoningConfig
from models.errors import ModelError
from models.hrm import HRMConfig
from models.transformer import TransformerConfig
from models.trm import TRMConfig
from models.urm import URMConfig

ARCHITECTURES: dict[str, type[ReasoningConfig]] = {
    "hrm": HRMConfig,
    "trm": TRMConfig,
    "urm": URMConfig,
    "transformer": TransformerConfig,
}

_LAZY = {
    "ACT": "models.act",
    "Carry": "models.act",
    "IGNORE_LABEL": "models.act",
    "Answer": "models.pretrained",
    "ReasoningModel": "models.reasoning",
    "Solver": "models.pretrained",
    "act_loss": "models.loss",
    "build_model": "models.build",
    "choose": "models.act",
    "counter_uniform": "models.random",
    "load_pretrained": "models.pretrained",
    "perturbed": "models.perturb",
}

__all__ = ["ARCHITECTURES", "LossConfig", "ModelDims", "ModelError", "ReasoningConfig", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")
