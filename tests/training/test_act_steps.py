"""ACT steps of evaluation on fixed addresses: the same numbers, graphs that stay valid."""

from __future__ import annotations

import pytest
import torch

from data import read_dataset
from models import ACT, build_model
from tests.training.helpers import newest, tensors, train
from training.act_steps import ACTSteps
from training.config import EvalConfig, ThinkConfig
from training.evaluation import evaluate
from training.thinking import Thinker, _fewer

CPU = torch.device("cpu")


class Recorded:
    """Stands in for `GraphedWork` where there is no GPU: every call does the work."""

    def __init__(self):
        self.keys = []

    def run(self, key, work):
        self.keys.append(key)
        work()


def recorded(act) -> ACTSteps:
    steps = ACTSteps(act, CPU)
    assert steps.work is None  # no graph on a CPU
    steps.work = Recorded()
    return steps


def test_evaluation_on_fixed_addresses_is_the_plain_one(solver):
    act, dataset = solver
    options = {"batch_size": 5, "seed": 0, "device": CPU}
    steps = recorded(act)
    plain = evaluate(act, dataset, EvalConfig(), **options)
    assert evaluate(act, dataset, EvalConfig(), steps=steps, **options) == plain
    assert len(set(steps.work.keys)) == 1  # one graph for all batches and ACT steps
    assert len(steps.work.keys) % 5 == 0


def test_other_weights_have_a_place_of_their_own(solver):
    act, dataset = solver
    options = {"batch_size": 5, "seed": 0, "device": CPU}
    steps = recorded(act)
    first = evaluate(act, dataset, EvalConfig(), steps=steps, **options)
    weight = act.model.q_head.weight
    own = weight.data
    weight.data = own * 0.5
    other = evaluate(act, dataset, EvalConfig(), steps=steps, **options)
    assert other == evaluate(act, dataset, EvalConfig(), **options) != first
    weight.data = own
    assert evaluate(act, dataset, EvalConfig(), steps=steps, **options) == first
    assert len(set(steps.work.keys)) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"early_halt": True},
        {"breadth": 3, "noise": 0.5, "early_halt": True},
        {"breadth": 2, "random_init": True},
    ],
)
def test_thinking_on_fixed_addresses_is_the_plain_one(solver, options):
    from tests.training.test_thinking import loader

    act, dataset = solver
    found = [
        Thinker(act, dataset, loader(dataset), ThinkConfig(depth=5, **options), 0, steps)
        for steps in (None, recorded(act))
    ]
    with torch.no_grad():
        plain, fixed = (thinker.run() for thinker in found)
    for name in ("answers", "right", "q_halt", "stable", "steps"):
        a, b = getattr(plain, name), getattr(fixed, name)
        assert ((a == b) | ((a != a) & (b != b))).all(), name


def test_halted_rows_stop_costing(solver):
    """What early halting saves in ACT steps is saved in rows that are computed."""
    from tests.training.test_thinking import loader

    act, dataset = solver
    rows = []
    with torch.no_grad():
        for early in (False, True):
            cost = []
            steps = lambda carry: (cost.append(len(carry.steps)), act(carry))[1]  # noqa: E731, B023
            thinker = Thinker(
                act, dataset, loader(dataset, 6), ThinkConfig(depth=5, early_halt=early), 0, steps
            )
            found = thinker.run()
            rows.append((sum(cost), int(found.steps.sum()), cost))
    (full, full_steps, _), (early, early_steps, cost) = rows
    assert full_steps <= full <= 1.3 * full_steps
    assert early_steps < full_steps and early_steps <= early < full
    assert cost == sorted(cost, reverse=True) and cost[-1] < cost[0]


def test_fewer_rows_are_kept_where_half_are_idle():
    import numpy as np

    busy = np.array([False, True, False, False, True, False, False, False])
    kept = _fewer(busy)
    assert sorted(kept[:2]) == [1, 4] and len(kept) == 2
    assert _fewer(np.array([True, True, False])) is None
    assert _fewer(np.array([True])) is None


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["trm", "trm_mlp"])
def test_evaluations_leave_the_graph_of_training_valid(tiny, monkeypatch, arch):
    """On a GPU: a run that is evaluated after each step ends in the bits of one that is not."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    keys = ("device=cuda", f"arch={arch}", "ema=true")
    often = train(monkeypatch, *tiny(*keys, "run_name=often", "eval_interval=1"))
    rarely = train(monkeypatch, *tiny(*keys, "run_name=rarely"))
    assert tensors(newest(often)) == tensors(newest(rarely))


@pytest.mark.gpu
def test_graphs_give_the_bits_of_the_plain_evaluation(resolve_run):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    device = torch.device("cuda", 0)
    run = resolve_run("arch=trm_mlp")
    act = ACT(build_model(run.config.arch, run.dims, seed=1, device=device)).eval()
    dataset = read_dataset(run.dataset_path, "test")
    options = {"batch_size": 5, "seed": 0, "device": device}
    steps = ACTSteps(act, device)
    plain = evaluate(act, dataset, EvalConfig(), **options)
    for _ in range(2):
        assert evaluate(act, dataset, EvalConfig(), steps=steps, **options) == plain
    assert len(steps.work.graphs) == 1
