"""What is true of every maze: cells, shortest paths, validity of a path.

Tokens as in the published data: pad 0, wall `#` 1, free ` ` 2, start `S` 3, goal `G` 4, path `o` 5.
A maze is (cells,) uint8 in row-major order. Moves go to the four neighbours.
"""

from functools import lru_cache

import numpy as np

CHARACTERS = "# SGo"  # token 1 on
WALL, FREE, START, GOAL, PATH = 1, 2, 3, 4, 5
VOCAB_SIZE = 6


@lru_cache
def around(size: tuple[int, int]) -> np.ndarray:
    """(cells, 4) int32: the cell below, left, right and above each, -1 outside."""
    from data import maze_kernels

    return maze_kernels.neighbours(*size)


def label_mazes(questions: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The published labels: breadth-first from S, neighbours down, left, right, up.

    Args:
        questions: (mazes, cells) uint8 with one start and one goal each.
        size: rows and columns.

    Returns:
        answers (mazes, cells) uint8: the questions with the path marked; moves from start to goal
        (mazes,) int32, -1 where there is no way.
    """
    from data import maze_kernels

    paths = np.zeros(questions.shape, bool)
    lengths = np.zeros(len(questions), np.int32)
    starts, goals = (np.argmax(questions == token, axis=1) for token in (START, GOAL))
    maze_kernels.label(questions == WALL, around(size), starts, goals, paths, lengths)
    return np.where(paths, np.uint8(PATH), questions), lengths


def path_lengths(
    questions: np.ndarray, answers: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Judge answers by the rules, not by the label.

    Args:
        questions, answers: (mazes, cells) uint8.
        size: rows and columns.

    Returns:
        moves of the way that the answer marks (mazes,) int32, 0 where it is not one whole way from
        start to goal and nothing else, or where it alters the maze; moves of a shortest way
        (mazes,) int32. The answer is a shortest way where the two are equal.
    """
    from data import maze_kernels

    marked = answers == PATH
    ends = (questions == START) | (questions == GOAL)
    intact = (np.where(marked, np.uint8(FREE), answers) == questions).all(axis=1)
    starts, goals = (np.argmax(questions == token, axis=1) for token in (START, GOAL))
    inside, best = np.zeros((2, len(questions)), np.int32)
    unused = np.zeros(questions.shape, bool)
    maze_kernels.label(~(marked | ends), around(size), starts, goals, unused, inside)
    _, best = label_mazes(questions, size)
    # A shortest way inside the marked cells that uses all of them is the way that they mark.
    whole = intact & (inside > 0) & (inside - 1 == marked.sum(axis=1))
    return np.where(whole, inside, 0), best
