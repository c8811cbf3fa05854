"""Run folders: `runs/NAME/`, which explains itself."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from training.config import RunConfig
from training.errors import ConfigError

if TYPE_CHECKING:
    from training.resume import Resume

_LOCK = ".lock"
_PACKAGES = ("torch", "triton", "numpy", "hydra-core", "pydantic", "safetensors", "wandb")
_README = """# {name}

A training run of Loopwright, started with

    {command}

| file | what |
|---|---|
| config.yaml | every setting of the run |
| environment.json | code version, packages, machine |
| metrics.jsonl | one line per log interval and evaluation |
| log.txt | what was said on the way |
| curves.png | losses and accuracies over the steps |
| summary.json | the result, once there is one |
| checkpoints/ | whole training states: the newest ones and the best |

    python evaluate.py checkpoint={run_dir}          evaluate it
    python pretrain.py load_checkpoint={run_dir}     continue it exactly where it stopped
"""


def new_run_dir(config: RunConfig) -> tuple[Path, str]:
    """Choose and create a new run folder; returns it and the run's id.

    With resume=auto and after a restart, a folder in which the run ended before its first
    checkpoint is taken over.
    """
    run_id = secrets.token_hex(4)
    runs_dir = Path(config.runs_dir)
    if config.run_name is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run_dir = runs_dir / f"{config.data.name}-{config.arch.name}-{stamp}-{run_id}"
    else:
        run_dir = runs_dir / config.run_name
        again = config.resume == "auto" or run_before_restart(runs_dir) == run_dir
        begun = again and (run_dir / "checkpoints").is_dir()
        if run_dir.exists() and not begun and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise ConfigError(
                f"run_name={config.run_name}: {run_dir} exists already; choose another name, or "
                f"continue it with load_checkpoint={run_dir}"
            )
    if run_dir.parent != runs_dir and (run_dir.parent / "config.yaml").exists():
        raise ConfigError(
            f"run_name={config.run_name}: {run_dir.parent} is the folder of a run already; choose "
            "another name"
        )
    _create(run_dir)
    return run_dir, run_id


def reopen_run_dir(config: RunConfig, resume: Resume) -> tuple[Path, str]:
    """The resumed run's folder; a new one for another run_name, or a checkpoint outside of runs."""
    renamed = config.run_name not in (None, resume.index["config"]["run_name"])
    if renamed or not resume.in_run_folder:
        return new_run_dir(config)
    run_dir, here = resume.run_dir, Path.cwd()
    if run_dir.is_relative_to(here):
        run_dir = run_dir.relative_to(here)
    return run_dir, resume.index["run_id"]


def _create(run_dir: Path) -> None:
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the run folder {run_dir} cannot be created: {error.strerror}; "
            "set runs_dir to a writable folder"
        ) from None


def discard(run_dir: Path, config: RunConfig) -> None:
    """Remove a run folder in which no run has begun, and the folders above that held only it."""
    if any((run_dir / "checkpoints").iterdir()) or (run_dir / "metrics.jsonl").exists():
        return
    shutil.rmtree(run_dir, ignore_errors=True)
    for parent in run_dir.parents:
        if not parent.is_relative_to(config.runs_dir):
            return
        try:
            parent.rmdir()
        except OSError:  # not empty
            return


def describe(run_dir: Path, config: RunConfig) -> None:
    """Write README.md, config.yaml and environment.json."""
    values = config.model_dump(mode="json")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    text = _README.format(name=run_dir.name, command=command, run_dir=run_dir)
    (run_dir / "README.md").write_text(text)
    (run_dir / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


@functools.cache
def environment() -> dict[str, Any]:
    """Code version, packages and machine, as they were when first asked for."""
    packages = {}
    for package in _PACKAGES:
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = None
    return {
        "code": code_version(),
        "python": platform.python_version(),
        "packages": packages,
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
    }


def code_version() -> str:
    """The commit of the code, with `-dirty` where files were changed.

    Outside git what the environment variable LOOPWRIGHT_COMMIT says, else `unknown`.
    """
    root = Path(__file__).parent.parent
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root, capture_output=True, text=True, timeout=5, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("LOOPWRIGHT_COMMIT", "unknown")


def is_locked(run_dir: Path) -> bool:
    """Whether a process trains in the folder."""
    try:
        import fcntl

        with (run_dir / _LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        pass
    return False


def is_restart() -> bool:
    """Whether torchrun has started the processes of this run once more."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def run_before_restart(runs_dir: Path) -> Path | None:
    """The folder of the run that this torchrun trained before it restarted its processes."""
    if not is_restart():
        return None
    found = [*runs_dir.glob(f"*/{_LOCK}"), *runs_dir.glob(f"*/*/{_LOCK}")]
    mine = [path for path in found if path.read_text() == _agent()]
    return max(mine, key=lambda path: path.stat().st_mtime_ns).parent if mine else None


def _agent() -> str:
    """A name for the torchrun that started this process; it outlives restarts."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return "" if run is None else f"torchrun {run} {platform.node()} {os.getppid()}\n"


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write summary.json."""
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for this process; ConfigError if another one trains in it."""
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks of this kind
        yield
        return
    with (run_dir / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process is training in {run_dir}; wait for it") from None
        file.truncate(0)
        file.write(_agent())
        file.flush()
        yield
