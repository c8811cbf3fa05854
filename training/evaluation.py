"""Evaluation: every row thinks for all ACT steps; sums stay on the device until a set is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import EvalLoader, PuzzleDataset, ScoredRows, build_scorer
from models import ACT, IGNORE_LABEL, Carry, act_loss
from models.act import ACTOutput
from models.loss import token_loss
from training.act_steps import Steps
from training.config import EvalConfig
from training.ranks import ALONE, Ranks


@dataclass(frozen=True)
class SetReport:
    """Metrics of one set, averaged over its rows, and the scores of its task."""

    count: int
    accuracy: float
    exact_accuracy: float
    q_halt_accuracy: float
    steps: float
    lm_loss: float
    q_halt_loss: float
    scores: dict[str, float] = field(default_factory=dict)
    merit: float | None = None  # what the best checkpoint is chosen by, if not exact accuracy

    def values(self) -> dict[str, float]:
        """All metrics by name, flat."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**{k: v for k, v in own.items() if k not in ("scores", "merit")}, **self.scores}


@torch.no_grad()
def think(
    act: ACT, batch: dict[str, Tensor], steps: Steps | None = None
) -> tuple[Carry, ACTOutput]:
    """Run all ACT steps on one batch from fresh states; the last step's carry and output."""
    steps = steps or act
    carry = act.refill(act.initial_carry(batch), batch)
    for _ in range(act.model.config.halt_max_steps):
        carry, output = steps(carry)
    return carry, output


@torch.no_grad()
def evaluate(
    act: ACT,
    dataset: PuzzleDataset,
    config: EvalConfig,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    output_dir: Path | None = None,
    ranks: Ranks = ALONE,
    steps: Steps | None = None,
) -> dict[str, SetReport]:
    """Evaluate `act` on every set of `dataset`. Padding rows count nowhere.

    `steps` takes the ACT steps in place of `act` itself. While the device thinks about a batch,
    the host scores the one before: it waits for results only.

    With `output_dir`, the scorers write their files there (a submission), and with
    `config.save_predictions` predictions-SET.npz: indices, augmentations, inputs, labels,
    predictions (rows, L) as tokens, q_halt (rows,). Of several ranks, each thinks about its slice
    of every batch; all get the reports and the first one writes.
    """
    training = act.training
    act.eval()
    reports = {}
    for name in dataset.sets:
        loader = EvalLoader(
            dataset,
            set_name=name,
            batch_size=-(-batch_size // ranks.size) * ranks.size,
            rank=ranks.rank,
            world_size=ranks.size,
            device=device,
            max_examples=config.max_examples,
            seed=seed,
            num_aug=config.num_aug,
        )
        scorer = build_scorer(dataset, name)
        for file in config.add_votes if ranks.rank == 0 else ():
            scorer.add_votes(Path(file))
        sums: dict[str, Tensor] = {}
        saved = []
        progress = tqdm(
            total=len(loader), desc=f"evaluating {name}", unit="batch", leave=False,
            disable=None if ranks.rank == 0 else True,
        )  # fmt: skip
        for answers in _answers(act, loader, steps or act, scorer.needs_nll, sums):
            rows, nll = answers.fetch()
            scorer.add(_scored(rows, nll))
            if config.save_predictions and output_dir is not None:
                saved.append(rows)
            progress.update()
        progress.close()
        everyone = ranks.gather(({k: float(v) for k, v in sums.items()}, scorer, saved))
        values = {k: sum(theirs[0][k] for theirs in everyone) for k in sums}
        scorer.merge(theirs[1] for i, theirs in enumerate(everyone) if i != ranks.rank)
        count = int(values.pop("count"))
        reports[name] = SetReport(
            count,
            **{k: v / max(count, 1) for k, v in values.items()},
            scores=scorer.result(),
            merit=scorer.merit(),
        )
        if output_dir is not None and ranks.rank == 0:
            scorer.write(output_dir, "" if len(dataset.sets) == 1 else f"-{name}")
            if config.save_predictions:
                parts = [part for theirs in everyone for part in theirs[2]]
                _save_predictions(output_dir / f"predictions-{name}.npz", parts)
    act.train(training)
    return reports


def _answers(
    act: ACT, loader: EvalLoader, steps: Steps, needs_nll: bool, sums: dict[str, Tensor]
) -> Iterator[_Answers]:
    """The answers to each batch, once the device has been given the next one to think about.

    Adds up the metrics in `sums`, on the device.
    """
    before = None
    for number, batch in enumerate(loader):
        carry, output = think(act, batch, steps)
        present = (batch["labels"] != IGNORE_LABEL).any(-1)
        _, metrics = act_loss(carry, output, act.model.config.loss, present)
        for key, value in metrics.items():
            sums[key] = sums[key] + value if key in sums else value.clone()
        answers = _Answers(loader, number, act, batch, output, needs_nll)
        if before is not None:
            yield before
        before = answers
    if before is not None:
        yield before


class _Answers:
    """What the host needs of a batch's rows that are no padding; on its way there."""

    def __init__(
        self,
        loader: EvalLoader,
        number: int,
        act: ACT,
        batch: dict[str, Tensor],
        output: ACTOutput,
        needs_nll: bool,
    ) -> None:
        indices = loader.batch_indices(number)
        self.real = indices >= 0
        self.numbers = {
            "indices": indices[self.real],
            "augmentations": loader.batch_augmentations(number)[self.real],
        }
        tensors = {
            "inputs": batch["inputs"],
            "labels": batch["labels"],
            "predictions": output.logits.argmax(-1).to(torch.int32),
            "q_halt": output.q_halt.float(),
        }
        if needs_nll:
            nll = token_loss(output.logits, batch["labels"], act.model.config.loss.kind).sum(-1)
            tensors["nll"] = nll.double()
        self.tensors = {k: _to_host(v) for k, v in tensors.items()}
        self.arrived = None
        if loader.device.type == "cuda":
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def fetch(self) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """The rows by name, and their nll (rows,) where it was asked for; waits for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        arrays = {k: v.numpy()[self.real] for k, v in self.tensors.items()}
        nll = arrays.pop("nll", None)
        return {**self.numbers, **arrays}, nll


def _to_host(x: Tensor) -> Tensor:
    """A copy on the host; from a GPU into pinned memory, without waiting for it."""
    if not x.is_cuda:
        return x.cpu()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _scored(rows: dict[str, np.ndarray], nll: np.ndarray | None) -> ScoredRows:
    """What a scorer takes of `_Answers`."""
    return ScoredRows(
        examples=rows["indices"],
        augmentations=rows["augmentations"],
        inputs=rows["inputs"],
        labels=rows["labels"],
        predictions=rows["predictions"],
        confidence=1 / (1 + np.exp(-rows["q_halt"].astype(np.float64))),
        nll=nll,
    )


def _save_predictions(path: Path, parts: list[dict[str, np.ndarray]]) -> None:
    """Write the rows of all batches and ranks in the order of the set."""
    joined = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    order = np.lexsort((joined["augmentations"], joined["indices"]))
    np.savez_compressed(path, **{k: v[order] for k, v in joined.items()})


def table(reports: dict[str, SetReport]) -> str:
    """The reports as an aligned table, one line per set, and the scores of the tasks below."""
    head = ("set", "rows", "exact", "tokens", "halting", "ACT steps", "loss")
    rows = [
        (name, f"{r.count}", f"{r.exact_accuracy:.2%}", f"{r.accuracy:.2%}",
         f"{r.q_halt_accuracy:.2%}", f"{r.steps:.1f}", f"{r.lm_loss:.4f}")
        for name, r in reports.items()
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in (head, *rows)
    ]
    for name, report in reports.items():
        scores = [f"{key} {value:.4g}" for key, value in report.scores.items() if "/" not in key]
        if scores:
            lines.append(f"{name}: {', '.join(scores)}")
    return "\n".join(lines)
