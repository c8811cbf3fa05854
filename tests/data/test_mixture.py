"""Mixtures: shares by weight, identifiers side by side, each part as if it were alone."""

import numpy as np
import pytest
import torch

from data import (
    DataError,
    EvalLoader,
    MazeConfig,
    MixConfig,
    TrainLoader,
    build_scorer,
    dataset_info,
    read_dataset,
)
from data.loader import mixture_pattern
from tests.data.test_loader import grouped, same

CPU = torch.device("cpu")
MAZE = {"name": "maze", "size": (5, 6), "num_test": 7, "min_path": 6}
PARTS = ({**MAZE, "num_train": 40, "num_aug": 3}, {**MAZE, "num_train": 25, "seed": 1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return MixConfig(parts=PARTS, weights=(3.0, 1.0)).prepare(tmp_path_factory.mktemp("m"))


def test_shares_follow_the_weights():
    for weights in ([1.0], [1.0, 1.0], [3.0, 1.0], [1e-6, 1.0], [0.2, 0.5, 0.3], [1.0] * 64):
        pattern = mixture_pattern(weights, seed=5)
        shares = np.bincount(pattern, minlength=len(weights)) / len(pattern)
        assert len(pattern) == 4096 and (shares > 0).all()
        assert np.abs(shares - np.array(weights) / sum(weights)).max() < 1 / 2048
        assert (mixture_pattern(weights, seed=5) == pattern).all()
    first = mixture_pattern([1.0, 1.0], seed=0)[:400].mean()
    assert 0.4 < first < 0.6


def test_each_part_gives_its_own_stream(folder):
    mixed = read_dataset(folder, "train")
    parts = [p.dataset for p in mixed.parts]
    loader = TrainLoader(mixed, global_batch_size=64, seed=2, device=CPU)
    plans = np.concatenate([loader.plan(s) for s in range(40)], axis=1)
    batches = [loader.batch(s) for s in range(40)]
    joined = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    share = (plans[3] == 0).mean()
    assert 0.73 < share < 0.77
    for number, (part, num_aug) in enumerate(zip(parts, (3, 0), strict=True)):
        mine = plans[3] == number
        count = int(mine.sum())
        alone = TrainLoader(part, global_batch_size=count, seed=2, num_aug=num_aug, device=CPU)
        batch = {k: v[torch.from_numpy(mine)] for k, v in joined.items()}
        assert same(batch, alone.batch(0))
    assert set(joined["puzzle_ids"].tolist()) == {0, 1}  # each part has one identifier
    assert dataset_info(folder).num_puzzle_ids == 2
    assert loader.rows_per_epoch == dataset_info(folder).num_train_examples == 65


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_join_and_blocks_change_nothing(folder, world_size):
    mixed = read_dataset(folder, "train")
    args = {"global_batch_size": 24, "seed": 2, "device": CPU}
    whole = TrainLoader(mixed, **args, block_tokens=0)
    blocks = TrainLoader(mixed, **args, block_tokens=24 * 30 * 5)
    ranks = [TrainLoader(mixed, rank=r, world_size=world_size, **args) for r in range(world_size)]
    assert whole.block_steps == 1 and blocks.block_steps == 5
    for step in (0, 7, 3, 250):
        joined = [r.batch(step) for r in ranks]
        expected = whole.batch(step)
        assert same(expected, {k: torch.cat([j[k] for j in joined]) for k in expected})
        assert same(expected, blocks.batch(step))


def test_sets_are_evaluated_and_scored_by_their_part(folder):
    mixed = read_dataset(folder, "test")
    assert list(mixed.sets) == ["maze-5x6.all", "maze-5x6-2.all"]
    assert dataset_info(folder).test_sets == dict.fromkeys(mixed.sets, 7)
    for number, name in enumerate(mixed.sets):
        loader = EvalLoader(mixed, set_name=name, batch_size=7, device=CPU)
        assert loader.batch(0)["puzzle_ids"].tolist() == [number] * 7
        assert type(build_scorer(mixed, name)).__name__ == "MazeScorer"


def test_folders_are_parts_too(tmp_path, folder):
    plain = MazeConfig(**{**MAZE, "num_train": 12}).prepare(tmp_path)
    config = MixConfig(parts=(str(plain), PARTS[1]))
    mixed = read_dataset(config.prepare(tmp_path), "train")
    assert mixed.rows_per_epoch == 12 + 25
    assert config.prepare(tmp_path).name == config.prepare(tmp_path).name
    shares = np.bincount(TrainLoader(mixed, global_batch_size=4096, seed=0, device=CPU).plan(0)[3])
    assert shares.tolist() == [2048, 2048]
    reread = MixConfig.model_validate(config.model_dump(mode="json"))
    assert reread.fingerprint() == config.fingerprint()


def test_parts_of_other_formats_are_refused(tmp_path):
    other = {**MAZE, "size": (6, 6), "num_train": 5}
    with pytest.raises(DataError, match=r"seq_len is 30 in maze-5x6 and 36 in maze-6x6"):
        MixConfig(parts=(PARTS[1], other)).prepare(tmp_path)
    assert not list(tmp_path.glob("mix*"))


@pytest.mark.parametrize(
    "content, expected",
    [
        ("{", "is not readable JSON"),
        ("[]", "mix.json: .*valid dictionary"),
        ('{"fingerprint": "f", "parts": []}', "parts: .*at least 1 item"),
        ('{"fingerprint": "f", "parts": [{"name": "a", "path": "no", "weight": 1, "num_aug": 0}]}',
         "no is not a folder"),
        ('{"fingerprint": "f", "parts": [{"name": "a", "path": "no", "weight": 0, "num_aug": 0}]}',
         r"parts.0.weight: .*greater than 0"),
        ('{"fingerprint": "f", "parts": [{"name": "../a", "path": "no"}]}', r"parts.0.name"),
    ],
)  # fmt: skip
def test_damaged_mixtures_are_refused(tmp_path, content, expected):
    (tmp_path / "mix.json").write_text(content)
    for read in (lambda: read_dataset(tmp_path, "train"), lambda: dataset_info(tmp_path)):
        with pytest.raises(DataError, match=expected) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_planned_stream_is_the_same_on_a_device(monkeypatch):
    """The way that a GPU takes, on the CPU."""
    args = {"global_batch_size": 12, "seed": 3, "device": CPU}
    dataset = grouped(2)
    here = TrainLoader(dataset, **args)
    monkeypatch.setattr("data.sources._plan_device", lambda *_: CPU)
    there = TrainLoader(dataset, **args)
    assert here.sources[0].plan_device is None and there.sources[0].plan_device is CPU
    for step in (0, 1, 2, 40, 3):
        assert same(here.batch(step), there.batch(step))
        assert (here.plan(step) == there.plan(step)).all()
