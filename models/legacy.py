"""The ancestors' checkpoints: HRM, TinyRecursiveModels and URM, and training states of their forks.

Key map in both directions, and what a state dict alone tells of the model that it belongs to.
Tensors keep their values and shapes. Nothing here reads files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from models.config import ModelDims

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

PREFIX = "model.inner."  # of a loss head around an ACT wrapper around the model
_WRAPPERS = ("_orig_mod.", "module.", "model.", "inner.")
_WHOLE = {
    "init_hidden": "z_init",
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
    "dwconv": "conv",
    "qkv_proj": "qkv",
    "o_proj": "out",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "weight": "weight",
    "bias": "bias",
}
_WHOLE_BACK = {ours: theirs for theirs, ours in _WHOLE.items()}
_SEGMENTS_BACK = {ours: theirs for theirs, ours in _SEGMENTS.items()}


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
    if latent := re.fullmatch(r"L(\d+)_init", name):  # TRM with several latent states
        return f"z_L{latent[1]}_init"
    if name.startswith("layers."):  # URM's one level has no name
        name = f"L_level.{name}"
    segments = name.split(".")
    if any(not (s.isdigit() or s in _SEGMENTS) for s in segments):
        return None
    return ".".join(_SEGMENTS.get(s, s) for s in segments)


def reference_name(name: str, *, urm: bool) -> str:
    """The reference's name of our tensor; the inverse of `our_name`. KeyError: it has none."""
    if name in _WHOLE_BACK:
        return PREFIX + _WHOLE_BACK[name]
    if latent := re.fullmatch(r"z_L(\d+)_init", name):
        return f"{PREFIX}L{latent[1]}_init"
    level, _, rest = name.partition(".blocks.")
    segments = [_SEGMENTS_BACK[level], *(s if s.isdigit() else _SEGMENTS_BACK[s]
                                         for s in f"blocks.{rest}".split("."))]  # fmt: skip
    return PREFIX + ".".join(segments[1:] if urm else segments)


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


def to_reference(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename our state dict to the reference's names; KeyError names a tensor without one."""
    urm = "z_init" in state_dict
    return {reference_name(name, urm=urm): value for name, value in state_dict.items()}


@dataclass(frozen=True)
class ForeignState:
    """What is of use in somebody's file: weights, under our names."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None = None  # parameters as averaged by an EMA
    step: int | None = None  # after which it was saved
    reference: bool = False  # whether the names were the reference's


def read_state(content: Mapping[str, Any]) -> ForeignState:
    """The weights in a state dict, or in a training state (`model_state_dict`, `ema_shadow`, …).

    Raises KeyError for a reference tensor without counterpart, TypeError if these are no tensors.
    """
    average, step = None, None
    for key in ("model_state_dict", "state_dict"):
        if isinstance(content.get(key), Mapping):
            average, step = content.get("ema_shadow") or content.get("ema"), content.get("step")
            content = content[key]
            break
    if isinstance(average, Mapping) and isinstance(average.get("shadow"), Mapping):
        average = average["shadow"]
    weights, reference = _renamed(content)
    shadow = _renamed(average)[0] if isinstance(average, Mapping) else None
    return ForeignState(weights, shadow, step if isinstance(step, int) else None, reference)


def _renamed(tensors: Mapping[str, Any]) -> tuple[dict[str, Tensor], bool]:
    import torch

    wrong = [k for k, v in tensors.items() if not isinstance(v, torch.Tensor)]
    if wrong or not tensors:
        raise TypeError(f"{wrong[0]!r} is no tensor" if wrong else "it is empty")
    if is_reference(tensors):
        return from_reference(tensors), True
    return {
        k.replace("_orig_mod.", "").removeprefix("model."): t for k, t in tensors.items()
    }, False


def describe(
    weights: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any], ModelDims]:
    """(architecture, fields of its config, dims) that the shapes of `weights` and `config` tell.

    `config` is the `arch` section of the reference's configuration, where it is known; shapes win
    over it. Without it heads, cycles and ACT steps keep our defaults. `dims.seq_len` is 0 unless
    learned positions or a token mixer tell it. KeyError: a tensor that every model has is missing.
    """
    from models import ARCHITECTURES

    vocab_size, width = weights["embedding.tokens"].shape
    puzzles, positions = weights.get("embedding.puzzles"), weights.get("embedding.positions")
    layers: dict[str, int] = {}
    for match in (re.match(r"levels\.([HL])\.blocks\.(\d+)\.", name) for name in weights):
        if match:
            layers[match[1]] = max(layers.get(match[1], 0), int(match[2]) + 1)
    if not layers:
        raise KeyError("there is no tensor of a block in it")
    first = f"levels.{next(iter(layers))}.blocks.0"
    mixer = weights.get(f"{first}.token_mlp.down.weight")
    shapes: dict[str, Any] = {
        "hidden_size": width,
        "expansion": 1.5 * weights[f"{first}.mlp.down.weight"].shape[1] / width,
        "puzzle_emb_ndim": 0 if puzzles is None else puzzles.shape[1],
    }
    if positions is not None:
        shapes["pos_encodings"] = "learned"
    if "z_init" in weights:
        name, shapes["num_layers"] = "urm", layers["L"]
        shapes["conv_kernel"] = weights[f"{first}.mlp.conv.weight"].shape[-1]
    elif set(layers) == {"H", "L"}:
        name, shapes["H_layers"], shapes["L_layers"] = "hrm", layers["H"], layers["L"]
    elif "H" in layers:
        name, shapes["H_layers"] = "transformer", layers["H"]
    else:
        name, shapes["L_layers"] = "trm", layers["L"]
        latents = sum(n.startswith("z_L") for n in weights)
        shapes["latents"] = latents if "z_H_init" in weights else 0
        shapes["mixer"] = "attention" if mixer is None else "mlp"
        if mixer is not None and positions is None:
            shapes["pos_encodings"] = "none"
    fields = {**reference_fields(config or {}, name), **shapes}
    given = ARCHITECTURES[name](**fields)  # refuses what cannot be
    length = next((t.shape[0] for t in (positions,) if t is not None), 0)
    if mixer is not None:
        length = mixer.shape[0]
    seq_len = max(length - given.prefix_len, 0)
    return name, fields, ModelDims(seq_len, vocab_size, 1 if puzzles is None else len(puzzles))


def reference_fields(arch: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Fields of our config of the architecture `name` from a reference's `arch` section."""
    from models import ARCHITECTURES

    known = ARCHITECTURES[name].model_fields
    fields = {k: v for k, v in arch.items() if k in known and k not in ("name", "loss")}
    # of the reference's classes only TRM's know a prefix longer than its embedding
    prefix = arch.get("puzzle_emb_len", 16 if name == "trm" and not arch else 0)
    fields["puzzle_emb_len"] = prefix or "auto"
    if "loops" in arch:
        fields["halt_max_steps"] = arch["loops"]
    if "mlp_t" in arch and name == "trm":
        fields["mixer"] = "mlp" if arch["mlp_t"] else "attention"
    # HRM and its baseline halt where q_halt > q_continue
    fields["no_act_continue"] = arch.get("no_ACT_continue", name in ("trm", "urm"))
    loss = arch.get("loss")
    kind = loss.get("loss_type", "") if isinstance(loss, Mapping) else ""
    fields["loss"] = {"kind": "softmax" if kind.startswith("softmax") else "stablemax"}
    return fields


def resize_puzzles(
    table: Tensor,
    rows: int,
    old_names: Sequence[str] | None = None,
    new_names: Sequence[str] | None = None,
) -> Tensor:
    """A table of `rows` puzzle embeddings from one of another dataset, (old rows, D) → (rows, D).

    A puzzle that both datasets know by name keeps its embedding; all others start from the mean.
    """
    resized = table.mean(dim=0, keepdim=True).expand(rows, -1).clone()
    known = {name: row for row, name in enumerate(old_names or ()) if row < len(table)}
    for row, name in enumerate((new_names or ())[:rows]):
        if name in known:
            resized[row] = table[known[name]]
    return resized
