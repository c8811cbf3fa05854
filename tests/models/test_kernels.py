"""Fused operations against float64: on the CPU in Triton's interpreter, on a GPU as compiled.

In float32 an operation may differ from float64 by what float32 sums do; in half precision by a
few roundings to its dtype: bfloat16 has 8 bits, so 2⁻⁹ relative per rounding, float16 11 bits.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA and not INTERPRETED else "cpu"
# relative error of the whole tensor, ‖out - ref‖ / ‖ref‖
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16]

in_kernel = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs CUDA or the interpreter")
pytestmark = [pytest.mark.gpu] if not INTERPRETED else []


def relative(out: torch.Tensor, ref: torch.Tensor) -> float:
    error = (out.double() - ref.double()).norm() / ref.double().norm()
    return float("inf") if error.isnan() else error.item()


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


def both(fused, plain, tensors, dtype):
    """Outputs and gradients of both functions; the plain one in float64."""
    results = []
    for function, kind in ((fused, None), (plain, torch.float64)):
        leaves = [t.to(kind or t.dtype).detach().requires_grad_() for t in tensors]
        out = function(*leaves)
        torch.manual_seed(1)
        out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.device, out.dtype))
        results.append([out.detach(), *(t.grad for t in leaves)])
    for got, ref in zip(*results, strict=True):
        assert got.shape == ref.shape
        assert relative(got, ref) <= TOLERANCE[dtype]


def plain_mixer(x, gate_up, down, eps=1e-5):
    x = x.transpose(1, 2)
    gate, up = (x @ gate_up.mT).chunk(2, -1)
    y = x + (F.silu(gate) * up) @ down.mT
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).transpose(1, 2)


@in_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, length, width", [(1, 3, 8), (2, 11, 40), (3, 17, 136), (2, 97, 64)]
)
def test_token_mixer(batch, length, width, dtype):
    from models.kernels.mixer import cast_weights, token_mixer

    torch.manual_seed(0)
    x = draw(batch, length, width, dtype=dtype)
    weights = (
        draw(512, length, dtype=dtype, scale=length**-0.5),
        draw(length, 256, dtype=dtype, scale=1 / 16),
    )
    both(lambda *t: token_mixer(*t, 1e-5), plain_mixer, (x, *weights), dtype)
    with torch.no_grad():
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        out = token_mixer(x, *weights, 1e-5)
        assert torch.equal(out, token_mixer(strided, *weights, 1e-5))
        wide = tuple(w.float() for w in weights)  # as the parameters are, cast beforehand
        assert torch.equal(out, token_mixer(x, *wide, 1e-5, cast_weights(x, *wide)))


def plain_attention(qkv, heads, cos, sin, causal):
    batch, length = qkv.shape[:2]
    q, k, v = qkv.view(batch, length, 3, heads, -1).unbind(2)

    def turned(t):
        if cos is None:
            return t
        low, high = t.chunk(2, -1)
        c, s = cos[:, None].to(t.dtype), sin[:, None].to(t.dtype)
        return t * c + torch.cat((-high, low), -1) * s

    q, k, v = (t.transpose(1, 2) for t in (turned(q), turned(k), v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).reshape(batch, length, -1)


@in_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope, causal", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize(
    "batch, length, heads, head_dim",
    [(1, 1, 1, 32), (2, 11, 2, 32), (2, 16, 3, 64), (1, 97, 2, 64)],
)
def test_short_attention(batch, length, heads, head_dim, rope, causal, dtype):
    from models.kernels.attention import short_attention
    from models.layers import RotaryTable

    torch.manual_seed(0)
    qkv = draw(batch, length, 3 * heads * head_dim, dtype=dtype)
    table = RotaryTable(head_dim, torch.arange(length), 10000.0).to(DEVICE)
    cos, sin = (table.cos, table.sin) if rope else (None, None)
    both(
        lambda t: short_attention(t, heads, cos, sin, causal),
        lambda t: plain_attention(t, heads, cos, sin, causal),
        (qkv,),
        dtype,
    )


@in_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("batch, length, heads", [(0, 5, 2), (1, 1, 1), (2, 65, 3)])
def test_turn(batch, length, heads, rope, dtype):
    """What long attention reads: q and k rotated, q times log2(e) / 8."""
    from models.kernels.long_attention import turn
    from models.layers import RotaryTable

    torch.manual_seed(0)
    qkv = draw(batch, length, 3 * heads * 64, dtype=dtype)
    table = RotaryTable(64, torch.arange(length), 10000.0).to(DEVICE)
    got = turn(qkv, heads, *((table.cos, table.sin) if rope else (None, None)))
    q, k, v = qkv.double().view(batch, length, 3, heads, 64).unbind(2)
    if rope:
        q, k = table(q), table(k)
    expected = torch.stack((q / 8 / math.log(2), k, v), 2).view(qkv.shape)
    assert got.shape == qkv.shape and (not batch or relative(got, expected) <= TOLERANCE[dtype])
    assert torch.equal(got[..., -heads * 64 :], qkv[..., -heads * 64 :])


@in_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width, inner", [(1, 8, 256), (130, 72, 256), (257, 64, 512)])
def test_linear_swiglu(rows, width, inner, dtype):
    from models.kernels.swiglu import linear_swiglu

    torch.manual_seed(0)
    x, weight = draw(rows, width, dtype=dtype), draw(2 * inner, width, dtype=dtype, scale=0.2)
    gate, up = (x.double() @ weight.double().mT).chunk(2, -1)
    assert relative(linear_swiglu(x, weight), F.silu(gate) * up) <= TOLERANCE[dtype]


@in_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(1, 8), (7, 40), (33, 512)])
def test_norm_backward(rows, width, dtype):
    from models.kernels.residual import norm_backward

    torch.manual_seed(0)
    v = draw(rows, width, dtype=dtype).double().requires_grad_()
    factors = torch.rsqrt(v.square().mean(-1) + 1e-5)
    out, dout = v * factors[:, None], draw(rows, width, dtype=dtype)
    out.backward(dout.double())
    got, _ = norm_backward(out.detach().to(dtype), factors.detach().float(), dout)
    assert relative(got, v.grad) <= TOLERANCE[dtype]


def hopper_only():
    if not CUDA or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def plain_norm(v, eps=1e-5):
    return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)


@in_kernel
@pytest.mark.parametrize("shape", [(1, 1), (3, 97), (2, 130)])
@pytest.mark.parametrize("width", [128, 512])
def test_linear_and_swiglu_with_residual_and_norm(shape, width):
    hopper_only()
    from models.kernels.residual import linear_norm, swiglu_norm
    from models.kernels.swiglu import swiglu_mlp

    torch.manual_seed(0)
    kind = torch.bfloat16
    x, r = draw(*shape, 256, dtype=kind), draw(*shape, width, dtype=kind)
    w = draw(width, 256, dtype=kind, scale=1 / 16)
    both(
        lambda x, w, r: linear_norm(x, w, r, 1e-5),
        lambda x, w, r: plain_norm(r + x @ w.mT),
        (x, w, r),
        kind,
    )
    gate_up = draw(512, width, dtype=kind, scale=width**-0.5)
    down = draw(width, 256, dtype=kind, scale=1 / 16)

    def plain_mlp(x, gate_up, down):
        gate, up = (x @ gate_up.mT).chunk(2, -1)
        return (F.silu(gate) * up) @ down.mT

    both(
        lambda *t: swiglu_norm(*t, 1e-5),
        lambda x, *w: plain_norm(x + plain_mlp(x, *w)),
        (r, gate_up, down),
        kind,
    )
    both(swiglu_mlp, plain_mlp, (r, gate_up, down), kind)


@in_kernel
@pytest.mark.parametrize("shape", [(1, 1), (3, 97), (2, 130)])
@pytest.mark.parametrize(("width", "inner"), [(128, 256), (512, 1536)])
def test_swiglu_with_residual_and_a_norm_inside_too(shape, width, inner):
    hopper_only()
    from models.kernels.residual import swiglu_norm

    torch.manual_seed(0)
    kind = torch.bfloat16
    x = draw(*shape, width, dtype=kind)
    gate_up = draw(2 * inner, width, dtype=kind, scale=2 * width**-0.5)
    down = draw(width, inner, dtype=kind, scale=inner**-0.5)

    def plain(x, gate_up, down):
        gate, up = (x @ gate_up.mT).chunk(2, -1)
        return plain_norm(x + (torch.sigmoid(gate) * plain_norm(gate * up)) @ down.mT)

    both(lambda *t: swiglu_norm(*t, 1e-5, normed=True), plain, (x, gate_up, down), kind)


@in_kernel
@pytest.mark.parametrize(("parts", "rows"), [(1, 1), (3, 7), (12, 300)])
def test_inverse_rms(parts, rows):
    from models.kernels.residual import inverse_rms

    torch.manual_seed(0)
    squares = draw(parts, rows, dtype=torch.float32).square()
    expected = torch.rsqrt(squares.double().sum(0) / 40 + 1e-5)
    assert relative(inverse_rms(squares, 40, 1e-5), expected) <= TOLERANCE[torch.float32]


@in_kernel
def test_linear_beside_a_residual():
    """One product gives the sum of both gradients of x."""
    hopper_only()
    from models.kernels.residual import linear_beside

    torch.manual_seed(0)
    kind = torch.bfloat16
    x, w = draw(3, 97, 256, dtype=kind), draw(768, 256, dtype=kind, scale=1 / 16)
    both(
        lambda x, w: torch.cat(linear_beside(x, w, w.detach(), w.detach().t().contiguous()), -1),
        lambda x, w: torch.cat((x @ w.mT, x), -1),
        (x, w),
        kind,
    )


@in_kernel
@pytest.mark.parametrize("name", ["short_attention", "token_mixer"])
def test_the_compiler_sees_one_operation(name):
    """No graph break, and what the function gives without the compiler."""
    from models.kernels.attention import short_attention
    from models.kernels.mixer import token_mixer

    torch.manual_seed(0)
    kind = DTYPES[-1]
    if name == "short_attention":
        x = draw(2, 20, 3 * 4 * 32, dtype=kind)  # heads of 32, the fewest that it takes
        tensors, function = (x,), lambda x: 2 * short_attention(2 * x, 4, None, None, False)
    else:
        x = draw(2, 20, 192, dtype=kind)
        weights = draw(128, 20, dtype=kind, scale=0.2), draw(20, 64, dtype=kind, scale=0.1)
        tensors, function = (x, *weights), lambda x, *w: 2 * token_mixer(2 * x, *w, 1e-5)
    results = []
    for f in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = f(*leaves)
        out.float().square().sum().backward()
        results.append([out, *(t.grad for t in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@in_kernel
@pytest.mark.parametrize("shape", [(5, 3, 7), (1, 1, 1), (3, 97, 128), (0, 4, 8), (4, 0, 8)])
@pytest.mark.parametrize("kind", ["rows", "vector", "yes", "no"])
def test_select_rows(shape, kind):
    from models.kernels.rows import select_rows

    torch.manual_seed(0)
    then, other = draw(*shape, dtype=DTYPES[-1]), draw(*shape, dtype=DTYPES[-1])
    mask = torch.rand(shape[0], device=DEVICE) < 0.5
    if kind in ("yes", "no"):
        mask = torch.tensor(kind == "yes", device=DEVICE)
    if kind == "vector":
        then = draw(shape[-1], dtype=DTYPES[-1]).expand(shape)
    other[..., -1:] = torch.nan
    expected = torch.where(mask.view(-1, 1, 1), then, other)
    assert torch.equal(select_rows(mask, then, other).nan_to_num(7), expected.nan_to_num(7))
    out = torch.empty_like(other)
    assert select_rows(mask, then, other, out) is out
    assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels run in this process")
def test_in_the_interpreter():
    """On a machine without a GPU: the tests above, in a process with Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "not interpreter and not residual"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        cwd=Path(__file__).parents[2], timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]
