"""The token mixer's Hopper kernels: against float64, in a CUDA graph, repeated."""

import pytest
import torch
import torch.nn.functional as F

from models.kernels import hopper

pytest.importorskip("triton")

from models.kernels import mixer
from models.kernels.hopper import mixer as kernels

_HERE = torch.cuda.is_available() and hopper.available(torch.cuda.current_device())
on_hopper = pytest.mark.skipif(not _HERE, reason="needs a Hopper GPU")

LENGTHS = (1, 16, 30, 64, 81, 97, 113, 128)
SHAPES = ((1, 64, 64), (3, 512, 512), (7, 128, 192), (5, 192, 320), (67, 512, 512))  # B, D, J
EPS = 1e-5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def _inputs(batch: int, length: int, width: int, inner: int) -> tuple[torch.Tensor, ...]:
    gate_up = _draw(2 * inner, length, scale=2 * length**-0.5)
    return _draw(batch, length, width), gate_up, _draw(length, inner, scale=inner**-0.5)


def _plain(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, eps: float = EPS
) -> torch.Tensor:
    x_BDL = x.transpose(1, 2)
    gate, up = (x_BDL @ gate_up.mT).chunk(2, -1)
    y = x_BDL + (F.silu(gate) * up) @ down.mT
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).transpose(1, 2)


def _normed(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, eps: float = EPS
) -> torch.Tensor:
    x_BDL = x.transpose(1, 2)
    gate, up = (x_BDL @ gate_up.mT).chunk(2, -1)
    product = gate * up * torch.rsqrt((gate * up).square().mean(-1, keepdim=True) + eps)
    y = x_BDL + (torch.sigmoid(gate) * product) @ down.mT
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).transpose(1, 2)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected).norm() / expected.norm()).item()


def _forward(x, gate_up, down, save, eps=EPS):
    return kernels.forward(x, kernels.pad(gate_up), down, eps, save)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(length, shape):
    batch, width, inner = shape
    x, gate_up, down = _inputs(batch, length, width, inner)
    assert kernels.takes(x, inner)
    eps = EPS if length > 1 else 1.0  # the sign of one token near zero is left to rounding
    expected = _plain(x.double(), gate_up.double(), down.double(), eps)
    out, inv = _forward(x, gate_up, down, True, eps)
    assert _error(out, expected) < 3e-3  # bfloat16 rounds by 2⁻⁹ at most, h and the result
    assert (out.double() - expected).abs().max() < 0.05
    x_BDL, (gate, up) = x.mT.double(), (x.mT.double() @ gate_up.mT.double()).chunk(2, -1)
    y = x_BDL + (F.silu(gate) * up) @ down.mT.double()
    assert _error(inv, torch.rsqrt(y.square().mean(-1) + eps)) < 2e-3
    assert torch.equal(_forward(x, gate_up, down, False, eps)[0], out)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("length", LENGTHS[1:])  # of one token, all gradients are rounding
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(length, shape):
    batch, width, inner = shape
    inputs = _inputs(batch, length, width, inner)
    dout = _draw(batch, length, width)
    exact = [t.double().requires_grad_() for t in inputs]
    _plain(*exact).backward(dout.double())
    leaves = [t.clone().requires_grad_() for t in inputs]
    mixer.token_mixer(*leaves, EPS).backward(dout)
    for actual, expected in zip(leaves, exact, strict=True):
        assert _error(actual.grad, expected.grad) < 8e-3
    # the inner gradients, each
    x, gate_up, down = inputs
    out, inv = _forward(x, gate_up, down, True)
    weights = kernels.pad(gate_up), kernels.pad(down.mT)
    dx, dy, dgu, h, _ = kernels.backward(x, out, inv, dout, *weights, True)
    again = kernels.backward(x, out, inv, dout, *weights, False)
    assert torch.equal(again[0], dx) and torch.equal(again[1], dy)
    o, g = out.double(), dout.double()
    dy_ = (g - o * (o * g).mean(1, keepdim=True)) * inv.double()[:, None]
    torch.testing.assert_close(dy.double(), dy_, rtol=2**-7, atol=1e-3)
    gate, up = (x.mT.double() @ gate_up.mT.double()).chunk(2, -1)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    h_ = F.silu(gate) * up
    h_.backward(dy.mT.double() @ down.double())
    assert _error(h, h_.detach()) < 4e-3
    dgu_ = torch.cat((gate.grad, up.grad), -1)
    assert _error(dgu, dgu_) < 6e-3
    assert _error(dx, dy_ + (dgu_ @ gate_up.double()).mT) < 6e-3
    if kernels.sums_weights(length, inner):
        dgate_up, ddown = kernels.weight_gradients(x, dy, *weights)
        assert _error(dgate_up, torch.einsum("bdj,bld->jl", dgu_, x.double())) < 6e-3
        assert _error(ddown, torch.einsum("bld,bdj->lj", dy_, h_.detach())) < 6e-3


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("length", LENGTHS[1:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_inside(length, shape):
    batch, width, inner = shape
    inputs = _inputs(batch, length, width, inner)
    dout = _draw(batch, length, width)
    exact = [t.double().requires_grad_() for t in inputs]
    expected = _normed(*exact)
    expected.backward(dout.double())
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = mixer.token_mixer(*leaves, EPS, normed=True)
    out.backward(dout)
    assert _error(out.detach(), expected.detach()) < 4e-3
    for actual, reference in zip(leaves, exact, strict=True):
        assert _error(actual.grad, reference.grad) < 1e-2  # y - x is taken from rounded results
    with torch.no_grad():
        assert torch.equal(mixer.token_mixer(*inputs, EPS, normed=True), out)


@pytest.mark.gpu
@on_hopper
def test_graph_and_repetition():
    """Replayed on new values in the same buffers; the same bits every time; all rows written."""
    x, gate_up, down = _inputs(150, 97, 512, 512)
    dout = _draw(150, 97, 512)
    weights = kernels.pad(gate_up), kernels.pad(down.mT)

    def run():
        out, inv = kernels.forward(x, weights[0], down, EPS, True)
        dx, dy, dgu, h, _ = kernels.backward(x, out, inv, dout, *weights, True)
        return out, inv, dx, dy, dgu, h, *kernels.weight_gradients(x, dy, *weights)

    first = run()  # compiled and loaded outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for _ in range(20):
        for t in results:
            t.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))
    x.copy_(_draw(150, 97, 512))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, run(), strict=True))


def test_what_it_takes():
    """Only bfloat16 on a GPU, and shapes that the tiles cover."""
    assert not kernels.takes(torch.zeros(1, 97, 64, dtype=torch.bfloat16), 64)
    plan = kernels.forward_plan(512, 97, False)
    assert (plan.NT, plan.KT) == (104, 112)
    for length in range(1, kernels.MAX_TOKENS + 1):
        plans = [kernels.forward_plan(64, length, True)]
        plans += [kernels.backward_plan(64, length, keep) for keep in (False, True)]
        plans += [kernels.weights_plan(64, length)] * kernels.sums_weights(length, 64)
        assert all(p.STAGES >= 2 and p.shared_bytes <= 227 * 1024 for p in plans)
