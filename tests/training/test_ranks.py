"""Several ranks compute what one does: gloo on the CPU, in processes of their own."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from optim import OPTIMIZERS
from tests.training.helpers import newest, tensors
from tests.training.rank_cases import fit, steps, together
from tests.training.rank_checks import (
    EXACT,
    FIT,
    REPEATED,
    check_equal_to_one,
    check_float32,
    check_round_trip,
    shuffled,
)

SIZES = (2, 4)
SHARDED = ("optim.sharded=false", "optim.sharded=true")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """`worlds(jobs)` → {size: results per rank}; each job list is run once per size."""
    known = {}

    def run(name, jobs):
        if name not in known:
            place = tmp_path_factory.mktemp(name)
            known[name] = {s: together(s, jobs, place / str(s)) for s in SIZES}
        return known[name]

    return run


def test_every_optimizer_in_float64(resolve_run, worlds):
    """Losses of 20 steps to 1e-9, parameters of all ranks to the bit, and of one rank to 1e-9."""
    settings = product([f"optim={name}" for name in OPTIMIZERS], SHARDED)
    jobs = [("steps", {"run": resolve_run(*EXACT, *some)}) for some in settings]
    jobs.append(("steps", {"run": resolve_run(*EXACT, "grad_accum=2")}))
    jobs.append(("steps", {"run": resolve_run(*EXACT, "arch=trm_mlp", "optim=adamw")}))
    alone = [steps(**arguments) for _, arguments in jobs]
    assert all(r["halted"] > 8 for r in alone)
    for ranks in worlds("exact", jobs).values():
        for number, one in enumerate(alone):
            check_equal_to_one(one, [results[number] for results in ranks])


def test_three_ranks(resolve_run, tmp_path):
    """A number that divides neither the model's sizes nor a power of two."""
    settings = (("optim=adamw",), ("optim=adam_atan2", "optim.sharded=true"),
                ("optim=muon", "optim.sharded=true"))  # fmt: skip
    jobs = [("steps", {"run": resolve_run(*EXACT, "global_batch_size=12", *some)})
            for some in settings]  # fmt: skip
    ranks = together(3, jobs, tmp_path)
    for number, (_, arguments) in enumerate(jobs):
        check_equal_to_one(steps(**arguments), [results[number] for results in ranks])


def test_float32_differs_no_more_than_an_order_of_rows(resolve_run, worlds):
    """Within 3 times the spread that permuting the rows gives on one rank."""
    recipe = ("arch.forward_dtype=float32", "max_steps=20")
    runs = [[resolve_run(*recipe, f"optim={name}", sharded) for sharded in SHARDED]
            for name in OPTIMIZERS]  # fmt: skip
    alone = [[steps(**some) for some in shuffled(plain)] for plain, _ in runs]
    jobs = [("steps", {"run": run}) for pair in runs for run in pair]
    for ranks in worlds("float32", jobs).values():
        for number in range(len(jobs)):
            check_float32(alone[number // 2], [results[number] for results in ranks])


def test_rows_of_one_puzzle_on_several_ranks(resolve_run, worlds):
    """The gathered gradients arrive in the order of the batch: the table is equal to the bit."""
    run = resolve_run(*EXACT, "freeze_weights=true", "lr_warmup_steps=0")
    job = {"run": run, "ids": REPEATED, "count": 6}
    one = steps(**job)
    touched = one["puzzles"].abs().sum(1).nonzero().flatten().tolist()
    assert touched == [3, 5, 7]
    for ranks in worlds("embeddings", [("steps", job)]).values():
        for results in ranks:
            assert torch.equal(results[0]["puzzles"], one["puzzles"])


def test_a_nan_on_one_rank_holds_all(resolve_run, worlds):
    """The step that is spoiled on the last rank of two changes nothing anywhere."""
    run = resolve_run(*EXACT, "on_nonfinite=skip")
    job = {"run": run, "count": 4, "nan_at": (1, 3)}
    before = {"run": run, "count": 3}
    for ranks in worlds("nan", [("steps", job), ("steps", before)]).values():
        assert {results[0]["nonfinite"] for results in ranks} == {1}
        assert {results[0]["digest"] for results in ranks} == {ranks[0][1]["digest"]}


def test_averaged_gradients(resolve_run, worlds):
    """grad_reduce=mean: AdamATan2 does not see the scale, so the norm tells."""
    summed = {"run": resolve_run(*EXACT, "grad_clip_norm=0"), "count": 2}
    meant = {"run": resolve_run(*EXACT, "grad_clip_norm=0", "grad_reduce=mean"), "count": 2}
    for size, ranks in worlds("mean", [("steps", summed), ("steps", meant)]).items():
        for results in ranks:
            first, second = (r["grad_norm"] for r in results)
            assert second * size == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("optim=adamw", "optim.sharded=true"),
        ("optim=adamw", "optim.sharded=true", "arch.L_layers=1", "arch.expansion=16"),
        ("optim=adam_mini", "optim.sharded=true"),
        ("optim=muon", "optim.sharded=true"),
    ],
    ids=["plain", "cut", "large", "blocks", "matrices"],
)
def test_saved_on_some_ranks_resumed_on_others(resolve_run, tmp_path, settings):
    """From 4 to 2 to 1 and back to 4; a large tensor runs over the whole of a rank's share."""
    check_round_trip(resolve_run, tmp_path, (*FIT, *settings), 4, (2, 1))


def test_moments_in_fp8_are_shared_out_and_saved(resolve_run, tmp_path):
    """A dtype that torch neither pickles nor selects from; resumed on two ranks, to the bit."""
    recipe = (*FIT, "optim=adam_mini", "optim.state=fp8", "optim.sharded=true")
    whole, cut = (resolve_run(*recipe, f"run_name={name}") for name in ("whole", "cut"))
    together(2, [("fit", {"run": whole}), ("fit", {"run": cut, "stop_in": 6})], tmp_path / "first")
    go_on = resolve_run(f"load_checkpoint={cut.run_dir}")
    together(2, [("fit", {"run": go_on})], tmp_path / "then")
    assert tensors(newest(whole.run_dir)) == tensors(newest(cut.run_dir))


def test_only_the_first_rank_writes(resolve_run, tmp_path):
    """Nothing in the run folder that one rank alone would not have written."""
    recipe = (*FIT, "eval_interval=6", "eval.batch_size=5")  # which two ranks round up
    run, one = (resolve_run(*recipe, f"run_name={name}") for name in ("two", "one"))
    together(2, [("fit", {"run": run})], tmp_path / "place")
    fit(one)
    names = [sorted(p.relative_to(r.run_dir) for p in r.run_dir.rglob("*")) for r in (run, one)]
    assert names[0] == names[1] and len(names[0]) > 10
