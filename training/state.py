"""`TrainState`: everything that decides the future of a run, and nothing else.

What is not in it cannot influence the next step; so a resume is exact by construction. The loader
is a pure function of the step, random numbers are a pure function of (seed, step, row).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from data import PuzzleDataset, make_train_loader, puzzle_names
from models import ACT, Carry, build_model
from models.legacy import resize_puzzles
from optim import EMA, ShardedOptimizer, SparseSignSGD
from optim.base import DeviceOptimizer
from optim.shards import Piece
from training import packing
from training.buckets import GradientBuckets
from training.checkpoint import read_tensors
from training.config import RunConfig
from training.errors import ConfigError
from training.graph import GraphedWork
from training.loss_scale import LossScale
from training.ranks import ALONE, Ranks
from training.resolve import ResolvedRun
from training.resume import Resume, WarmStart
from training.weights import read_weights

logger = logging.getLogger(__name__)

METRICS = ("count", "accuracy", "exact_accuracy", "q_halt_accuracy", "steps")
LOSSES = ("lm_loss", "q_halt_loss", "q_continue_loss")
SAME_ON_ALL = ("grad_norm", "train_steps")  # every rank has the whole of these
SUMS = (*METRICS, *LOSSES, *SAME_ON_ALL)


class TrainState:
    """Model, optimizers, average, carry, counters and metric sums of one run, on one device.

    Of several ranks, each has the whole model and its rows of the carry.
    """

    def __init__(
        self,
        run: ResolvedRun,
        dataset: PuzzleDataset,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        config = run.config
        self.ranks = ranks
        self.device, self.step = device, 0
        model = build_model(config.arch, run.dims, seed=config.seed, device=device)
        model.requires_grad_(not config.freeze_weights)
        self.model, self.act = model, ACT(model).train()
        self.optimizers: dict[str, DeviceOptimizer | ShardedOptimizer] = {}
        self.sharded: ShardedOptimizer | None = None  # that of the weights, where its state is
        if not config.freeze_weights:
            self.optimizers[config.optim.name] = self._build_optimizer(config)
        if model.embedding.puzzles is not None:
            self.optimizers["sparse_signsgd"] = SparseSignSGD(
                [("embedding.puzzles", model.embedding.puzzles)],
                lr=0.0,
                weight_decay=config.puzzle_emb_weight_decay,
            )
        self._check_ownership(config.freeze_weights)
        self.buckets: GradientBuckets | ShardedOptimizer | None = None
        if self.sharded is not None:
            self.buckets = self.sharded
        elif ranks.size > 1 and not config.freeze_weights:
            mean = config.grad_reduce == "mean"
            self.buckets = GradientBuckets(model.parameters(), mean=mean)
        self.ema = EMA(model.named_parameters(), config.ema_rate) if config.ema else None
        if self.ema is not None:
            whole = (o for o in self.optimizers.values() if o is not self.sharded)
            self.ema.attach(*whole)
        self.loader = make_train_loader(
            dataset,
            num_workers=config.num_workers,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            num_aug=config.data.num_aug,
            rank=ranks.rank,
            world_size=ranks.size,
            device=device,
        )
        self.incoming = self.loader.batch(0)  # where the next step finds its batch
        self.carry: Carry = self.act.initial_carry(self.incoming)
        self.step_counter = torch.zeros((), dtype=torch.int64, device=device)  # the step, there
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)  # steps held back
        half = model.embedding.dtype == torch.float16
        self.loss_scale = LossScale(device) if half else None
        self.graph: GraphedWork | None = None
        wide = torch.promote_types(model.embedding.dtype, torch.float32)
        self.sums = {k: torch.zeros((), dtype=wide, device=device) for k in SUMS}  # since the log
        self.row_numbers = torch.arange(
            self.loader.local.start, self.loader.local.stop, device=device
        )

    def _build_optimizer(self, config: RunConfig) -> DeviceOptimizer | ShardedOptimizer:
        """The optimizer of the weights."""
        named = list(self.model.named_parameters())
        if self.ranks.size == 1 or not config.optim.sharded:
            return config.optim.build(named, lr=0.0)
        self.sharded = ShardedOptimizer(
            named,
            config.optim.build,
            cut=config.optim.elementwise,
            divide=config.optim.divide,
            mean=config.grad_reduce == "mean",
            lr=0.0,
        )
        return self.sharded

    def use_graph(self) -> None:
        """From now on steps run in a CUDA graph, for which gradients keep their addresses."""
        self.graph = GraphedWork(self.device)
        for p in self.model.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)

    def clear_gradients(self) -> None:
        """Forget all gradients, in place where they keep their addresses."""
        for name, optimizer in self.optimizers.items():
            if name == "sparse_signsgd" or self.buckets is None:
                optimizer.zero_grad(set_to_none=self.graph is None)
        if self.buckets is not None:
            self.buckets.zero()

    def _check_ownership(self, frozen: bool) -> None:
        owned = [p for o in self.optimizers.values() for g in o.param_groups for p in g["params"]]
        wanted = [] if frozen else list(self.model.parameters())
        if self.model.embedding.puzzles is not None:
            wanted.append(self.model.embedding.puzzles)
        assert sorted(map(id, owned)) == sorted(map(id, wanted)), (
            "every parameter belongs to exactly one optimizer"
        )

    # What a checkpoint holds

    @staticmethod
    def is_own(stem: str, name: str) -> bool:
        """Whether a tensor of `files()` belongs to this rank alone: rows of the carry, sums."""
        return stem == "carry" and (_is_row(name) or name.startswith("sums."))

    def files(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of the state, by file and name (not copies); see `pieces`, too."""
        carry = {f"state.{k}": v for k, v in self.carry.state.items()}
        carry |= {f"batch.{k}": v for k, v in self.carry.batch.items()}
        carry |= {"steps": self.carry.steps, "halted": self.carry.halted}
        carry |= {f"sums.{k}": v for k, v in self.sums.items()}
        carry["nonfinite"] = self.nonfinite
        if self.loss_scale is not None:
            carry |= self.loss_scale.tensors()
        files = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer_tensors(),
            "carry": carry,
        }
        if self.ema is not None:
            files["ema"] = self.ema.state_dict()
        return files

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """Every optimizer's tensors in place, named `OPTIMIZER/PARAMETER/MOMENT`."""
        names = {id(p): n for n, p in self.model.named_parameters()}
        names |= {id(b): n for n, b in self.model.named_buffers()}
        tensors = {}
        for kind, optimizer in self.optimizers.items():
            if optimizer is self.sharded:
                continue
            for number, group in enumerate(optimizer.param_groups):
                tensors[f"{kind}/groups/{number}/lr"] = group["lr"]
                for p in group["params"]:
                    for moment, value in optimizer.state[p].items():
                        tensors[f"{kind}/{names[id(p)]}/{moment}"] = value
        return tensors

    def pieces(self) -> dict[str, Piece]:
        """What this rank keeps of a sharded optimizer, by the names of the whole tensors."""
        if self.sharded is None:
            return {}
        names = {id(p): n for n, p in self.model.named_parameters()}
        kind = next(k for k, o in self.optimizers.items() if o is self.sharded)
        pieces = self.sharded.pieces()
        return {f"{kind}/{names[id(piece.param)]}/{piece.moment}": piece for piece in pieces}

    def restore(self, resume: Resume) -> None:
        """Fill every tensor of the state from a checkpoint; ConfigError if one does not match.

        The checkpoint may be of any number of ranks.
        """
        packed = resume.path.is_file()
        for stem, tensors in self.files().items():
            if packed and stem == "carry":  # stays as it is: every row takes new data
                continue
            saved = packing.read_tensors(resume.path, stem) if packed else self._saved(resume, stem)
            source = f"{resume.path}, {stem}" if packed else f"{resume.path / stem}.safetensors"
            if stem == "optimizer":
                tensors, saved = self._own_moments(tensors, saved)
            _copy_all(tensors, saved, source)
        self.step = int(resume.index["step"])
        self.step_counter.fill_(self.step)
        logger.info("restored from %s:", resume.path)
        logger.info("  step %d, parameters, optimizer states (%s), EMA %s%s", self.step,
                    ", ".join(self.optimizers), "yes" if self.ema else "no",
                    "" if packed else ", carry, metric sums")  # fmt: skip
        if packed:
            logger.info("  a packed state: moments and averages were rounded to %s, the carry is "
                        "new, so every row starts on a puzzle of this step",
                        resume.index["rounded"])  # fmt: skip
        for change in resume.changes:
            logger.info("  changed on the command line: %s", change)
        if not resume.changes:
            logger.info("  no setting was changed")

    def _saved(self, resume: Resume, stem: str) -> dict[str, Tensor]:
        """The tensors of one of the checkpoint's files, of which only this rank's rows."""
        rows = self.loader.local if self.ranks.size > 1 else None
        saved = read_tensors(resume.path, stem, rows if stem == "carry" else None, _is_row)
        return {k: self._own_sum(k, v) if self.is_own(stem, k) else v for k, v in saved.items()}

    def _own_moments(
        self, tensors: dict[str, Tensor], saved: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both without learning rates, which every step sets; of a sharded optimizer, its part."""
        tensors, saved = ({k: t for k, t in some.items() if "/groups/" not in k}
                          for some in (tensors, saved))  # fmt: skip
        if self.sharded is None:
            return tensors, saved
        for name, piece in self.pieces().items():
            tensors[name] = piece.tensor
            if piece.start is not None and name in saved:
                stop = piece.start + piece.tensor.numel()
                saved[name] = saved[name].reshape(-1)[piece.start : stop].view(piece.tensor.shape)
        return tensors, {k: t for k, t in saved.items() if k in tensors}

    def _own_sum(self, name: str, saved: Tensor) -> Tensor:
        """This rank's part of a metric sum that was saved as one number per rank."""
        if _is_row(name):
            return saved
        parts = saved.reshape(-1)
        if len(parts) == self.ranks.size:
            return parts[self.ranks.rank]
        if name.removeprefix("sums.") in SAME_ON_ALL:
            return parts[0]
        return parts.sum() if self.ranks.rank == 0 else torch.zeros_like(parts[0])

    def warm_start(self, start: WarmStart, dataset: Path) -> None:
        """Take the weights, and nothing else, from a file.

        Puzzle embeddings of another dataset are kept where both datasets name their puzzles
        (`identifiers.json` beside the file; the folder `dataset`), else they start from their
        mean. An average in the file becomes the average here.
        """
        state = read_weights(start.path)
        own, name = self.model.state_dict(), "embedding.puzzles"
        for tensors in filter(None, (state.weights, state.average)):
            table = tensors.get(name)
            if table is None or name not in own or table.ndim != 2:
                continue
            there, here = puzzle_names(start.path.parent), puzzle_names(dataset)
            if len(table) == len(own[name]) and (there == here or not (there and here)):
                continue
            tensors[name] = resize_puzzles(table, len(own[name]), there, here)
            kept = len(set(there or ()) & set(here or ()))
            logger.info("%d puzzle embeddings in %s, %d here: %d kept by name, the others start "
                        "from the mean", len(table), start.path, len(own[name]), kept)  # fmt: skip
        _copy_all(own, state.weights, str(start.path))
        if self.ema is not None:
            average = {**own, **(state.average or {})}
            shadow = {k: average[k] for k in self.ema.shadow}
            _copy_all(self.ema.shadow, shadow, f"{start.path} (its average)")
        logger.info("warm start: weights%s from %s%s, everything else new, at step 0",
                    " and average" if state.average and self.ema else "", start.path,
                    "" if state.step is None else f" (saved after step {state.step})")  # fmt: skip


def _is_row(name: str) -> bool:
    """Whether a tensor of the carry has one row per row of the batch."""
    return name.startswith(("state.", "batch.")) or name in ("steps", "halted")


@torch.no_grad()
def _copy_all(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: str) -> None:
    """Copy `saved` into `own` in place, after checking every name and shape."""
    missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if missing or unknown:
        raise ConfigError(
            f"{source} does not fit this model: "
            + "; ".join(
                f"{len(names)} tensors are {what}, such as {names[0]}"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            )
        )
    for name, tensor in own.items():
        if saved[name].shape != tensor.shape:
            raise ConfigError(
                f"{source} does not fit this model: {name} has shape "
                f"{list(saved[name].shape)} there and {list(tensor.shape)} here"
            )
    for name, tensor in own.items():
        tensor.copy_(saved[name])
