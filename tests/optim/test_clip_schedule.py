"""Clipping against torch's own; the schedule against values worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import AdamW, clip_grad_norm, clip_scale, global_grad_norm, learning_rate


def params_with_grads(seed, dtype, scale):
    rng = torch.Generator().manual_seed(seed)
    params = [torch.zeros(s, dtype=dtype, requires_grad=True) for s in [(3, 4), (), (0,), (7,)]]
    for p in params:
        p.grad = torch.randn(p.shape, dtype=dtype, generator=rng) * scale
    return [*params, torch.zeros(2, requires_grad=True)]


@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    max_norm=st.sampled_from([1e-3, 1.0, 100.0]),
)
@settings(max_examples=40, deadline=None)
def test_clipping_agrees_with_torch(seed, dtype, scale, max_norm):
    mine, theirs = params_with_grads(seed, dtype, scale), params_with_grads(seed, dtype, scale)
    norm = clip_grad_norm(mine, max_norm)
    want = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    eps = torch.finfo(dtype).eps
    assert norm.dtype == dtype
    torch.testing.assert_close(norm, want, rtol=4 * eps, atol=0)
    for p, q in zip(mine[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=8 * eps, atol=0)


def test_clip_scale_inside_the_step_is_clipping_before_it():
    a, b = params_with_grads(0, torch.float64, 10.0), params_with_grads(0, torch.float64, 10.0)
    one, two = AdamW(a, 0.1), AdamW(b, 0.1)
    one.step(grad_scale=clip_scale(global_grad_norm(a), 1.0))
    clip_grad_norm(b, 1.0)
    two.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)


def test_norm_of_what():
    p = torch.zeros(2, requires_grad=True)
    assert global_grad_norm([p]).item() == 0
    assert global_grad_norm([]).shape == ()
    p.grad = torch.tensor([3.0, 4.0])
    assert global_grad_norm([p]).item() == 5
    assert global_grad_norm(iter([p.grad])).item() == 5
    assert global_grad_norm(p).item() == 5
    half = torch.full((1000,), 100.0, dtype=torch.float16)
    assert global_grad_norm([half]).item() == pytest.approx(100 * math.sqrt(1000))
    embedding = torch.nn.Embedding(5, 1, sparse=True)
    embedding(torch.tensor([1, 1, 2])).sum().backward()
    assert global_grad_norm(embedding.parameters()).item() == pytest.approx(math.sqrt(5))
    for bad in (float("nan"), float("inf")):
        assert not global_grad_norm([torch.tensor([1.0, bad])]).isfinite()


def test_max_norm():
    norm = torch.tensor(5.0)
    assert clip_scale(norm, 0.0).item() == 1
    assert clip_scale(norm, 10.0).item() == 1
    assert clip_scale(norm, 2.5).item() == pytest.approx(2.0)
    assert clip_scale(torch.tensor(float("nan")), 1.0).isnan()
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm"):
            clip_scale(norm, bad)
    grads = params_with_grads(0, torch.float32, 1e6)
    before = grads[0].grad.clone()
    clip_grad_norm(grads, 0.0)
    assert torch.equal(grads[0].grad, before)
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm(grads, -1.0)


@pytest.mark.parametrize(
    ("step", "warmup", "total", "ratio", "want"),
    [
        (1, 0, 100, 0.0, 0.5 * (1 + math.cos(math.pi * 0.01))),
        (1, 2000, 10_000, 1.0, 1 / 2000),
        (1999, 2000, 10_000, 1.0, 1999 / 2000),
        (2000, 2000, 10_000, 0.1, 1.0),
        (6000, 2000, 10_000, 0.1, 0.55),
        (10_000, 2000, 10_000, 0.1, 0.1),
        (99_999, 2000, 10_000, 0.1, 0.1),
        (7, 2, 10, 1.0, 1.0),
        (5, 5, 5, 0.25, 1.0),
        (6, 5, 5, 0.25, 0.25),
        (3, 5, 4, 0.25, 3 / 5),
    ],
)
def test_schedule(step, warmup, total, ratio, want):
    got = learning_rate(step, base_lr=2.0, warmup_steps=warmup, total_steps=total, min_ratio=ratio)
    assert got == pytest.approx(2.0 * want, rel=1e-12, abs=1e-15)


def test_schedule_counts_from_one():
    with pytest.raises(ValueError, match="counts from 1"):
        learning_rate(0, base_lr=1.0, warmup_steps=0, total_steps=1, min_ratio=0.0)
