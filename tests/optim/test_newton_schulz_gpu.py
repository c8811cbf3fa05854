"""Newton–Schulz and Muon on a CUDA device: accuracy, determinism, launches, capture."""

import os

import pytest
import torch

from optim import EMA, Muon, newton_schulz

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs a CUDA device",
    ),
]

if torch.cuda.is_available():
    from tests.optim.ns_cases import *  # noqa: F403
    from tests.optim.ns_cases import error, muon, reference, set_grads


def matrix_of(shape, kind, seed=0):
    rng = torch.Generator("cuda").manual_seed(seed)
    matrix = torch.randn(shape, device="cuda", generator=rng)
    if kind == "decaying":  # singular values over five orders of magnitude
        rows = shape[-2]
        matrix = torch.logspace(0, -5, rows, device="cuda")[:, None] * matrix
    return matrix


@pytest.mark.parametrize("kind", ["normal", "decaying"])
@pytest.mark.parametrize(
    "shape", [(512, 512), (1024, 1024), (512, 1536), (1000, 3000), (3, 640, 512)]
)
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
def test_error_is_at_most_that_of_plain_bf16(shape, kind, coefficients):
    matrix = matrix_of(shape, kind)
    want = reference(matrix, coefficients=coefficients)
    ours = error(newton_schulz(matrix, coefficients=coefficients), want)
    plain = error(newton_schulz(matrix, coefficients=coefficients, fused="off"), want)
    assert ours <= 1.05 * plain, (ours, plain)


@pytest.mark.parametrize(
    "shape", [(512, 512), (1024, 1024), (2048, 2048), (1024, 4096), (6, 512, 1536)]
)
def test_the_same_bits_every_time_also_as_a_graph(shape):
    matrix = matrix_of(shape, "normal")
    first = newton_schulz(matrix)
    assert all(torch.equal(first, newton_schulz(matrix)) for _ in range(20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = newton_schulz(matrix)
    for _ in range(5):
        captured.zero_()
        graph.replay()
        assert torch.equal(first, captured)


def test_muon_launches_and_does_not_wait():
    named, opt = muon("on")
    ema = EMA(named, 0.9).attach(opt)
    found = torch.zeros((), device="cuda")
    for seed in range(2):
        set_grads(named, seed)
        opt.step(found_inf=found)
        ema.update(found)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step(found_inf=found)
        ema.update(found)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        opt.step(found_inf=found)
        ema.update(found)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    ours = ("adam_", "momentum_", "gather_", "apply_", "symmetric_", "update_tma_")
    products = [n for n in names if not n.startswith(ours)]
    assert all("gemm" in n or "cutlass" in n or "nvjet" in n for n in products), names
    once = [
        n.split("_kernel")[0] for n in names if n.startswith(("adam", "mom", "gather", "apply"))
    ]
    assert sorted(once) == ["adam", "apply", "gather", "momentum"], names


def test_muon_replays_are_eager_steps():
    def run(capture):
        named, opt = muon("on")
        set_grads(named, 0)
        static = [p.grad for _, p in named]
        opt.step()
        step = opt.step
        torch.cuda.synchronize()
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                opt.step()
            step = graph.replay
        rng = torch.Generator("cuda").manual_seed(3)
        for i in range(4):
            opt.set_lr(1e-3 * (i + 1))
            for g in static:
                g.copy_(torch.randn(g.shape, device="cuda", generator=rng))
            step()
        return [p.detach().clone() for _, p in named]

    assert all(torch.equal(x, y) for x, y in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_muon_of_half_precision(dtype):
    rng = torch.Generator("cuda").manual_seed(0)
    start = torch.randn(96, 160, device="cuda", generator=rng).to(dtype)
    pair = []
    for fused in ("off", "on"):
        p = start.clone().requires_grad_()
        opt = Muon([{"params": [p], "kind": "muon"}], 1e-2, fused=fused)
        for seed in range(3):
            rng = torch.Generator("cuda").manual_seed(seed)
            p.grad = torch.randn(p.shape, device="cuda", generator=rng).to(dtype)
            opt.step()
        pair.append(p.detach().float())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*pair, rtol=2 * eps, atol=2e-3 + eps)
