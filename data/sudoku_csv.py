"""Sudokus from CSV: every row is validated, and every complaint names the file and the line.

The form is that of Sudoku-Extreme: a header `source,question,answer,rating`, then one puzzle a
row, cells in row-major order, `.` or `0` blank; `rating` may be missing from the header. Plain
or gzip.
"""

import csv
import gzip
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from data.errors import DataError
from data.sudoku_rules import has_swap, is_solution
from data.sudoku_solver import solve

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".csv.gz")
_CHUNK_ROWS = 65536  # rows that are held as text at one time
_QUICK_ROWS = 10_000  # rows that are checked without a search first
_COLUMNS = ("question", "answer")


@dataclass(frozen=True)
class SudokuTable:
    """Puzzles as digits, 0 blank."""

    questions: np.ndarray  # (puzzles, n²) uint8
    answers: np.ndarray  # (puzzles, n²) uint8
    ratings: np.ndarray | None  # (puzzles,) int32
    lines: np.ndarray | None = None  # (puzzles,) int64 line in the file, where there is one

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, rows: np.ndarray | slice) -> "SudokuTable":
        """The puzzles of a boolean mask, an index vector or a slice."""
        parts = (self.questions, self.answers, self.ratings, self.lines)
        return SudokuTable(*(None if part is None else part[rows] for part in parts))


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    """Text of a plain or gzipped file; whatever is wrong with it becomes a DataError."""
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as stream:
                yield stream
        else:
            with path.open(encoding="utf-8-sig", newline="") as stream:
                yield stream
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}).") from None
    except gzip.BadGzipFile:
        raise DataError(f"{path} ends in .gz, but is not a gzip file.") from None
    except (EOFError, zlib.error):
        raise DataError(f"{path} is a truncated or damaged gzip file.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error}).") from None


def _read_header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    header = [name.strip().lower() for name in next(reader, [])]
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        raise DataError(
            f"{path}, line 1: the header must be source,question,answer,rating, "
            f"but lacks {' and '.join(missing)}."
        )
    if len(set(header)) != len(header):
        raise DataError(f"{path}, line 1: the header names a column twice.")
    return header


def check_header(path: Path) -> bool:
    """Refuse a file that does not begin as it should; tell whether it has ratings."""
    with _open(path) as stream:
        return "rating" in _read_header(path, csv.reader(stream))


def read_sudoku_csv(path: Path, box: tuple[int, int]) -> SudokuTable:
    """Read and validate a whole file, in pieces so that the text is never held at once.

    Every answer must be a valid solution that agrees with its question. That the solution is the
    only one is a matter of `require_unique`, as it takes a search.

    Raises:
        DataError: names the file and the first line that is wrong.
    """
    chunks: list[SudokuTable] = []
    with _open(path) as stream:
        reader = csv.reader(stream)
        header = _read_header(path, reader)
        rows: list[tuple[int, list[str]]] = []
        for row in reader:
            if not row:  # a blank line
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(row)} fields where the header has "
                    f"{len(header)}."
                )
            rows.append((reader.line_num, row))
            if len(rows) == _CHUNK_ROWS:
                chunks.append(_parse(path, header, rows, box))
                rows = []
        if rows:
            chunks.append(_parse(path, header, rows, box))
    if not chunks:
        raise DataError(f"{path} has no puzzles below its header.")
    return SudokuTable(
        np.concatenate([c.questions for c in chunks]),
        np.concatenate([c.answers for c in chunks]),
        np.concatenate([c.ratings for c in chunks]) if "rating" in header else None,
        np.concatenate([c.lines for c in chunks]),
    )


def _parse(
    path: Path, header: list[str], rows: list[tuple[int, list[str]]], box: tuple[int, int]
) -> SudokuTable:
    lines = np.array([line for line, _ in rows])

    def column(name: str) -> list[str]:
        index = header.index(name)
        return [row[index].strip() for _, row in rows]

    questions = _parse_grids(path, lines, column("question"), box, "question")
    answers = _parse_grids(path, lines, column("answer"), box, "answer")
    differs = ((questions > 0) & (questions != answers)).any(axis=1)
    _refuse(path, lines, differs, "the answer does not agree with the clues of the question")
    _refuse(
        path, lines, ~is_solution(answers, box),
        "the answer is not a valid solution: a digit is twice in a row, a column or a box",
    )  # fmt: skip
    ratings = None
    if "rating" in header:
        texts = column("rating")
        bad = np.array([not (t.isascii() and t.isdigit() and len(t) < 10) for t in texts])
        if bad.any():
            first = int(bad.argmax())
            raise DataError(
                f"{path}, line {lines[first]}: the rating must be a whole number from 0 on, "
                f"not {texts[first][:20]!r}."
            )
        ratings = np.array(texts, dtype=np.int32)
    return SudokuTable(questions, answers, ratings, lines)


def _parse_grids(
    path: Path, lines: np.ndarray, texts: list[str], box: tuple[int, int], what: str
) -> np.ndarray:
    n = box[0] * box[1]
    lengths = np.array([len(text) for text in texts])
    if (lengths != n * n).any():
        first = int((lengths != n * n).argmax())
        raise DataError(
            f"{path}, line {lines[first]}: the {what} has {lengths[first]} cells, but data.box="
            f"{list(box)} needs {n * n}."
        )
    raw = np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8).reshape(-1, n * n)
    digits = raw - np.uint8(ord("0"))  # wraps, so that what lies below "0" is large
    blank = (raw == ord(".")) | (raw == ord("0"))
    lowest, allowed = 1, f"the digits 1-{n}"
    if what == "question":
        digits = np.where(blank, np.uint8(0), digits)
        lowest, allowed = 0, f"{allowed} and . or 0 for a blank"
    bad = (digits < lowest) | (digits > n)
    if bad.any():
        row, cell = np.argwhere(bad)[0]
        raise DataError(
            f"{path}, line {lines[row]}: the {what} holds {texts[row][cell]!r} in cell {cell + 1}; "
            f"allowed are {allowed}."
        )
    return digits


def _refuse(path: Path, lines: np.ndarray, bad: np.ndarray, complaint: str) -> None:
    if bad.any():
        more = f" ({int(bad.sum())} such rows)" if bad.sum() > 1 else ""
        raise DataError(f"{path}, line {lines[int(bad.argmax())]}: {complaint}{more}.")


def require_unique(path: Path, table: SudokuTable, box: tuple[int, int]) -> None:
    """Refuse puzzles with more than one solution (a search of each: about 0.1 ms for 9×9)."""
    complaint = "the puzzle has more than one solution (data.check_unique=false admits such)"
    some = table.take(slice(_QUICK_ROWS))  # most faults show before anything is compiled
    _refuse(path, some.lines, has_swap(some.questions, some.answers, box), complaint)
    logger.info("%s: checking that %d puzzles have one solution each", path.name, len(table))
    counts, _, _ = solve(table.questions, box)
    _refuse(path, table.lines, counts != 1, complaint)
