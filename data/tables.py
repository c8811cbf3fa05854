"""Puzzles from CSV files: reading in pieces, complaints with file and line, selection, leaks.

The form is that of Sudoku-Extreme and Maze-30x30-Hard: a header `source,question,answer,rating`,
then one puzzle a row, cells in row-major order; `rating` may be missing from the header. Plain,
gzip or xz.
"""

import csv
import gzip
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from data.errors import DataError
from data.hashing import hash32
from data.progress import progress

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".csv.gz", ".csv.xz")
_CHUNK_ROWS = 32768  # rows that are held as text at one time
_COLUMNS = ("question", "answer")
_SUBSAMPLE = 0x21  # stream of the hash


@dataclass(frozen=True)
class PuzzleTable:
    """Puzzles as numbers below 256; what they mean is a matter of the dataset."""

    questions: np.ndarray  # (puzzles, cells) uint8
    answers: np.ndarray  # (puzzles, cells) uint8
    ratings: np.ndarray | None  # (puzzles,) int32
    lines: np.ndarray | None = None  # (puzzles,) int64 line in the file, where there is one

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, rows: np.ndarray | slice) -> "PuzzleTable":
        """The puzzles of a boolean mask, an index vector or a slice."""
        parts = (self.questions, self.answers, self.ratings, self.lines)
        return PuzzleTable(*(None if part is None else part[rows] for part in parts))


@dataclass(frozen=True)
class TextRows:
    """Some rows of a file as text, with what a complaint about them needs."""

    path: Path
    lines: np.ndarray  # (rows,) line in the file
    columns: dict[str, list[str]]

    def refuse(self, bad: np.ndarray, complaint: str) -> None:
        """Raise DataError for the first row of the mask `bad`, if there is one."""
        refuse_rows(self.path, self.lines, bad, complaint)

    def grids(self, name: str, cells: int, needed_by: str) -> np.ndarray:
        """A column as ASCII codes (rows, cells) uint8; what is not ASCII becomes `?`.

        Raises DataError unless every text has so many characters; `needed_by` says why.
        """
        texts = [t if len(t) == cells else t.strip() for t in self.columns[name]]
        lengths = np.array([len(text) for text in texts])
        if (lengths != cells).any():
            first = int((lengths != cells).argmax())
            raise DataError(
                f"{self.path}, line {self.lines[first]}: the {name} has {lengths[first]} cells, "
                f"but {needed_by} needs {cells}."
            )
        codes = np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8)
        return codes.reshape(-1, cells)

    def refuse_cells(self, name: str, bad: np.ndarray, allowed: str) -> None:
        """Raise DataError for the first cell of the mask `bad` (rows, cells), if there is one."""
        if bad.any():
            row, cell = np.argwhere(bad)[0]
            raise DataError(
                f"{self.path}, line {self.lines[row]}: the {name} holds "
                f"{self.columns[name][row][cell]!r} in cell {cell + 1}; allowed are {allowed}."
            )

    def ratings(self) -> np.ndarray | None:
        """The column `rating` as (rows,) int32, or None where there is none."""
        if "rating" not in self.columns:
            return None
        texts = [text.strip() for text in self.columns["rating"]]
        bad = np.array([not (t.isascii() and t.isdigit() and len(t) < 10) for t in texts])
        if bad.any():
            first = int(bad.argmax())
            raise DataError(
                f"{self.path}, line {self.lines[first]}: the rating must be a whole number from "
                f"0 on, not {texts[first][:20]!r}."
            )
        return np.array(texts, dtype=np.int32)


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    """Text of a plain or compressed file; whatever is wrong with it becomes a DataError."""
    name = path.name.lower()
    kind = "gzip" if name.endswith(".gz") else "xz"
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}).") from None
    except gzip.BadGzipFile:
        raise DataError(f"{path} ends in .gz, but is not a gzip file.") from None
    except lzma.LZMAError:
        raise DataError(f"{path} is not an xz file, or is damaged.") from None
    except (EOFError, zlib.error):
        raise DataError(f"{path} is a truncated or damaged {kind} file.") from None
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


def _pieces(path: Path) -> Iterator[TextRows]:
    """The rows of a file, some thousands at a time."""
    with _open(path) as stream:
        reader = csv.reader(stream)
        header = _read_header(path, reader)
        wanted = [name for name in (*_COLUMNS, "rating") if name in header]
        places = [header.index(name) for name in wanted]
        lines: list[int] = []
        columns: list[list[str]] = [[] for _ in wanted]

        def piece() -> TextRows:
            return TextRows(path, np.array(lines), dict(zip(wanted, columns, strict=True)))

        for row in reader:
            if not row:  # a blank line
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(row)} fields where the header has "
                    f"{len(header)}."
                )
            lines.append(reader.line_num)
            for column, place in zip(columns, places, strict=True):
                column.append(row[place])
            if len(lines) == _CHUNK_ROWS:
                yield piece()
                lines, columns = [], [[] for _ in wanted]
        if lines:
            yield piece()


def read_table(path: Path, parse: Callable[[TextRows], PuzzleTable]) -> PuzzleTable:
    """Read a whole file, in pieces so that the text is never held at once.

    Raises:
        DataError: names the file and the first line that is wrong.
    """
    chunks: list[list[np.ndarray | None]] = []
    for rows in progress(_pieces(path), f"reading {path.name}", unit="piece"):
        table = parse(rows)
        chunks.append([table.questions, table.answers, table.ratings, table.lines])
    if not chunks:
        raise DataError(f"{path} has no puzzles below its header.")
    joined = []
    for part in range(4):  # one at a time, giving up the pieces: 4 million puzzles fit in 1 GiB
        arrays = [chunk[part] for chunk in chunks]
        joined.append(None if arrays[0] is None else np.concatenate(arrays))
        for chunk in chunks:
            chunk[part] = None
    return PuzzleTable(*joined)


def refuse_rows(path: Path, lines: np.ndarray, bad: np.ndarray, complaint: str) -> None:
    """Raise DataError for the first row of the mask `bad`, if there is one."""
    if bad.any():
        more = f" ({int(bad.sum())} such rows)" if bad.sum() > 1 else ""
        raise DataError(f"{path}, line {lines[int(bad.argmax())]}: {complaint}{more}.")


# ---------------------------------------------------------------------------------------- choosing


def refuse_shared(train: PuzzleTable, train_file: Path, test: PuzzleTable, test_file: Path) -> None:
    """Refuse a question that is in both files; tell how many the training file repeats."""
    # Python's hash of the rows; it differs between processes, which does not matter here.
    known, own = (
        np.fromiter((hash(row.tobytes()) for row in table.questions), np.int64, len(table))
        for table in (train, test)
    )
    repeated = len(known) - len(np.unique(known))
    if repeated:
        logger.info("%s: %d puzzles are repeated", train_file.name, repeated)
    candidates = train.take(np.isin(known, own))
    lines = {
        row.tobytes(): line
        for row, line in zip(candidates.questions, candidates.lines, strict=True)
    }
    shared = [
        (lines[row.tobytes()], line)
        for row, line in zip(test.questions, test.lines, strict=True)
        if row.tobytes() in lines
    ]
    if shared:
        raise DataError(
            f"{test_file}, line {shared[0][1]}: this puzzle is in {train_file}, line "
            f"{shared[0][0]}, too ({len(shared)} shared in all); remove them from one of the files."
        )


def select_ratings(table: PuzzleTable, path: Path, limits: tuple[int, int]) -> PuzzleTable:
    """Keep the puzzles with a rating from low to high."""
    low, high = limits
    kept = table.take((table.ratings >= low) & (table.ratings <= high))
    if not len(kept):
        raise DataError(
            f"{path} has no puzzle with a rating from {low} to {high}; change data.min_rating or "
            "data.max_rating."
        )
    return kept


def subsample(table: PuzzleTable, path: Path, count: int, seed: int) -> PuzzleTable:
    """A seeded choice of rows, in the order of the file."""
    if count > len(table):
        raise DataError(
            f"data.max_train={count} is more than the {len(table)} puzzles to choose from in "
            f"{path}; leave it out to take all."
        )
    keys = hash32(_SUBSAMPLE, seed, np.arange(len(table)))
    return table.take(np.sort(np.argsort(keys, kind="stable")[:count]))
