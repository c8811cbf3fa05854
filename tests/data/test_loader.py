"""Loaders: pure in the step, sliced by rank, every row once an epoch, honest padding."""

import numpy as np
import pytest
import torch

from data import DataError, EvalLoader, PuzzleDataset, PuzzleSet, TrainLoader, read_dataset
from data.sudoku_rules import is_solution

CPU = torch.device("cpu")


def grouped(num_sets=1):
    """Groups of several puzzles with several examples each, as ARC has; token = example number."""
    groups = [[2, 2], [3], [1, 4, 2], [1]]  # examples of each puzzle of each group
    sets = {}
    for k in range(num_sets):
        puzzles = [n for group in groups for n in group]
        examples = sum(puzzles)
        numbers = np.arange(k * examples, (k + 1) * examples)
        tokens = np.repeat(numbers[:, None], 4, axis=1).astype(np.int16)
        sets[f"set{k}"] = PuzzleSet(
            inputs=tokens,
            labels=tokens,
            puzzle_identifiers=np.arange(len(puzzles), dtype=np.int32) + 1 + k * len(puzzles),
            puzzle_indices=np.cumsum([0, *puzzles]),
            group_indices=np.cumsum([0, *map(len, groups)]),
        )
    return PuzzleDataset("train", 1000, 4, 100, 0, None, 0, "f", None, sets)


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in ("inputs", "labels", "puzzle_ids"))


def test_batches_are_a_pure_function_of_the_step(sudoku9):
    make = lambda **kw: TrainLoader(  # noqa: E731
        sudoku9, global_batch_size=32, num_aug=5, device=CPU, **{"seed": 1, **kw}
    )
    first, second = make(), make()
    forward = [first.batch(step) for step in range(9)]
    backward = [second.batch(step) for step in reversed(range(9))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    assert not same(forward[0], forward[1])
    assert not same(make(seed=2).batch(0), forward[0])
    batch = forward[0]
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        "inputs": ((32, 81), torch.int32),
        "labels": ((32, 81), torch.int32),
        "puzzle_ids": ((32,), torch.int32),
    }


def test_global_random_numbers_are_neither_used_nor_changed(sudoku9):
    loader = TrainLoader(sudoku9, global_batch_size=32, seed=1, num_aug=5, device=CPU)
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    a = loader.batch(3)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])
    torch.manual_seed(1)
    assert same(a, loader.batch(3))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_hold_slices_of_the_same_batch(sudoku9, world_size):
    args = {"global_batch_size": 24, "seed": 7, "num_aug": -1, "device": CPU}
    whole = TrainLoader(sudoku9, **args)
    parts = [TrainLoader(sudoku9, rank=r, world_size=world_size, **args) for r in range(world_size)]
    for step in (0, 2, 11):
        joined = [p.batch(step) for p in parts]
        assert same(whole.batch(step), {k: torch.cat([j[k] for j in joined]) for k in joined[0]})


@pytest.mark.parametrize("batch_size", [1, 7, 60, 64, 250])
def test_an_epoch_visits_every_puzzle_once(sudoku9, batch_size):
    loader = TrainLoader(sudoku9, global_batch_size=batch_size, seed=0, device=CPU)
    n = loader.rows_per_epoch
    assert n == sudoku9.rows_per_epoch == 60
    steps = -(-3 * n // batch_size)
    rows = np.concatenate([loader.plan(s)[0] for s in range(steps)])
    epochs = rows[: 3 * n].reshape(3, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    assert len(np.unique(epochs, axis=0)) == 3


def test_the_stream_does_not_depend_on_the_batch_size(sudoku9):
    args = {"seed": 0, "num_aug": 100, "device": CPU}
    small = TrainLoader(sudoku9, global_batch_size=5, **args)
    large = TrainLoader(sudoku9, global_batch_size=100, **args)
    joined = np.concatenate([small.plan(s) for s in range(20)], axis=1)
    assert (joined == large.plan(0)).all()


def test_augmentation_indices_are_uniform_over_0_to_n(sudoku9):
    loader = TrainLoader(sudoku9, global_batch_size=6000, seed=0, num_aug=9, device=CPU)
    counts = np.bincount(np.concatenate([loader.plan(s)[2] for s in range(5)]), minlength=10)
    assert len(counts) == 10
    assert ((counts - 3000) ** 2 / 3000).sum() < 35
    endless = TrainLoader(sudoku9, global_batch_size=6000, seed=0, num_aug=-1, device=CPU)
    drawn = endless.plan(0)[2]
    assert drawn.min() > 0 and len(np.unique(drawn)) == 6000


def test_augmented_batches_are_valid_sudokus(sudoku9):
    loader = TrainLoader(sudoku9, global_batch_size=500, seed=0, num_aug=1000, device=CPU)
    batch = loader.batch(0)
    assert is_solution((batch["labels"].numpy() - 1).astype(np.uint8), (3, 3)).all()
    clues = batch["inputs"] > 1
    assert torch.equal(batch["inputs"][clues], batch["labels"][clues])
    assert len(torch.unique(batch["labels"], dim=0)) > 400


@pytest.mark.parametrize("num_sets", [1, 2])
def test_groups_give_all_examples_of_one_puzzle(num_sets):
    dataset = grouped(num_sets)
    loader = TrainLoader(dataset, global_batch_size=10 * num_sets, seed=0, device=CPU)
    assert loader.rows_per_epoch == 10 * num_sets  # 2 + 3 + 4 + 1
    ends = np.cumsum([2, 2, 3, 1, 4, 2, 1])
    drawn = set()
    for step in range(60):
        batch = loader.batch(step)
        for k in range(num_sets):
            offset = 15 * k
            inside = (batch["inputs"][:, 0] >= offset) & (batch["inputs"][:, 0] < offset + 15)
            tokens = np.sort(batch["inputs"][inside, 0].numpy()) - offset
            puzzle = np.searchsorted(ends, tokens, side="right")
            ids = np.unique(puzzle)
            assert len(ids) == 4 and {2, 6} <= set(ids)
            drawn.update(ids.tolist())
            (small,) = ids[(ids == 0) | (ids == 1)]
            assert (tokens[puzzle == small] == np.arange(2) + 2 * small).all()
            (three,) = ids[(ids > 2) & (ids < 6)]
            count = {3: 1, 4: 4, 5: 2}[int(three)]
            seen, times = np.unique(tokens[puzzle == three], return_counts=True)
            assert len(seen) == count and (times == 4 // count).all()
        owner = np.searchsorted(ends, np.arange(15), side="right")
        expected = {15 * k + e: p + 1 + 7 * k for k in range(num_sets) for e, p in enumerate(owner)}
        ids = [expected[t] for t in batch["inputs"][:, 0].tolist()]
        assert batch["puzzle_ids"].tolist() == ids
    assert drawn == set(range(7))


@pytest.mark.parametrize("make", [grouped, lambda: grouped(2)])
def test_memory_mapped_and_resident_data_give_the_same(make):
    args = {"global_batch_size": 12, "seed": 3, "device": CPU}
    resident, streamed = TrainLoader(make(), **args), TrainLoader(make(), resident_bytes=0, **args)
    assert resident.sources[0].store.resident is not None
    assert streamed.sources[0].store.resident is None
    assert all(same(resident.batch(s), streamed.batch(s)) for s in range(6))


def test_ignored_labels_become_minus_100(sudoku4):
    dataset = read_dataset(sudoku4, "train")
    dataset.sets["all"].labels[:, 3] = 0
    labels = TrainLoader(dataset, global_batch_size=8, seed=0, device=CPU).batch(0)["labels"]
    assert (labels[:, 3] == -100).all() and (labels[:, :3] > 1).all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_covers_the_set_in_order_and_pads(sudoku4, world_size):
    dataset = read_dataset(sudoku4, "test")
    args = {"set_name": "all", "batch_size": 16, "device": CPU, "world_size": world_size}
    loaders = [EvalLoader(dataset, rank=r, **args) for r in range(world_size)]
    assert {len(loader) for loader in loaders} == {4}
    parts = [list(loader) for loader in loaders]
    size = {1: 13, 2: 7}[world_size]  # 50 rows, spread evenly over 4 batches and the ranks
    seen = []
    for number in range(4):
        for loader, part in zip(loaders, parts, strict=True):
            rows, batch = loader.batch_indices(number), part[number]
            assert len(rows) == len(batch["inputs"]) == size
            real = rows >= 0
            seen += rows[real].tolist()
            inputs = dataset.sets["all"].inputs[rows[real]]
            assert (batch["inputs"].numpy()[real] == inputs).all()
            assert (batch["inputs"].numpy()[~real] == dataset.pad_id).all()
            assert (batch["labels"].numpy()[~real] == -100).all()
            assert (batch["puzzle_ids"].numpy()[~real] == dataset.blank_identifier_id).all()
            assert {k: v.dtype for k, v in batch.items()} == dict.fromkeys(batch, torch.int32)
    assert seen == list(range(50)) == loaders[0].indices.tolist()
    assert [len(list(loader)) for loader in loaders] == [4] * world_size  # again


def test_evaluation_of_a_seeded_subset(sudoku4):
    dataset = read_dataset(sudoku4, "test")
    args = {"set_name": "all", "batch_size": 8, "device": CPU}
    a, b = (EvalLoader(dataset, max_examples=20, seed=s, **args).indices for s in (0, 1))
    assert len(a) == 20 and (np.diff(a) > 0).all() and (a != b).any()
    assert (a == EvalLoader(dataset, max_examples=20, seed=0, **args).indices).all()
    assert len(EvalLoader(dataset, max_examples=500, **args).indices) == 50


def test_misuse_is_refused_in_a_sentence(sudoku4):
    train, test = (read_dataset(sudoku4, split) for split in ("train", "test"))
    with pytest.raises(DataError, match="num_aug"):
        TrainLoader(train, global_batch_size=8, seed=0, num_aug=3, device=CPU)
    for size, world in ((0, 1), (9, 2), (-4, 2)):
        with pytest.raises(DataError, match="global_batch_size"):
            TrainLoader(train, global_batch_size=size, seed=0, world_size=world, device=CPU)
    with pytest.raises(DataError, match=r"'hard'.*'all'"):
        EvalLoader(test, set_name="hard", batch_size=8, device=CPU)
    with pytest.raises(DataError, match="max_examples"):
        EvalLoader(test, set_name="all", batch_size=8, max_examples=0, device=CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_batches_are_the_same_and_do_not_wait(sudoku9):
    args = {"global_batch_size": 64, "seed": 3, "num_aug": 50}
    here = TrainLoader(sudoku9, device=CPU, **args)
    for resident_bytes in (0, 1 << 30):
        there = TrainLoader(sudoku9, device="cuda", resident_bytes=resident_bytes, **args)
        there.batch(0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches = [there.batch(step) for step in range(5)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for step, batch in enumerate(batches):
            assert same(here.batch(step), {k: v.cpu() for k, v in batch.items()})
