"""What all scorers share: accuracy by difficulty."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.puzzles import PuzzleDataset, PuzzleSet, TokenStream

IGNORED = -100
_BUCKETS = 5


@dataclass(frozen=True)
class ScoredRows:
    """Some rows of a set with what a model said; no padding rows."""

    examples: np.ndarray  # (rows,) example of the set
    augmentations: np.ndarray  # (rows,) augmentation index; 0: the original
    inputs: np.ndarray  # (rows, L) tokens
    labels: np.ndarray  # (rows, L) tokens, -100 where ignored
    predictions: np.ndarray  # (rows, L) tokens
    confidence: np.ndarray  # (rows,) halting probability, in [0, 1]
    nll: np.ndarray | None = None  # (rows,) -ln p of all labelled tokens together


def difficulty_edges(ratings: np.ndarray) -> np.ndarray:
    """Lower ends of up to five buckets of about equal size: ascending, distinct."""
    quantiles = np.quantile(ratings, np.arange(_BUCKETS) / _BUCKETS, method="higher")
    return np.unique(quantiles)


class Scorer:
    """Exact and token accuracy per difficulty bucket, where examples have ratings.

    Subclasses add what the rules of their task can judge; each overrides `add` or `result`, or
    both, and calls this class's.
    """

    needs_nll = False  # whether rows come with their likelihood

    def __init__(self, dataset: PuzzleDataset, arrays: PuzzleSet | TokenStream) -> None:
        self.dataset, self.arrays = dataset, arrays
        self.sums: dict[str, float] = {}  # added up over rows and processes
        self.edges = None
        if arrays.ratings is not None and arrays.ratings.min() < arrays.ratings.max():
            self.edges = difficulty_edges(arrays.ratings)

    def __getstate__(self) -> dict[str, object]:
        """What another process needs to merge: everything but the data."""
        return {k: v for k, v in vars(self).items() if k not in ("dataset", "arrays")}

    def count(self, key: str, values: np.ndarray | float) -> None:
        """Add the sum of `values` to a sum."""
        self.sums[key] = self.sums.get(key, 0.0) + float(np.sum(values))

    def mean(self, key: str, per: str) -> float:
        """A sum divided by another one, 0 where there is nothing."""
        return self.sums.get(key, 0.0) / max(self.sums.get(per, 0.0), 1.0)

    def add(self, rows: ScoredRows) -> None:
        """Take rows in; those without any label say nothing here."""
        valid = rows.labels != IGNORED
        tokens = valid.sum(axis=1)
        self.count("labelled", tokens > 0)
        if self.edges is None:
            return
        right = (valid & (rows.predictions == rows.labels)).sum(axis=1)
        ratings = self.arrays.ratings[rows.examples]
        bucket = np.searchsorted(self.edges, ratings, side="right") - 1
        for number in np.unique(bucket[tokens > 0]):
            mine = (bucket == number) & (tokens > 0)
            self.count(f"bucket{number}/count", mine)
            self.count(f"bucket{number}/exact", right[mine] == tokens[mine])
            self.count(f"bucket{number}/accuracy", right[mine] / tokens[mine])

    def merge(self, others: Iterable[Scorer]) -> None:
        """Take in what scorers of other processes collected of the same set."""
        for other in others:
            for key, value in other.sums.items():
                self.sums[key] = self.sums.get(key, 0.0) + value

    def result(self) -> dict[str, float]:
        """Metrics by name; of a bucket `rating_LOW-HIGH/exact_accuracy` and so on."""
        if self.edges is None:
            return {}
        highs = [str(low - 1) for low in self.edges[1:]] + [str(self.arrays.ratings.max())]
        out: dict[str, float] = {}
        for number, (low, high) in enumerate(zip(self.edges, highs, strict=True)):
            prefix, per = f"bucket{number}", f"bucket{number}/count"
            if per in self.sums:
                name = f"rating_{low}-{high}"
                out[f"{name}/count"] = self.sums[per]
                out[f"{name}/exact_accuracy"] = self.mean(f"{prefix}/exact", per)
                out[f"{name}/accuracy"] = self.mean(f"{prefix}/accuracy", per)
        return out

    def merit(self) -> float | None:
        """What the best checkpoint is chosen by, higher being better; None: exact accuracy."""
        return None

    def add_votes(self, file: Path) -> None:
        """Let the votes of another checkpoint count, too, where a task has votes.

        Raises:
            DataError: this task has none.
        """
        raise DataError(f"eval.add_votes={file}: only ARC has votes; leave it out.")

    def write(self, folder: Path, suffix: str) -> list[Path]:
        """Write what others want to read (a submission), named with `suffix`; the files."""
        return []
