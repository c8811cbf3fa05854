"""Evaluation: every row thinks for all ACT steps; sums stay on the device until a set is done."""

from __future__ import annotations

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
def think(act: ACT, batch: dict[str, Tensor]) -> tuple[Carry, ACTOutput]:
    """Run all ACT steps on one batch from fresh states; the last step's carry and output."""
    carry = act.refill(act.initial_carry(batch), batch)
    for _ in range(act.model.config.halt_max_steps):
        carry, output = act(carry)
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
) -> dict[str, SetReport]:
    """Evaluate `act` on every set of `dataset`. Padding rows count nowhere.

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
        for number, batch in enumerate(loader):
            carry, output = think(act, batch)
            present = (batch["labels"] != IGNORE_LABEL).any(-1)
            _, metrics = act_loss(carry, output, act.model.config.loss, present)
            for key, value in metrics.items():
                sums[key] = sums[key] + value if key in sums else value.clone()
            rows = _predictions(loader, number, batch, output)
            nll = None
            if scorer.needs_nll:
                nll = token_loss(output.logits, batch["labels"], act.model.config.loss.kind).sum(-1)
                nll = nll[: len(rows["indices"])]  # padding comes last
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


def _predictions(
    loader: EvalLoader, number: int, batch: dict[str, Tensor], output: ACTOutput
) -> dict[str, np.ndarray]:
    """The rows of a batch that are no padding, on the host."""
    indices = loader.batch_indices(number)
    real = indices >= 0
    tensors = {
        "inputs": batch["inputs"],
        "labels": batch["labels"],
        "predictions": output.logits.argmax(-1).to(torch.int32),
        "q_halt": output.q_halt.float(),
    }
    arrays = {k: v.cpu().numpy()[real] for k, v in tensors.items()}
    augmentations = loader.batch_augmentations(number)[real]
    return {"indices": indices[real], "augmentations": augmentations, **arrays}


def _scored(rows: dict[str, np.ndarray], nll: Tensor | None) -> ScoredRows:
    """What a scorer takes of `_predictions`; `nll` (rows,) is of the same rows."""
    return ScoredRows(
        examples=rows["indices"],
        augmentations=rows["augmentations"],
        inputs=rows["inputs"],
        labels=rows["labels"],
        predictions=rows["predictions"],
        confidence=1 / (1 + np.exp(-rows["q_halt"].astype(np.float64))),
        nll=None if nll is None else nll.double().cpu().numpy(),
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
