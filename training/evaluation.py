"""Evaluation: every row thinks for all ACT steps; sums stay on the device until a set is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import EvalLoader, PuzzleDataset
from models import ACT, IGNORE_LABEL, Carry, act_loss
from models.act import ACTOutput
from training.config import EvalConfig


@dataclass(frozen=True)
class SetReport:
    """Metrics of one set, averaged over its examples."""

    count: int
    accuracy: float
    exact_accuracy: float
    q_halt_accuracy: float
    steps: float
    lm_loss: float
    q_halt_loss: float


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
    predictions_dir: Path | None = None,
) -> dict[str, SetReport]:
    """Evaluate `act` on every set of `dataset`. Padding rows count nowhere.

    With `predictions_dir`, writes predictions-SET.npz: indices, inputs, labels, predictions
    (rows, L) as tokens, q_halt (rows,).
    """
    training = act.training
    act.eval()
    reports = {}
    for name in dataset.sets:
        loader = EvalLoader(
            dataset,
            set_name=name,
            batch_size=batch_size,
            device=device,
            max_examples=config.max_examples,
            seed=seed,
        )
        sums: dict[str, Tensor] = {}
        saved = []
        progress = tqdm(
            total=len(loader), desc=f"evaluating {name}", unit="batch", leave=False, disable=None
        )
        for number, batch in enumerate(loader):
            carry, output = think(act, batch)
            present = (batch["labels"] != IGNORE_LABEL).any(-1)
            _, metrics = act_loss(carry, output, act.model.config.loss, present)
            for key, value in metrics.items():
                sums[key] = sums[key] + value if key in sums else value.clone()
            if predictions_dir is not None:
                saved.append(_predictions(loader.batch_indices(number), batch, output))
            progress.update()
        progress.close()
        values = {k: float(v) for k, v in sums.items()}
        count = int(values.pop("count"))
        reports[name] = SetReport(count, **{k: v / max(count, 1) for k, v in values.items()})
        if predictions_dir is not None:
            joined = {k: np.concatenate([part[k] for part in saved]) for k in saved[0]}
            np.savez_compressed(predictions_dir / f"predictions-{name}.npz", **joined)
    act.train(training)
    return reports


def _predictions(
    indices: np.ndarray, batch: dict[str, Tensor], output: ACTOutput
) -> dict[str, np.ndarray]:
    real = indices >= 0
    tensors = {
        "inputs": batch["inputs"],
        "labels": batch["labels"],
        "predictions": output.logits.argmax(-1).to(torch.int32),
        "q_halt": output.q_halt,
    }
    arrays = {k: v.cpu().numpy()[real] for k, v in tensors.items()}
    return {"indices": indices[real], **arrays}


def table(reports: dict[str, SetReport]) -> str:
    """The reports as an aligned table, one line per set."""
    head = ("set", "puzzles", "exact", "tokens", "halting", "ACT steps", "loss")
    rows = [
        (name, f"{r.count}", f"{r.exact_accuracy:.2%}", f"{r.accuracy:.2%}",
         f"{r.q_halt_accuracy:.2%}", f"{r.steps:.1f}", f"{r.lm_loss:.4f}")
        for name, r in reports.items()
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = (
        "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in (head, *rows)
    )
    return "\n".join(lines)
