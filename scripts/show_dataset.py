"""A sheet of examples of a dataset as PNG: question, answer and what augmentation makes of them.

    python scripts/show_dataset.py datasets/sudoku-9x9-…                  → sudoku-9x9-….png
    python scripts/show_dataset.py datasets/arc-… --set evaluation --count 8 --out arc.png

The dataset is what `python -m data.build` or `pretrain.py` made, or any folder in the format of
the HRM and TRM repositories. Of a test split the augmentations are those of the training.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import DataError, PuzzleDataset, read_dataset
from data.arc_grids import decode
from data.hashing import hash32
from data.maze_rules import FREE, GOAL, PATH, START, WALL
from data.puzzles import TokenStream
from scripts.arguments import Parser, whole
from training.errors import fail

_CHOICE = 0x71  # stream of the hash
_ARC = ("#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00", "#aaaaaa", "#f012be", "#ff851b",
        "#7fdbff", "#870c25")  # fmt: skip
_MAZE = {0: "#ff00ff", WALL: "#222222", FREE: "#ffffff", START: "#2ecc40", GOAL: "#ff4136",
         PATH: "#0074d9"}  # fmt: skip


def rows_of(
    dataset: PuzzleDataset, name: str, count: int, augmentations: int, seed: int
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Pairs (inputs, labels) of tokens: of each chosen example the original, then augmented."""
    import torch

    from data import build_augmentation
    from data.stores import TokenStore, WindowStore

    part, arrays, cpu = dataset.part_of(name), dataset.sets[name], torch.device("cpu")
    keys = hash32(_CHOICE, seed, np.arange(len(arrays)))
    chosen = np.sort(np.argsort(keys, kind="stable")[:count])
    if isinstance(arrays, TokenStream):
        place = np.concatenate([np.arange(0, len(s) - 1, arrays.seq_len) for s in arrays.shards])
        inputs, labels = WindowStore([arrays], part, cpu).gather(
            place[chosen], torch.from_numpy(place[chosen])
        )
        return [[(i.numpy(), o.numpy())] for i, o in zip(inputs, labels, strict=True)]
    example = torch.from_numpy(chosen)
    tokens = TokenStore([arrays], part, cpu).gather(chosen, example)
    sizes = np.diff(arrays.puzzle_indices)
    identifier = np.repeat(arrays.puzzle_identifiers, sizes)[chosen].astype(np.int64)
    out = [tokens]
    if part.augmentation is not None:
        augment = build_augmentation(part.augmentation, seed=seed, device=cpu)
        for index in range(1, augmentations + 1):
            indices = torch.full_like(example, index)
            out.append(augment(*tokens, example, indices, torch.from_numpy(identifier)))
    return [
        [(inputs[row].numpy(), labels[row].numpy()) for inputs, labels in out]
        for row in range(len(chosen))
    ]


def draw(axis: Any, tokens: np.ndarray, task: dict[str, Any], question: np.ndarray | None) -> None:
    """Draw one grid; `question` is what an answer belongs to."""
    name = task.get("name")
    if name == "sudoku":
        draw_sudoku(axis, tokens, task["box"], question)
    elif name == "maze":
        picture = tokens.reshape(task["size"])
        axis.imshow(colours(picture, _MAZE), interpolation="nearest")
    elif name == "arc":
        grid = decode(tokens, anywhere=True)
        if grid.size:
            axis.imshow(colours(grid, dict(enumerate(_ARC))), interpolation="nearest")
            axis.set_xticks(np.arange(-0.5, grid.shape[1]), minor=True)
            axis.set_yticks(np.arange(-0.5, grid.shape[0]), minor=True)
            axis.grid(which="minor", color="#555555", linewidth=0.4)
            axis.tick_params(which="both", length=0)
    else:
        side = int(len(tokens) ** 0.5)
        square = tokens.reshape(side, side) if side * side == len(tokens) else tokens[None, :]
        axis.imshow(square, interpolation="nearest", aspect="auto" if side == 1 else "equal")


def colours(grid: np.ndarray, table: dict[int, str]) -> np.ndarray:
    """Numbers (rows, columns) → RGB (rows, columns, 3)."""
    from matplotlib.colors import to_rgb

    lookup = np.array([to_rgb(table.get(i, "#ff00ff")) for i in range(max(table) + 1)])
    return lookup[np.clip(grid, 0, len(lookup) - 1)]


def draw_sudoku(axis: Any, tokens: np.ndarray, box: list[int], question: np.ndarray | None) -> None:
    """Digits; in an answer, those that were not given are blue."""
    n = box[0] * box[1]
    axis.set_xlim(0, n)
    axis.set_ylim(n, 0)
    axis.set_aspect("equal")
    for line in range(n + 1):
        axis.axhline(line, color="black", linewidth=1.6 if line % box[0] == 0 else 0.4)
        axis.axvline(line, color="black", linewidth=1.6 if line % box[1] == 0 else 0.4)
    for cell, token in enumerate(tokens):
        if token > 1:
            given = question is None or question[cell] > 1
            axis.text(cell % n + 0.5, cell // n + 0.55, str(token - 1), ha="center", va="center",
                      fontsize=60 / n, color="black" if given else "#0055cc")  # fmt: skip


def show_text(tokens: np.ndarray) -> str:
    """Bytes as text, what cannot be shown as a dot."""
    raw = bytes(int(t) for t in tokens if 0 <= t < 256).decode("utf-8", "replace")
    return "".join(c if c.isprintable() and c != "�" else "·" for c in raw)


def sheet(dataset: PuzzleDataset, name: str, count: int, augmentations: int, seed: int) -> Any:
    """The figure: one line per example."""
    from matplotlib.figure import Figure

    task = dataset.part_of(name).task or {}
    rows = rows_of(dataset, name, count, augmentations, seed)
    title = f"{dataset.path}, {dataset.split}, {name}: {len(dataset.sets[name])} examples"
    if task.get("name") == "text":
        figure = Figure(figsize=(11, 0.5 + 1.1 * len(rows)))
        figure.suptitle(title, fontsize=8)
        for number, ((tokens, _),) in enumerate(rows):
            shown = show_text(tokens)
            lines = [shown[i : i + 128] for i in range(0, min(len(shown), 640), 128)]
            figure.text(0.02, 0.95 - 0.93 * (number + 0.5) / len(rows), "\n".join(lines),
                        family="monospace", fontsize=7, va="center", parse_math=False)  # fmt: skip
        return figure
    columns = 2 * max(map(len, rows))
    figure = Figure(figsize=(1.9 * columns, 0.4 + 1.9 * len(rows)), layout="constrained")
    figure.suptitle(title, fontsize=8)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, pairs in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
        for number, (inputs, labels) in enumerate(pairs):
            draw(line[2 * number], inputs, task, None)
            draw(line[2 * number + 1], labels, task, inputs)
    for number in range(columns // 2):
        what = "" if number == 0 else f", augmentation {number}"
        axes[0][2 * number].set_title(f"question{what}", fontsize=7)
        axes[0][2 * number + 1].set_title(f"answer{what}", fontsize=7)
    return figure


def main(arguments: list[str]) -> None:
    """Parse the arguments, draw, write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="dataset folder")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--set", help="set of the split; default: its first")
    parser.add_argument("--count", type=whole(1, 100), default=6, help="examples")
    parser.add_argument(
        "--augmentations", type=whole(0, 20), default=2, help="of each, beside the original"
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="which examples")
    parser.add_argument("--out", type=Path, help="default: the folder's name.png")
    given = parser.parse_args(arguments)
    try:
        dataset = read_dataset(given.path, given.split)
        name = given.set or next(iter(dataset.sets))
        if name not in dataset.sets:
            raise DataError(f"--set {name}: {given.path} has the sets {', '.join(dataset.sets)}.")
        out = given.out or Path(f"{given.path.resolve().name}.png")
        if out.suffix.lower() != ".png":
            raise DataError(f"--out {out} must end in .png.")
        if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
            raise DataError(f"--out {out}: {out.parent} is not a folder that can be written to.")
        figure = sheet(dataset, name, given.count, given.augmentations, given.seed)
        figure.savefig(out, dpi=110)
    except (DataError, OSError) as error:
        fail(str(error))
    print(out)


if __name__ == "__main__":
    main(sys.argv[1:])
