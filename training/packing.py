"""A training state in one small file, to travel between sittings; what is lost is said.

Parameters and buffers go whole. Moments and averages (as differences from the parameters) are
rounded: to bfloat16, or to 8-bit floats with a scale for each row. The carry stays behind: every
row of the batch starts anew, with the puzzles of its step. All else that decides the run (step,
configuration, dataset, training time) is in the file's header, with a checksum over all of it.

    NAME.safetensors: model/…, optimizer/…, ema/…, and …@scale for what is in 8 bits
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from training import checkpoint
from training.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Rounded = Literal["bf16", "fp8"]
STEMS = ("model", "optimizer", "ema")  # of a checkpoint's files
_HEADER, _SCALE = "loopwright_state", "@scale"
_LARGE = 1024  # numbers; smaller tensors stay as they are
_LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def pack(folder: Path, target: Path, rounded: Rounded = "bf16") -> dict[str, Any]:
    """Write the checkpoint in `folder` to `target`; returns the header.

    Raises ConfigError for a damaged checkpoint or a target that cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    index = checkpoint.read_index(folder)
    whole = {stem: checkpoint.read_tensors(folder, stem) for stem in STEMS}
    packed: dict[str, Tensor] = {f"model/{k}": v for k, v in whole["model"].items()}
    for name, value in whole["optimizer"].items():
        packed |= _rounded(f"optimizer/{name}", value, rounded)
    for name, value in whole["ema"].items():
        packed |= _rounded(f"ema/{name}", value - whole["model"][name], rounded)
    index["files"] = {}
    header = {**index, "rounded": rounded, "sha256": _digest(packed)}
    temporary = target.with_name(f".writing-{target.name}")
    try:
        save_file(packed, temporary, metadata={_HEADER: json.dumps(header)})
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"{target} cannot be written: {error}") from None
    return header


def is_packed(path: Path) -> bool:
    """Whether the file is a packed state, by its header."""
    return path.suffix == ".safetensors" and _header(path) is not None


def read_index(path: Path) -> dict[str, Any]:
    """The checked header of a packed state: a checkpoint's index; ConfigError if it is damaged."""
    index = _header(path) or {}
    if index.get("format") != checkpoint.FORMAT or "sha256" not in index:
        raise ConfigError(f"{path} is a packed state of another version")
    if index["sha256"] != _digest(_load(path)):
        raise ConfigError(f"{path} is damaged: its checksum does not fit")
    return index


def read_tensors(path: Path, stem: str) -> dict[str, Tensor]:
    """What of the state was in the checkpoint's file `stem`, rounded as it is here."""
    import torch

    tensors = _load(path)
    found = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind != stem or name.endswith(_SCALE):
            continue
        scale = tensors.get(name + _SCALE)
        if scale is not None:
            value = value.to(torch.float32) * scale
        if stem == "ema":
            weight = tensors[f"model/{rest}"]
            value = weight + value.to(weight.dtype)
        found[rest] = value
    return found


def _rounded(name: str, value: Tensor, rounded: Rounded) -> dict[str, Tensor]:
    """`value` under `name` in fewer bits, with the scale of its rows where there is one."""
    import torch

    if value.numel() < _LARGE or not value.is_floating_point():
        return {name: value}
    if rounded == "bf16":
        return {name: value.to(torch.bfloat16)}
    # second moments span many orders of magnitude and are never negative: more bits of exponent
    kind = torch.float8_e5m2 if name.endswith("exp_avg_sq") else torch.float8_e4m3fn
    rows = value.to(torch.float32).abs().amax(dim=-1, keepdim=True)
    scale = (rows / _LARGEST[str(kind).removeprefix("torch.")]).clamp(min=2.0**-120)
    return {name: (value / scale).to(kind), name + _SCALE: scale}


def _header(path: Path) -> dict[str, Any] | None:
    """The index in a safetensors file's header, read without torch; None where there is none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= path.stat().st_size - 8:
                return None
            text = json.loads(file.read(length)).get("__metadata__", {}).get(_HEADER)
        return None if text is None else json.loads(text)
    except (OSError, ValueError, AttributeError):
        return None


def _load(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
