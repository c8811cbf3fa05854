"""SparseSignSGD against a dictionary of rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import SparseSignSGD, sparse_signsgd_update
from optim.sparse_signsgd import sum_duplicates

# Small multiples of 1/8: sums are exact, so that their signs do not depend on the order.
GRID = 0.125


def oracle(table, ids, grads, lr, wd):
    """A dictionary id -> summed gradient, then the rule row by row, in float64."""
    sums = {}
    for i, g in zip(ids.tolist(), grads.double().numpy(), strict=True):
        sums[i] = sums.get(i, 0.0) + g
    out = table.double().numpy().copy()
    for i, g in sums.items():
        out[i] = out[i] * (1 - lr * wd) - lr * np.sign(g)
    return out


@st.composite
def batches(draw):
    rows, n = draw(st.integers(1, 12)), draw(st.integers(0, 40))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(rows, (n,), generator=rng)
    width = draw(st.integers(1, 5))
    grads = torch.randint(-8, 9, (n, width), generator=rng) * GRID
    return torch.randn(rows, width, generator=rng), ids, grads


@given(batch=batches(), dtype=st.sampled_from([torch.float32, torch.float64]), narrow=st.booleans())
@settings(max_examples=60, deadline=None)
def test_rows_against_the_oracle(batch, dtype, narrow):
    table, ids, grads = batch[0].to(dtype), batch[1], batch[2].to(dtype)
    want = oracle(table, ids, grads, 0.1, 0.5)
    opt = SparseSignSGD([table], 0.1, 0.5)
    before = table.clone()
    opt.add_rows(table, ids.int() if narrow else ids, grads)
    opt.step()
    tol = 1e-6 if dtype == torch.float32 else 1e-14
    np.testing.assert_allclose(table.double().numpy(), want, rtol=tol, atol=tol)
    untouched = torch.ones(len(table), dtype=torch.bool)
    untouched[ids] = False
    assert torch.equal(table[untouched], before[untouched])


@given(batch=batches())
@settings(max_examples=30, deadline=None)
def test_sums_are_at_every_duplicate(batch):
    _, ids, grads = batch
    sorted_ids, sums = sum_duplicates(ids, grads)
    assert torch.equal(sorted_ids, ids.sort().values)
    for i, s in zip(sorted_ids, sums, strict=True):
        assert torch.equal(s, grads[ids == i].sum(0))


def test_sparse_gradients_are_the_same_as_rows():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    table = embedding.weight.detach().clone()
    ids = torch.tensor([[1, 3], [3, 9]])
    grads = torch.randint(-8, 9, (2, 2, 4)) * GRID
    (embedding(ids) * grads).sum().backward()
    assert not embedding.weight.grad.is_coalesced()
    SparseSignSGD(embedding.parameters(), 0.1, 0.1).step()
    other = SparseSignSGD([table], 0.1, 0.1)
    other.add_rows(table, ids, grads)
    other.step()
    assert torch.equal(embedding.weight.detach(), table)


def test_calls_accumulate_until_the_step_and_are_copied():
    table = torch.zeros(3, 1)
    opt = SparseSignSGD([table], 0.5, 0.0)
    row = torch.ones(1, 1)
    opt.add_rows(table, torch.tensor([0]), row)
    row.fill_(-3.0)
    opt.add_rows(table, torch.tensor([0]), row)
    row.zero_()
    opt.step()
    assert table.flatten().tolist() == [0.5, 0.0, 0.0]  # sign(1 - 3) = -1
    opt.step()
    assert table.flatten().tolist() == [0.5, 0.0, 0.0]
    opt.add_rows(table, torch.tensor([1]), torch.ones(1, 1))
    opt.zero_grad()
    opt.step()
    assert table.flatten().tolist() == [0.5, 0.0, 0.0]


def test_gate_and_scale():
    table = torch.randn(5, 3)
    before = table.clone()
    opt = SparseSignSGD([table], 0.1, 0.1)
    opt.add_rows(table, torch.tensor([1, 1, 2]), torch.full((3, 3), float("nan")))
    opt.step(found_inf=torch.tensor(1.0))
    assert torch.equal(table, before)
    opt.add_rows(table, torch.tensor([1, 2]), torch.ones(2, 3))
    opt.step(found_inf=torch.tensor(0.0), grad_scale=torch.tensor(4.0))
    assert torch.equal(table[1], before[1] * (1 - 0.1 * 0.1) - 0.1)
    opt.add_rows(table, torch.tensor([1]), torch.ones(1, 3))
    before = table.clone()
    opt.set_lr(0.0)
    opt.step()
    assert torch.equal(table, before)


def test_saving_keeps_the_learning_rate():
    table = torch.zeros(2, 2)
    opt = SparseSignSGD([table], 0.3, 0.2)
    fresh = SparseSignSGD([table.clone()], 0.1, 0.1)
    fresh.load_state_dict(opt.state_dict())
    assert float(fresh.param_groups[0]["lr"]) == 0.3
    assert fresh.param_groups[0]["weight_decay"] == 0.2


def test_half_precision_rows_are_summed_in_float32():
    rows = torch.full((300, 1), 1.0, dtype=torch.bfloat16)
    rows[-1] = -298.0
    _, new = sparse_signsgd_update(
        torch.zeros(1, 1), torch.zeros(300, dtype=torch.long), rows, 1.0, weight_decay=0.0
    )
    assert (new == -1).all()  # 299 ones do not sum to 299 in bfloat16


def test_errors_are_sentences():
    table = torch.zeros(4, 2)
    opt = SparseSignSGD([table], 0.1)
    ids, rows = torch.tensor([0, 1]), torch.zeros(2, 2)
    cases = [
        (torch.zeros(4, 2), ids, rows, "belongs to this optimizer"),
        (table, ids.float(), rows, "int32 or int64"),
        (table, ids, torch.zeros(3, 2), "row_grads must have shape"),
        (table, ids, rows.long(), "floating point"),
        (table, torch.tensor([0, 4]), rows, "id 4 is outside a table of 4 rows"),
        (table, torch.tensor([-1, 0]), rows, "id -1 is outside"),
    ]
    for args in cases:
        with pytest.raises(ValueError, match=args[-1]):
            opt.add_rows(*args[:-1])
    with pytest.raises(ValueError, match="2 dimensions"):
        SparseSignSGD([torch.zeros(3)], 0.1)
    dense = torch.zeros(2, 2, requires_grad=True)
    dense.sum().backward()
    with pytest.raises(RuntimeError, match="is dense"):
        SparseSignSGD([dense], 0.1).step()
