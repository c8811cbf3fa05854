"""Key map between the state dicts of the ancestors (HRM, TinyRecursiveModels) and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

_WRAPPERS = ("_orig_mod.", "module.", "model.", "inner.")
_WHOLE = {
    "H_init": "z_H_init",
    "L_init": "z_L_init",
    "embed_tokens.embedding_weight": "embedding.tokens",
    "embed_pos.embedding_weight": "embedding.positions",
    "puzzle_emb.weights": "embedding.puzzles",
    "lm_head.weight": "lm_head.weight",
    "q_head.weight": "q_head.weight",
    "q_head.bias": "q_head.bias",
}
_SEGMENTS = {
    "H_level": "levels.H",
    "L_level": "levels.L",
    "layers": "blocks",
    "self_attn": "attention",
    "mlp_t": "token_mlp",
    "mlp": "mlp",
    "qkv_proj": "qkv",
    "o_proj": "out",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "weight": "weight",
}


def unwrap(name: str) -> str:
    """Drop the prefixes that torch.compile, DataParallel and the reference's wrappers put on."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in _WRAPPERS:
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
    return name


def our_name(name: str) -> str | None:
    """Our name of a reference tensor, or None where there is no counterpart."""
    name = unwrap(name)
    if name in _WHOLE:
        return _WHOLE[name]
    segments = name.split(".")
    if any(not (s.isdigit() or s in _SEGMENTS) for s in segments):
        return None
    return ".".join(_SEGMENTS.get(s, s) for s in segments)


def is_reference(names: Mapping[str, object]) -> bool:
    """Whether these are the reference's tensor names (with or without prefixes)."""
    return any(unwrap(name) == "embed_tokens.embedding_weight" for name in names)


def from_reference(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename a reference state dict to our names; KeyError names a tensor without counterpart."""
    renamed = {}
    for name, value in state_dict.items():
        ours = our_name(name)
        if ours is None:
            raise KeyError(f"no counterpart for the reference tensor {name!r}")
        renamed[ours] = value
    return renamed
