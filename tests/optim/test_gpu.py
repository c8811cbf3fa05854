"""On a CUDA device: no host synchronization, the same bits every time, capture in a graph."""

import pytest
import torch

from optim import EMA, AdamATan2, AdamMini, AdamW, Muon, SparseSignSGD, clip_scale, global_grad_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLASSES = [AdamATan2, AdamW]
SHAPES = [(513, 129), (), (0, 3), (7,), (64, 64)]


def make_params(dtype=torch.float32, seed=0):
    rng = torch.Generator("cuda").manual_seed(seed)
    params = [torch.randn(s, device="cuda", generator=rng).to(dtype) for s in SHAPES]
    params.append(torch.randn(8, 16, device="cuda", generator=rng).to(dtype)[:, ::2])
    for p in params:
        p.requires_grad_().grad = torch.randn(p.shape, device="cuda", generator=rng).to(dtype)
    return params


@pytest.fixture
def no_sync():
    """Makes every host synchronization an error, inside the test after warm-up."""

    class Guard:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    return Guard()


def one_step(opt, params, ema, table_opt, table, found):
    norm = global_grad_norm(params)
    scale = clip_scale(norm, 1.0)
    opt.step(grad_scale=scale, found_inf=found)
    ema.update(found_inf=found)
    ids = torch.arange(12, device="cuda") % 5
    table_opt.add_rows(table, ids, torch.ones(12, 3, device="cuda"))
    table_opt.step(grad_scale=scale, found_inf=found)


@pytest.mark.parametrize("cls", [*CLASSES, Muon])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_step_never_waits(cls, dtype, no_sync):
    params = make_params(dtype)
    opt, ema = cls(params, 1e-3), EMA(params, 0.9)
    table = torch.randn(9, 3, device="cuda")
    table_opt = SparseSignSGD([table], 0.1)
    found = torch.zeros((), device="cuda")
    one_step(opt, params, ema, table_opt, table, found)
    with no_sync:
        opt.set_lr(2e-3)
        opt.param_groups[0]["lr"] = 3e-3
        one_step(opt, params, ema, table_opt, table, found)
        clip_scale(global_grad_norm(params), 1.0)
    assert float(opt.param_groups[0]["lr"]) == pytest.approx(3e-3)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_agrees_with_the_cpu(cls, dtype):
    gpu = make_params(dtype)
    cpu = [p.detach().cpu().requires_grad_() for p in gpu]
    one, two = cls(gpu, 1e-2), cls(cpu, 1e-2)
    for _ in range(10):
        for p, q in zip(gpu, cpu, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cpu()
        one.step()
        two.step()
    tol = 2e-6 if dtype == torch.float32 else 1e-8  # a float32 lr beside float64 weights
    for p, q in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=tol, atol=tol)


@pytest.mark.parametrize("cls", [*CLASSES, Muon])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_found_inf_leaves_every_bit(cls, dtype):
    params = make_params(dtype)
    opt = cls(params, 1e-2)
    opt.step()
    before = [t.clone() for p in params for t in (p.detach(), *opt.state[p].values())]
    for p in params:
        p.grad.fill_(float("nan"))
    opt.step(found_inf=torch.tensor(3.0, device="cuda"))
    after = [t for p in params for t in (p.detach(), *opt.state[p].values())]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("cls", [*CLASSES, Muon])
def test_graph_capture_is_the_eager_step(cls):
    """Replays follow set_lr and new gradients in the same buffers, to the bit."""

    def run(capture):
        params = make_params()
        opt, ema = cls(params, 1e-3), EMA(params, 0.9)
        table = torch.zeros(9, 3, device="cuda")
        table_opt = SparseSignSGD([table], 0.1)
        found = torch.zeros((), device="cuda")
        args = (opt, params, ema, table_opt, table, found)
        opt.set_lr(0.0)
        table_opt.set_lr(0.0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            one_step(*args)
        torch.cuda.current_stream().wait_stream(side)
        step = lambda: one_step(*args)  # noqa: E731
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                one_step(*args)
            step = graph.replay
        rng = torch.Generator("cuda").manual_seed(3)
        for i in range(5):
            opt.set_lr(1e-3 * (i + 1))
            table_opt.set_lr(0.1)
            found.fill_(1.0 if i == 2 else 0.0)
            for p in params:
                p.grad.copy_(torch.randn(p.shape, device="cuda", generator=rng))
            step()
        return [*params, table, *ema.shadow.values(), opt.state[params[0]]["step"]]

    for x, y in zip(run(False), run(True), strict=True):
        assert torch.equal(x, y)
    assert float(y) == 5


def test_assigning_lr_just_before_capture_is_an_error():
    params = make_params()
    opt = AdamATan2(params, 1e-3)
    opt.step()
    opt.param_groups[0]["lr"] = 0.5
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="set_lr"), torch.cuda.graph(graph):
        opt.step()


@pytest.mark.parametrize("cls", [*CLASSES, AdamMini, Muon])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_moved_after_the_optimizer_was_made_is_named(cls, steps):
    model = torch.nn.Linear(64, 64).to("cpu" if steps == 0 else "cuda")
    options = {"num_heads": 1} if cls is AdamMini else {}
    opt = cls([("q_proj.weight", model.weight), ("q_proj.bias", model.bias)], 0.1, **options)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    model.to("cuda" if steps == 0 else "cpu")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="change the model before the optimizer is made"):
        opt.step()
    torch.cuda.synchronize()


def test_sparse_rows_are_the_same_bits_every_time():
    rng = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(100, (768,), device="cuda", generator=rng)
    rows = torch.randn(768, 512, device="cuda", generator=rng)
    results = []
    for _ in range(20):
        table = torch.zeros(1000, 512, device="cuda")
        opt = SparseSignSGD([table], 0.1, 0.1)
        opt.add_rows(table, ids, rows)
        opt.step()
        results.append(table)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_muon_on_cuda_is_muon_on_the_cpu_up_to_bf16():
    """An update is lr * 0.2 * sqrt(513) large per singular vector; bf16 products keep 1 % of it."""
    gpu = make_params()
    cpu = [p.detach().cpu().requires_grad_() for p in gpu]
    one, two = Muon(gpu, 1e-2), Muon(cpu, 1e-2)
    for p, q in zip(gpu, cpu, strict=True):
        q.grad = p.grad.cpu()
    before = [q.detach().clone() for q in cpu]
    one.step()
    two.step()
    for p, q, b in zip(gpu, cpu, before, strict=True):
        if q.numel() > 1:
            error = (p.detach().cpu() - q.detach()).norm() / (q.detach() - b).norm()
            assert error < 0.03, (tuple(q.shape), float(error))
