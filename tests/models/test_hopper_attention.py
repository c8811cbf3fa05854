"""Attention on Hopper: against float64, beside Triton, in a CUDA graph, repeated."""

import math

import pytest
import torch

from models.kernels.hopper import attention as short
from models.layers import RotaryTable


def _hopper() -> bool:
    from models.kernels import hopper

    return torch.cuda.is_available() and hopper.available(torch.cuda.current_device())


on_hopper = pytest.mark.skipif(not _hopper(), reason="needs a Hopper GPU")
OPTIONS = ((True, False), (False, False), (True, True), (False, True))  # rope, causal


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def plain(qkv, heads, cos, sin, causal):
    """In the dtype of qkv, with no kernel at all."""
    batch, length = qkv.shape[:2]
    q, k, v = (
        t.view(batch, length, heads, -1).transpose(1, 2)
        for t in qkv.view(batch, length, -1).chunk(3, -1)
    )

    def turned(t):
        low, high = t.chunk(2, -1)
        return t * cos.to(t.dtype) + torch.cat((-high, low), -1) * sin.to(t.dtype)

    if cos is not None:
        q, k = turned(q), turned(k)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(scores.new_ones(length, length).triu(1).bool(), -torch.inf)
    mixed = scores.softmax(-1) @ v
    return mixed.transpose(1, 2).reshape(batch, length, -1), scores.logsumexp(-1).flatten(0, 1)


def draw(batch, length, heads):
    qkv = torch.randn(batch, length, 3 * heads * 64, device="cuda").bfloat16()
    dout = torch.randn(batch, length, heads * 64, device="cuda").bfloat16()
    return qkv, dout, RotaryTable(64, torch.arange(length), 10000.0).cuda()


def both(qkv, dout, table, heads, rope, causal):
    """out, lse and dqkv of the kernels."""
    tables = (table.cos, table.sin)
    out, lse = short.attend(qkv, *tables, heads, rope, causal, True)
    return out, lse, short.attend_backward(qkv, *tables, out, lse, dout, heads, rope, causal)


def relative(actual, expected) -> float:
    error = (actual.double() - expected).norm() / expected.norm()
    return float("inf") if error.isnan() else error.item()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rope, causal", OPTIONS)
@pytest.mark.parametrize("batch, heads", [(1, 1), (3, 5), (67, 8)])
@pytest.mark.parametrize("length", [1, 16, 33, 64, 81, 97, 113, 128])
def test_against_float64(length, batch, heads, rope, causal):
    qkv, dout, table = draw(batch, length, heads)
    assert short.supported(qkv, table.cos, heads, rope)
    out, lse, dqkv = both(qkv, dout, table, heads, rope, causal)
    wide = qkv.double().requires_grad_()
    tables = (table.cos, table.sin) if rope else (None, None)
    expected, expected_lse = plain(wide, heads, *tables, causal)
    expected.backward(dout.double())
    assert relative(out, expected.detach()) < 5e-3  # bfloat16 rounds by 2⁻⁹; a few roundings
    torch.testing.assert_close(lse.double(), expected_lse.detach(), rtol=0, atol=2e-2)
    parts = zip(dqkv.chunk(3, -1), wide.grad.chunk(3, -1), strict=True)
    for name, (part, ref) in zip("qkv", parts, strict=True):
        if length == 1 and name != "v":  # one token: no gradient but what rounding leaves
            assert part.float().abs().max() < 0.1
        else:
            assert relative(part, ref) < 1e-2, name
    alone, _ = short.attend(qkv, table.cos, table.sin, heads, rope, causal, False)
    assert torch.equal(alone, out)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("length", [33, 97, 128])
def test_graph_and_repetition(length):
    """Replayed in the same buffers, and on new values: the same bits every time."""
    heads, options = 8, (True, False)
    qkv, dout, table = draw(150, length, heads)
    first = both(qkv, dout, table, heads, *options)  # compiled and loaded outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = both(qkv, dout, table, heads, *options)
    for _ in range(10):
        for t in again:
            t.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, again, first))
    qkv.copy_(draw(150, length, heads)[0])
    graph.replay()
    assert all(map(torch.equal, again, both(qkv, dout, table, heads, *options)))


@pytest.mark.gpu
@on_hopper
def test_extreme_scores():
    """Scores of thousands neither overflow nor lose the sum; other puzzles do not notice."""
    qkv, dout, table = draw(3, 97, 2)
    before, *_ = both(qkv, dout, table, 2, True, False)
    qkv[1] *= 60
    out, lse, dqkv = both(qkv, dout, table, 2, True, False)
    assert all(t.isfinite().all() for t in (out, lse, dqkv))
    assert torch.equal(out[::2], before[::2])


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize(
    "batch, heads, length",
    [(1, 1, 129), (3, 5, 192), (2, 3, 385), (50, 8, 256), (19, 8, 916), (2, 2, 1024)],
)
def test_long_against_float64(batch, heads, length, rope):
    from models.kernels import long_attention as long

    qkv, dout, table = draw(batch, length, heads)
    tables = (table.cos, table.sin) if rope else (None, None)
    wide = qkv.double().requires_grad_()
    expected, _ = plain(wide, heads, *tables, False)
    expected.backward(dout.double())
    with torch.no_grad():
        alone = long.long_attention(qkv, heads, *tables)
    assert relative(alone, expected.detach()) < 5e-3
    leaf = qkv.clone().requires_grad_()
    out = long.long_attention(leaf, heads, *tables)
    assert torch.equal(out, alone)
    out.backward(dout)
    for part, ref in zip(leaf.grad.chunk(3, -1), wide.grad.chunk(3, -1), strict=True):
        assert relative(part, ref) < 1e-2


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("batch, heads, length", [(1, 2, 129), (5, 4, 300), (17, 8, 916)])
def test_projected_against_float64(batch, heads, length, rope):
    """The product with the rotation in it, attention, and the sum of x's two gradients."""
    from models.kernels.long_attention import projected_attention

    width = heads * 64
    _, dout, table = draw(batch, length, heads)
    x, dx = (torch.randn(batch, length, width, device="cuda").bfloat16() for _ in range(2))
    weight = torch.randn(3 * width, width, device="cuda") / width**0.5
    half = weight.bfloat16()
    tables = (table.cos, table.sin) if rope else (None, None)
    wide, wide_weight = x.double().requires_grad_(), half.double().requires_grad_()
    expected, _ = plain(wide @ wide_weight.mT, heads, *tables, False)
    torch.autograd.backward((expected, wide), (dout.double(), dx.double()))
    with torch.no_grad():
        alone, _ = projected_attention(x, weight, heads, *tables, half)
    assert relative(alone, expected.detach()) < 5e-3
    for half_t in (None, half.t().contiguous()):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out, beside = projected_attention(*leaves, heads, *tables, half, half_t)
        assert torch.equal(out, alone) and torch.equal(beside, x)
        torch.autograd.backward((out, beside), (dout, dx))
        assert relative(leaves[0].grad, wide.grad) < 1e-2
        assert relative(leaves[1].grad, wide_weight.grad) < 1e-2


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("extreme", [12.0, 60.0, "low"])
def test_long_extreme_scores(extreme):
    """Sums that leave float32 without a maximum: those heads are done again, with it."""
    from models.kernels import long_attention as long
    from models.kernels.hopper import attention_long

    qkv, dout, table = draw(3, 200, 4)
    rows = qkv[1].view(200, 3, 4, 64)
    before, tables = rows[:, :, 2].clone(), (table.cos, table.sin)
    if extreme == "low":  # all scores of a head near -690
        rows[:, 1, 2] = 1 + 0.02 * torch.randn(200, 64, device="cuda").bfloat16()
        rows[:, 0, 2] = -60
        tables = (None, None)
    else:  # its diagonal at 140 or 690
        rows[:, 0, 2] = rows[:, 1, 2] * extreme

    def run(qkv):
        leaf = qkv.clone().requires_grad_()
        out = long.long_attention(leaf, 4, *tables)
        out.backward(dout)
        return out.detach(), leaf.grad

    wide = qkv.double().requires_grad_()
    expected, _ = plain(wide, 4, *tables, False)
    expected.backward(dout.double())
    out, grad = run(qkv)
    assert relative(out, expected.detach()) < 5e-3
    assert grad.isfinite().all()
    others = torch.arange(3 * 4 * 64, device="cuda").view(3, 4, 64)[:, [0, 1, 3]].flatten()
    assert relative(grad[..., others], wide.grad[..., others]) < 1e-2
    # what is rounded before the scores decides at such a size: the rest is judged from there
    turned = long.turn(qkv, 4, *tables)
    q, k, _ = turned.double().view(3, 200, 3, 4, 64).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT * math.log(2)
    _, lse = attention_long.attend(turned, 4, True)
    sums = logits.logsumexp(-1) / math.log(2)
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-2)
    dv = (logits.softmax(-1).mT @ dout.double().view(3, 200, 4, 64).transpose(1, 2))[:, 2]
    assert relative(grad.view(3, 200, 3, 4, 64)[:, :, 2, 2], dv) < 1e-2
    rows[:, :, 2] = before
    calm = run(qkv)[0].view(3, 200, 4, 64)
    out = out.view(3, 200, 4, 64)
    assert torch.equal(out[:, :, [0, 1, 3]], calm[:, :, [0, 1, 3]])
    assert torch.equal(out[::2], calm[::2])


@pytest.mark.gpu
@on_hopper
def test_long_graph_and_repetition():
    from models.kernels import long_attention as long

    def run():
        leaf = qkv.detach().requires_grad_()
        out = long.long_attention(leaf, 8, table.cos, table.sin)
        return out.detach(), *torch.autograd.grad(out, leaf, dout)

    qkv, dout, table = draw(40, 300, 8)
    torch.use_deterministic_algorithms(True)
    try:
        first = run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = run()
        for _ in range(5):
            for t in again:
                t.fill_(float("nan"))
            graph.replay()
            assert all(map(torch.equal, again, first))
    finally:
        torch.use_deterministic_algorithms(False)


def test_plans_fit():
    """Shared memory and registers of a thread block, whatever the length."""
    for length in range(1, short.MAX_TOKENS + 1):
        for backward in (False, True):
            plan = short.Plan(backward, length, rope=True, causal=False, save=True)
            assert plan.shared_bytes <= 227 * 1024
            assert plan.rows >= length and 64 * plan.blocks >= plan.rows
            source, macros = plan.source()
            assert "wgmma_scores" in source and macros["LENGTH"] == length


def test_long_plans_fit():
    from models.kernels.hopper import attention_long

    for length in range(129, attention_long.MAX_TOKENS + 1):
        plan = attention_long.Plan(length, bold=True, save=True)
        assert plan.shared_bytes <= 227 * 1024
        assert plan.source()[1]["LENGTH"] == length
        for plan in attention_long.backward_plans(length, True):
            assert plan.shared_bytes <= 227 * 1024
            rows, columns = plan.rows, plan.columns
            assert attention_long.padded(length) >= max(
                -(-length // n) * n for n in (rows, columns)
            )


def test_not_without_a_gpu():
    qkv = torch.zeros(1, 4, 192, dtype=torch.bfloat16)
    assert not short.supported(qkv, torch.zeros(4, 64), 1, True)
