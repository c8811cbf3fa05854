"""Sudokus from CSV: every row is validated; `.` or `0` is a blank. See data/tables.py."""

import logging
from pathlib import Path

import numpy as np

from data.progress import bar
from data.sudoku_rules import has_swap, is_solution
from data.sudoku_solver import solve
from data.tables import PuzzleTable, TextRows, read_table, refuse_rows

logger = logging.getLogger(__name__)

_QUICK_ROWS = 10_000  # rows that are checked without a search first
_SEARCHED_ROWS = 16_384  # rows of one search


def read_sudoku_csv(path: Path, box: tuple[int, int]) -> PuzzleTable:
    """Read and validate a whole file; digits, 0 blank.

    Every answer must be a valid solution that agrees with its question. That the solution is the
    only one is a matter of `require_unique`, as it takes a search.

    Raises:
        DataError: names the file and the first line that is wrong.
    """

    def parse(rows: TextRows) -> PuzzleTable:
        questions = _parse_grids(rows, box, "question")
        answers = _parse_grids(rows, box, "answer")
        differs = ((questions > 0) & (questions != answers)).any(axis=1)
        rows.refuse(differs, "the answer does not agree with the clues of the question")
        rows.refuse(
            ~is_solution(answers, box),
            "the answer is not a valid solution: a digit is twice in a row, a column or a box",
        )
        return PuzzleTable(questions, answers, rows.ratings(), rows.lines)

    return read_table(path, parse)


def _parse_grids(rows: TextRows, box: tuple[int, int], what: str) -> np.ndarray:
    n = box[0] * box[1]
    raw = rows.grids(what, n * n, f"data.box={list(box)}")
    digits = raw - np.uint8(ord("0"))  # wraps, so that what lies below "0" is large
    blank = (raw == ord(".")) | (raw == ord("0"))
    lowest, allowed = 1, f"the digits 1-{n}"
    if what == "question":
        digits = np.where(blank, np.uint8(0), digits)
        lowest, allowed = 0, f"{allowed} and . or 0 for a blank"
    rows.refuse_cells(what, (digits < lowest) | (digits > n), allowed)
    return digits


def require_unique(path: Path, table: PuzzleTable, box: tuple[int, int]) -> None:
    """Refuse puzzles with more than one solution (a search of each: about 0.1 ms for 9×9)."""
    complaint = "the puzzle has more than one solution (data.check_unique=false admits such)"
    some = table.take(slice(_QUICK_ROWS))  # most faults show before anything is compiled
    refuse_rows(path, some.lines, has_swap(some.questions, some.answers, box), complaint)
    logger.info("%s: checking that %d puzzles have one solution each", path.name, len(table))
    with bar(f"checking {path.name}", len(table), "puzzle") as progress:
        for start in range(0, len(table), _SEARCHED_ROWS):
            part = table.take(slice(start, start + _SEARCHED_ROWS))
            counts, _, _ = solve(part.questions, box)
            refuse_rows(path, part.lines, counts != 1, complaint)
            progress.update(len(part))
