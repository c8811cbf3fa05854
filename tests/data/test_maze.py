"""Mazes: the published labels, the generator's distribution, what the rules say of answers."""

import gzip
import lzma
import os
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from data import EvalLoader, MazeConfig, ScoredRows, TrainLoader, build_scorer, read_dataset
from data.augment_grids import DihedralAugmentation
from data.maze_generate import MazeSpec, canonical, generate_mazes
from data.maze_rules import CHARACTERS, FREE, GOAL, PATH, START, WALL, label_mazes, path_lengths

CPU = torch.device("cpu")
PUBLISHED = os.environ.get("LOOPWRIGHT_MAZES")  # a folder with maze_{train,test}.csv.xz


def tokens(*rows: str) -> np.ndarray:
    return np.array([[CHARACTERS.index(c) + 1 for c in "".join(rows)]], np.uint8)


def text(grid: np.ndarray) -> str:
    return "".join(CHARACTERS[t - 1] for t in grid)


def search(question: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Breadth-first in plain Python: down, left, right, up."""
    rows, columns = size
    start, goal = (int(np.argmax(question == t)) for t in (START, GOAL))
    parent, queue = {start: None}, deque([start])
    while queue:
        cell = queue.popleft()
        row, column = divmod(cell, columns)
        for down, right in ((1, 0), (0, -1), (0, 1), (-1, 0)):
            r, c = row + down, column + right
            there = r * columns + c
            free = 0 <= r < rows and 0 <= c < columns and question[there] != WALL
            if free and there not in parent:
                parent[there] = cell
                queue.append(there)
    answer, length, cell = question.copy(), 0, goal
    if goal not in parent:
        return answer, -1
    while (cell := parent[cell]) is not None:
        length += 1
        if cell != start:
            answer[cell] = PATH
    return answer, length


@pytest.fixture(scope="module")
def small():
    spec = MazeSpec((8, 9), 60, 40, seed=3, walls=(0.3, 0.5), min_path=9)
    return spec, *generate_mazes(spec)


def test_ties_are_broken_down_left_right_up():
    for rows, expected in (
        (("S ", " G"), "S oG"),  # down before right
        ((" S", "G "), " SGo"),
        (("G ", " S"), "G oS"),  # left before up
    ):
        answer, length = label_mazes(tokens(*rows), (2, 2))
        assert text(answer[0]) == expected and length[0] == 2
    open_room = tokens("S    ", "     ", "    G")
    assert text(label_mazes(open_room, (3, 5))[0][0]) == "S    o    ooooG"


def test_labels_are_those_of_a_plain_search(small):
    rng = np.random.default_rng(0)
    questions = np.where(rng.random((200, 72)) < 0.35, WALL, FREE).astype(np.uint8)
    questions[:, 5], questions[:, 60] = START, GOAL
    answers, lengths = label_mazes(questions, (8, 9))
    for question, answer, length in zip(questions, answers, lengths, strict=True):
        expected, moves = search(question, (8, 9))
        assert length == moves and (answer == expected).all()
    assert 20 < (lengths < 0).sum() < 180


def test_generated_mazes_are_as_asked(small):
    spec, train, test = small
    assert len(train) == 60 and len(test) == 40
    for table in (train, test):
        assert ((table.questions == START).sum(1) == 1).all()
        assert ((table.questions == GOAL).sum(1) == 1).all()
        answers, lengths = label_mazes(table.questions, spec.size)
        assert (answers == table.answers).all() and (table.ratings == lengths + 1).all()
        assert lengths.min() >= 9
    kinds = {canonical(q, spec.size) for t in (train, test) for q in t.questions}
    assert len(kinds) == 100  # no maze is a rotation or reflection of another one


def test_generation_is_reproducible_and_seeded(small, monkeypatch):
    spec, train, _ = small
    monkeypatch.setattr("data.maze_generate._BATCH", 512)
    monkeypatch.setattr("data.maze_generate._PIECE", 100)
    again, _ = generate_mazes(spec)
    assert (again.questions == train.questions).all()
    other, _ = generate_mazes(MazeSpec((8, 9), 60, 1, seed=4, walls=(0.3, 0.5), min_path=9))
    assert (other.questions != train.questions).any()


def test_the_shortcut_keeps_the_distribution_of_drawing_one_by_one():
    """Means of walls and lengths against plain rejection, on a size where that is quick."""
    size, least = (6, 6), 8
    spec = MazeSpec(size, 1500, 1, seed=0, walls=(0.3, 0.5), min_path=least)
    made, _ = generate_mazes(spec)
    rng = np.random.default_rng(1)
    walls = rng.random((400_000, 36)) < rng.uniform(0.3, 0.5, (400_000, 1))
    questions = np.where(walls, WALL, FREE).astype(np.uint8)
    ends = np.argsort(rng.random(questions.shape) + walls, axis=1)[:, :2]  # two free cells
    enough = (~walls).sum(1) >= 2
    questions[np.arange(len(questions)), ends[:, 0]] = START
    questions[np.arange(len(questions)), ends[:, 1]] = GOAL
    questions = questions[enough]
    _, lengths = label_mazes(questions, size)
    kept, lengths = questions[lengths >= least], lengths[lengths >= least]
    assert len(kept) > 3000
    for ours, plain in (
        ((made.questions == WALL).sum(1), (kept == WALL).sum(1)),
        (made.ratings - 1, lengths),
    ):
        error = np.hypot(ours.std() / len(ours) ** 0.5, plain.std() / len(plain) ** 0.5)
        assert abs(ours.mean() - plain.mean()) < 4 * error + 0.05


def test_symmetry_ids_tell_how_a_maze_was_turned(tmp_path):
    keys = {"size": (6, 6), "num_train": 20, "num_test": 8, "min_path": 4, "seed": 1}
    folder = MazeConfig(**keys, num_aug=7, symmetry_ids=True).prepare(tmp_path)
    train, test = (read_dataset(folder, split) for split in ("train", "test"))
    assert train.num_puzzle_identifiers == test.num_puzzle_identifiers == 8
    turn = DihedralAugmentation((6, 6), device=CPU)
    mazes, paths = (torch.from_numpy(np.array(x)).int() for x in
                    (train.sets["all"].inputs, train.sets["all"].labels))  # fmt: skip
    expected = set()
    for element in range(8):
        turned = turn(mazes, paths, None, torch.full((20,), element))
        expected |= {(element, *row.tolist()) for row in torch.cat(turned, dim=1)}
    loader = TrainLoader(train, global_batch_size=20, seed=0, num_aug=7, device=CPU)
    seen = set()
    for step in range(30):
        batch = loader.batch(step)
        rows = torch.cat((batch["puzzle_ids"][:, None], batch["inputs"], batch["labels"]), dim=1)
        seen |= {tuple(row.tolist()) for row in rows}
    assert seen <= expected and {row[0] for row in seen} == set(range(8))
    rows = list(EvalLoader(test, set_name="all", batch_size=8, device=CPU))
    assert len(rows) == 1 and not rows[0]["puzzle_ids"].any()
    plain = MazeConfig(**keys)
    assert "symmetry_ids" not in plain.identity()
    with pytest.raises(ValueError, match=r"symmetry_ids=true needs data\.num_aug=7"):
        MazeConfig(**keys, num_aug=0, symmetry_ids=True)


@pytest.mark.skipif(not PUBLISHED, reason="LOOPWRIGHT_MAZES names no folder")
def test_published_labels_are_reproduced(tmp_path):
    files = {f"{s}_csv": str(Path(PUBLISHED) / f"maze_{s}.csv.xz") for s in ("train", "test")}
    folder = MazeConfig(**files).prepare(tmp_path)
    for split in ("train", "test"):
        arrays = read_dataset(folder, split).sets["all"]
        answers, lengths = label_mazes(np.asarray(arrays.inputs), (30, 30))
        assert len(answers) == 1000 and (answers == arrays.labels).all()
        assert (lengths + 1 == arrays.ratings).all()


def test_answers_are_judged_by_the_rules():
    question = tokens("S   ", " ## ", "    ", "   G")
    cases = {
        "S   o## oooo   G": (6, True),
        "S   o## oooo  oG": (0, False),  # a branch
        "S   o## o   oooG": (6, True),
        "Sooo ##o   o   G": (6, True),  # not the labelled way, but as short
        "S   o## ooo   oG": (6, True),
        "S   o##ooooo   G": (0, False),
        "So  o## o   oooG": (0, False),  # a cell too many
        "S   o## o    ooG": (0, False),  # a gap
        "S   oo# o   oooG": (0, False),  # through a wall
        "S   o## o   ooo ": (0, False),  # no goal
        "                ": (0, False),
    }
    for answer, (moves, shortest) in cases.items():
        found, best = path_lengths(question, tokens(answer), (4, 4))
        assert best[0] == 6 and found[0] == moves, answer
        assert (found[0] == best[0]) == shortest, answer
    detour = tokens("S  G", "o##o", "oooo")
    moves, best = path_lengths(tokens("S  G", " ## ", "    "), detour, (3, 4))
    assert (moves[0], best[0]) == (7, 3)


def test_scores_of_a_set(tmp_path):
    config = MazeConfig(size=(6, 6), num_train=10, num_test=30, min_path=6)
    dataset = read_dataset(config.prepare(tmp_path), "test")
    arrays = dataset.sets["all"]
    count = np.arange(30)

    def score(predictions: np.ndarray) -> dict[str, float]:
        scorer = build_scorer(dataset, "all")
        rows = (count, count * 0, arrays.inputs, arrays.labels, predictions, np.ones(30))
        scorer.add(ScoredRows(*rows))
        return scorer.result()

    assert score(arrays.labels)["shortest_path"] == score(arrays.labels)["valid_path"] == 1
    assert score(np.asarray(arrays.inputs))["valid_path"] == 0
    half = np.where((count % 2 == 0)[:, None], arrays.labels, arrays.inputs)
    assert score(half)["shortest_path"] == 0.5 and score(half)["excess_moves"] == 0
    noise = np.random.default_rng(0).integers(0, 6, arrays.labels.shape)
    assert score(noise)["valid_path"] == 0


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".csv.xz"])
def test_csv_and_generated_datasets_are_the_same(tmp_path, small, suffix):
    _, train, test = small
    files = {}
    for key, table in (("train_csv", train), ("test_csv", test)):
        lines = ["source,question,answer,rating"] + [
            f"x,{text(q)},{text(a)},{r}"
            for q, a, r in zip(table.questions, table.answers, table.ratings, strict=True)
        ]
        content = "\n".join(lines).encode() + b"\n"
        pack = {".csv": bytes, ".csv.gz": gzip.compress, ".csv.xz": lzma.compress}[suffix]
        (tmp_path / f"{key}{suffix}").write_bytes(pack(content))
        files[key] = str(tmp_path / f"{key}{suffix}")
    read = read_dataset(MazeConfig(size=(8, 9), **files).prepare(tmp_path), "test").sets["all"]
    made = MazeConfig(size=(8, 9), num_train=60, num_test=40, seed=3, min_path=9)
    generated = read_dataset(made.prepare(tmp_path), "test").sets["all"]
    for key in ("inputs", "labels", "ratings"):
        assert (getattr(read, key) == getattr(generated, key)).all()
    assert (read.inputs == test.questions).all()
    held = MazeConfig(size=(8, 9), train_csv=files["train_csv"], test_fraction=0.2, max_train=40)
    folder = held.prepare(tmp_path)
    assert len(read_dataset(folder, "train").sets["all"]) == 40
    assert len(read_dataset(folder, "test").sets["all"]) == 12
