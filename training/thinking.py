"""Test-time compute: more ACT steps than in training, several trajectories a puzzle, one choice.

Trajectory 0 of a puzzle is the plain one. The others differ from it by what was asked for: a
symmetry of the puzzle (undone in the answer), random initial states, or noise added to the states
after each ACT step. Rows of the batch never stand idle: one that ends takes the next trajectory
that is still wanted, and a puzzle wants no more (with `early_halt`) once as many trajectories as
must `agree` have ended on the same answer with a content halting head. One alone is at times
content with a wrong answer; two of them seldom with the same.

Sources: TRM and HRM halt by the same head at training time; noise per step and the choice by the
halting head: PTRM; random initial states: EqR.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import EvalLoader, PuzzleDataset, build_augmentation
from models import ACT, IGNORE_LABEL, Carry
from training.act_steps import Steps
from training.config import ThinkConfig
from training.errors import ConfigError


@dataclass
class Trajectories:
    """What was found out about N puzzles, B trajectories each, at K depths.

    `answers` (N, B, L) and `q_halt` (N, B, K), `sure` and `stable` (N, B) are of the trajectory's
    last step (`q_halt`: of the step at each depth); `q_halt` is NaN where it had ended, or never
    ran.
    """

    depths: tuple[int, ...]
    labels: np.ndarray  # (N, L)
    answers: np.ndarray
    right: np.ndarray  # (N, B, K) bool: every labelled token
    q_halt: np.ndarray
    sure: np.ndarray  # (N, B) bool: the halting head was content at the end
    stable: np.ndarray  # ACT steps for which the answer has not changed
    steps: np.ndarray  # (N, B) ACT steps taken

    @property
    def ran(self) -> np.ndarray:
        """(N, B) which trajectories were run."""
        return self.steps > 0

    def sharing(self, puzzle: int, trajectory: int) -> int:
        """How many of a puzzle's sure trajectories share that one's answer, itself among them."""
        same = (self.answers[puzzle] == self.answers[puzzle, trajectory]).all(-1)
        return int((same & self.sure[puzzle]).sum())

    def chosen(self, breadth: int, select: str) -> np.ndarray:
        """(N,) which of the first `breadth` trajectories gives the answer, at the full depth."""
        ran = self.ran[:, :breadth]
        last = _last(self.q_halt)[:, :breadth]
        if select == "halt":
            score = last
        elif select == "convergence":
            score = self.stable[:, :breadth] + _sigmoid(last)
        else:
            score = self._votes(breadth) + _sigmoid(last)
        return np.where(ran, score, -np.inf).argmax(1)

    def _votes(self, breadth: int) -> np.ndarray:
        """(N, breadth) how many of a puzzle's trajectories share this one's answer."""
        answers, ran = self.answers[:, :breadth], self.ran[:, :breadth]
        same = (answers[:, :, None] == answers[:, None]).all(-1)  # (N, breadth, breadth)
        return (same & ran[:, None] & ran[:, :, None]).sum(2)

    def accuracy(self, breadth: int, select: str) -> float:
        """Share of puzzles answered exactly."""
        rows = np.arange(len(self.steps))
        return float(self.right[rows, self.chosen(breadth, select), -1].mean())

    def curve(self, select: str) -> Iterator[dict[str, float]]:
        """Exact accuracy against compute: depths of trajectory 0, then breadths at full depth."""
        for k, depth in enumerate(self.depths):
            steps = np.minimum(self.steps[:, 0], depth).mean()
            yield {"depth": depth, "breadth": 1, "ACT_steps": float(steps),
                   "exact_accuracy": float(self.right[:, 0, k].mean())}  # fmt: skip
        for breadth in range(2, self.steps.shape[1] + 1):
            steps = self.steps[:, :breadth].sum(1).mean()
            yield {"depth": self.depths[-1], "breadth": breadth, "ACT_steps": float(steps),
                   "exact_accuracy": self.accuracy(breadth, select)}  # fmt: skip


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.nan_to_num(x, nan=-50.0).clip(-50, 50)))


def _last(q: np.ndarray) -> np.ndarray:
    """(N, B) the value at the last depth that a trajectory reached; -inf where none was."""
    known = ~np.isnan(q)
    last = q.shape[2] - 1 - known[:, :, ::-1].argmax(2)
    values = np.take_along_axis(q, last[:, :, None], 2)[:, :, 0]
    return np.where(known.any(2), values, -np.inf)


def _each(rows: Tensor) -> Tensor:
    """A mask of rows (B,), for states (B, L, D)."""
    return rows[:, None, None]


def _fewer(busy: np.ndarray) -> np.ndarray | None:
    """Which rows to go on with where at most half of them are busy: those, in a half, quarter …

    Idle rows cost as much as others; few different batch sizes are few CUDA graphs.
    """
    size = len(busy)
    while size > 1 and busy.sum() <= size // 2:
        size //= 2
    return None if size == len(busy) else np.argsort(~busy, kind="stable")[:size]


def depths_up_to(depth: int) -> tuple[int, ...]:
    """Depths at which the accuracy is noted: powers of two, and `depth` itself."""
    return tuple(sorted({*(2**k for k in range(depth.bit_length()) if 2**k <= depth), depth}))


class Thinker:
    """Runs the trajectories of one set through a batch of fixed size."""

    def __init__(
        self,
        act: ACT,
        dataset: PuzzleDataset,
        loader: EvalLoader,
        config: ThinkConfig,
        seed: int,
        steps: Steps | None = None,
    ) -> None:
        self.act, self.config, self.steps = act, config, steps or act
        self.depth = config.depth or act.model.config.halt_max_steps
        batches = list(loader)
        self.device = loader.device
        self.rows = len(batches[0]["inputs"])
        joined = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
        real = np.concatenate([loader.batch_indices(i) for i in range(len(loader))]) >= 0
        keep = torch.from_numpy(real).to(self.device)
        self.puzzles = {k: v[keep] for k, v in joined.items()}
        self.count = int(real.sum())
        self.augment = None
        if config.augment:
            task = dataset.task or {}
            if task.get("name") != "sudoku":
                raise ConfigError("eval.augment=true needs a dataset of Sudoku puzzles")
            self.augment = build_augmentation(task, seed=seed, device=self.device)
        self.random = torch.Generator(self.device).manual_seed(seed)
        self.threshold = math.log(config.confidence) - math.log1p(-config.confidence)

    def run(self, name: str = "") -> Trajectories:
        """All trajectories that are wanted."""
        n, breadth, depths = self.count, self.config.breadth, depths_up_to(self.depth)
        length = self.puzzles["labels"].shape[1]
        found = Trajectories(
            depths=depths,
            labels=self.puzzles["labels"].cpu().numpy(),
            answers=np.zeros((n, breadth, length), np.int32),
            right=np.zeros((n, breadth, len(depths)), bool),
            q_halt=np.full((n, breadth, len(depths)), np.nan, np.float32),
            sure=np.zeros((n, breadth), bool),
            stable=np.zeros((n, breadth), np.int32),
            steps=np.zeros((n, breadth), np.int32),
        )
        waiting = ((p, t) for t in range(breadth) for p in range(n))
        content = np.zeros(n, bool)  # puzzles that want no more trajectories
        puzzle = np.full(self.rows, -1)  # of each row; -1: idle
        trajectory = np.zeros(self.rows, np.int64)
        carry: Carry | None = None
        answers = torch.zeros(self.rows, length, dtype=torch.int64, device=self.device)
        stable = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        progress = tqdm(
            total=n * breadth, desc=f"thinking {name}", unit="row", leave=False, disable=None
        )
        while True:
            free = np.flatnonzero(puzzle < 0)
            for row in free:
                task = next((t for t in waiting if not content[t[0]]), None)
                if task is None:
                    break
                puzzle[row], trajectory[row] = task
            busy = puzzle >= 0
            if not busy.any():
                break
            if carry is None or busy[free].any():
                carry = self._begin(carry, puzzle, trajectory, free)
            elif (kept := _fewer(busy)) is not None:
                puzzle, trajectory, busy = puzzle[kept], trajectory[kept], busy[kept]
                rows = torch.from_numpy(kept).to(self.device)
                carry, answers, stable = carry.at(rows), answers[rows], stable[rows]
            carry, output = self.steps(carry)
            now = self._undo(output.logits.argmax(-1), puzzle, trajectory)
            stable = torch.where((now == answers).all(-1), stable + 1, 0)
            answers = now
            labels = self.puzzles["labels"][torch.from_numpy(np.maximum(puzzle, 0)).to(self.device)]
            right = ((labels == IGNORE_LABEL) | (labels == answers)).all(-1)
            told = torch.stack([t.float() for t in (carry.steps, output.q_halt, right, stable)])
            steps, q, right_host, stable_host = told.cpu().numpy()  # the step's one wait
            ended = steps >= self.depth
            sure = self.config.early_halt & (q > self.threshold)
            ended |= sure
            for k, depth in enumerate(depths):
                at = busy & ((steps == depth) | (ended & (steps <= depth)))
                found.right[puzzle[at], trajectory[at], k] = right_host[at] > 0
                found.q_halt[puzzle[at], trajectory[at], k] = q[at]
            over = np.flatnonzero(busy & ended)
            if len(over):
                where = puzzle[over], trajectory[over]
                found.answers[where] = answers[torch.from_numpy(over).to(self.device)].cpu().numpy()
                found.stable[where] = stable_host[over]
                found.steps[where] = steps[over]
                found.sure[where] = sure[over]
                for p, t in zip(*(w[sure[over]] for w in where), strict=True):
                    content[p] = content[p] or found.sharing(p, t) >= self.config.agree
                puzzle[over] = -1
                progress.update(len(over))
            carry = self._noisy(carry, trajectory)
        progress.close()
        return found

    def _begin(
        self, carry: Carry | None, puzzle: np.ndarray, trajectory: np.ndarray, free: np.ndarray
    ) -> Carry:
        """Rows in `free` start on the puzzle that is now theirs; the others go on."""
        ids = torch.from_numpy(np.maximum(puzzle, 0)).to(self.device)
        batch = {k: v[ids] for k, v in self.puzzles.items()}
        if self.augment is not None:
            turns = torch.from_numpy(trajectory).to(self.device)
            inputs = batch["inputs"]
            batch["inputs"] = self.augment(inputs, inputs, ids, turns)[0]
        if carry is None:
            carry = self.act.initial_carry(batch)
        fresh = torch.zeros_like(carry.halted)
        fresh[torch.from_numpy(free).to(self.device)] = True
        carry = self.act.refill(replace(carry, halted=fresh), batch)
        if not self.config.random_init:
            return carry
        fresh = fresh & torch.from_numpy(trajectory > 0).to(self.device)
        state = {k: torch.where(_each(fresh), self._normal(v), v) for k, v in carry.state.items()}
        return replace(carry, state=state)

    def _noisy(self, carry: Carry, trajectory: np.ndarray) -> Carry:
        """The carry with noise on the states of all trajectories but the first."""
        if not self.config.noise:
            return carry
        some = _each(torch.from_numpy(trajectory > 0).to(self.device))
        state = {
            k: torch.where(some, v + self.config.noise * self._normal(v), v)
            for k, v in carry.state.items()
        }
        return replace(carry, state=state)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.random, dtype=like.dtype, device=self.device)

    def _undo(self, answers: Tensor, puzzle: np.ndarray, trajectory: np.ndarray) -> Tensor:
        """Answers of turned puzzles as answers of the puzzles themselves."""
        if self.augment is None:
            return answers
        ids = torch.from_numpy(np.maximum(puzzle, 0)).to(self.device)
        turns = torch.from_numpy(trajectory).to(self.device)
        return self.augment.invert(answers, ids, turns)


@torch.no_grad()
def explore(
    act: ACT,
    dataset: PuzzleDataset,
    config: ThinkConfig,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    steps: Steps | None = None,
) -> Iterator[tuple[str, Trajectories, float]]:
    """Run the trajectories of every set: its name, what was found out, and the seconds it took.

    `steps` takes the ACT steps in place of `act` itself.
    """
    training = act.training
    act.eval()
    for name in dataset.sets:
        loader = EvalLoader(
            dataset, set_name=name, batch_size=batch_size, device=device,
            max_examples=config.max_examples, seed=seed,
        )  # fmt: skip
        began = time.perf_counter()
        found = Thinker(act, dataset, loader, config, seed, steps).run(name)
        yield name, found, time.perf_counter() - began
    act.train(training)


def think_harder(
    act: ACT,
    dataset: PuzzleDataset,
    config: ThinkConfig,
    *,
    output_dir: Path,
    **how: Any,
) -> dict[str, dict[str, float]]:
    """Evaluate every set with test-time compute; writes thinking-SET.csv, an accuracy curve.

    `how` goes to `explore`. Returns by set: count, exact_accuracy, plain_exact_accuracy
    (trajectory 0 at the depth of training or the one asked for, whichever is less), ACT_steps (of
    a puzzle, all trajectories), seconds_per_puzzle.
    """
    reports = {}
    for name, found, seconds in explore(act, dataset, config, **how):
        trained = min(act.model.config.halt_max_steps, found.depths[-1])
        plain = max(k for k, depth in enumerate(found.depths) if depth <= trained)
        reports[name] = {
            "count": len(found.steps),
            "exact_accuracy": found.accuracy(config.breadth, config.select),
            "plain_exact_accuracy": float(found.right[:, 0, plain].mean()),
            "ACT_steps": float(found.steps.sum(1).mean()),
            "seconds_per_puzzle": seconds / len(found.steps),
        }
        write_curve(output_dir / f"thinking-{name}.csv", found, config.select)
    return reports


def write_curve(path: Path, found: Trajectories, select: str) -> None:
    """`Trajectories.curve` as CSV."""
    rows = list(found.curve(select))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
