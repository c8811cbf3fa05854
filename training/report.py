"""Evaluating a checkpoint from the command line: metrics per set, as a table and as JSON."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import DatasetConfig, DatasetInfo, dataset_info
from models import ModelDims, published
from models.files import HUB
from training import checkpoint
from training.config import EvaluateConfig, RunConfig, validate, validate_data
from training.errors import ConfigError
from training.resolve import World, check_device, check_hardware
from training.resume import Resume, WarmStart, find_checkpoint, saved_config

if TYPE_CHECKING:
    from data import PuzzleDataset
    from models import ACT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedEvaluation:
    """A checkpoint, the run it comes from, and the data to evaluate it on."""

    config: EvaluateConfig
    trained: RunConfig
    checkpoint: Resume | WarmStart
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
    is_published = published.is_published(found.path)
    if isinstance(found, Resume):
        if found.path.is_file():
            raise ConfigError(
                f"{found.path} is a packed state, to go on with: pretrain.py load_checkpoint=…"
            )
        found = _best(found) if config.which == "best" else found
        trained, dims = _of_checkpoint(config, found)
    elif is_published:
        trained, dims = _of_published(config, found)
    else:
        trained, dims = _of_file(config, found)
    check_device(config.device)
    check_hardware(config.device, trained.arch)
    there = found.run_dir if isinstance(found, Resume) else found.path.parent
    if config.checkpoint.startswith(HUB) or is_published:
        there = Path()  # not among the downloads
    output_dir = Path(config.output_dir) if config.output_dir else there
    if config.eval.thinks and World.from_environment().size > 1:
        raise ConfigError("eval.depth, breadth and early_halt work in a single process for now")
    _require_writable(output_dir)
    data = _test_data(config, trained)
    data.check()
    _check_votes(config.eval.add_votes, data.may_have_votes)
    if planned := data.planned_tokens():
        _check_tokens(f"data={data.label()}", planned, found, dims)
    dataset_path = data.prepare(Path(config.datasets_dir))
    info = dataset_info(dataset_path)
    if not dims.seq_len:  # a file of an ancestor does not tell
        dims = replace(dims, seq_len=info.seq_len)
    _check_tokens(str(dataset_path), (info.seq_len, info.vocab_size), found, dims)
    _check_votes(config.eval.add_votes, (info.task or {}).get("name") == "arc")
    if trained.arch.prefix_len and info.num_puzzle_ids > dims.num_puzzle_ids:
        raise ConfigError(
            f"{dataset_path} has {info.num_puzzle_ids} puzzle identifiers, but {found.path} has "
            f"embeddings of {dims.num_puzzle_ids}"
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={output_dir} cannot be created: {error.strerror}") from None
    return ResolvedEvaluation(
        config, trained, found, dims, dataset_path, info, output_dir, World.from_environment()
    )


def _check_tokens(
    source: str, here: tuple[int, int], found: Resume | WarmStart, dims: ModelDims
) -> None:
    """Raise ConfigError unless tokens and vocabulary of the data are those of the model."""
    there = (dims.seq_len or here[0], dims.vocab_size)  # a file of an ancestor tells no length
    if here != there:
        raise ConfigError(
            f"{source} does not fit {found.path}: it has {here[0]} tokens of a vocabulary of "
            f"{here[1]}, the model {there[0]} of {there[1]}"
        )


def _check_votes(files: tuple[str, ...], possible: bool) -> None:
    """Raise ConfigError if votes are to be added where there are none."""
    for file in files:
        if not possible:
            raise ConfigError(f"eval.add_votes={file}: only ARC has votes; leave it out")
        if not Path(file).is_file():
            raise ConfigError(f"eval.add_votes={file} does not exist; give a votes.npz")


def _require_writable(output_dir: Path) -> None:
    """Raise ConfigError unless reports can be written there; creates nothing."""
    there = next(p for p in (output_dir, *output_dir.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        state = "is not writable" if there.is_dir() else "is a file"
        raise ConfigError(f"output_dir={output_dir}: {there} {state}; choose a writable folder")


def _of_checkpoint(config: EvaluateConfig, found: Resume) -> tuple[RunConfig, ModelDims]:
    """How the checkpoint was trained, with the given keys of `arch` on top."""
    if config.weights == "ema" and "ema.safetensors" not in found.index["files"]:
        raise ConfigError(f"{found.path} has no EMA weights; use weights=model")
    return _trained(config, found.path, found.index), ModelDims(**found.index["dims"])


def _of_published(config: EvaluateConfig, found: WarmStart) -> tuple[RunConfig, ModelDims]:
    """The same of published weights, which say all that a checkpoint's index does."""
    from models import ModelError

    try:
        index = published.read_index(found.path)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    return _trained(config, found.path, index), ModelDims(**index["dims"])


def _trained(config: EvaluateConfig, path: Path, index: dict[str, Any]) -> RunConfig:
    """The run that the weights in `path` are from, with the given keys of `arch` on top."""
    saved, given = index["config"], config.arch or {}
    if "name" in given:
        raise ConfigError(
            f"arch={given['name']} is not possible: {path} says what its model is; give "
            "single keys, such as arch.halt_max_steps"
        )
    arch = saved_config(saved, path).arch.portable().model_dump(mode="json")
    trained: RunConfig = validate(RunConfig, {**saved, "arch": {**arch, **given}})
    trained.arch.check_machine()
    if fixed := sorted(given.keys() - trained.arch.tunable - {"forward_dtype"}):
        raise ConfigError(f"arch.{fixed[0]} cannot differ from what {path} was trained with")
    return trained


def _of_file(config: EvaluateConfig, found: WarmStart) -> tuple[RunConfig, ModelDims]:
    """What a file of weights tells of its model, with the given keys of `arch` below that."""
    from models import ModelError, files
    from models.pretrained import describe_file, make_config

    given = dict(config.arch or {})
    try:
        if files.metadata(found.path) is None and not files.read_file(found.path).reference:
            raise ConfigError(
                f"checkpoint={found.path} is a bare file of weights, which does not say what model "
                "it belongs to; give a run folder or a folder checkpoints/step_N"
            )
        name, fields, dims, _ = describe_file(found.path, config.weights)
        if given.pop("name", name) != name:
            raise ConfigError(f"{found.path} belongs to arch={name}; leave out the other")
        arch = make_config(name, {**given, **fields}, found.path)
        if silent := sorted(k for k in given if fields.get(k, given[k]) != given[k]):
            shown = fields[silent[0]]
            raise ConfigError(f"arch.{silent[0]}: {found.path} has {shown}, which cannot change")
    except ModelError as error:
        raise ConfigError(str(error)) from None
    if "name" not in (config.data or {}):
        raise ConfigError(f"data is missing: {found.path} does not name any; give data=PRESET")
    logger.info("%s is a %s: %s", found.path, name, arch.model_dump(mode="json"))
    values = {"arch": arch.model_dump(mode="json"), "data": config.data}
    return validate(RunConfig, {**values, "optim": {"name": "adam_atan2"}}), dims


def _test_data(config: EvaluateConfig, trained: RunConfig) -> DatasetConfig:
    """The checkpoint's dataset; or the one given; or the former with the given keys on top."""
    values = config.data or {}
    if "name" in values:
        return validate_data(values).test_only()
    data = validate_data({**trained.data.model_dump(mode="json"), **values})
    return data.test_only() if values else data


def _best(found: Resume) -> Resume:
    best = checkpoint.best(found.run_dir)
    if best is None:
        raise ConfigError(f"which=best: {found.run_dir} was not evaluated yet; use which=newest")
    path = found.path.parent / checkpoint.name(best["step"])
    return Resume(path, checkpoint.read_index(path))


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model on its device, and what evaluating it takes."""

    act: ACT
    dataset: PuzzleDataset
    step: int | None
    how: dict[str, Any]  # batch_size, seed, device, steps: arguments of evaluations


def load(job: ResolvedEvaluation) -> Loaded:
    """Build the model and load its weights."""
    from data import read_dataset
    from models import ACT, build_model, kernels
    from models.pretrained import load_tensors, load_weights
    from training.act_steps import ACTSteps
    from training.device import (
        choose_device,
        compile_model,
        device_name,
        set_determinism,
        wants_compile,
    )

    config, found = job.config, job.checkpoint
    device = choose_device(config.device, job.world.local_rank)
    set_determinism(device)
    model = build_model(job.trained.arch, job.dims, seed=0, device=device)
    load_weights(model, load_tensors(found.path, config.weights)[3], found.path)
    if config.kernels == "off":
        kernels.switch_off()
    if wants_compile(config.compile, device):
        compile_model(model, config.compile, job.batch_size)
    step = found.index["step"] if isinstance(found, Resume) else None
    if published.is_published(found.path):
        step = published.read_index(found.path)["step"]
    logger.info("checkpoint %s: step %s, %s weights", found.path,
                "unknown" if step is None else step, config.weights.upper())  # fmt: skip
    logger.info("device %s", device_name(device))
    act = ACT(model)
    graphed = config.cuda_graph == "auto" and job.world.size == 1
    steps = ACTSteps(act, device, graphed=graphed)
    how = {"batch_size": job.batch_size, "seed": config.seed, "device": device, "steps": steps}
    return Loaded(act, read_dataset(job.dataset_path, "test"), step, how)


def run_evaluation(job: ResolvedEvaluation) -> dict[str, Any]:
    """Build the model, load its weights, evaluate, write the report; returns it."""
    from training.device import memory_advice
    from training.evaluation import evaluate, table
    from training.ranks import joined
    from training.thinking import think_harder

    if job.world.rank > 0:  # the first rank speaks for all
        logging.getLogger().setLevel(logging.WARNING)
    config, found = job.config, job.checkpoint
    with memory_advice(job.trained):
        loaded = load(job)
        parts = loaded.act, loaded.dataset, config.eval
        options = {**loaded.how, "output_dir": job.output_dir}
        began = time.perf_counter()
        if config.eval.thinks:
            found_out = think_harder(*parts, **options)
            text = _thinking_table(found_out)
        else:
            with joined(job.world) as ranks:
                reports = evaluate(*parts, ranks=ranks, **options)
            found_out = {name: r.values() for name, r in reports.items()}
            text = table(reports)
    seconds = time.perf_counter() - began
    report = {
        "checkpoint": str(found.path),
        "step": loaded.step,
        "weights": config.weights,
        "dataset": str(job.dataset_path),
        "eval": config.eval.model_dump(mode="json"),
        "seconds": round(seconds, 3),
        "sets": found_out,
    }
    if job.world.rank > 0:
        return report
    kind = "thinking" if config.eval.thinks else "evaluation"
    path = job.output_dir / f"{kind}-{found.path.name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    logger.info("%s", text)
    logger.info("in %.3g s, written to %s", seconds, path)
    return report


def _thinking_table(found: dict[str, dict[str, float]]) -> str:
    return "\n".join(
        f"{name}: exact {r['exact_accuracy']:.2%} of {r['count']} (plain "
        f"{r['plain_exact_accuracy']:.2%}), {r['ACT_steps']:.1f} ACT steps and "
        f"{r['seconds_per_puzzle'] * 1e3:.3g} ms a puzzle"
        for name, r in found.items()
    )
