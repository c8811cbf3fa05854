"""ARC: the augmentations of a test pair vote; pass@k; Kaggle's submission.

Each answer is turned back to the original colours and orientation, and votes with the model's
halting probability. Answers are ranked by their votes, then by how many gave them. A task's score
is the share of its test pairs whose right answer is among the first k (as Kaggle has it, and the
evaluators of the HRM and TRM papers).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.arc_grids import decode, undo
from data.errors import DataError
from data.puzzles import PuzzleDataset, PuzzleSet
from data.scoring.base import ScoredRows, Scorer

logger = logging.getLogger(__name__)

PASS_AT = (1, 2, 5, 10, 100, 1000)
_ATTEMPTS = 2  # of a submission
_UNIT = 1 << 32  # votes are whole numbers, so that their sum does not depend on the order

Answer = tuple[int, int, bytes]  # rows, columns, colours
Ballot = dict[Answer, list[int]]  # answer → [votes, how many gave it]


class ArcScorer(Scorer):
    """`pass@1` … `pass@1000` over the tasks of which every test pair was tried."""

    def __init__(self, dataset: PuzzleDataset, arrays: PuzzleSet) -> None:
        super().__init__(dataset, arrays)
        self.ballots: dict[int, Ballot] = {}  # by example
        sizes = np.diff(arrays.puzzle_indices)
        self.identifier = np.repeat(arrays.puzzle_identifiers, sizes)  # (examples,)
        self.seed = int(dataset.augmentation["seed"])

    def add(self, rows: ScoredRows) -> None:
        """See `Scorer.add`."""
        super().add(rows)
        votes = np.rint(np.clip(rows.confidence.astype(np.float64), 0, 1) * _UNIT).astype(np.int64)
        identifiers = self.identifier[rows.examples]
        grids = undo(rows.predictions, self.seed, identifiers, rows.augmentations)
        for example, grid, vote in zip(rows.examples, grids, votes, strict=True):
            answer = (*grid.shape, grid.tobytes())
            entry = self.ballots.setdefault(int(example), {}).setdefault(answer, [0, 0])
            entry[0] += int(vote)
            entry[1] += 1

    def merge(self, others: Iterable[ArcScorer]) -> None:
        """See `Scorer.merge`."""
        others = list(others)
        super().merge(others)
        for other in others:
            self._add_ballots(other.ballots)

    def _add_ballots(self, ballots: dict[int, Ballot]) -> None:
        for example, ballot in ballots.items():
            mine = self.ballots.setdefault(example, {})
            for answer, (votes, count) in ballot.items():
                entry = mine.setdefault(answer, [0, 0])
                entry[0] += votes
                entry[1] += count

    def ranking(self, example: int) -> list[Answer]:
        """The answers to a test pair, best first; what is no grid is not among them."""
        ballot = self.ballots.get(example, {})
        grids = [answer for answer in ballot if answer[0] > 0]
        return sorted(grids, key=lambda a: (-ballot[a][0], -ballot[a][1], a))

    def result(self) -> dict[str, float]:
        """See `Scorer.result`; `tasks` says how many are scored."""
        scores: list[list[float]] = []  # of each task: at every k
        for begin, end in zip(
            self.arrays.puzzle_indices[:-1], self.arrays.puzzle_indices[1:], strict=True
        ):
            pairs = range(int(begin), int(end))
            right = [decode(np.asarray(self.arrays.labels[e])) for e in pairs]
            if not all(e in self.ballots and r.size for e, r in zip(pairs, right, strict=True)):
                continue  # not tried, or the answer is not known
            places = []
            for example, grid in zip(pairs, right, strict=True):
                ranked = self.ranking(example)
                answer = (*grid.shape, grid.tobytes())
                places.append(ranked.index(answer) if answer in ranked else len(ranked) + 10**6)
            scores.append([np.mean([place < k for place in places]) for k in PASS_AT])
        out = {"tasks": float(len(scores))}
        if scores:
            means = np.mean(scores, axis=0)
            out |= {f"pass@{k}": float(v) for k, v in zip(PASS_AT, means, strict=True)}
        return {**out, **super().result()}

    def submission(self) -> dict[str, list[dict[str, list[list[int]]]]]:
        """Kaggle's form: two attempts for every test pair of every task, tried or not."""
        out = {}
        for name, begin, end in zip(
            self._task_names(), self.arrays.puzzle_indices[:-1], self.arrays.puzzle_indices[1:],
            strict=True,
        ):  # fmt: skip
            out[name] = [self._attempts(example) for example in range(int(begin), int(end))]
        return out

    def _attempts(self, example: int) -> dict[str, list[list[int]]]:
        grids = [
            np.frombuffer(cells, np.uint8).reshape(rows, columns).tolist()
            for rows, columns, cells in self.ranking(example)[:_ATTEMPTS]
        ]
        grids += grids[:1] or [[[0]]]  # there must be two
        return {f"attempt_{i + 1}": (grids + grids)[i] for i in range(_ATTEMPTS)}

    def _task_names(self) -> list[str]:
        """Names of the set's tasks; numbers, with a warning, where tasks.json does not tell."""
        file = Path(self.dataset.path or "") / "tasks.json"
        number = (self.arrays.puzzle_identifiers - 1) // self.dataset.identifiers_per_puzzle
        try:
            names = json.loads(file.read_text(encoding="utf-8"))["tasks"]
            return [str(names[i]) for i in number]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            logger.warning("%s does not name the tasks (%s); the submission numbers them", file,
                           error)  # fmt: skip
            return [str(i) for i in number]

    def write(self, folder: Path, suffix: str) -> list[Path]:
        """Write submission.json, and the votes for `add_votes`."""
        submission, votes = folder / f"submission{suffix}.json", folder / f"votes{suffix}.npz"
        submission.write_text(json.dumps(self.submission()) + "\n", encoding="utf-8")
        entries = [
            (example, *entry, answer)
            for example, ballot in sorted(self.ballots.items())
            for answer, entry in sorted(ballot.items())
        ]
        np.savez_compressed(
            votes,
            fingerprint=np.array(self.dataset.fingerprint),
            examples=np.array([e[0] for e in entries], np.int64),
            votes=np.array([e[1] for e in entries], np.int64),
            counts=np.array([e[2] for e in entries], np.int64),
            shapes=np.array([e[3][:2] for e in entries], np.int64).reshape(-1, 2),
            colours=np.frombuffer(b"".join(e[3][2] for e in entries), np.uint8),
        )
        return [submission, votes]

    def add_votes(self, file: Path) -> None:
        """Let the votes of another evaluation of the same set count, too.

        Raises:
            DataError: not a file of votes, or of another dataset.
        """
        try:
            with np.load(file, allow_pickle=False) as saved:
                parts = {key: saved[key] for key in saved.files}
            fingerprint = str(parts["fingerprint"])
            sizes = parts["shapes"].prod(axis=1)
            ends = np.cumsum(sizes)
            ballots: dict[int, Ballot] = {}
            for i, example in enumerate(parts["examples"]):
                cells = parts["colours"][ends[i] - sizes[i] : ends[i]].tobytes()
                answer = (*map(int, parts["shapes"][i]), cells)
                entry = [int(parts["votes"][i]), int(parts["counts"][i])]
                ballots.setdefault(int(example), {})[answer] = entry
        except (OSError, ValueError, KeyError, IndexError, EOFError) as error:
            raise DataError(f"{file} is not a file of votes ({error}).") from None
        if fingerprint != self.dataset.fingerprint:
            raise DataError(f"{file} holds votes on another dataset; use those of this one only.")
        self._add_ballots(ballots)
