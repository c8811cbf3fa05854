"""Products with fused epilogues on Hopper: against float64, in a CUDA graph, repeated."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from models.kernels import hopper
from models.kernels.hopper import compile as nvrtc


def _hopper() -> bool:
    return torch.cuda.is_available() and hopper.available(torch.cuda.current_device())


on_hopper = pytest.mark.skipif(not _hopper(), reason="needs a Hopper GPU")

ROWS = (1, 63, 129, 1000, 8193)
# (features in, features out): tiles of 128 and 256 columns, one and many blocks of K.
SHAPES = ((64, 128), (512, 512), (512, 1536), (128, 384), (1536, 512), (704, 640), (3072, 256))
SHAPES += ((256, 1024),)


def _draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def _close(actual: torch.Tensor, expected: torch.Tensor, roundings: int = 1) -> None:
    """bfloat16 rounds by at most 2⁻⁸ of a value; float32 sums add little to that."""
    torch.testing.assert_close(actual.double(), expected, rtol=roundings * 2**-8, atol=2e-3)
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < 2.5e-3 * roundings**0.5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_and_residual(rows, shape):
    k, n = shape
    x, w, r = _draw(rows, k), _draw(n, k, scale=k**-0.5), _draw(rows, n)
    assert hopper.supported(w, x, r)
    product = x.double() @ w.double().T
    _close(hopper.linear(x, w), product)
    _close(hopper.linear_residual(x, w, r), r.double() + product)
    if n in hopper.NORM_WIDTHS:
        v = r.double() + product
        factor = (v.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        y, none = hopper.linear_residual_norm(x, w, r, 1e-5, save=False)
        _close(y, v * factor, roundings=2)  # v is rounded, too
        assert none is None
        again, saved = hopper.linear_residual_norm(x, w, r, 1e-5, save=True)
        assert torch.equal(again, y)
        torch.testing.assert_close(saved.double(), factor[:, 0], rtol=1e-5, atol=0)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", ((64, 64), (512, 1536), (128, 512), (1024, 192), (768, 256)))
def test_swiglu(rows, shape):
    k, inner = shape
    x, w = _draw(rows, k), _draw(2 * inner, k, scale=2 * k**-0.5)
    gate_up = x.double() @ w.double().T
    h, none = hopper.linear_swiglu(x, w, save=False)
    assert none is None
    again, saved = hopper.linear_swiglu(x, w, save=True)
    assert torch.equal(again, h)
    _close(saved, gate_up)
    gate, up = saved.double().chunk(2, dim=-1)  # h is made of what is saved
    _close(h, F.silu(gate) * up)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", ((64, 128), (512, 1536), (128, 384), (1024, 384), (768, 256)))
def test_dswiglu(rows, shape):
    n, inner = shape
    dy, w, gate_up = _draw(rows, n), _draw(n, inner, scale=n**-0.5), _draw(rows, 2 * inner, scale=3)
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    h = F.silu(gate) * up
    h.backward(dy.double() @ w.double())
    d_wide, h_again = hopper.linear_dswiglu(dy, w.T.contiguous(), gate_up)
    _close(d_wide, wide.grad, roundings=2)  # dh is rounded, too
    _close(h_again, h.detach())


@pytest.mark.gpu
@on_hopper
def test_extreme_gates():
    """Gates far out neither overflow nor lose the sign: silu is 0 on the left, x on the right."""
    w = torch.zeros(128, 64, device="cuda", dtype=torch.bfloat16)
    w[:64, 0] = 1
    w[64:, 1] = 1
    x = torch.zeros(6, 64, device="cuda", dtype=torch.bfloat16)
    x[:, 0] = torch.tensor([-3e38, -200.0, -1e-3, 0.0, 200.0, 1e30])
    x[:, 1] = 1
    h, _ = hopper.linear_swiglu(x, w, save=False)
    _close(h, F.silu(x[:, :1].double()).expand(6, 64))


@pytest.mark.gpu
@on_hopper
def test_graph_and_repetition():
    """Replayed on new values in the same buffers; the same bits every time; all rows written."""
    rows = 20_000
    w_up, w_down = _draw(3072, 512, scale=0.1), _draw(512, 1536, scale=0.03)
    w_down_t = w_down.T.contiguous()
    x, r, dy = _draw(rows, 512), _draw(rows, 512), _draw(rows, 512)

    def run() -> list[torch.Tensor]:
        h, gate_up = hopper.linear_swiglu(x, w_up, save=True)
        y, factors = hopper.linear_residual_norm(h, w_down, r, 1e-5, save=True)
        plain = hopper.linear_residual(x, w_up[:512], r)
        return [h, gate_up, y, factors, plain, *hopper.linear_dswiglu(dy, w_down_t, gate_up)]

    first = run()  # compiled and loaded outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for _ in range(20):
        for t in results:
            t.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, results, first))
    x.copy_(_draw(rows, 512))
    graph.replay()
    _close(results[1], x.double() @ w_up.double().T)
    assert all(map(torch.equal, results, run()))


@pytest.mark.gpu
@on_hopper
def test_what_is_not_supported():
    w = _draw(128, 64)
    assert hopper.supported(w, _draw(3, 64))
    assert not hopper.supported(w, _draw(64, 3).T)
    assert not hopper.supported(w, torch.zeros(3, 64, device="cuda"))
    assert not hopper.supported(w, torch.zeros(3, 64, dtype=torch.bfloat16))
    assert not hopper.supported(w[:64], _draw(3, 64))
    assert not hopper.supported(_draw(128, 60), _draw(3, 60))


def test_without_a_gpu():
    """Imported and asked without CUDA; plans fit the shared memory of a thread block."""
    w = torch.zeros(128, 64, dtype=torch.bfloat16)
    assert not hopper.supported(w, w)
    for epilogue in range(6):
        for k in range(64, 4097, 64):
            plan = hopper.plan(epilogue, k, 1024)
            assert plan.shared_bytes <= 227 * 1024
            assert plan.stages >= 3
    for epilogue in (hopper.PLAIN, hopper.SWIGLU, hopper.NORM, hopper.ROTARY):
        for k in range(128, 4097, 128):
            for columns in (128, 384, 512, 1024):
                plan = hopper.plan(epilogue, k, columns, eight=True)
                assert plan.shared_bytes <= 227 * 1024 and plan.stages >= 3
                assert columns % (plan.out * plan.cn) == 0


def test_cache(monkeypatch, tmp_path):
    """The second request for the same source and macros does not compile."""

    class Version:
        @staticmethod
        def nvrtcVersion(major, minor) -> int:
            ctypes.cast(major, ctypes.POINTER(ctypes.c_int))[0] = 13
            return 0

    asked = []

    def compiled(source, options):
        asked.append(options)
        return b"code", ""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "nvrtc", lambda: Version)
    monkeypatch.setattr(nvrtc, "compile_source", compiled)
    for _ in range(2):
        assert nvrtc.cubin("source", {"K": 64}) == b"code"
    assert len(asked) == 1 and "-DK=64" in asked[0]
    nvrtc.cubin("source", {"K": 128})
    assert len(asked) == 2
