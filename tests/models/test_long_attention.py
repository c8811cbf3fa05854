"""How attention over many tokens is put together, with plain PyTorch in place of its kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.layers import RotaryTable

long = pytest.importorskip("models.kernels.long_attention")
SCALE = long.attention_long.SCALE


def turned(qkv, heads, cos, sin):
    """q and k rotated, q scaled."""
    q, k, v = qkv.view(*qkv.shape[:2], 3, heads, 64).unbind(2)
    if cos is not None:
        low, high = (torch.cat((-t[..., 32:], t[..., :32]), -1) for t in (q, k))
        cos, sin = cos[:, None], sin[:, None]
        q, k = q * cos + low * sin, k * cos + high * sin
    return torch.stack((q * SCALE, k, v), 2).view(qkv.shape)


def attended(qkv, heads):
    """out, and the logarithm of the sum, of base 2."""
    q, k, v = qkv.view(*qkv.shape[:2], 3, heads, 64).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * torch.tensor(2.0).log()
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out, scores.logsumexp(-1) / torch.tensor(2.0).log()


def backward(given, cos, sin, out, lse, dout, heads):
    """Through `attended` and `turned`, which is linear."""
    torch.testing.assert_close((out, lse), attended(given, heads))
    with torch.enable_grad():
        leaf = given.detach().requires_grad_()
        (inner,) = torch.autograd.grad(attended(leaf, heads)[0], leaf, dout)
        leaf = torch.zeros_like(given).requires_grad_()
        return torch.autograd.grad(turned(leaf, heads, cos, sin), leaf, inner)[0]


def close(actual, expected):
    """To float32's rounding, some of it, of the whole."""
    return (actual.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    torch._dynamo.reset()
    kernels, product = long.attention_long, torch.mm
    monkeypatch.setattr(kernels, "attend", lambda qkv, heads, save: attended(qkv, heads))
    monkeypatch.setattr(kernels, "attend_backward", backward)
    monkeypatch.setattr(long, "turn", turned)
    monkeypatch.setattr(
        long.hopper,
        "linear_rotary",
        lambda x, w, cos, sin, _: turned(F.linear(x, w), w.shape[0] // 192, cos, sin),
    )
    monkeypatch.setattr(long.hopper, "linear_residual", lambda x, w, r: r + F.linear(x, w))
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: product(a, b))


def draw(batch, length, width, rotated):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, width, generator=generator)
    weight = torch.randn(3 * width, width, generator=generator) / width**0.5
    table = RotaryTable(64, torch.arange(length), 10000.0)
    return x, weight, (table.cos, table.sin) if rotated else (None, None)


def expected_of(x, weight, heads, tables):
    """out with all of it differentiable, in float64."""
    cos, sin = (None if t is None else t.double() for t in tables)
    return attended(turned(F.linear(x, weight), heads, cos, sin), heads)[0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("kept", ["nothing", "half", "half and its transpose"])
@pytest.mark.parametrize("batch", [0, 2])
def test_projected(batch, kept, rotated, compiled):
    """out, and the gradients of weight and x, of which another use has its share."""
    x, weight, tables = draw(batch, 20, 128, rotated)
    halves = {"nothing": (), "half": (weight,)}.get(kept, (weight, weight.t().contiguous()))

    def function(x, weight):
        out, beside = long.projected_attention(2 * x, weight, 2, *tables, *halves)
        return out, out.square().sum() + beside.pow(3).sum()

    run = torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    out, loss = run(*leaves)
    loss.backward()
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = expected_of(2 * wide[0], wide[1], 2, tables)
    (expected.square().sum() + (2 * wide[0]).pow(3).sum()).backward()
    assert close(out, expected)
    for leaf, reference in zip(leaves, wide, strict=True):
        assert close(leaf.grad, reference.grad)
    with torch.no_grad():
        assert torch.equal(run(x, weight)[0], out)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rotated", [True, False])
def test_of_a_product_made_elsewhere(rotated, compiled):
    x, weight, tables = draw(2, 20, 128, rotated)

    def function(qkv):
        return long.long_attention(qkv, 2, *tables)

    run = torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
    leaf = F.linear(x, weight).requires_grad_()
    out = run(leaf)
    out.square().sum().backward()
    wide = F.linear(x, weight).double().requires_grad_()
    expected = expected_of(wide, torch.eye(384, dtype=torch.float64), 2, tables)
    expected.square().sum().backward()
    assert close(out, expected)
    assert close(leaf.grad, wide.grad)
    with torch.no_grad():
        assert torch.equal(run(leaf), out)
