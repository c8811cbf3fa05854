"""Sudoku: rules, solver, generator, datasets; checked against a plain search in Python."""

import numpy as np
import pytest

from data import SudokuConfig, dataset_info, read_dataset
from data import sudoku_solver as solver
from data.sudoku_4x4 import candidates_4x4, grids_4x4
from data.sudoku_rules import BOXES, has_swap, is_solution, symmetry_hash, units
from data.sudoku_solver import candidates, solve


def all_solutions(question, box, limit=2):
    """Solutions by a search that shares nothing with the package; question: list of ints."""
    r, c = box
    n = r * c

    def options(grid, cell):
        y, x = divmod(cell, n)
        taken = {grid[y * n + k] for k in range(n)} | {grid[k * n + x] for k in range(n)}
        top, left = y - y % r, x - x % c
        taken |= {grid[(top + i) * n + left + j] for i in range(r) for j in range(c)}
        return [d for d in range(1, n + 1) if d not in taken]

    found, stack = [], [list(question)]
    while stack and len(found) < limit:
        grid = stack.pop()
        empty = [(options(grid, k), k) for k in range(n * n) if grid[k] == 0]
        if not empty:
            found.append(grid)
            continue
        digits, cell = min(empty, key=lambda pair: len(pair[0]))
        for digit in digits:
            stack.append([*grid[:cell], digit, *grid[cell + 1 :]])
    return found


def make(box, count, low=0, high=0, seed=0):
    if box == (2, 2):
        grids = np.arange(288)
        return candidates_4x4(0, count, seed=seed, stream=1, low=low, high=high, grids=grids)
    return candidates(0, count, box=box, seed=seed, stream=1, low=low, high=high)


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_units_partition_the_grid(box):
    r, c = box
    n = r * c
    cells = units(box)
    assert cells.shape == (3 * n, n)
    for kind in range(3):
        assert sorted(cells[kind * n : (kind + 1) * n].ravel()) == list(range(n * n))
    first_box = [y * n + x for y in range(r) for x in range(c)]
    assert cells[2 * n].tolist() == first_box


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_minimal_puzzles_have_one_solution_and_no_spare_clue(box):
    questions, answers, _ = make(box, 2 if box == (3, 3) else 12)
    assert is_solution(answers, box).all()
    for question, answer in zip(questions.tolist(), answers.tolist(), strict=True):
        assert all_solutions(question, box) == [answer]
        for cell in np.flatnonzero(question):
            fewer = [*question[:cell], 0, *question[cell + 1 :]]
            assert len(all_solutions(fewer, box)) == 2


@pytest.mark.parametrize("box", [(2, 3), (3, 2), (3, 3)], ids=str)
def test_solver_counts_as_the_plain_search(box):
    questions, answers, ratings = make(box, 15)
    rng = np.random.default_rng(0)
    fewer = questions.copy()
    for question in fewer[5:]:
        question[rng.choice(np.flatnonzero(question), 2, replace=False)] = 0
    fewer[0, :2] = 1  # a contradiction
    counts, _, solutions = solve(fewer, box, limit=5)
    for question, count in zip(fewer.tolist(), counts, strict=True):
        assert len(all_solutions(question, box, limit=5)) == count
    assert counts[0] == 0 and (solutions[1:5] == answers[1:5]).all()
    assert (solve(questions, box)[1] == ratings).all()


def test_grids_4x4_are_all_and_their_puzzles_need_no_guess():
    grids = grids_4x4()
    assert len(np.unique(grids, axis=0)) == 288 and is_solution(grids, (2, 2)).all()
    assert len(all_solutions([0] * 16, (2, 2), limit=1000)) == 288
    questions, answers, ratings = make((2, 2), 3000, low=4, high=8)
    counts, guesses, solutions = solve(questions, (2, 2))
    assert (counts == 1).all() and (solutions == answers).all()
    assert not guesses.any() and not ratings.any()


def test_invalid_grids_are_told_from_solutions():
    _, answers, _ = make((3, 3), 4)
    bad = answers.copy()
    bad[0, [0, 1]] = bad[0, [1, 0]]
    bad[1, 5] = 0
    bad[2] = np.tile(np.arange(1, 10), 9)
    assert is_solution(bad, (3, 3)).tolist() == [False, False, False, True]
    assert not is_solution(np.full((1, 81), 200, np.uint8), (3, 3))[0]


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_swaps_prove_a_second_solution(box):
    questions, answers, _ = make(box, 60)
    assert not has_swap(questions, answers, box).any()
    fewer = questions.copy()
    rng = np.random.default_rng(0)
    for question in fewer:
        question[rng.choice(np.flatnonzero(question))] = 0
    found = has_swap(fewer, answers, box)
    assert found.mean() > 0.2
    assert (solve(fewer, box)[0][found] == 2).all()
    assert has_swap(questions * 0, answers, box).all()


@pytest.mark.parametrize("box", [(2, 3), (3, 3)], ids=str)
def test_symmetry_hash_tells_puzzles_apart(box):
    questions, answers, _ = make(box, 500)
    assert len(np.unique(symmetry_hash(questions, answers, box))) > 495


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_generation_does_not_depend_on_threads_or_pieces(box, monkeypatch):
    whole = make(box, 30, low=8, high=20, seed=5)
    monkeypatch.setattr(solver, "_in_threads", lambda count, work: work(slice(0, count)))
    single = make(box, 30, low=8, high=20, seed=5)
    for a, b in zip(whole, single, strict=True):
        assert (a == b).all()
    assert (make(box, 30, low=8, high=20, seed=6)[0] != whole[0]).any()
    if box != (2, 2):
        part = candidates(10, 5, box=box, seed=5, stream=1, low=8, high=20)
        assert (part[0] == whole[0][10:15]).all()


def splits(config, root):
    folder = config.prepare(root)
    return [read_dataset(folder, split).sets["all"] for split in ("train", "test")]


def distinct(rows):
    return {row.tobytes() for row in rows}


def test_4x4_holds_out_grids(tmp_path):
    config = SudokuConfig(box=(2, 2), num_train=4000, num_test=500)
    train, test = splits(config, tmp_path)
    assert (len(train), len(test)) == (4000, 500)
    train_grids, test_grids = distinct(train.labels), distinct(test.labels)
    assert not train_grids & test_grids
    assert len(train_grids) == 240 and len(test_grids) == 48
    assert len(distinct(train.inputs)) == 4000
    assert {train.inputs.min(), train.inputs.max(), train.labels.min()} == {1, 5, 2}
    clues = (train.inputs > 1).sum(1)
    assert clues.min() == 4 and clues.max() == 8
    few = SudokuConfig(box=(2, 2), num_train=500, num_test=100, holdout_grids=100)
    assert len(distinct(splits(few, tmp_path)[1].labels)) > 48


@pytest.mark.parametrize("box", [(2, 3), (3, 2), (3, 3)], ids=str)
def test_no_test_puzzle_is_equivalent_to_a_training_puzzle(tmp_path, box):
    train, test = splits(SudokuConfig(box=box, num_train=500, num_test=100), tmp_path)
    hashes = [symmetry_hash(s.inputs - 1, s.labels - 1, box) for s in (train, test)]
    assert not set(hashes[0].tolist()) & set(hashes[1].tolist())
    assert not distinct(train.labels) & distinct(test.labels)
    assert (solve(test.inputs - 1, box)[0] == 1).all()


def test_limits_on_clues_and_rating_hold(tmp_path):
    config = SudokuConfig(
        num_train=20, num_test=8, min_rating=1, max_rating=9, num_clues=(25, 27), seed=4
    )
    for part in splits(config, tmp_path):
        clues = (part.inputs > 1).sum(1)
        assert clues.min() >= 25 and clues.max() <= 27
        assert part.ratings.min() >= 1 and part.ratings.max() <= 9
    exact = SudokuConfig(box=(2, 3), num_clues=12, num_train=50, num_test=20)
    assert {*(splits(exact, tmp_path)[0].inputs > 1).sum(1)} == {12}
    minimal = SudokuConfig(box=(2, 3), minimal=True, num_train=20, num_test=5)
    for question in (splits(minimal, tmp_path)[0].inputs - 1).tolist():
        for cell in np.flatnonzero(question):
            assert len(all_solutions([*question[:cell], 0, *question[cell + 1 :]], (2, 3))) == 2


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    config = SudokuConfig(box=(2, 3), num_train=100, num_test=30)
    a, b = config.prepare(tmp_path / "a"), config.prepare(tmp_path / "b")
    other = SudokuConfig(box=(2, 3), num_train=100, num_test=30, seed=1).prepare(tmp_path / "a")
    for file in a.rglob("*.*"):
        assert file.read_bytes() == (b / file.relative_to(a)).read_bytes()
    name = "train/all__inputs.npy"
    assert (a / name).read_bytes() != (other / name).read_bytes()


def test_csv_rows_arrive_in_order_with_their_ratings(tmp_path, write_csv, rows, puzzles):
    questions, answers, ratings = puzzles
    config = SudokuConfig(
        train_csv=write_csv("train.csv", rows[:30]), test_csv=write_csv("t.csv.gz", rows[30:])
    )
    train, test = splits(config, tmp_path)
    assert (train.inputs == questions[:30] + 1).all() and (test.labels == answers[30:] + 1).all()
    assert (train.ratings == ratings[:30]).all()
    subset = config.model_copy(update={"max_train": 10})
    chosen = splits(subset, tmp_path)[0].inputs
    assert len(chosen) == 10 and distinct(chosen) <= distinct(train.inputs)


def test_csv_variants_of_the_form_are_read(tmp_path, write_csv, rows):
    lines = [line.replace(".", "0") for line in rows[:10]]
    header = "\ufeffsource,question,answer,rating\r"
    crlf = write_csv("a.csv", [line + "\r" for line in [*lines, ""]], header)
    short = [",".join(line.split(",")[1:3]) for line in rows[20:30]]
    config = SudokuConfig(
        train_csv=crlf, test_csv=write_csv("b.csv", short, header="question,answer")
    )
    train, test = splits(config, tmp_path)
    assert len(train) == len(test) == 10 and test.ratings is None


def test_held_out_share_of_a_csv_keeps_equivalent_puzzles_together(tmp_path, write_csv, rows):
    doubled = [*rows, *rows[:15]]
    config = SudokuConfig(train_csv=write_csv("a.csv", doubled), test_fraction=0.25)
    train, test = splits(config, tmp_path)
    assert len(train) + len(test) == 55 and 10 <= len(test) <= 20
    assert not distinct(train.inputs) & distinct(test.inputs)


def test_a_test_file_alone_is_a_dataset_for_evaluation(tmp_path, write_csv, rows):
    path = write_csv("t.csv", rows[:20])
    whole = SudokuConfig(train_csv=write_csv("train.csv", rows[20:]), test_csv=path, max_train=5)
    config = whole.test_only()
    assert config == SudokuConfig(test_csv=path)
    folder = config.prepare(tmp_path)
    info = dataset_info(folder)
    assert (info.num_train_examples, info.test_sets) == (0, {"all": 20})
    test = read_dataset(folder, "test").sets["all"]
    expected = read_dataset(whole.prepare(tmp_path), "test").sets["all"]
    assert (test.inputs == expected.inputs).all() and (test.labels == expected.labels).all()
    generated = SudokuConfig(box=(2, 2))
    assert generated.test_only() == generated
