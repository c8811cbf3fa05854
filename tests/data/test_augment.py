"""Augmented Sudokus: valid, solved by their labels, pure, and uniform over the symmetry group."""

from itertools import product
from math import factorial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError
from data.augment import SudokuAugmentation, build_augmentation
from data.sudoku_4x4 import candidates_4x4
from data.sudoku_rules import BOXES, is_solution, symmetry_hash
from data.sudoku_solver import candidates

CPU = torch.device("cpu")
# n!, row orders, column orders, transposition
GROUP_SIZE = {
    (2, 2): 24 * 8 * 8 * 2,
    (2, 3): 720 * (6 * 2**3) * (2 * 6**2),
    (3, 2): 720 * (2 * 6**2) * (6 * 2**3),
    (3, 3): factorial(9) * 1296 * 1296 * 2,
}


def example(box, count=8):
    """Tokens of unique puzzles: inputs, labels (count, n²) uint8."""
    if box == (2, 2):
        made = candidates_4x4(0, count, seed=1, stream=1, low=4, high=8, grids=np.arange(288))
    else:
        made = candidates(0, count, box=box, seed=1, stream=1, low=0, high=20)
    return torch.from_numpy(made[0] + 1), torch.from_numpy(made[1] + 1)


@pytest.fixture(scope="module", params=BOXES, ids=str)
def case(request):
    box = request.param
    return box, *example(box)


def test_group_has_the_known_number_of_elements(case):
    box = case[0]
    a = SudokuAugmentation(box, seed=0, device=CPU)
    assert int(a.counts[:3].prod()) * (2 if a.square else 1) == GROUP_SIZE[box]
    for table in (a.digits, a.rows, a.columns):
        assert len(torch.unique(table, dim=0)) == len(table)
        assert torch.equal(table[0], torch.sort(table[0]).values)  # number 0 is the identity


def test_result_is_valid_and_equivalent_to_the_original(case):
    box, inputs, labels = case
    augment = SudokuAugmentation(box, seed=3, device=CPU)
    rows = torch.arange(len(inputs)).repeat(50)
    x, y = augment(inputs[rows], labels[rows], rows, torch.arange(len(rows)))
    questions, answers = x.numpy() - 1, y.numpy() - 1
    assert x.dtype == inputs.dtype
    assert is_solution(answers, box).all()
    assert ((questions == 0) | (questions == answers)).all()
    assert ((questions > 0).sum(1) == (inputs.numpy() > 1).sum(1)[rows]).all()
    before = symmetry_hash(inputs.numpy() - 1, labels.numpy() - 1, box)
    assert (symmetry_hash(questions, answers, box) == before[rows]).all()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    index=st.integers(0, 10**9),
    order=st.permutations(range(8)),
)
def test_rows_do_not_depend_on_their_batch(seed, index, order):
    inputs, labels = example((2, 2))
    augment = SudokuAugmentation((2, 2), seed=seed, device=CPU)
    indices = torch.arange(8) * 7 + index
    rows = torch.arange(8)
    whole = augment(inputs, labels, rows, indices)
    order = torch.tensor(order)
    shuffled = augment(inputs[order], labels[order], rows[order], indices[order])
    one = augment(inputs[3:4], labels[3:4], rows[3:4], indices[3:4])
    for a, b, c in zip(whole, shuffled, one, strict=True):
        assert torch.equal(a[order], b) and torch.equal(a[3:4], c)


def test_index_zero_is_the_identity_and_pads_stay(case):
    box, inputs, labels = case
    augment = SudokuAugmentation(box, seed=9, device=CPU)
    rows = torch.arange(len(inputs))
    x, y = augment(inputs, labels, rows, torch.zeros_like(rows))
    assert torch.equal(x, inputs) and torch.equal(y, labels)
    x, _ = augment(inputs * 0, labels, rows, rows + 1)
    assert not x.any()


def test_seed_puzzle_and_index_all_matter():
    inputs, labels = example((3, 3), 1)
    results = set()
    for seed in (0, 1, 2**40):
        augment = SudokuAugmentation((3, 3), seed=seed, device=CPU)
        for puzzle, index in product((0, 1), (1, 2)):
            x, _ = augment(inputs, labels, torch.tensor([puzzle]), torch.tensor([index]))
            results.add(x.numpy().tobytes())
    assert len(results) == 12


def test_uniform_over_the_group_of_2x2():
    # These two grids together look different under every element of the group.
    augment = SudokuAugmentation((2, 2), seed=0, device=CPU)
    _, labels = example((2, 2), 1)
    puzzles = torch.arange(50).repeat_interleave(2000)
    indices = torch.arange(1, 2001).repeat(50)
    cells = torch.arange(16, dtype=torch.uint8)[None] % 6
    x, y = augment(
        cells.expand(len(puzzles), -1), labels.expand(len(puzzles), -1), puzzles, indices
    )
    both = torch.cat([x, y], 1).numpy()
    _, counts = np.unique(both, axis=0, return_counts=True)
    expected = len(puzzles) / len(counts)
    assert len(counts) == GROUP_SIZE[2, 2]
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < len(counts) + 5 * np.sqrt(2 * len(counts))


def test_every_part_of_the_9x9_group_is_uniform_and_the_parts_are_independent():
    augment = SudokuAugmentation((3, 3), seed=0, device=CPU)
    order = torch.arange(2, 11, dtype=torch.uint8)  # row i, column j: digit token of i, or of j
    by_row, by_column = order.repeat_interleave(9)[None], order.repeat(9)[None]
    count = 200_000
    puzzles = torch.arange(count) % 1000
    indices = torch.arange(count) // 1000 + 1
    x, y = augment(by_row.expand(count, -1), by_column.expand(count, -1), puzzles, indices)
    for cells in (x[:, 0], x[:, 40], y[:, 40]):  # digit and position together
        counts = torch.bincount(cells.long(), minlength=11)[2:].double()
        assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 30
    transposed = (x[:, 0] != x[:, 1]).double()
    assert abs(transposed.mean() - 0.5) < 0.005
    pairs = torch.bincount(x[:, 0].long() * 11 + y[:, 0].long(), minlength=121)
    pairs = pairs[pairs > 0].double()
    assert len(pairs) == 81
    same, other = count / 81, len(pairs)
    assert float(((pairs - same) ** 2 / same).sum()) < other + 6 * np.sqrt(2 * other)


def test_unknown_augmentations_are_refused():
    for spec in ({"name": "rotate"}, {"name": "sudoku"}, {"name": "sudoku", "box": [1, 9]}):
        with pytest.raises(DataError, match="augmentation"):
            build_augmentation(spec, seed=0, device=CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_result_on_the_gpu(case):
    box, inputs, labels = case
    rows = torch.arange(len(inputs)).repeat(100)
    args = (inputs[rows], labels[rows], rows, torch.arange(len(rows)))
    here = SudokuAugmentation(box, seed=5, device=CPU)(*args)
    cuda = torch.device("cuda")
    there = SudokuAugmentation(box, seed=5, device=cuda)(*(a.to(cuda) for a in args))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, b.cpu())
