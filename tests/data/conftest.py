"""Small datasets that the tests of data/ share."""

import gzip
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
