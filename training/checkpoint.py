"""Checkpoints on disk: a folder of safetensors files and one JSON index, atomic and checksummed.

    checkpoints/step_00000060/model.safetensors      parameters and buffers
                              ema.safetensors        averaged parameters
                              optimizer.safetensors  moments, steps, learning rates
                              carry.safetensors      latent states, puzzles in work, metric sums
                              index.json             step, configuration, dataset, checksums
    checkpoints/best.json                            which one evaluated best

A checkpoint is written beside its place, synced to the disk, then renamed: a kill at any moment
leaves whole checkpoints only. Nothing is pickled. Free of torch except where tensors are touched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.config import file_sha256
from training.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 1
INDEX = "index.json"
BEST = "best.json"
_NEEDED = {f"{stem}.safetensors" for stem in ("model", "optimizer", "carry")}
_STEP = re.compile(r"step_(\d+)$")


class _Part(BaseModel):
    """A part of an index, whose further keys are no concern of this version."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Dataset(_Part):
    seq_len: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    num_puzzle_ids: int = Field(ge=1)
    fingerprint: str


class _Dims(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    seq_len: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    num_puzzle_ids: int = Field(ge=1)


class _Index(_Part):
    """The form of index.json, as far as it is read."""

    format: int
    step: int = Field(ge=0)
    config: dict[str, Any]
    dims: _Dims
    dataset: _Dataset
    run_id: str
    seconds: float = Field(ge=0, allow_inf_nan=False)
    files: dict[Annotated[str, Field(pattern=r"^\w+\.safetensors$")], str]


class DamagedCheckpoint(ConfigError):
    """A checkpoint that is incomplete or whose checksums do not fit."""


def folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def list_steps(run_dir: Path) -> list[int]:
    """Steps of which a checkpoint exists, ascending."""
    found = (_STEP.match(path.name) for path in folder(run_dir).glob("step_*") if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def write(
    run_dir: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], index: dict[str, Any]
) -> Path:
    """Write one checkpoint and return its folder; OSError leaves the earlier ones untouched."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    parent = folder(run_dir)
    parent.mkdir(parents=True, exist_ok=True)
    target = parent / name(step)
    temporary = parent / f".writing-{name(step)}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        checksums = {}
        for stem, tensors in files.items():
            path = temporary / f"{stem}.safetensors"
            whole = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
            save_file(whole, path)
            checksums[path.name] = file_sha256(path)
        index = {"format": FORMAT, "step": step, **index, "files": checksums}
        text = json.dumps({**index, "checksum": _index_checksum(index)}, indent=1)
        (temporary / INDEX).write_text(text + "\n")
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        if target.exists():  # the same step once more, after a resume
            old = parent / f".replaced-{name(step)}-{os.getpid()}"
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(target)
        sync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(str(error)) from None
    return target


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except PermissionError:  # folders cannot be opened on Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_index(path: Path) -> dict[str, Any]:
    """The verified index of the checkpoint folder `path`, all files' checksums compared."""
    try:
        index = json.loads((path / INDEX).read_text())
        stated = index.pop("checksum")
        if stated != _index_checksum(index):
            raise DamagedCheckpoint(f"{path / INDEX} is damaged: its checksum does not fit")
        if index["format"] != FORMAT:
            raise ConfigError(
                f"{path} has format {index['format']}; this version reads format {FORMAT}"
            )
        _Index.model_validate(index)
        if missing := sorted(_NEEDED - index["files"].keys()):
            raise DamagedCheckpoint(f"{path / INDEX} is damaged: it lists no {missing[0]}")
        for file, checksum in index["files"].items():
            if not (path / file).is_file():
                raise DamagedCheckpoint(f"{path / file} is missing")
            if file_sha256(path / file) != checksum:
                raise DamagedCheckpoint(f"{path / file} is damaged: its checksum does not fit")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"]
        raise DamagedCheckpoint(
            f"{path / INDEX} is damaged: {key}: {message[0].lower()}{message[1:]}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise DamagedCheckpoint(f"{path / INDEX} cannot be read ({reason})") from None
    return index


def newest(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint of a run; damaged ones are reported and passed over."""
    steps = list_steps(run_dir)
    if not steps:
        raise ConfigError(
            f"{run_dir} holds no checkpoint yet; start the run again with another run_name, "
            "or delete the folder"
        )
    damage = []
    for step in reversed(steps):
        path = folder(run_dir) / name(step)
        try:
            index = read_index(path)
        except DamagedCheckpoint as error:
            damage.append(str(error))
            continue
        for text in damage:
            logger.warning("%s; taking the checkpoint before it", text)
        return path, index
    raise DamagedCheckpoint(
        f"every checkpoint in {folder(run_dir)} is damaged, and none can be used: {damage[0]}"
    )


def read_tensors(
    path: Path,
    stem: str,
    rows: slice | None = None,
    has_rows: Callable[[str], bool] = lambda name: False,
) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint, on the CPU; {} where it has no such file.

    With `rows`, only those rows of the tensors whose name `has_rows`; the others whole.
    """
    from safetensors import safe_open

    file = path / f"{stem}.safetensors"
    if not file.exists():
        return {}
    with safe_open(file, framework="pt") as saved:
        return {
            name: saved.get_slice(name)[rows] if rows and has_rows(name) else saved.get_tensor(name)
            for name in saved.keys()  # noqa: SIM118 (no mapping)
        }


def mark_best(run_dir: Path, step: int, value: float, merit: float | None = None) -> None:
    """Note that the checkpoint of `step` is the best so far, with its exact accuracy.

    `merit` is what it was chosen by, where that is something else.
    """
    chosen_by = {} if merit in (None, value) else {"merit": merit}
    path = folder(run_dir) / BEST
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps({"step": step, "exact_accuracy": value, **chosen_by}) + "\n")
    sync(temporary)
    temporary.replace(path)


def best(run_dir: Path) -> dict[str, Any] | None:
    """`{"step", "exact_accuracy"}` of the best checkpoint, or None."""
    try:
        found = json.loads((folder(run_dir) / BEST).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and type(found.get("step")) is int else None


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    steps = list_steps(run_dir)
    kept = set(steps[-keep:]) | {(best(run_dir) or {}).get("step")}
    for step in steps:
        if step not in kept:
            path = folder(run_dir) / name(step)
            doomed = path.with_name(f".removing-{path.name}")
            path.rename(doomed)  # never half a checkpoint under its own name
            shutil.rmtree(doomed, ignore_errors=True)


def tidy(run_dir: Path, step: int) -> None:
    """Before a run goes on at `step`: sweep what a kill left; set newer checkpoints aside."""
    parent = folder(run_dir)
    for path in parent.glob(".*-step_*"):
        shutil.rmtree(path, ignore_errors=True)
    for later in (s for s in list_steps(run_dir) if s > step):
        aside = parent / f"superseded-{name(later)}"
        shutil.rmtree(aside, ignore_errors=True)
        (parent / name(later)).rename(aside)
        logger.warning("checkpoint %s is newer than step %d: set aside as %s", later, step, aside)
    if (best(run_dir) or {}).get("step", 0) > step:
        (parent / BEST).unlink()


def _index_checksum(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
