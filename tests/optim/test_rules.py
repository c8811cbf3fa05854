"""Each update rule against an independent float64 computation, and AdamW against torch's own."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import AdamATan2, AdamW, adam_atan2_update, adamw_update
from optim.base import bias_correction

SHAPES = [(), (1,), (0, 3), (7,), (5, 3), (2, 3, 4)]


def oracle_atan2(p, g, m, v, t, lr, betas, wd, a, b, form):
    """The published formulas in NumPy float64."""
    b1, b2 = betas
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    p = p * (1 - lr * wd)
    c1, c2 = 1 - b1**t, 1 - b2**t
    if form == "outside":
        return p - a * lr / c1 * np.arctan2(m, b * np.sqrt(v) / np.sqrt(c2)), m, v
    return p - a * lr * np.arctan2(m / c1, b * np.sqrt(v / c2)), m, v


@pytest.mark.parametrize("form", ["outside", "inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**31),
    lr=st.sampled_from([0.0, 1e-4, 0.1]),
    wd=st.sampled_from([0.0, 0.1, 1.0]),
    betas=st.sampled_from([(0.9, 0.95), (0.0, 0.999), (0.95, 0.0)]),
    ab=st.sampled_from([(1.0, 1.0), (1.27, 1.0), (1.0, 2.0)]),
)
@settings(max_examples=25, deadline=None)
def test_adam_atan2_follows_the_formula(form, dtype, shape, seed, lr, wd, betas, ab):
    rng = np.random.default_rng(seed)
    p = torch.tensor(rng.normal(size=shape), dtype=dtype)
    param = p.clone().requires_grad_()
    opt = AdamATan2([param], lr, betas, wd, *ab, bias_correction=form)
    want, m, v = p.double().numpy(), np.zeros(shape), np.zeros(shape)
    for t in range(1, 21):
        g = torch.tensor(rng.normal(size=shape) * 10.0 ** rng.integers(-6, 3), dtype=dtype)
        param.grad = g
        opt.step()
        want, m, v = oracle_atan2(want, g.double().numpy(), m, v, t, lr, betas, wd, *ab, form)
    # float32: 20 steps of half an ulp of the weight, and of the step where the step is large.
    tol = 1e-13 if dtype == torch.float64 else 2e-6 * (1 + 20 * lr)
    np.testing.assert_allclose(param.detach().double().numpy(), want, rtol=tol, atol=tol)


@pytest.mark.parametrize("size", [1000, (1 << 18) + 5])
def test_inside_is_adam_atan2_pytorch(size):
    """That package's form with its a and b, float32, 20 steps: within 2e-6 for weights below 1."""
    package = pytest.importorskip("adam_atan2_pytorch")
    rng = torch.Generator().manual_seed(0)
    mine = (torch.rand(size, generator=rng) * 2 - 1).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    options = {"betas": (0.9, 0.99), "weight_decay": 0.1, "a": 1.27, "b": 1.0}
    opt = AdamATan2([mine], 1e-3, bias_correction="inside", **options)
    ref = package.AdamAtan2([theirs], 1e-3, **options)
    for _ in range(20):
        mine.grad = torch.randn(size, generator=rng)
        theirs.grad = mine.grad.clone()
        opt.step()
        ref.step()
    assert (mine - theirs).abs().max() <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**31),
    lr=st.sampled_from([0.0, 1e-4, 1e-2]),
    wd=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=25, deadline=None)
def test_adamw_is_torch_adamw_to_an_ulp(dtype, shape, seed, lr, wd):
    rng = torch.Generator().manual_seed(seed)
    mine = torch.randn(shape, dtype=dtype, generator=rng).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    opt = AdamW([mine], lr, weight_decay=wd)
    ref = torch.optim.AdamW([theirs], lr, betas=(0.9, 0.95), weight_decay=wd, fused=True)
    for _ in range(10):
        mine.grad = torch.randn(shape, dtype=dtype, generator=rng)
        theirs.grad = mine.grad.clone()
        opt.step()
        ref.step()
        assert torch.equal(mine, theirs)
        for name, value in ref.state[theirs].items():
            assert torch.equal(opt.state[mine][name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_reference_is_torch_adamw(dtype):
    """The reference rule against torch's plain loop, states put equal before each step."""
    torch.manual_seed(0)
    p = torch.randn(64, 33, dtype=dtype).requires_grad_()
    ref = torch.optim.AdamW([p], 1e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    ulp = torch.finfo(dtype).eps
    state = [torch.zeros_like(p), torch.zeros_like(p)]
    for t in range(1, 51):
        p.grad = torch.randn_like(p)
        old = p.detach().clone()
        new = adamw_update(old, p.grad, *state, torch.tensor(float(t)), 1e-3)
        ref.step()
        state = [ref.state[p]["exp_avg"].clone(), ref.state[p]["exp_avg_sq"].clone()]
        size = torch.maximum(old.abs(), p.detach().abs())
        # In float64 torch's `1 - beta ** t` has itself an error of some ulp, hence the 1e-3 * 8.
        slack = 8e-3 * ulp if dtype == torch.float64 else 0.0
        assert ((new[0] - p.detach()).abs() <= ulp * size + slack).all()
        # Moments: beta * m + (1 - beta) * g may be contracted differently.
        for got, want in zip(new[1:], state, strict=True):
            torch.testing.assert_close(got, want, rtol=4 * ulp, atol=4 * ulp)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.999, 0.9999999])
def test_bias_correction_keeps_its_digits(beta):
    for t in (1, 2, 10, 1000, 123_457, 2**24):
        got = bias_correction(torch.tensor(float(t)), beta).item()
        want = 1.0 if beta == 0 else -math.expm1(t * math.log(beta))
        assert got == pytest.approx(want, rel=1e-15)


def test_rules_are_pure():
    args = [torch.randn(3, 4) for _ in range(3)] + [torch.rand(3, 4), torch.tensor(1.0)]
    for rule in (adam_atan2_update, adamw_update):
        before = [a.clone() for a in args]
        rule(*args, 0.1)
        assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))


def test_adam_atan2_ignores_the_scale_of_gradients():
    g = torch.randn(100)
    zero, one = torch.zeros(100), torch.tensor(1.0)
    runs = [adam_atan2_update(zero, g * s, zero, zero, one, 0.1)[0] for s in (1.0, 2.0**-20)]
    assert torch.equal(*runs)


def test_zero_gradient_does_not_move_a_weight_at_rest():
    zero = torch.zeros(5)
    assert torch.equal(adam_atan2_update(zero, zero, zero, zero, torch.tensor(1.0), 0.1)[0], zero)


@pytest.mark.parametrize("cls", [AdamATan2, AdamW])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_float32_moments_and_rounds_once(cls, dtype):
    p = torch.randn(50).to(dtype).requires_grad_()
    wide = p.detach().float().requires_grad_()
    p.grad = torch.randn(50).to(dtype)
    wide.grad = p.grad.float()
    narrow_opt, wide_opt = cls([p], 0.1), cls([wide], 0.1)
    narrow_opt.step()
    wide_opt.step()
    assert narrow_opt.state[p]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(p.detach().float(), wide.detach(), rtol=2e-2, atol=1e-3)
    # A kernel's float32 result may sit on the other side of a rounding boundary, rarely.
    assert (p.detach() == wide.detach().to(dtype)).float().mean() > 0.9


@pytest.mark.parametrize("form", ["outside", "inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_path_without_temporaries_is_the_rule_to_the_bit(form, dtype):
    p = torch.randn(33, 7, dtype=dtype).requires_grad_()
    opt = AdamATan2([p], 1e-2, a=1.27, b=1.1, bias_correction=form)
    want = p.detach().clone()
    m, v = torch.zeros_like(want), torch.zeros_like(want)
    options = {"a": 1.27, "b": 1.1, "bias_correction": form}
    for t in range(1, 6):
        p.grad = torch.randn_like(p)
        grad = p.grad / torch.tensor(3.0)
        lr = opt.param_groups[0]["lr"]
        want, m, v = adam_atan2_update(want, grad, m, v, torch.tensor(float(t)), lr, **options)
        opt.step(grad_scale=torch.tensor(3.0))
        for got, value in zip(
            (p.detach(), *list(opt.state[p].values())[1:]), (want, m, v), strict=True
        ):
            assert torch.equal(got, value)


@pytest.mark.parametrize("form", ["outside", "inside"])
def test_the_compiled_pass_is_the_formula(form):
    """Large CPU tensors: against float64, and the same bits with any number of threads."""
    pytest.importorskip("numba")
    n = (1 << 18) + 77
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=rng)
    runs = []
    options = {"bias_correction": form, "a": 1.27, "b": 1.1}
    before = torch.get_num_threads()
    for threads, dtype in ((1, torch.float32), (3, torch.float32), (1, torch.float64)):
        torch.set_num_threads(threads)
        p = start.to(dtype, copy=True).requires_grad_()
        opt = AdamATan2([p], 1e-3, **options)
        rng.manual_seed(1)
        for _ in range(20):
            p.grad = torch.randn(n, generator=rng).to(dtype) * 3
            p.grad[:5] = torch.tensor([0.0, -0.0, 1e-38, -1e30, 1e-20], dtype=dtype)
            opt.step(grad_scale=torch.tensor(3.0, dtype=dtype))
        runs.append([p.detach(), *opt.state[p].values()])
    torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(runs[0], runs[1], strict=True))
    # squares of the first five leave float32's range, where a direction is 0 or π/2 as it should
    error = (runs[0][0] - runs[2][0]).abs() / runs[2][0].abs().clamp(min=1)
    assert error[5:].max() <= 2e-6
    assert runs[0][0][:5].isfinite().all()
