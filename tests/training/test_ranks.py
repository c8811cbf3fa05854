"""Several ranks compute what one does: gloo on the CPU, in processes of their own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from optim import OPTIMIZERS
from tests.training.helpers import metrics, newest, tensors
from tests.training.rank_cases import fit, steps, together

SIZES = (2, 4)
EXACT = ("arch.forward_dtype=float64", "arch.halt_max_steps=3", "arch.halt_exploration_prob=0.5",
         "max_steps=20", "grad_clip_norm=0.5")  # fmt: skip
# With puzzle embeddings whose identifiers repeat in a batch and across ranks: 3 on all of four.
REPEATED = [3, 3, 5, 3, 7, 3, 3, 5]


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


def assert_close(ours: list[float], theirs: list[float], tolerance: float) -> None:
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        assert abs(a - b) <= tolerance * max(1.0, abs(b)), f"step {step}: {a} and {b}"


def test_every_optimizer_in_float64(resolve_run, worlds):
    """Losses of 20 steps to 1e-9, parameters of all ranks to the bit, and of one rank to 1e-9."""
    settings = [(f"optim={name}", f"optim.sharded={sharded}") for name in OPTIMIZERS
                for sharded in ("false", "true")]  # fmt: skip
    jobs = [("steps", {"run": resolve_run(*EXACT, *some)}) for some in settings]
    jobs.append(("steps", {"run": resolve_run(*EXACT, "grad_accum=2")}))
    jobs.append(("steps", {"run": resolve_run(*EXACT, "arch=trm_mlp", "optim=adamw")}))
    alone = [steps(**arguments) for _, arguments in jobs]
    assert all(r["halted"] > 8 for r in alone)
    for ranks in worlds("exact", jobs).values():
        for number, one in enumerate(alone):
            many = [results[number] for results in ranks]
            assert_close(many[0]["losses"], one["losses"], 1e-9)
            assert len({r["digest"] for r in many}) == 1
            assert many[0]["halted"] == one["halted"]
            assert many[0]["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-9)
            for name, tensor in one["model"].items():
                assert torch.allclose(many[0]["model"][name], tensor, rtol=1e-9, atol=1e-11), name


def test_float32_differs_no_more_than_an_order_of_rows(resolve_run, worlds):
    """Within 3 times the spread that permuting the rows gives on one rank."""
    run = resolve_run("arch.forward_dtype=float32", "max_steps=20", "optim=adamw")
    straight = steps(run=run)["losses"]
    shuffles = [torch.Generator().manual_seed(seed) for seed in range(4)]
    orders = [torch.randperm(8, generator=shuffle).tolist() for shuffle in shuffles]
    permuted = [steps(run=run, order=order)["losses"] for order in orders]
    spread = max(abs(a - b) for p in permuted for a, b in zip(p, straight, strict=True))
    assert 0 < spread < 0.05
    for ranks in worlds("float32", [("steps", {"run": run})]).values():
        losses = ranks[0][0]["losses"]
        assert max(abs(a - b) for a, b in zip(losses, straight, strict=True)) <= 3 * spread
        assert len({results[0]["digest"] for results in ranks}) == 1


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


FIT = ("arch.forward_dtype=float64", "arch.halt_max_steps=3", "arch.halt_exploration_prob=0.5",
       "max_steps=12", "checkpoint_interval=5", "log_interval=4")  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [(), ("optim=adamw", "optim.sharded=true"), ("optim=muon", "optim.sharded=true")],
    ids=["plain", "cut", "whole"],
)
def test_saved_on_some_ranks_resumed_on_others(resolve_run, tmp_path, settings):
    """From 4 to 2 to 1 and back to 4: as one sitting on one rank, to 1e-9; on 4, to the bit."""
    recipe = (*FIT, *settings)
    run = resolve_run(*recipe, "run_name=whole")
    fit(run)
    whole, folder = run.run_dir, run.run_dir.parent
    first = [("fit", {"run": resolve_run(*recipe, "run_name=parts"), "stop_in": 4}),
             ("fit", {"run": resolve_run(*recipe, "run_name=same"), "stop_in": 6}),
             ("fit", {"run": resolve_run(*recipe, "run_name=four")})]  # fmt: skip
    for results in together(4, first, tmp_path / "first"):  # told one step later to the others
        assert [r["step"] for r in results] == [5, 7, 12]
    go_on = f"load_checkpoint={folder / 'parts'}"
    together(2, [("fit", {"run": resolve_run(go_on), "stop_in": 6})], tmp_path / "second")
    assert fit(resolve_run(go_on), stop_in=9)["step"] == 9
    last = [go_on, f"load_checkpoint={folder / 'same'}"]
    together(4, [("fit", {"run": resolve_run(start)}) for start in last], tmp_path / "last")
    parts = folder / "parts"
    four, same = folder / "four", folder / "same"
    assert tensors(newest(four)) == tensors(newest(same))
    assert metrics(four) == metrics(same)
    for theirs in (metrics(parts), metrics(four)):
        for ours, one in zip(theirs, metrics(whole), strict=True):
            assert ours == pytest.approx(one, rel=1e-9, abs=1e-12)
    for stem in ("model", "ema", "optimizer", "carry"):
        one, many = (load_file(newest(r) / f"{stem}.safetensors") for r in (whole, parts))
        assert {k for k in one if "/groups/" not in k} == {k for k in many if "/groups/" not in k}
        for name, tensor in one.items():
            if not name.startswith("sums.") and name in many:  # those are one per rank
                assert torch.allclose(many[name].double(), tensor.double(), rtol=1e-9), name


def test_only_the_first_rank_writes(resolve_run, tmp_path):
    """Nothing in the run folder that one rank alone would not have written."""
    run = resolve_run(*FIT, "run_name=two", "eval_interval=6")
    one = resolve_run(*FIT, "run_name=one", "eval_interval=6")
    together(2, [("fit", {"run": run})], tmp_path / "place")
    fit(one)
    names = [sorted(p.relative_to(r.run_dir) for p in r.run_dir.rglob("*")) for r in (run, one)]
    assert names[0] == names[1] and len(names[0]) > 10
