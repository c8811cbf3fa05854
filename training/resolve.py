"""From what the user wrote to what will run: checks that need no torch, dataset, steps, folder."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import DATASETS, DatasetInfo, dataset_info
from models import ARCHITECTURES, ModelDims, ReasoningConfig
from optim import OPTIMIZERS, OptimizerConfig
from training.config import CheckpointKeys, RunConfig, validate
from training.errors import ConfigError
from training.resume import Resume, WarmStart, find_start, merge
from training.run_folder import discard, new_run_dir, reopen_run_dir


@dataclass(frozen=True)
class World:
    """This process among those of the run, as torchrun's environment tells."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> World:
        """Read RANK, WORLD_SIZE and LOCAL_RANK; ConfigError where they make no sense."""
        values = {}
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
            text = os.environ.get(name, str(default))
            if not (text.isascii() and text.isdigit()):
                raise ConfigError(f"the environment variable {name}={text} should be a number")
            values[name] = int(text)
        if values["WORLD_SIZE"] < 1 or values["RANK"] >= values["WORLD_SIZE"]:
            raise ConfigError(
                f"the environment variables RANK={values['RANK']} and "
                f"WORLD_SIZE={values['WORLD_SIZE']} contradict each other"
            )
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if values["WORLD_SIZE"] > 1 and not os.environ.get(name):
                raise ConfigError(
                    f"the environment says WORLD_SIZE={values['WORLD_SIZE']} but not {name}; start "
                    "several ranks with torchrun --nproc-per-node N pretrain.py …"
                )
        return cls(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"])


@dataclass(frozen=True)
class ResolvedRun:
    """A `RunConfig` completed by the dataset and the checkpoint; nothing left to decide."""

    config: RunConfig
    dims: ModelDims
    dataset_path: Path
    info: DatasetInfo
    total_steps: int
    world: World
    run_dir: Path
    run_id: str
    resume: Resume | WarmStart | None

    @property
    def checkpoint_interval(self) -> int:
        """Steps between checkpoints: as configured, or the evaluation's, or a tenth of the run."""
        config = self.config
        return config.checkpoint_interval or config.eval_interval or -(-self.total_steps // 10)


def check_device(device: str) -> None:
    """Raise ConfigError for a device that this machine plainly lacks, without importing torch."""
    if device == "mps" and (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        raise ConfigError("device=mps needs a Mac with Apple silicon; use device=auto or cpu")
    if not device.startswith("cuda"):
        return
    count = _cuda_devices()
    if count == 0:
        raise ConfigError(f"device={device}: no CUDA device is visible; use device=auto or cpu")
    index = int(device.partition(":")[2] or 0)
    if count is not None and index >= count:
        raise ConfigError(
            f"device={device}: only {count} CUDA devices are visible, cuda:0 to cuda:{count - 1}"
        )


def _cuda_devices() -> int | None:
    """Number of CUDA devices by the driver's own count; None where it cannot tell (ROCm)."""
    if Path("/dev/kfd").exists():
        return None
    name = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def check(config: RunConfig, world: World) -> None:
    """Checks across keys that a single field cannot make."""
    rows = config.global_batch_size
    if rows % world.size:
        raise ConfigError(
            f"global_batch_size={rows} is not divisible by the {world.size} ranks; "
            f"use {rows // world.size * world.size or world.size}"
        )
    if rows // world.size % config.grad_accum:
        raise ConfigError(
            f"grad_accum={config.grad_accum} does not divide the {rows // world.size} rows "
            "per rank of global_batch_size"
        )
    if rows // world.size // config.grad_accum % config.arch.chains:
        raise ConfigError(
            f"arch.chains={config.arch.chains} does not divide the "
            f"{rows // world.size // config.grad_accum} rows of a micro-batch, of global_batch_size"
        )
    if config.freeze_weights and config.arch.prefix_len == 0:
        raise ConfigError(
            "freeze_weights=true leaves nothing to train without puzzle embeddings; "
            "set arch.puzzle_emb_ndim and arch.puzzle_emb_len above 0"
        )
    if world.size > 1 and config.device.startswith(("mps", "cuda:")):
        raise ConfigError(
            f"device={config.device} is one device, and there are {world.size} ranks; use "
            "device=cuda (one GPU per rank), cpu or auto"
        )
    if config.device == "mps" and config.arch.forward_dtype == "float64":
        raise ConfigError("arch.forward_dtype=float64 does not exist on device=mps; use float32")
    check_device(config.device)
    check_hardware(config.device, config.arch, config.optim)
    check_causal(config, config.data.causal)
    if config.eval.add_votes:
        raise ConfigError("eval.add_votes is for evaluate.py: in training checkpoints vote alone")
    config.arch.check_machine()
    config.data.check()
    planned = config.data.planned_examples()
    if planned is not None:
        count_steps(config, planned)


def check_hardware(
    device: str, arch: ReasoningConfig, optim: OptimizerConfig | None = None
) -> None:
    """Raise ConfigError for what only a CUDA device can do, where there plainly is none."""
    if device.startswith("cuda") or (device == "auto" and _cuda_devices() != 0):
        return
    for key, wanted in (
        ("arch.fp8=true", arch.fp8),
        ("optim.fused=on", optim is not None and optim.fused == "on"),
        (
            f"arch.attention_backend={arch.attention_backend}",
            arch.has_attention and arch.attention_backend in ("fa2", "fa3"),
        ),
    ):
        if wanted:
            raise ConfigError(f"{key} needs a CUDA device, and device={device} is none here")


def check_causal(config: RunConfig, causal: bool) -> None:
    """Raise ConfigError where the model could see the labels among its inputs."""
    if causal and not config.arch.causal:
        raise ConfigError(
            f"arch.causal=false: the labels of data={config.data.name} are the tokens to come, "
            "which the model must not see; set arch.causal=true"
        )


def count_steps(config: RunConfig, num_examples: int) -> int:
    """Optimizer steps of the whole run over so many training examples."""
    if num_examples == 0:
        raise ConfigError(
            "the dataset has a test split only; give training puzzles, such as data.train_csv"
        )
    if config.max_steps is not None:
        return config.max_steps
    rows = config.epochs * num_examples
    if rows < config.global_batch_size:
        raise ConfigError(
            f"epochs={config.epochs} of {num_examples} puzzles are fewer rows than one "
            f"step of global_batch_size={config.global_batch_size}; raise epochs or lower the batch"
        )
    return rows // config.global_batch_size


def dims_of(info: DatasetInfo) -> ModelDims:
    """The dataset's part of a model's shape."""
    return ModelDims(info.seq_len, info.vocab_size, info.num_puzzle_ids)


def fitting(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`values` without an experiment's keys for another architecture, optimizer or dataset.

    `experiment=quickstart arch=transformer` is possible, though one sets cycles and the other has
    none. What the user wrote stays, to be refused.
    """
    given = {text.lstrip("+").partition("=")[0] for text in overrides}
    fitted = dict(values)
    for group, table in (("arch", ARCHITECTURES), ("optim", OPTIMIZERS), ("data", DATASETS)):
        section = values.get(group)
        own = table.get(section.get("name")) if isinstance(section, dict) else None
        if own is not None:
            others = {key for c in table.values() for key in c.model_fields} - {*own.model_fields}
            fitted[group] = {
                k: v for k, v in section.items() if k not in others or f"{group}.{k}" in given
            }
    return fitted


def check_job(
    values: dict[str, Any], overrides: list[str]
) -> tuple[RunConfig, World, Resume | WarmStart | None]:
    """Every check that needs neither torch nor the dataset; writes nothing."""
    world = World.from_environment()
    keys = {k: values[k] for k in CheckpointKeys.model_fields if k in values}
    found = find_start(validate(CheckpointKeys, keys))
    values = fitting(values, overrides)
    if isinstance(found, Resume):
        found, values = merge(found, values, overrides)
    config = validate(RunConfig, values)
    check(config, world)
    if isinstance(found, Resume):
        found.check_data(config.data)
        if config.max_steps is not None:
            found.check_steps(config.max_steps)
    return config, world, found


def resolve(values: dict[str, Any], overrides: list[str]) -> ResolvedRun:
    """Check everything, find the checkpoint, build the dataset if missing, open the run folder.

    `values` is the composed configuration, `overrides` what the user wrote on the command line.
    Raises ConfigError or DataError with one sentence; a new run folder is gone again then.
    """
    config, world, found = check_job(values, overrides)
    if isinstance(found, Resume):
        run_dir, run_id = reopen_run_dir(config, found)
    else:
        run_dir, run_id = new_run_dir(config)
    try:
        dataset_path = config.data.prepare(Path(config.datasets_dir))
        info = dataset_info(dataset_path)
        check_causal(config, info.causal)
        total_steps = count_steps(config, info.num_train_examples)
        if isinstance(found, Resume):
            found.check_dataset(info)
            found.check_steps(total_steps)
    except BaseException:
        discard(run_dir, config)
        raise
    return ResolvedRun(
        config, dims_of(info), dataset_path, info, total_steps, world, run_dir, run_id, found
    )


def command(*arguments: str) -> str:
    """A command line that the user can copy."""
    return " ".join(("python", Path(sys.argv[0]).name, *arguments))
