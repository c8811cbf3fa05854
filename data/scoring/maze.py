"""Mazes: is the marked way a way, and is it a shortest one, even if not the labelled one?"""

from __future__ import annotations

import numpy as np

from data.maze_rules import path_lengths
from data.scoring.base import ScoredRows, Scorer


class MazeScorer(Scorer):
    """`valid_path`, `shortest_path`: shares; `excess_moves`: mean detour of the valid paths."""

    def add(self, rows: ScoredRows) -> None:
        """See `Scorer.add`."""
        super().add(rows)
        size = tuple(self.dataset.task["size"])
        tokens = np.clip(rows.predictions, 0, 255).astype(np.uint8)
        moves, best = path_lengths(rows.inputs.astype(np.uint8), tokens, size)
        self.count("rows", len(moves))
        self.count("valid_path", moves > 0)
        self.count("shortest_path", (moves > 0) & (moves == best))
        self.count("excess_moves", (moves - best)[moves > 0])

    def result(self) -> dict[str, float]:
        """See `Scorer.result`."""
        named = {key: self.mean(key, "rows") for key in ("valid_path", "shortest_path")}
        named["excess_moves"] = self.mean("excess_moves", "valid_path")
        return {**named, **super().result()}
