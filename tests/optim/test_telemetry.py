"""Telemetry: the numbers of a step, per block, of any optimizer."""

import pytest
import torch

from optim import AdamATan2, AdamMini, Muon, SparseSignSGD, Telemetry


def grads(params, seed):
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng)


@pytest.mark.parametrize("state", ["fp32", "bf16", "fp8"])
def test_numbers_per_block(state):
    named = [("mlp.weight", torch.randn(5, 8)), ("x.q", torch.randn(4, 6)), ("e", torch.ones(0))]
    named = [(n, p.requires_grad_()) for n, p in named]
    params = [p for _, p in named]
    opt = AdamMini(named, 0.1, num_heads=2, state=state)
    seen = []
    with Telemetry(opt) as telemetry:
        for seed in range(2):
            before = [p.detach().clone() for p in params]
            grads(params, seed)
            opt.step()
            seen += telemetry.records()
    assert [(r.step, r.name, r.block) for r in seen[:7]] == [
        *((1, "mlp.weight", i) for i in range(5)),
        *((1, "x.q", i) for i in range(2)),
    ]
    last = seen[7:]
    for i in range(5):
        change = (params[0] - before[0])[i]
        assert last[i].max_update == pytest.approx(change.abs().max().item(), rel=1e-6)
        assert last[i].norm == pytest.approx(change.norm().item(), rel=1e-6)
        m = opt.state[params[0]]["exp_avg"][i].float().abs().max().item()
        assert last[i].max_m * last[i].scale == pytest.approx(m, rel=1e-6)
    names = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
    assert {r.dtype for r in seen} == {names[state]}
    assert state == "fp8" or {r.scale for r in seen} == {1.0}
    grads(params, 3)
    opt.step()  # no longer watched
    assert telemetry.records() == []


def test_other_optimizers_and_every_nth_step():
    p, table = torch.ones(4, 4, requires_grad=True), torch.zeros(3, 2)
    for opt in (AdamATan2([p], 0.1), Muon([("block.w", p)], 0.1)):
        telemetry = Telemetry(opt, every=2)
        for seed in range(3):
            grads([p], seed)
            opt.step()
        rows = telemetry.rows()
        assert [r["step"] for r in rows] == [1, 3]
        assert all(r["max_update"] > 0 and r["max_m"] > 0 for r in rows)
    sparse = SparseSignSGD([table], 0.1)
    with Telemetry(sparse) as telemetry:
        sparse.add_rows(table, torch.tensor([1]), torch.ones(1, 2))
        sparse.step()
    (record,) = telemetry.records()
    assert record.max_update == pytest.approx(0.1) and record.dtype == "" and record.max_m == 0
    with pytest.raises(ValueError, match="every"):
        Telemetry(sparse, every=0)
