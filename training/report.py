"""Evaluating a checkpoint from the command line: metrics per set, as a table and as JSON."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import DatasetConfig, DatasetInfo, dataset_info
from models import ModelDims
from training import checkpoint
from training.config import EvaluateConfig, RunConfig, validate, validate_data
from training.errors import ConfigError
from training.resolve import World, check_device
from training.resume import Resume, find_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedEvaluation:
    """A checkpoint, the run it comes from, and the data to evaluate it on."""

    config: EvaluateConfig
    trained: RunConfig
    checkpoint: Resume
    dims: ModelDims
    dataset_path: Path
    info: DatasetInfo
    output_dir: Path
    world: World

    @property
    def batch_size(self) -> int:
        """Rows per batch: as configured, or as in training."""
        return (
            self.config.eval.batch_size
            or self.trained.eval.batch_size
            or self.trained.global_batch_size
        )


def resolve_evaluation(values: dict[str, Any]) -> ResolvedEvaluation:
    """Check everything without torch; ConfigError or DataError with one sentence."""
    config: EvaluateConfig = validate(EvaluateConfig, values)
    if config.checkpoint is None:
        raise ConfigError("checkpoint is missing; give checkpoint=runs/NAME, or checkpoint=latest")
    found = find_checkpoint(config.checkpoint, Path(config.runs_dir))
    if not isinstance(found, Resume):
        raise ConfigError(
            f"checkpoint={config.checkpoint} is a bare file of weights, which does not say what "
            "model it belongs to; give a run folder or a folder checkpoints/step_N"
        )
    if config.which == "best":
        found = _best(found)
    trained: RunConfig = validate(RunConfig, found.index["config"])
    if config.weights == "ema" and "ema.safetensors" not in found.index["files"]:
        raise ConfigError(f"{found.path} has no EMA weights; use weights=model")
    check_device(config.device)
    output_dir = Path(config.output_dir) if config.output_dir else found.run_dir
    _require_writable(output_dir)
    data = _test_data(config, found)
    data.check()
    dataset_path = data.prepare(Path(config.datasets_dir))
    info = dataset_info(dataset_path)
    dims = ModelDims(**found.index["dims"])
    if (info.seq_len, info.vocab_size) != (dims.seq_len, dims.vocab_size):
        raise ConfigError(
            f"{dataset_path} does not fit {found.path}: it has {info.seq_len} tokens of a "
            f"vocabulary of {info.vocab_size}, the model {dims.seq_len} of {dims.vocab_size}"
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={output_dir} cannot be created: {error.strerror}") from None
    return ResolvedEvaluation(
        config, trained, found, dims, dataset_path, info, output_dir, World.from_environment()
    )


def _require_writable(output_dir: Path) -> None:
    """Raise ConfigError unless reports can be written there; creates nothing."""
    there = next(p for p in (output_dir, *output_dir.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        state = "is not writable" if there.is_dir() else "is a file"
        raise ConfigError(f"output_dir={output_dir}: {there} {state}; choose a writable folder")


def _test_data(config: EvaluateConfig, found: Resume) -> DatasetConfig:
    """The checkpoint's dataset; or the one given; or the former with the given keys on top."""
    values = config.data or {}
    if "name" in values:
        return validate_data(values).test_only()
    data = validate_data({**found.index["config"]["data"], **values})
    return data.test_only() if values else data


def _best(found: Resume) -> Resume:
    best = checkpoint.best(found.run_dir)
    if best is None:
        raise ConfigError(f"which=best: {found.run_dir} was not evaluated yet; use which=newest")
    path = found.path.parent / checkpoint.name(best["step"])
    return Resume(path, checkpoint.read_index(path))


def run_evaluation(job: ResolvedEvaluation) -> dict[str, Any]:
    """Build the model, load its weights, evaluate, write the report; returns it."""
    from data import read_dataset
    from models import ACT, build_model
    from training.device import (
        choose_device,
        configure_compiler,
        device_name,
        memory_advice,
        set_determinism,
        wants_compile,
    )
    from training.evaluation import evaluate, table
    from training.ranks import joined

    config, found = job.config, job.checkpoint
    device = choose_device(config.device, job.world.local_rank)
    set_determinism(device)
    with memory_advice(job.trained):
        model = build_model(job.trained.arch, job.dims, seed=0, device=device)
        tensors = checkpoint.read_tensors(found.path, "model")
        if config.weights == "ema":
            tensors |= checkpoint.read_tensors(found.path, "ema")
        model.load_state_dict(tensors)
        if wants_compile(config.compile, device):
            configure_compiler()
            model.compile_levels()
        logger.info("checkpoint %s: step %d, %s weights", found.path, found.index["step"],
                    config.weights.upper())  # fmt: skip
        logger.info("device %s", device_name(device))
        with joined(job.world) as ranks:
            reports = evaluate(
                ACT(model),
                read_dataset(job.dataset_path, "test"),
                config.eval,
                batch_size=job.batch_size,
                seed=config.seed,
                device=device,
                output_dir=job.output_dir,
                ranks=ranks,
            )
    report = {
        "checkpoint": str(found.path),
        "step": found.index["step"],
        "weights": config.weights,
        "dataset": str(job.dataset_path),
        "sets": {name: r.values() for name, r in reports.items()},
    }
    if job.world.rank > 0:
        return report
    path = job.output_dir / f"evaluation-{found.path.name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    logger.info("%s", table(reports))
    logger.info("written to %s", path)
    return report
