"""Half-precision parameters: stochastic rounding and float32 masters, in every optimizer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import AdamATan2, AdamMini, AdamW, Muon
from optim.rounding import noise16, stochastic_round

pytestmark = pytest.mark.filterwarnings("ignore:no rule of optim.partition knows")
EVERY = [AdamATan2, AdamW, AdamMini, Muon]
per_any = pytest.mark.parametrize("cls", EVERY)
SHAPES = [(6, 8), (5,), (), (0, 2)]


def make(cls, half, dtype=torch.bfloat16, lr=1e-2):
    rng = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=rng).to(dtype).requires_grad_() for s in SHAPES]
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    return params, cls(named, lr, half=half)


def set_grads(params, seed):
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng).to(p.dtype)


def everything(params, opt):
    return [t.clone() for p in params for t in (p.detach(), *opt.state[p].values())]


def same(xs, ys):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@given(value=st.floats(-(2.0**100), 2.0**100, width=32), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=100, deadline=None)
def test_rounds_to_a_neighbour(value, seed):
    x = torch.full((64,), value)
    got = stochastic_round(x, seed, torch.tensor(3.0))
    below = torch.tensor(value).view(torch.int32) & -65536
    neighbours = torch.stack([below, below + 65536]).view(torch.float32)
    assert torch.isin(got.float(), neighbours).all()
    exact = torch.tensor([value]).bfloat16().float()
    assert torch.equal(stochastic_round(exact, seed, torch.tensor(1.0)).float(), exact)


def test_rounds_right_on_average():
    for fraction in (0.1, 0.5, 0.9):
        x = torch.full((100_000,), 1.0 + fraction * 2.0**-7)
        up = (stochastic_round(x, 7, torch.tensor(5.0)) > 1.0).float().mean().item()
        assert up == pytest.approx(fraction, abs=4 * np.sqrt(fraction * (1 - fraction) / 1e5))


def test_special_values_stay():
    x = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    got = stochastic_round(x, 1, torch.tensor(1.0))
    assert torch.equal(got[:4], x[:4].bfloat16()) and got[4].isnan()
    assert torch.equal(got[:2].signbit(), x[:2].signbit())


def test_noise_differs_by_place_step_and_parameter():
    rows = [
        noise16(torch.Size([4096]), seed, torch.tensor(step))
        for seed in (0, 1, 2) for step in (1.0, 2.0, 3.0)
    ]  # fmt: skip
    for row in rows:
        assert row.min() >= 0 and row.max() < 1 << 16
        assert row.float().mean().item() == pytest.approx(32767.5, rel=0.03)
        assert len(row.unique()) > 3800  # 4096 draws of 65536: 3,970 expected
    stack = torch.stack(rows).double()
    assert (torch.corrcoef(stack) - torch.eye(9)).abs().max() < 0.08


@per_any
def test_small_steps_are_lost_to_the_nearest_only(cls):
    """An update of a twentieth of a bfloat16 spacing, 200 times."""
    moved = {}
    for half in ("nearest", "stochastic", "master"):
        p = torch.ones(16, 16, dtype=torch.bfloat16).requires_grad_()
        options = {"scaling": "keller"} if cls is Muon else {}
        opt = cls([("w", p)], 2.0**-8 / 20, weight_decay=0.0, half=half, **options)
        for _ in range(200):
            p.grad = torch.eye(16).bfloat16() if cls is Muon else torch.ones_like(p)
            opt.step()
        part = p.detach().float().diagonal() if cls is Muon else p.detach().float()
        moved[half] = 1.0 - part.mean().item()
    assert moved["nearest"] == 0.0
    assert moved["master"] > 0.02
    assert moved["stochastic"] == pytest.approx(moved["master"], rel=0.35 if cls is Muon else 0.15)


@per_any
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_master_is_a_float32_run(cls, dtype):
    params, opt = make(cls, "master", dtype)
    wide = [p.detach().float().requires_grad_() for p in params]
    twin = cls([(f"w{i}", p) for i, p in enumerate(wide)], 1e-2)
    for seed in range(5):
        set_grads(params, seed)
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.float()
        opt.step()
        twin.step()
    for p, q in zip(params, wide, strict=True):
        master = opt.state[p]["master"]
        assert master.dtype == torch.float32
        torch.testing.assert_close(master, q.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(p.detach(), master.to(dtype))


@per_any
@pytest.mark.parametrize("half", ["stochastic", "master"])
def test_it_repeats_resumes_and_is_gated(cls, half):
    def run(steps, params, opt, first=0):
        for seed in range(first, steps):
            set_grads(params, seed)
            opt.step()
        return everything(params, opt)

    assert same(run(6, *make(cls, half)), run(6, *make(cls, half)))
    params, opt = make(cls, half)
    run(3, params, opt)
    twins, fresh = make(cls, half)
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    fresh.load_state_dict(opt.state_dict())
    assert same(run(6, params, opt, 3), run(6, twins, fresh, 3))
    before = everything(params, opt)
    opt.step(found_inf=torch.tensor(1.0))
    assert same(before, everything(params, opt))


@per_any
def test_float32_does_not_care(cls):
    results = []
    for half in ("nearest", "stochastic", "master"):
        params, opt = make(cls, half, torch.float32)
        set_grads(params, 0)
        opt.step()
        assert "master" not in opt.state[params[0]]
        results.append(everything(params, opt))
    assert same(results[0], results[1]) and same(results[0], results[2])
