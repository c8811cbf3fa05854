"""Sudoku: how far an answer is from keeping the rules, whatever the label says."""

from __future__ import annotations

import numpy as np

from data.scoring.base import ScoredRows, Scorer
from data.sudoku_rules import units

_PAD, _BLANK = 0, 1  # digit d is token d + 1


def violations(grids: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """(puzzles,) digits that are missing from rows, columns and boxes, all counted together.

    `grids` (puzzles, n²) may hold any number; 0 for a solution, 3n² - 3n for one digit everywhere.
    """
    n = box[0] * box[1]
    inside = grids[:, units(box)]  # (puzzles, 3n, n)
    present = np.stack([(inside == digit).any(axis=2) for digit in range(1, n + 1)])
    return (~present).sum(axis=(0, 2))


class SudokuScorer(Scorer):
    """`violations`: mean per puzzle; `valid`: share of answers that keep all rules and clues."""

    def add(self, rows: ScoredRows) -> None:
        """See `Scorer.add`."""
        super().add(rows)
        broken = violations(rows.predictions - 1, tuple(self.dataset.task["box"]))
        clue = rows.inputs > _BLANK
        kept = (~clue | (rows.predictions == rows.inputs)).all(axis=1)
        self.count("rows", len(broken))
        self.count("violations", broken)
        self.count("valid", (broken == 0) & kept)

    def result(self) -> dict[str, float]:
        """See `Scorer.result`."""
        named = {key: self.mean(key, "rows") for key in ("violations", "valid")}
        return {**named, **super().result()}
