"""Several GPUs compute what one does: NCCL, the step as a CUDA graph."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch

from optim import OPTIMIZERS
from tests.training.helpers import metrics, newest, tensors
from tests.training.rank_cases import together
from tests.training.rank_checks import (
    EXACT,
    FIT,
    REPEATED,
    check_equal_to_one,
    check_float32,
    check_round_trip,
    shuffled,
)
from tests.training.test_faults import RECIPE, torchrun

RANKS = 4 if torch.cuda.device_count() >= 4 else 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
GPU = ("device=cuda", "compile=off")  # compiling takes longer than the tests
SHARDED = ("optim.sharded=false", "optim.sharded=true")


def test_every_optimizer_in_float64(resolve_run, tmp_path):
    settings = [*product([f"optim={name}" for name in OPTIMIZERS], SHARDED),
                ("grad_accum=2",), ("arch=trm_mlp", "optim=adamw"),
                ("cuda_graph=off",)]  # fmt: skip
    jobs = [("steps", {"run": resolve_run(*EXACT, *GPU, *some)}) for some in settings]
    with ThreadPoolExecutor(1) as beside:
        one = beside.submit(together, 1, jobs, tmp_path / "one")
        ranks = together(RANKS, jobs, tmp_path / "many")
        (alone,) = one.result()
    for number, some in enumerate(settings):
        many = [results[number] for results in ranks]
        assert all(r["graphs"] == (0 if "cuda_graph=off" in some else 1) for r in many)
        assert alone[number]["halted"] > 8
        check_equal_to_one(alone[number], many)


def test_float32_differs_no_more_than_an_order_of_rows(resolve_run, tmp_path):
    """With compiled blocks."""
    recipe = ("arch.forward_dtype=float32", "max_steps=20", "optim=adamw", "device=cuda")
    runs = [resolve_run(*recipe, sharded) for sharded in SHARDED]
    with ThreadPoolExecutor(1) as beside:
        rows = [("steps", some) for some in shuffled(runs[0])]
        one = beside.submit(together, 1, rows, tmp_path / "one")
        many = together(RANKS, [("steps", {"run": run}) for run in runs], tmp_path / "many")
        (alone,) = one.result()
    for number in range(len(runs)):
        check_float32(alone, [results[number] for results in many])


def test_rows_of_one_puzzle_on_several_ranks(resolve_run, tmp_path):
    run = resolve_run(*EXACT, *GPU, "freeze_weights=true", "lr_warmup_steps=0")
    job = ("steps", {"run": run, "ids": REPEATED, "count": 6})
    ((one,),) = together(1, [job], tmp_path / "one")
    assert one["puzzles"].abs().sum(1).nonzero().flatten().tolist() == [3, 5, 7]
    for results in together(RANKS, [job], tmp_path / "many"):
        assert torch.allclose(results[0]["puzzles"], one["puzzles"], rtol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [(), ("optim=adamw", "optim.sharded=true"), ("optim=muon", "optim.sharded=true")],
    ids=["plain", "cut", "matrices"],
)
def test_saved_on_some_ranks_resumed_on_others(resolve_run, tmp_path, settings):
    fewer = (2, 1) if RANKS > 2 else (1,)
    check_round_trip(resolve_run, tmp_path, (*FIT, *GPU, *settings), RANKS, fewer)


@pytest.mark.slow
def test_kills_of_one_rank(tmp_path):
    """In a step, while saving and evaluating: the end is that of an undisturbed run."""
    recipe = (*(text for text in RECIPE if not text.startswith("device=")), *GPU)
    kinds = ["step", "save", "evaluate"]
    moments = random.Random(3)
    victims = [moments.randrange(RANKS), 0, moments.randrange(RANKS)]  # only the first one saves
    counts = [moments.randrange(4, 9), moments.randrange(4, 9), 1]
    plan = [f"{k}:{v}:{c}" for k, v, c in zip(kinds, victims, counts, strict=True)]
    faults = ",".join(plan)
    with ThreadPoolExecutor(1) as beside:
        undisturbed = (*recipe, "run_name=whole", "datasets_dir=others")
        whole = beside.submit(torchrun, tmp_path, RANKS, *undisturbed)
        done = torchrun(tmp_path, RANKS, *recipe, "run_name=killed", faults=faults, restarts=3)
    assert whole.result().returncode == 0, whole.result().stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "faults.txt").read_text().split() == kinds
    runs = [tmp_path / "runs" / name for name in ("whole", "killed")]
    assert tensors(newest(runs[0])) == tensors(newest(runs[1]))
    assert metrics(runs[0]) == metrics(runs[1])
