"""`load_checkpoint=`: find it, take its configuration as the base, refuse what cannot match."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data import DatasetConfig, DatasetInfo
from models import files, published
from training import checkpoint, packing
from training.config import CheckpointKeys, RunConfig, validate
from training.errors import ConfigError, nearest
from training.run_folder import run_before_restart
from training.weights import check_weights_file

logger = logging.getLogger(__name__)

_STARTING = ("load_checkpoint", "resume", "stop_at")  # where this sitting begins and ends


@dataclass(frozen=True)
class Resume:
    """A whole training state to go on from."""

    path: Path  # the checkpoint's folder, or the file of a packed state
    index: dict[str, Any]
    changes: tuple[str, ...] = field(default=())  # "key: old → new"

    @property
    def run_dir(self) -> Path:
        """The run folder that the checkpoint lies in."""
        return self.path.parent.parent

    @property
    def in_run_folder(self) -> bool:
        """Whether the checkpoint lies in a run folder; one that was copied out of it does not."""
        return self.path.parent.name == "checkpoints"

    def trained(self) -> RunConfig:
        """The configuration it was trained with; ConfigError if this version has no such."""
        return saved_config(self.index["config"], self.path)

    def check_data(self, data: DatasetConfig) -> None:
        """Raise ConfigError if changed settings plainly name another dataset; builds nothing."""
        changes = [text for text in self.changes if text.startswith("data.")]
        named = isinstance(self.index["config"]["data"].get("name"), str)
        if not (changes and named) or data.name == "folder":
            return
        if data.fingerprint() != self.index["dataset"]["fingerprint"]:
            raise ConfigError(
                f"{'; '.join(changes)}: that is another dataset than the one {self.path} was "
                "trained on; to start from its weights only, give its model.safetensors file"
            )

    def check_dataset(self, info: DatasetInfo) -> None:
        """Raise ConfigError unless the dataset is the one the state was trained on."""
        saved = self.index["dataset"]
        for key in ("seq_len", "vocab_size", "num_puzzle_ids", "fingerprint"):
            now = getattr(info, key)
            if saved[key] != now:
                raise ConfigError(
                    f"data: {self.path} was trained on another dataset: {key} was {saved[key]} and "
                    f"is {now}; to start from its weights only, give its model.safetensors file"
                )

    def check_steps(self, total_steps: int) -> None:
        """Raise ConfigError if the run is to end before the checkpoint."""
        if total_steps < self.index["step"]:
            changed = [c for c in self.changes if c.startswith(("max_steps", "epochs"))]
            raise ConfigError(
                f"{'; '.join(changed)}: the run would end at step {total_steps}, and {self.path} "
                f"is at step {self.index['step']} already; raise max_steps or epochs"
            )


@dataclass(frozen=True)
class WarmStart:
    """A file or folder of weights: a new run starts from them, at step 0."""

    path: Path


def saved_config(values: object, path: Path) -> RunConfig:
    """The configuration that `path`, a folder or a file, was saved with; ConfigError as above."""
    try:
        return validate(RunConfig, values)
    except ConfigError as error:
        source = path / checkpoint.INDEX if path.is_dir() else path
        raise ConfigError(f"{source}: {error}") from None


def find_checkpoint(text: str, runs_dir: Path) -> Resume | WarmStart:
    """What `text` names: `latest`, a run or checkpoint folder, a weights file, a hub's id."""
    if text.startswith(files.HUB):
        path = files.from_hub(text)
    else:
        path = _latest_run(runs_dir) if text == "latest" else Path(text).expanduser()
    if not (path / "config.yaml").exists() and path.is_dir():
        path = files.newest_file(path) or path  # a run folder of the ancestors
    if published.is_published(path):
        return WarmStart(path)
    if path.is_file() and packing.is_packed(path):
        return Resume(path.resolve(), packing.read_index(path))
    if path.is_file():
        check_weights_file(path)
        return WarmStart(path)
    if (path / checkpoint.INDEX).exists() or (path.name.startswith("step_") and path.is_dir()):
        return Resume(path.resolve(), checkpoint.read_index(path))
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        found, index = checkpoint.newest(path)
        return Resume(found.resolve(), index)
    if path.is_dir():
        raise ConfigError(
            f"{path} is neither a run folder nor a checkpoint (no checkpoints/ in it)"
        )
    names = [p.name for p in runs_dir.glob("*") if p.is_dir()] if runs_dir.is_dir() else []
    hint = nearest(path.name, names)
    raise ConfigError(f"there is no checkpoint at {path}{hint}")


def find_start(keys: CheckpointKeys) -> Resume | WarmStart | None:
    """What a run begins from; None: from nothing.

    With resume=auto, and after torchrun has restarted its processes, that is the newest checkpoint
    of the run's own folder before all else.
    """
    if keys.resume == "auto" and keys.run_name is None:
        raise ConfigError("resume=auto needs run_name, whose folder it looks into")
    own = run_before_restart(Path(keys.runs_dir))
    if keys.resume == "auto":
        own = Path(keys.runs_dir) / keys.run_name
    if own is not None and checkpoint.list_steps(own):
        path, index = checkpoint.newest(own)
        return Resume(path.resolve(), index)
    if keys.load_checkpoint is None:
        return None
    return find_checkpoint(keys.load_checkpoint, Path(keys.runs_dir))


def _latest_run(runs_dir: Path) -> Path:
    indices = [*runs_dir.glob("*/checkpoints/step_*/index.json")]
    indices += runs_dir.glob("*/*/checkpoints/step_*/index.json")
    if not indices:
        raise ConfigError(f"latest: there is no checkpoint in {runs_dir}/ yet")
    return max(indices, key=lambda p: p.stat().st_mtime_ns).parents[2]


def merge(
    found: Resume, values: dict[str, Any], overrides: list[str]
) -> tuple[Resume, dict[str, Any]]:
    """The checkpoint's configuration with only the explicit overrides on top.

    Raises ConfigError where an override contradicts the stored state.
    """
    saved = found.index["config"]
    merged = {**saved, **{k: values[k] for k in _STARTING if k in values}}
    for key in explicit_keys(overrides):
        if _has(values, key.split(".")):  # an experiment's key for another preset is gone
            merged = _assign(merged, values, key.split("."))
    old = found.trained()
    new = validate(RunConfig, merged)
    differences = _differences(old.model_dump(), new.model_dump())
    for key in _STARTING:
        differences.pop(key, None)
    for key, (before, after) in differences.items():
        if _is_fixed(key, old):
            raise ConfigError(
                f"{key}={after} cannot continue {found.path}, which was trained with "
                f"{key}={before}; to start from its weights only, give its model.safetensors file"
            )
    changes = tuple(f"{key}: {before} → {after}" for key, (before, after) in differences.items())
    return Resume(found.path, found.index, changes), merged


def explicit_keys(overrides: list[str]) -> list[str]:
    """Dotted keys that the command line sets: its own, and those of an experiment it names."""
    keys = []
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "experiment":
            keys += _preset_keys(value.strip("'\""))
        elif not key.startswith("hydra") and key not in _STARTING:
            keys.append(key)
    return keys


def _preset_keys(experiment: str) -> list[str]:
    """Dotted keys and groups that an experiment sets, with those of the ones it builds on."""
    from training.cli import CONFIG_DIR

    preset = yaml.safe_load((CONFIG_DIR / "experiment" / f"{experiment}.yaml").read_text()) or {}
    keys = []
    for default in preset.pop("defaults", []):
        if isinstance(default, dict):
            keys += [k.removeprefix("override").strip(" /") for k in default]
        elif default != "_self_":
            keys += _preset_keys(default)
    return keys + _leaves(preset, "")


def _leaves(tree: dict[str, Any], prefix: str) -> list[str]:
    keys = []
    for key, value in tree.items():
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return keys


def _has(values: Any, path: list[str]) -> bool:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def _assign(target: dict[str, Any], source: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """`target` with the value that `source` has at `path`."""
    head, rest = path[0], path[1:]
    value = source[head]
    if rest:
        value = _assign(target.get(head) or {}, source[head], rest)
    return {**target, head: value}


def _differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in {**old, **new}:
            found |= _differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
        return found
    return {} if old == new else {prefix: (old, new)}


def _is_fixed(key: str, config: RunConfig) -> bool:
    section, _, rest = key.partition(".")
    if section == "arch":
        return rest.partition(".")[0] not in config.arch.tunable
    return key == "optim.name" or section in config.fixed
