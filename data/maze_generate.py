"""Generated mazes with the distribution of Maze-30x30-Hard.

The wall share is drawn from a range (0.3 to 0.5), every cell is a wall with that chance on its own,
start and goal are any two free cells, and a maze is kept if its shortest path is long enough (109
moves for 30×30). Drawn one by one, 60,000 mazes are thrown away for each that is kept. Here a
layout is kept with a probability proportional to the share of its pairs of cells that are far
enough apart, and one of those pairs is its start and goal: the same distribution, at a
thousandth of the work.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data.errors import DataError
from data.hashing import hash32
from data.maze_rules import FREE, GOAL, START, WALL, around, label_mazes
from data.progress import bar
from data.tables import PuzzleTable

logger = logging.getLogger(__name__)

_TRAIN, _TEST = 1, 2  # streams of random numbers
_HIGH, _LOW, _KEEP = 0x61, 0x62, 0x63  # streams of the hash
_BATCH = 4096  # layouts made at a time; the result does not depend on it
_PIECE = 256  # … by one thread
_PILOT = 256  # layouts with far pairs that tell how likely to keep one
_PILOT_SHARE = 99  # percentile of their shares that is always kept
_PATIENCE = 1_000_000  # layouts without enough that qualify, before giving up


@dataclass(frozen=True)
class MazeSpec:
    """What to generate."""

    size: tuple[int, int]
    num_train: int
    num_test: int
    seed: int
    walls: tuple[float, float]
    min_path: int


def generate_mazes(spec: MazeSpec) -> tuple[PuzzleTable, PuzzleTable]:
    """Make the training and the test mazes: distinct up to symmetry, reproducible by seed.

    Raises:
        DataError: too few mazes have a path of the asked length.
    """
    seen: set[bytes] = set()
    tables = []
    for key, count, stream in (("num_train", spec.num_train, _TRAIN),
                               ("num_test", spec.num_test, _TEST)):  # fmt: skip
        questions = _collect(spec, key, count, stream, seen)
        answers, lengths = label_mazes(questions, spec.size)
        logger.info("%d %s mazes: %.1f %% walls, paths of %.1f moves", count, key[4:],
                    100 * (questions == WALL).mean(), lengths.mean())  # fmt: skip
        tables.append(PuzzleTable(questions, answers, lengths + np.int32(1)))
    return tables[0], tables[1]


def _collect(spec: MazeSpec, key: str, count: int, stream: int, seen: set[bytes]) -> np.ndarray:
    """The first `count` mazes of a stream that qualify and are new: (count, cells) uint8."""
    found: list[np.ndarray] = []
    pilot: list[float] = []
    waiting: list[tuple[np.ndarray, float, int]] = []  # until the pilot is complete
    first = idle = 0
    with bar(f"generating {key[4:]} mazes", count, "maze") as progress:
        while len(found) < count:
            questions, shares = _candidates(spec, stream, first, _BATCH)
            qualified = np.flatnonzero(shares > 0)
            waiting += [(questions[i], shares[i], first + int(i)) for i in qualified]
            pilot += shares[qualified[: max(0, _PILOT - len(pilot))]].tolist()
            first += _BATCH
            idle += _BATCH  # layouts since the last new maze
            if len(pilot) < _PILOT and first < _PATIENCE:
                continue
            if not pilot or idle >= _PATIENCE:
                raise DataError(
                    f"data.{key}={count}: only {len(found)} mazes were found in {first} tries; "
                    "ask for fewer, or relax data.min_path or data.walls."
                )
            always = np.percentile(pilot, _PILOT_SHARE)
            for question, share, number in waiting:
                draw = hash32(_KEEP, spec.seed, stream, number) / 2**32
                if draw * always >= share or len(found) == count:
                    continue
                name = canonical(question, spec.size)
                if name not in seen:
                    seen.add(name)
                    found.append(question)
                    progress.update()
                    idle = 0
            waiting = []
    return np.stack(found)


def _candidates(
    spec: MazeSpec, stream: int, first: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mazes number first..first+count-1 of a stream, and their shares of far pairs."""
    from data import maze_kernels

    number = np.arange(first, first + count)
    high, low = (hash32(s, spec.seed, stream, number).astype(np.uint64) for s in (_HIGH, _LOW))
    seeds = (high << np.uint64(32)) | low
    cells = spec.size[0] * spec.size[1]
    walls = np.zeros((count, cells), bool)
    starts, goals = np.zeros((2, count), np.int64)
    shares = np.zeros(count)
    links = around(spec.size)

    def work(begin: int) -> None:
        part = slice(begin, begin + _PIECE)
        maze_kernels.candidates(
            seeds[part], links, *spec.walls, spec.min_path,
            walls[part], starts[part], goals[part], shares[part],
        )  # fmt: skip

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(work, range(0, count, _PIECE)))
    questions = np.where(walls, np.uint8(WALL), np.uint8(FREE))
    rows = np.arange(count)
    questions[rows, starts] = START
    questions[rows, goals] = GOAL
    return questions, shares


def canonical(question: np.ndarray, size: tuple[int, int]) -> bytes:
    """The same for all mazes that are rotations and reflections of each other."""
    grid = question.reshape(size)
    turned = [np.rot90(grid, k) for k in range(4)]
    return min(bytes(view.shape) + view.tobytes() for g in turned for view in (g, g.T))
