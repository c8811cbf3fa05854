"""Worker processes: the same batches for any number, from any step, in any order."""

import os

import pytest
import torch

from data import MixConfig, TrainLoader, WorkerLoader, make_train_loader, read_dataset
from tests.data.test_loader import grouped, same
from tests.data.test_mixture import PARTS

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_do_not_depend_on_the_workers(sudoku9, num_workers):
    args = {"global_batch_size": 24, "seed": 7, "num_aug": 9, "device": CPU}
    here = TrainLoader(sudoku9, **args)
    there = make_train_loader(sudoku9, num_workers=num_workers, **args)
    assert isinstance(there, WorkerLoader) and there.local == here.local
    before = torch.get_rng_state()
    try:
        for step in (0, 1, 2, 3, 4, 11, 12, 2):  # in order, then from elsewhere, as a resume does
            assert same(here.batch(step), there.batch(step))
    finally:
        there.close()
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_join(sudoku9):
    args = {"global_batch_size": 24, "seed": 7, "num_aug": -1, "device": CPU}
    whole = TrainLoader(sudoku9, **args).batch(5)
    parts = []
    for rank in range(2):
        loader = make_train_loader(sudoku9, num_workers=1, rank=rank, world_size=2, **args)
        parts.append(loader.batch(5))
        loader.close()
    assert same(whole, {k: torch.cat([p[k] for p in parts]) for k in whole})


def test_mixtures_and_datasets_in_memory(tmp_path):
    mixed = read_dataset(MixConfig(parts=PARTS).prepare(tmp_path), "train")
    for dataset in (mixed, grouped()):
        args = {"global_batch_size": 10, "seed": 1, "device": CPU}
        here, there = (
            TrainLoader(dataset, **args),
            make_train_loader(dataset, num_workers=2, **args),
        )
        assert all(same(here.batch(s), there.batch(s)) for s in range(4))
        there.close()


def test_what_a_worker_is_sent_is_a_path(sudoku9):
    loader = WorkerLoader(sudoku9, num_workers=1, global_batch_size=4, seed=0, device=CPU)
    sent = loader.batches.__getstate__()
    assert sent["dataset"].sets == {} and sent["dataset"].path == sudoku9.path
    assert sent["loader"] is None


def test_no_process_is_left(sudoku9):
    loader = WorkerLoader(sudoku9, num_workers=2, global_batch_size=4, seed=0, device=CPU)
    loader.batch(0)
    processes = [w.pid for w in loader.iterator._workers]
    loader.close()
    for pid in processes:
        with pytest.raises(OSError):
            os.kill(pid, 0)
