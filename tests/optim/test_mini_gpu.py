"""Adam-mini's kernels on a CUDA device: the common cases, and what only a GPU can show."""

import os

import pytest
import torch

from optim import EMA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs a CUDA device",
    ),
]

STATES = []
if torch.cuda.is_available():
    from tests.optim.mini_cases import *  # noqa: F403
    from tests.optim.mini_cases import STATES, everything, make, same, set_grads
    from tests.optim.size_cases import *  # noqa: F403

per_state = pytest.mark.parametrize("state", STATES)


@per_state
def test_two_launches_and_the_same_bits_every_time(state):
    results = []
    for _ in range(5):
        params, opt = make(True, state)
        ema = EMA(params, 0.9).attach(opt)
        for seed in range(3):
            set_grads(params, seed)
            opt.step()
            ema.update()
        results.append([*everything(params, opt), *ema.shadow.values()])
    assert all(same(results[0], r) for r in results[1:])
    found, scale = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    opt.step(grad_scale=scale, found_inf=found)
    ema.update(found)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        opt.step(grad_scale=scale, found_inf=found)
        ema.update(found)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert [n.split("_")[0] for n in names] == ["large", "adam"], names


@per_state
def test_no_synchronization(state):
    params, opt = make(True, state)
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


@per_state
def test_graph_replays_are_eager_steps_also_mixed(state):
    def run(capture):
        params, opt = make(True, state)
        ema = EMA(params, 0.9).attach(opt)
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
                ema.update()
        return [*everything(params, opt), *ema.shadow.values()]

    assert same(run(False), run(True))


def test_official_package_on_the_same_partition():
    """float32, 50 steps, to 1e-6."""
    adam_mini = pytest.importorskip("adam_mini")
    shapes = {"embed.weight": (30, 64), "q_proj.weight": (64, 64), "mlp.weight": (96, 64)}
    params, opt = make(True, shapes=shapes)
    opt.param_groups[0].update(num_heads=2, weight_decay=0.1)
    twins = [p.detach().clone().requires_grad_() for p in params]
    theirs = adam_mini.Adam_mini(
        list(zip(shapes, twins, strict=True)), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1,
        dim=64, n_heads=2, verbose=False,
    )  # fmt: skip
    for seed in range(50):
        for ps, o in ((params, opt), (twins, theirs)):
            set_grads(ps, seed)
            o.step()
    for p, q in zip(params, twins, strict=True):
        assert ((p - q).abs() <= 1e-6 * q.abs().clamp(min=1)).all()
