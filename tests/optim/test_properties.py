"""Many tensors of any sizes at once are the rule applied to each alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import (
    EMA,
    AdamATan2,
    AdamMini,
    AdamW,
    Muon,
    adam_atan2_update,
    adam_mini_update,
    adamw_update,
    clip_grad_norm,
    global_grad_norm,
    muon_update,
)

pytestmark = pytest.mark.filterwarnings("ignore:no rule of optim.partition knows")
EVERY = [AdamATan2, AdamW, AdamMini, Muon]
SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 13, 31, 33]), min_size=0, max_size=3)
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def alone(opt, group, p, grad):
    """New (parameter, first moment) by the pure function, and the old state of `p`."""
    state, lr = opt.state[p], group["lr"]
    step = state["step"] + 1
    if group.get("kind") == "muon":
        pieces = dict(zip(group["params"], group["pieces"], strict=True))[p]
        return muon_update(p, grad, state["momentum_buffer"], lr, pieces=pieces)
    moments = (state["exp_avg"], state["exp_avg_sq"], step, lr)
    if isinstance(opt, AdamMini):
        return adam_mini_update(p, grad, *moments, segments=opt.segments(p))
    rule = adamw_update if isinstance(opt, AdamW) else adam_atan2_update
    return rule(p, grad, *moments)


def check(cls, shapes, seed, steps=2):
    rng = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=rng).requires_grad_() for s in shapes]
    opt = cls([(f"block.{i}", p) for i, p in enumerate(params)], **OPTIONS)
    for _ in range(steps):
        want = {}
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=rng)
                want[p] = [t.detach() for t in alone(opt, group, p, p.grad)]
        opt.step()
        for p, (new, first, *_) in want.items():
            moment = opt.state[p].get("exp_avg", opt.state[p].get("momentum_buffer"))
            torch.testing.assert_close(p.detach(), new, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(moment, first, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("cls", EVERY)
@given(shapes=st.lists(SIZES, min_size=1, max_size=12), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_any_sizes(cls, shapes, seed):
    check(cls, shapes, seed)


@pytest.mark.parametrize("cls", EVERY)
def test_a_thousand_tensors_at_once(cls):
    check(cls, [((i % 7), (i % 50)) if i % 3 else (i % 50,) for i in range(1000)], 0, steps=1)


@given(shapes=st.lists(SIZES, min_size=1, max_size=12), limit=st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_clipping_any_sizes(shapes, limit):
    rng = torch.Generator().manual_seed(0)
    params = [torch.zeros(s, requires_grad=True) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng)
    twins = [p.detach().clone().requires_grad_() for p in params]
    for p, q in zip(params, twins, strict=True):
        q.grad = p.grad.clone()
    norm = clip_grad_norm(params, limit)
    want = torch.nn.utils.clip_grad_norm_(twins, limit)
    torch.testing.assert_close(norm, want, rtol=1e-6, atol=0)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-30)
    assert global_grad_norm(params) <= limit * (1 + 1e-5)


@given(shapes=st.lists(SIZES, min_size=1, max_size=12), rate=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_averages_of_any_sizes(shapes, rate):
    params = [torch.ones(s) for s in shapes]
    ema = EMA(params, rate)
    for p in params:
        p.fill_(3.0)
    ema.update()
    for shadow in ema.shadow.values():
        torch.testing.assert_close(shadow, torch.full_like(shadow, 3.0 - 2.0 * rate))
