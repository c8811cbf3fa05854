"""Small datasets that the tests of data/ share."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from data import SudokuConfig, read_dataset

HEADER = "source,question,answer,rating"


def to_text(grid: np.ndarray) -> str:
    return "".join("." if d == 0 else str(d) for d in grid)


@pytest.fixture(scope="session")
def puzzles():
    """40 unique 9×9 puzzles: questions, answers (40, 81), ratings (40,)."""
    from data.sudoku_solver import candidates

    return candidates(0, 40, box=(3, 3), seed=11, stream=1, low=24, high=30)


@pytest.fixture(scope="session")
def rows(puzzles):
    """The same as CSV lines."""
    return [f"test,{to_text(q)},{to_text(a)},{r}" for q, a, r in zip(*puzzles, strict=True)]


@pytest.fixture
def write_csv(tmp_path):
    """Write lines below a header to a plain or gzipped file; returns its path as text."""

    def write(name: str, lines: list[str], header: str = HEADER) -> str:
        path: Path = tmp_path / name
        text = "\n".join([header, *lines]) + "\n"
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def sudoku4(tmp_path_factory):
    """Folder of a small generated 4×4 dataset."""
    config = SudokuConfig(box=(2, 2), num_train=300, num_test=50)
    return config.prepare(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def sudoku9(tmp_path_factory):
    """A generated 9×9 training split with augmentation."""
    config = SudokuConfig(num_train=60, num_test=20)
    return read_dataset(config.prepare(tmp_path_factory.mktemp("datasets")), "train")


def arc_task(number: int) -> dict:
    """A made-up ARC task: grids of several sizes, the output is the input turned and recoloured."""
    rng = np.random.default_rng(number)

    def pair() -> dict:
        rows, columns = rng.integers(1, 31, 2)
        grid = rng.integers(0, 10, (rows, columns))
        return {"input": grid.tolist(), "output": ((grid.T + number) % 10).tolist()}

    return {"train": [pair() for _ in range(3)], "test": [pair() for _ in range(1 + number % 2)]}


def arc_set(first: int, count: int) -> dict[str, dict]:
    """Tasks by name, in the form that holds the answers, too."""
    return {f"task{n:04d}": arc_task(n) for n in range(first, first + count)}


def write_kaggle(folder: Path, name: str, tasks: dict[str, dict], *, solutions: bool = True) -> str:
    """Write tasks in Kaggle's form; the path of the challenges."""
    hidden = {
        key: {"train": t["train"], "test": [{"input": p["input"]} for p in t["test"]]}
        for key, t in tasks.items()
    }
    path = folder / f"arc-agi_{name}_challenges.json"
    path.write_text(json.dumps(hidden))
    if solutions:
        answers = {key: [p["output"] for p in t["test"]] for key, t in tasks.items()}
        (folder / f"arc-agi_{name}_solutions.json").write_text(json.dumps(answers))
    return str(path)
