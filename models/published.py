"""Published weights: one safetensors file cut into small parts, with an index that names them.

    NAME/index.json        configuration, dims, where the weights come from, checksums
         weights.000, …    the parts, in order: joined they are one .safetensors file

Parts are small enough for any host of git repositories. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "index.json"
KIND = "published weights"
PART_BYTES = 2 * 2**20 - 4096  # of a part at most


def write(folder: Path, tensors: Mapping[str, Tensor], index: Mapping[str, Any]) -> None:
    """Write `tensors` and `index` into the new folder; OSError if it exists or cannot be made."""
    from safetensors.torch import save

    content = save({k: t.detach().cpu().contiguous() for k, t in tensors.items()})
    folder.mkdir(parents=True)
    parts = {}
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        part = content[start : start + PART_BYTES]
        name = f"weights.{number:03d}"
        (folder / name).write_bytes(part)
        parts[name] = hashlib.sha256(part).hexdigest()
    told = {
        "kind": KIND,
        **index,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "files": parts,
    }
    (folder / INDEX).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def is_published(folder: Path) -> bool:
    """Whether the folder holds published weights."""
    try:
        return json.loads((folder / INDEX).read_text(encoding="utf-8")).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def read_index(folder: Path) -> dict[str, Any]:
    """The index of published weights; ModelError if it lacks something."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        missing = [k for k in ("config", "dims", "step", "files", "sha256") if k not in index]
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder / INDEX} cannot be read: {error}") from None
    if missing:
        raise ModelError(f"{folder / INDEX} has no {missing[0]}")
    return index


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors, on the CPU; ModelError names a part that is missing or damaged."""
    from safetensors.torch import load

    index, parts = read_index(folder), []
    for name, stated in index["files"].items():
        try:
            part = (folder / name).read_bytes()
        except OSError as error:
            raise ModelError(f"{folder / name} cannot be read: {error.strerror}") from None
        if hashlib.sha256(part).hexdigest() != stated:
            raise ModelError(f"{folder / name} is damaged: its checksum does not fit")
        parts.append(part)
    content = b"".join(parts)
    if hashlib.sha256(content).hexdigest() != index["sha256"]:
        raise ModelError(f"{folder} is damaged: its parts do not make the whole")
    return load(content)
