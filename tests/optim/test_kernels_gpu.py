"""The Triton kernels on a CUDA device: the common cases, and what only a GPU can show."""

import os

import pytest
import torch

from optim import EMA, AdamATan2, AdamW, SparseSignSGD, global_grad_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs a CUDA device",
    ),
]

if torch.cuda.is_available():
    from tests.optim.kernel_cases import *  # noqa: F403
    from tests.optim.kernel_cases import RULES, everything, make, same, set_grads
else:
    RULES = []

per_class = pytest.mark.parametrize("cls", [AdamW, AdamATan2])


def test_adamw_is_torch_adamw_to_an_ulp():
    """States put equal before each step; ulp of the larger of old and new value; 50 steps.

    Where a weight and its update both nearly vanish, one ulp holds only if every rounding is that
    of torch's kernel: the message says for how many elements each state differs at all.
    """
    params, opt = make(AdamW, {}, True, [(513, 1029)])
    opt.set_lr(1e-3)
    twin = params[0].detach().clone().requires_grad_()
    lr = torch.tensor(1e-3, device="cuda")
    ref = torch.optim.AdamW([twin], lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    worst, differ = 0.0, dict.fromkeys(("param", "exp_avg", "exp_avg_sq"), 0)
    for seed in range(50):
        set_grads(params, seed)
        twin.grad = params[0].grad.clone()
        old = twin.detach().clone()
        opt.step()
        ref.step()
        with torch.no_grad():
            size = torch.maximum(old.abs(), twin.abs())
            ulp = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
            worst = max(worst, float(((params[0] - twin).abs() / ulp).max()))
            mine, theirs = opt.state[params[0]], ref.state[twin]
            differ["param"] += int((params[0] != twin).sum())
            params[0].copy_(twin)
            for name, value in theirs.items():
                if name in differ:
                    differ[name] += int((mine[name] != value).sum())
                mine[name].copy_(value)
    print("elements of 50 steps that differ in a bit:", differ, "worst ulp:", worst)
    assert worst <= 1.0, (worst, differ)


@per_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(cls, dtype):
    params, opt = make(cls, {}, True, dtype=dtype)
    twins, plain = make(cls, {}, False, dtype=dtype)
    for seed in range(5):
        set_grads(params, seed)
        set_grads(twins, seed)
        opt.step()
        plain.step()
        with torch.no_grad():  # one rounding apart at most, each step on its own
            for p, q in zip(params, twins, strict=True):
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(p, q, rtol=eps, atol=1e-4)
                p.copy_(q)
                for name, value in plain.state[q].items():
                    torch.testing.assert_close(opt.state[p][name], value, rtol=1e-5, atol=1e-6)
                    opt.state[p][name].copy_(value)


@pytest.mark.parametrize(("cls", "options"), RULES)
def test_one_launch_and_the_same_bits_every_time(cls, options):
    results = []
    for _ in range(10):
        params, opt = make(cls, options, True, [(1000, 1031), (77,)] * 3)
        for seed in range(3):
            set_grads(params, seed)
            opt.step()
        results.append(everything(params, opt))
    assert all(same(results[0], r) for r in results[1:])
    found, scale = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    opt.step(grad_scale=scale, found_inf=found)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        opt.step(grad_scale=scale, found_inf=found)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    kernels = [n for n in names if "Memcpy" not in n and "Memset" not in n]
    assert len(kernels) == 1 and "adam_kernel" in kernels[0], kernels


@per_class
def test_clip_step_and_average_are_two_launches(cls):
    params, opt = make(cls, {}, True, [(1000, 1031), (77,)] * 3)
    ema = EMA(params, 0.9).attach(opt)
    found = torch.zeros((), device="cuda")
    set_grads(params, 0)

    def step():
        opt.step(grad_scale=opt.clip(1.0)[1], found_inf=found)
        ema.update(found)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert [n.split("_")[0] for n in names] == ["norm", "adam"], names


@per_class
def test_norm_in_one_launch_is_the_same_bits_every_time(cls):
    params, opt = make(cls, {}, True, [(1000, 1031), (77,)] * 30)
    set_grads(params, 0)
    first = [t.clone() for t in opt.clip(1.0)]
    for _ in range(200):
        assert same(first, opt.clip(1.0))
    torch.testing.assert_close(first[0], global_grad_norm(params), rtol=1e-6, atol=0)


@per_class
def test_no_synchronization_and_new_gradient_addresses(cls):
    params, opt = make(cls, {}, True)
    set_grads(params, 0)
    opt.step()
    grads = [torch.randn_like(p) for p in params]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.set_lr(1e-3)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        opt.step(found_inf=torch.zeros((), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(opt.state[params[0]]["step"]) == 2


@per_class
def test_graph_replays_are_eager_steps_also_mixed(cls):
    def run(capture):
        params, opt = make(cls, {}, True)
        ema = EMA(params, 0.9)
        found = torch.zeros((), device="cuda")
        set_grads(params, 0)
        static = [p.grad for p in params]

        def step():
            for p, g in zip(params, static, strict=True):
                p.grad = g
            opt.step(found_inf=found)
            ema.update(found_inf=found)

        step()
        torch.cuda.synchronize()
        replay = step
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            replay = graph.replay
        rng = torch.Generator("cuda").manual_seed(3)
        for i in range(6):
            opt.set_lr(1e-3 * (i + 1))
            found.fill_(1.0 if i == 2 else 0.0)
            for g in static:
                g.copy_(torch.randn(g.shape, device="cuda", generator=rng))
            replay()
            if i == 3:  # an eager step with other gradients in between
                set_grads(params, 7)
                opt.step()
        return [*everything(params, opt), *ema.shadow.values()]

    assert same(run(False), run(True))


def test_a_thousand_tensors():
    shapes = [(i % 50,) for i in range(1000)]
    params, opt = make(AdamATan2, {}, True, shapes)
    twins, plain = make(AdamATan2, {}, False, shapes)
    for seed in range(2):
        set_grads(params, seed)
        set_grads(twins, seed)
        opt.step()
        plain.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


def test_sparse_signsgd_is_one_launch_without_waiting():
    rng = torch.Generator("cuda").manual_seed(0)
    table = torch.zeros(100_000, 512, device="cuda")
    opt = SparseSignSGD([table], 0.1, fused="on")
    ids = torch.randint(300, (768,), device="cuda", generator=rng)
    rows = torch.randn(768, 512, device="cuda", generator=rng)
    found = torch.zeros((), device="cuda")
    results = []
    for _ in range(5):
        table.zero_()
        opt.add_rows(table, ids, rows)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            opt.step(found_inf=found)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append(table[:300].clone())
    assert all(torch.equal(results[0], r) for r in results)
    sums = torch.zeros(300, 512, dtype=torch.float64, device="cuda").index_add_(
        0, ids, rows.double()
    )
    sure = sums.abs() > 1e-4
    assert torch.equal(results[0][sure], -0.1 * sums.sign().float()[sure])
    opt.add_rows(table, ids, rows)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        opt.step(found_inf=found)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert len(names) == 1 and "sparse_signsgd" in names[0], names


@pytest.mark.slow
def test_more_than_two_billion_elements():
    """64-bit offsets: the far end of a tensor of 2³¹ + 4096 elements moves, and rightly."""
    n = 2**31 + 4096
    p = torch.zeros(n, device="cuda", dtype=torch.bfloat16).requires_grad_()
    p.grad = torch.zeros_like(p)
    p.grad[-5:] = 1.0
    p.grad[:3] = -1.0
    opt = AdamATan2([p], 0.1)
    opt.fused = "on"
    opt.step()
    assert (p[-5:] < -0.01).all() and (p[:3] > 0.01).all()
    assert p[3:-5].count_nonzero() == 0
    assert float(opt.state[p]["step"]) == 1
