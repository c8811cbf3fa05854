"""Saving, loading, copying of every optimizer."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import AdamW
from tests.optim.contract import (
    make_params,
    per_any,
    per_class,
    per_dtype,
    same,
    set_grads,
    snapshot,
)

pytestmark = pytest.mark.filterwarnings("ignore:no rule of optim.partition knows")


def to_cpu_copy(state):
    """As a checkpoint does: tensors copied, tuples turned into lists."""
    if isinstance(state, dict):
        return {k: to_cpu_copy(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return [to_cpu_copy(v) for v in state]
    return state.clone() if isinstance(state, torch.Tensor) else state


@per_any
@per_dtype
@given(before=st.integers(0, 3), seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_loading_then_stepping_is_never_having_saved(cls, dtype, before, seed):
    params = make_params(dtype, seed)
    opt = cls(params, 1e-2, weight_decay=0.3)
    for i in range(before):
        set_grads(params, i)
        opt.step()
    saved = to_cpu_copy(opt.state_dict())
    twins = [p.detach().clone().requires_grad_() for p in params]
    fresh = cls(twins, 0.7, weight_decay=0.0)
    addresses = [s.data_ptr() for p in twins for s in fresh.state[p].values()]
    fresh.load_state_dict(saved)
    assert addresses == [s.data_ptr() for p in twins for s in fresh.state[p].values()]
    assert fresh.param_groups[0]["betas"] == opt.param_groups[0]["betas"]
    assert same(snapshot(opt), snapshot(fresh))
    for i in range(3):
        set_grads(params, 10 + i)
        set_grads(twins, 10 + i)
        opt.step()
        fresh.step()
    assert same(snapshot(opt), snapshot(fresh))


@per_class
def test_a_state_that_does_not_fit_is_refused_whole(cls):
    def broken(change):
        saved = copy.deepcopy(opt.state_dict())
        change(saved)
        return saved

    params = make_params()
    opt = cls(params, 1e-2)
    set_grads(params, 0)
    opt.step()
    before = snapshot(opt)
    cases = [
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "groups of"),
        (lambda s: s["param_groups"][0]["params"].pop(), "groups of"),
        (lambda s: s["state"].pop(3), "state of parameter 3 has"),
        (lambda s: s["state"][0].pop("exp_avg"), "state of parameter 0 has"),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(9)), "saved exp_avg of parameter 0"),
        (lambda s: s["param_groups"][0].update(weight_decay=-1.0), "weight_decay"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr must"),
        (lambda s: s["param_groups"][0].update(maximize=True), "maximize=True, which is another"),
        (lambda s: s.pop("state"), "must have 'param_groups' and 'state'"),
        (lambda s: s.clear(), "must have 'param_groups' and 'state'"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(broken(change))
        assert same(before, snapshot(opt))


def test_adamw_loads_the_state_of_torch_adamw():
    params = make_params()[:2]
    theirs = torch.optim.AdamW(params, 1e-2)
    set_grads(params, 0)
    theirs.step()
    mine = AdamW(params, 0.5)
    mine.load_state_dict(theirs.state_dict())
    assert float(mine.param_groups[0]["lr"]) == 1e-2
    assert float(mine.state[params[0]]["step"]) == 1
    assert mine.param_groups[0].keys() == AdamW(params).param_groups[0].keys()


@per_class
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_live_on(cls, clone):
    params = make_params()
    opt = cls(params, 1e-2)
    set_grads(params, 0)
    opt.step()
    twin = clone(opt)
    twins = twin.param_groups[0]["params"]
    set_grads(params, 1)
    set_grads(twins, 1)
    opt.step()
    twin.set_lr(1e-2)
    twin.step()
    assert same(snapshot(opt), snapshot(twin))
