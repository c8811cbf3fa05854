"""What a parameter is, by its name and shape: what Muon and Adam-mini treat differently."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

# (role, pattern of a part of the dotted name, whether any part may match or only the last).
# The first that matches decides; "weight" and "bias" are no parts.
RULES: tuple[tuple[str, str, bool], ...] = (
    ("embedding", r"(.*_)?(embed(ding)?s?|emb|tokens|positions|wte|wpe)(_.*)?", True),
    ("head", r"(.*_)?(head|classifier|unembed)", False),
    ("qkv", r"(.*_)?(qkv|wqkv|c_attn|query_key_value|in_proj)(_.*)?", False),
    ("gate_up", r"(.*_)?(gate_up|up_gate|w12)(_.*)?", False),
    ("query", r"(.*_)?(q|query|wq)(_proj)?", False),
    ("key", r"(.*_)?(k|key|wk)(_proj)?", False),
    ("value", r"(.*_)?(v|value|wv)(_proj)?", False),
    ("projection", r"(o|wo|out|proj|c_proj|dense)(_proj)?", False),
    ("mlp", r"(gate|up|down|w1|w2|w3|fc\d*|c_fc|linear\d*)(_proj)?", False),
)
PIECES = {"qkv": 3, "gate_up": 2}  # matrices stacked along the rows of one parameter


@dataclass(frozen=True)
class Part:
    """One parameter and its role: a role of `RULES`, "vector" (fewer than 2 dimensions that are
    longer than 1), or "other" where no rule matched."""

    name: str
    param: Tensor
    role: str

    @property
    def pieces(self) -> int:
        """How many equally shaped matrices lie in it, along the rows."""
        pieces = PIECES.get(self.role, 1)
        return pieces if self.param.shape[0] % pieces == 0 else 1


def role_of(name: str, param: Tensor) -> str:
    """The role of one parameter, see `Part`."""
    if sum(n > 1 for n in param.shape) < 2:
        return "vector"
    parts = [part for part in name.split(".") if part not in ("weight", "bias")] or [""]
    for role, pattern, anywhere in RULES:
        if any(re.fullmatch(pattern, part) for part in (parts if anywhere else parts[-1:])):
            return role
    return "other"


def partition_parameters(named_parameters: Iterable[tuple[str, Tensor]]) -> list[Part]:
    """Every parameter with its role, in the given order.

    Raises:
        ValueError: if a parameter comes twice.
    """
    parts = [Part(name, p, role_of(name, p)) for name, p in named_parameters]
    if len({id(part.param) for part in parts}) != len(parts):
        raise ValueError("a parameter appears twice")
    return parts
