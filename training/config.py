"""`RunConfig`: all that a user can write, typed and frozen. Free of torch, so that it is fast."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from data import DATASETS, DatasetConfig
from models import ARCHITECTURES
from optim import OPTIMIZERS
from training.errors import ConfigError, nearest


def _one_of(table: dict[str, type[BaseModel]]) -> Any:
    """The union of a table's config classes, told apart by their `name`."""
    classes = tuple(dict.fromkeys(table.values()))
    if len(classes) == 1:
        return classes[0]
    return Annotated[Union[classes], Field(discriminator="name")]  # noqa: UP007 (built at run time)


@dataclass(frozen=True)
class KeysOf:
    """Marks a field of plain values that are keys of one of a table's classes."""

    table: dict[str, type[BaseModel]]


class Section(BaseModel):
    """A frozen group of keys that knows no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EvalConfig(Section):
    """How models are evaluated."""

    batch_size: int | None = Field(None, ge=1, le=2**20, description="null: as in training")
    max_examples: int | None = Field(None, ge=1, le=10**9, description="seeded subset of each")
    num_aug: int | None = Field(
        None, ge=0, le=10**9, description="augmentations that vote (ARC); null: all"
    )
    save_predictions: bool = Field(False, description="write predictions.npz with the report")
    add_votes: tuple[str, ...] = Field(
        (), description="votes.npz of other checkpoints that vote, too (ARC)"
    )


class ThinkConfig(EvalConfig):
    """Test-time compute: what `evaluate.py` can do beyond the evaluation of training."""

    depth: int | None = Field(None, ge=1, le=2**20, description="ACT steps; null: as in training")
    breadth: int = Field(1, ge=1, le=2**16, description="trajectories a puzzle; 1: the plain one")
    noise: float = Field(0.0, ge=0, le=100, description="added to the states after an ACT step")
    random_init: bool = Field(False, description="further trajectories start from random states")
    augment: bool = Field(False, description="further trajectories see a symmetry of the puzzle")
    early_halt: bool = Field(False, description="rows end where the halting head says so")
    confidence: float = Field(0.5, gt=0, lt=1, description="how sure it must be for that")
    agree: int = Field(
        1, ge=1, description="a puzzle wants no more once so many sure trajectories share an answer"
    )
    select: Literal["halt", "convergence", "vote"] = Field(
        "halt", description="the answer: of the surest, the steadiest or the most trajectories"
    )

    @property
    def thinks(self) -> bool:
        """Whether anything differs from the plain evaluation."""
        plain = (None, 1, False)
        return (self.depth, self.breadth, self.early_halt) != plain

    @model_validator(mode="after")
    def _check_breadth(self) -> ThinkConfig:
        varied = self.noise > 0 or self.random_init or self.augment
        if self.breadth > 1 and not varied:
            raise ValueError(
                f"breadth={self.breadth} trajectories would all be the same; set noise, "
                "random_init=true or augment=true"
            )
        if self.confidence != 0.5 and not self.early_halt:
            raise ValueError("confidence needs early_halt=true")
        if self.agree > 1 and not self.early_halt:
            raise ValueError(f"agree={self.agree} needs early_halt=true")
        if self.agree > 1 and self.select != "vote":
            raise ValueError(f"agree={self.agree} needs select=vote, the answer that is shared")
        if self.agree > self.breadth:
            raise ValueError(f"agree={self.agree} is more than breadth={self.breadth} trajectories")
        if self.breadth == 1 and varied:
            raise ValueError("noise, random_init and augment need breadth of 2 or more")
        return self


class WandbConfig(Section):
    """Weights & Biases. `offline` needs no account; metrics.jsonl is always written."""

    mode: Literal["online", "offline", "disabled"] = Field("disabled", description="where to log")
    project: str = Field("loopwright", pattern=r"^[^/\\#?%:]{1,128}$", description="project name")
    entity: str | None = Field(None, description="user or team")
    group: str | None = Field(None, description="group of runs")
    tags: tuple[str, ...] = Field((), description="labels of the run")


Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
_PART = r"[\w.,=+\-]*[\w,=+\-][\w.,=+\-]*"  # not dots alone: `..` is another folder
Name = Annotated[str, Field(pattern=rf"^{_PART}(/{_PART})?$", max_length=200)]
Steps = Annotated[int, Field(le=10**12)]


class RunConfig(Section):
    """One training run."""

    # Keys that decide what the stored state means; a resumed run cannot change them.
    fixed: ClassVar[frozenset[str]] = frozenset({"seed", "global_batch_size", "grad_accum", "ema"})

    arch: _one_of(ARCHITECTURES) = Field(description="architecture")
    optim: _one_of(OPTIMIZERS) = Field(description="optimizer")
    data: _one_of(DATASETS) = Field(description="dataset")

    seed: int = Field(0, ge=0, lt=2**63, description="of weights, data order and exploration")
    global_batch_size: int = Field(768, ge=1, le=2**20, description="rows per step, all ranks")
    grad_accum: int = Field(1, ge=1, le=2**20, description="micro-batches that a step is cut into")
    epochs: Steps = Field(50000, ge=1, description="passes over the original puzzles")
    max_steps: Steps | None = Field(None, ge=1, description="optimizer steps; overrides epochs")

    stop_at: Steps | None = Field(
        None, ge=1, description="end this sitting after that step; the schedule stays max_steps'"
    )

    lr: float = Field(1e-4, ge=0, le=10, description="peak learning rate")
    lr_warmup_steps: Steps = Field(2000, ge=0, description="linear warm-up, in steps")
    lr_min_ratio: float = Field(1.0, ge=0, le=1, description="final / peak learning rate (cosine)")
    puzzle_emb_lr: float = Field(1e-2, ge=0, le=10, description="SignSGD of the puzzle embeddings")
    puzzle_emb_weight_decay: float = Field(0.1, ge=0, description="their decoupled decay")
    grad_clip_norm: float = Field(1.0, ge=0, description="clip the global norm; 0: off")
    ema: bool = Field(True, description="evaluate an exponential moving average of the weights")
    ema_rate: float = Field(0.999, ge=0, lt=1, description="its memory per step")
    freeze_weights: bool = Field(False, description="train the puzzle embeddings only")
    on_nonfinite: Literal["stop", "skip"] = Field("stop", description="at a NaN or Inf gradient")
    grad_reduce: Literal["sum", "mean"] = Field(
        "sum", description="over ranks; the loss is divided by the global batch already"
    )
    comm_timeout: float = Field(
        600.0, ge=1, le=10**6, description="seconds that ranks wait for one another"
    )

    device: Device = Field("auto", description="auto, cpu, mps, cuda or cuda:N")
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto: CUDA")
    num_workers: int = Field(
        0, ge=0, le=256, description="processes that load data; 0: loaded on the device itself"
    )

    kernels: Literal["auto", "off"] = Field(
        "auto", description="fused Triton kernels of the model; auto: CUDA in half precision"
    )
    cuda_graph: Literal["auto", "off"] = Field(
        "auto", description="the step as one CUDA graph; auto: on CUDA"
    )

    log_interval: Steps = Field(10, ge=1, description="steps between log lines")
    eval_interval: Steps | None = Field(None, ge=1, description="steps; null: at the end only")
    checkpoint_interval: Steps | None = Field(None, ge=1, description="null: eval_interval")
    keep_checkpoints: int = Field(2, ge=1, le=10**6, description="newest, beside the best")
    eval: EvalConfig = EvalConfig()
    wandb: WandbConfig = WandbConfig()

    run_name: Name | None = Field(None, description="folder below runs_dir; null: made up")
    runs_dir: str = Field("runs", min_length=1, description="where run folders go")
    datasets_dir: str = Field("datasets", min_length=1, description="where built data go")
    load_checkpoint: str | None = Field(
        None, min_length=1, description="run folder, checkpoint, file, hf:OWNER/NAME, or latest"
    )
    resume: Literal["off", "auto"] = Field(
        "off", description="auto: go on with the newest checkpoint of run_name, if there is one"
    )


class CheckpointKeys(Section):
    """The keys that say where a checkpoint is: its configuration comes before all other keys."""

    load_checkpoint: str | None = Field(None, min_length=1)
    resume: Literal["off", "auto"] = "off"
    run_name: Name | None = None
    runs_dir: str = Field("runs", min_length=1)


class EvaluateConfig(Section):
    """One evaluation of a checkpoint."""

    checkpoint: str | None = Field(
        None, min_length=1, description="run folder, checkpoint, converted file, hf:…, or latest"
    )
    arch: Annotated[dict[str, Any] | None, KeysOf(ARCHITECTURES)] = Field(
        None, description="keys on top of the checkpoint's, such as arch.halt_max_steps"
    )
    data: Annotated[dict[str, Any] | None, KeysOf(DATASETS)] = Field(
        None, description="test data: a preset, or keys on top of the checkpoint's; null: its own"
    )
    weights: Literal["ema", "model"] = Field("ema", description="which weights")
    which: Literal["newest", "best"] = Field("newest", description="checkpoint of a run folder")
    device: Device = Field("auto", description="auto, cpu, mps, cuda or cuda:N")
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto: CUDA")
    kernels: Literal["auto", "off"] = Field("auto", description="fused kernels; as in training")
    cuda_graph: Literal["auto", "off"] = Field(
        "auto", description="ACT steps as a CUDA graph; auto: on CUDA"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the subset of max_examples")
    eval: ThinkConfig = ThinkConfig()
    runs_dir: str = Field("runs", min_length=1, description="where `latest` is looked for")
    datasets_dir: str = Field("datasets", min_length=1, description="where built data go")
    output_dir: str | None = Field(None, min_length=1, description="null: in the run folder")


_NAMES = {"arch.name", "optim.name", "data.name"}  # these come with a preset


def validate(schema: type[Section], values: dict[str, Any]) -> Any:
    """Build `schema` from plain values, strictly; ConfigError names the first wrong key."""
    try:
        return schema.model_validate(_tuples(values), strict=True)
    except ValidationError as error:
        raise ConfigError(_sentence(schema, error)) from None


def _tuples(value: Any) -> Any:
    """YAML and JSON lists as tuples, which is what a frozen configuration holds."""
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _sentence(schema: type[Section], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    tables = {"arch": ARCHITECTURES, "optim": OPTIMIZERS, "data": DATASETS}
    path = [str(part) for part in first["loc"]]
    keys = known_keys(schema) - _NAMES
    if len(path) > 1 and path[0] in tables and path[1] in tables[path[0]]:
        keys = known_keys(tables[path[0]][path[1]], f"{path[0]}.") - _NAMES
        del path[1]  # the union's tag
    path = [p for p in path if not p.startswith(("tuple[", "list[", "literal[", "function-"))]
    if len(path) > 1 and path[-1] in ("int", "str", "float"):
        del path[-1]  # a member of a union
    key, given, kind = ".".join(path) or "the configuration", first.get("input"), first["type"]
    if kind == "extra_forbidden":
        return f"there is no key {key}{nearest(key, keys - {key})}"
    if kind == "missing":
        return f"{key} is missing; give it a value"
    if kind.startswith("union_tag"):
        name = given.get("name") if isinstance(given, dict) else given
        return f"{key}.name={name} is unknown{nearest(str(name), tables.get(key, ()))}"
    message = first["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return message if message.startswith(path[0] + ".") else f"{key}: {message}"
    if kind == "model_type":
        inside = min(k for k in known_keys(schema) if k.startswith(f"{key}."))
        return f"{key}={json.dumps(given)} is not valid: it is a group of keys, such as {inside}"
    if kind == "tuple_type":
        message = "should be a list, such as [A,B]"
    if kind == "string_pattern_mismatch" and key == "device":
        message = "should be auto, cpu, mps, cuda or cuda:N"
    elif kind == "string_pattern_mismatch" and key == "wandb.project":
        message = "should be 1 to 128 characters without any of / \\ # ? % :"
    elif kind == "string_pattern_mismatch":
        message = "should be letters, digits and .,=+-_ with at most one /, not dots alone"
    return f"{key}={json.dumps(given)} is not valid: {message[0].lower()}{message[1:]}"


def known_keys(schema: type[BaseModel], prefix: str = "") -> set[str]:
    """Every dotted key of `schema` and its sections."""
    keys = set()
    for name, field in schema.model_fields.items():
        keys.add(prefix + name)
        for section in sections(field):
            keys |= known_keys(section, f"{prefix}{name}.")
    return keys


def sections(field: FieldInfo) -> list[type[BaseModel]]:
    """The config classes that a field can hold."""
    marked = [c for m in field.metadata if isinstance(m, KeysOf) for c in m.table.values()]
    return marked or _models_in(field.annotation)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [c for part in getattr(annotation, "__args__", ()) for c in _models_in(part)]


class _DataOnly(Section):
    data: _one_of(DATASETS)


def validate_data(values: dict[str, Any]) -> DatasetConfig:
    """A dataset's configuration from plain values; ConfigError names the first wrong key."""
    return validate(_DataOnly, {"data": values}).data
