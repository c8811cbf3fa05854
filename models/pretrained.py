"""Trained models for use outside of training: puzzles in, answers out, on any device.

from models import load_pretrained
solver = load_pretrained("runs/NAME")
answer = solver(puzzle)  # tokens as in the dataset: (L,), (rows, columns) or a batch of either
answer.tokens, answer.steps, answer.confidence
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from models import ARCHITECTURES, files, published
from models.act import ACT
from models.build import build_model
from models.config import ModelDims, ReasoningConfig
from models.errors import ModelError
from models.legacy import describe
from models.reasoning import ReasoningModel


@dataclass(frozen=True)
class Answer:
    """What a model answers. B stands for the dimensions of the batch: none for a single puzzle."""

    tokens: Tensor  # shaped as the puzzle, int64
    steps: Tensor  # (B) int64, ACT steps after which the model would halt
    confidence: Tensor  # (B) in [0, 1], that the answer is right, as the halting head sees it


class Solver:
    """A model in evaluation, with its tensors on one device."""

    def __init__(self, model: ReasoningModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.act = ACT(model).eval()
        self.device = model.lm_head.weight.device

    @torch.no_grad()
    def __call__(
        self,
        puzzle: Any,
        puzzle_ids: Any = 0,
        *,
        max_steps: int | None = None,
        stop_early: bool = False,
        batch_size: int = 512,
    ) -> Answer:
        """Solve one puzzle or a batch.

        Args:
            puzzle: integers of any shape whose last dimensions hold the L tokens of a puzzle: a
                tensor, a NumPy array or nested lists.
            puzzle_ids: row of the puzzle embedding, one for all or one per puzzle.
            max_steps: ACT steps; None: as many as in training. More can help hard puzzles.
            stop_early: answer with what each puzzle had when the model would halt, not with the
                last step's answer as evaluation does; ends when all have halted.
            batch_size: puzzles at a time.

        Raises:
            ModelError: tokens or ids that the model does not know, or another number of them.
        """
        tokens, dims = torch.as_tensor(puzzle), self.model.dims
        leading = _check(tokens, dims)
        rows = tokens.reshape(-1, dims.seq_len)
        ids = torch.as_tensor(puzzle_ids).reshape(-1).expand(len(rows))
        if int(ids.min()) < 0 or int(ids.max()) >= dims.num_puzzle_ids:
            raise ModelError(f"puzzle_ids should be 0 to {dims.num_puzzle_ids - 1}")
        limit = self.model.config.halt_max_steps if max_steps is None else max_steps
        if limit < 1 or batch_size < 1:
            raise ModelError("max_steps and batch_size should be at least 1")
        parts = [
            self._think(rows[i : i + batch_size], ids[i : i + batch_size], limit, stop_early)
            for i in range(0, len(rows), batch_size)
        ]
        answers, steps, confidence = (torch.cat(part) for part in zip(*parts, strict=True))
        return Answer(
            answers.reshape(tokens.shape), steps.reshape(leading), confidence.reshape(leading)
        )

    def _think(
        self, rows: Tensor, ids: Tensor, limit: int, stop_early: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = {
            "inputs": rows.to(self.device, torch.int32),
            "labels": torch.zeros_like(rows, dtype=torch.int32, device=self.device),
            "puzzle_ids": ids.to(self.device, torch.int32),
        }
        carry = self.act.refill(self.act.initial_carry(batch), batch)
        tokens = torch.zeros_like(rows, dtype=torch.int64, device=self.device)
        steps = torch.full((len(rows),), limit, dtype=torch.int64, device=self.device)
        confidence = torch.zeros(len(rows), device=self.device)
        halted = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        for step in range(1, limit + 1):
            carry, output = self.act(carry)
            now = output.logits.argmax(-1)
            fresh = ~halted if stop_early else torch.ones_like(halted)
            tokens = torch.where(fresh.unsqueeze(-1), now, tokens)
            confidence = torch.where(fresh, output.q_halt.sigmoid(), confidence)
            threshold = 0 if self.model.config.no_act_continue else output.q_continue
            halts = (output.q_halt > threshold) & ~halted
            steps = torch.where(halts, step, steps)
            halted = halted | halts
            if stop_early and bool(halted.all()):
                break
        return tokens.cpu(), steps.cpu(), confidence.cpu()


def _check(tokens: Tensor, dims: ModelDims) -> tuple[int, ...]:
    """The dimensions before those of a puzzle; ModelError unless these are puzzles."""
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ModelError(f"a puzzle is made of integers, not of {tokens.dtype}")
    split, size = tokens.ndim, 1
    while split and size != dims.seq_len:
        split -= 1
        size *= tokens.shape[split]
    if size != dims.seq_len or not tokens.numel():
        raise ModelError(
            f"a puzzle has {dims.seq_len} tokens here, but the given shape is {list(tokens.shape)}"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= dims.vocab_size:
        raise ModelError(f"tokens should be 0 to {dims.vocab_size - 1}, as in the model's dataset")
    return tuple(tokens.shape[:split])


# ------------------------------------------------------------------------------------------ loading


def load_pretrained(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    weights: Literal["ema", "model"] = "ema",
    seq_len: int | None = None,
    **fields: Any,
) -> Solver:
    """A solver from a run folder, a checkpoint folder, a file of weights, or `hf:owner/name`.

    Args:
        path: of Loopwright, of HRM, TinyRecursiveModels or URM, or of a fork's training state.
        device: auto takes CUDA, else Apple's MPS, else the CPU.
        weights: the averaged ones where there are such, or those of the last step.
        seq_len: tokens of a puzzle, where an ancestor's file does not tell.
        fields: fields of the architecture's config to change, or that a file does not tell
            (`num_heads`, `H_cycles`, `L_cycles`, `halt_max_steps`, …).

    Raises:
        ModelError: the file cannot be used; one sentence says why.
    """
    path = files.from_hub(str(path)) if str(path).startswith(files.HUB) else Path(path).expanduser()
    name, known, dims, tensors = load_tensors(path, weights)
    if seq_len is not None:
        dims = ModelDims(seq_len, dims.vocab_size, dims.num_puzzle_ids)
    if not dims.seq_len:
        raise ModelError(f"{path} does not tell how many tokens a puzzle has; give seq_len=N")
    config = make_config(name, {**known, **fields}, path).portable()
    model = build_model(config, dims, seed=0, device=_device(device))
    load_weights(model, tensors, path)
    return Solver(model)


def load_weights(model: ReasoningModel, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load the weights read from `source`; ModelError names the first that does not fit."""
    here = model.state_dict()
    misfit = sorted(here.keys() ^ tensors.keys())
    if misfit:
        state = "missing" if misfit[0] in here else "unknown"
        raise ModelError(f"{source} does not fit arch={model.config.name}: {misfit[0]} is {state}")
    for name, tensor in tensors.items():
        if tensor.shape != here[name].shape:
            raise ModelError(
                f"{source} does not fit its description: {name} has shape {list(tensor.shape)} "
                f"there and {list(here[name].shape)} here"
            )
    model.load_state_dict(tensors)


def make_config(name: str, fields: Mapping[str, Any], source: Path) -> ReasoningConfig:
    """The config of an architecture; ModelError names a field that is wrong."""
    if name not in ARCHITECTURES:
        raise ModelError(f"{source}: there is no architecture {name}")
    try:
        return ARCHITECTURES[name].model_validate({**fields, "name": name})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or name
        raise ModelError(f"{source}: {where}: {first['msg']}") from None


# An architecture's name, fields of its config, dims, and tensors under our names.
Described = tuple[str, dict[str, Any], ModelDims, dict[str, Tensor]]


def load_tensors(path: Path, weights: str = "ema") -> Described:
    """What a run folder, a checkpoint folder or a file holds; `weights` are "ema" or "model".

    Of published weights there is one kind only.
    """
    if published.is_published(path):
        index = published.read_index(path)
        fields = dict(index["config"]["arch"])
        return fields.pop("name"), fields, ModelDims(**index["dims"]), published.read(path)
    checkpoint = _checkpoint_folder(path)
    if checkpoint is not None:
        return _read_checkpoint(checkpoint, weights)
    if path.is_dir():
        path = files.newest_file(path) or path
    if not path.is_file():
        raise ModelError(f"there is no checkpoint at {path}")
    return describe_file(path, weights)


def describe_file(path: Path, weights: str = "ema") -> Described:
    """What a file of weights holds, whosever it is."""
    state = files.read_file(path)
    tensors = dict(state.weights)
    if weights == "ema":
        tensors |= state.average or {}
    told = files.metadata(path)
    if told is not None:
        fields = dict(told["arch"])
        return fields.pop("name"), fields, _dims(told["dims"], path), tensors
    try:
        name, fields, dims = describe(tensors, files.reference_config(path))
    except (KeyError, ValidationError) as error:
        reason = error.args[0] if error.args else str(error).splitlines()[1]
        raise ModelError(f"{path} belongs to no model known here: {reason}") from None
    return name, fields, dims, tensors


def _checkpoint_folder(path: Path) -> Path | None:
    """The checkpoint in `path`: itself, or the newest one of a run folder; None: it has none."""
    if (path / "index.json").is_file() and not published.is_published(path):
        return path
    found = sorted(p.parent for p in path.glob("checkpoints/step_*/index.json"))
    return found[-1] if found else None


def _read_checkpoint(folder: Path, weights: str) -> Described:
    from safetensors.torch import load_file

    try:
        index = json.loads((folder / "index.json").read_text())
        tensors: dict[str, Tensor] = {}
        for stem in ("model", "ema")[: 2 if weights == "ema" else 1]:
            file = folder / f"{stem}.safetensors"
            if file.name in index["files"]:
                if hashlib.sha256(file.read_bytes()).hexdigest() != index["files"][file.name]:
                    raise ModelError(f"{file} is damaged: its checksum does not fit")
                tensors |= load_file(file)
        fields = dict(index["config"]["arch"])
        return fields.pop("name"), fields, _dims(index["dims"], folder), tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{folder} is no whole checkpoint ({error})") from None


def _dims(values: Mapping[str, Any], source: Path) -> ModelDims:
    """What a file says of the dataset's part in the model's shape."""
    if values.keys() != ModelDims.__dataclass_fields__.keys() or not all(
        type(value) is int and value >= 0 for value in values.values()
    ):
        raise ModelError(f"{source}: its description of the model's shape is damaged")
    return ModelDims(**values)


def _device(device: str | torch.device) -> torch.device:
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"device={device} cannot be used here ({reason})") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
