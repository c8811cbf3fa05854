"""What predictions are worth: pure NumPy on rows of tokens, one scorer per kind of task.

A scorer collects rows of one set in one evaluation and is thrown away after it, so that two
checkpoints are never mixed. Rows may come in any order and on several processes: `merge` gives the
same numbers as one process would.
"""

from __future__ import annotations

from data.puzzles import PuzzleDataset
from data.scoring.arc import ArcScorer
from data.scoring.base import ScoredRows, Scorer
from data.scoring.maze import MazeScorer
from data.scoring.sudoku import SudokuScorer
from data.scoring.text import TextScorer

SCORERS: dict[str, type[Scorer]] = {
    "sudoku": SudokuScorer,
    "maze": MazeScorer,
    "arc": ArcScorer,
    "text": TextScorer,
}

__all__ = ["SCORERS", "ScoredRows", "Scorer", "build_scorer"]


def build_scorer(dataset: PuzzleDataset, set_name: str) -> Scorer:
    """The scorer of a set's task; of an unknown task the one that knows difficulties only."""
    part = dataset.part_of(set_name)
    scorer = SCORERS.get((part.task or {}).get("name", ""), Scorer)
    return scorer(part, dataset.sets[set_name])
