"""Checks of Adam-mini's kernels that run the same in the interpreter and on a GPU.

Not collected by itself, see `kernel_cases.py`.
"""

import os
import warnings

import pytest
import torch

from optim import EMA, AdamMini, global_grad_norm
from optim.kernels.mini_tiles import MiniTiles
from optim.partition import Segment, segments_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
STATES = ["fp32", "bf16", "fp8"]
# Rows that fit a tile and that do not, aligned and not; heads; nothing, one, and all in one block.
SHAPES = {
    "embed.weight": (30, 48),
    "a.qkv.weight": (288, 96),
    "a.query.weight": (18, 7),
    "a.out.weight": (5, 7),
    "a.mlp.up.weight": (64, 512),
    "a.mlp.down.weight": (3, 5000),
    "a.mlp.gate.weight": (2, 4999),
    "norm.weight": (48,),
    "norm.bias": (2,),
    "gain": (),
    "empty.value.weight": (0, 3),
    "unknown.thing": (70, 71),
    "unknown.other": (64, 80),
}


def make(fused, state="fp32", half="nearest", dtype=torch.float32, shapes=None, device=DEVICE):
    rng = torch.Generator().manual_seed(0)
    shapes = SHAPES if shapes is None else shapes
    named = [
        (n, torch.randn(s, generator=rng).to(device, dtype).requires_grad_())
        for n, s in shapes.items()
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = "on" if fused else "off"
        opt = AdamMini(named, 1e-2, num_heads=2, state=state, half=half, fused=how)
    return [p for _, p in named], opt


def set_grads(params, seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=rng) * scale).to(p.device, p.dtype)


def everything(params, opt):
    return [t.clone() for p in params for t in (p.detach(), *opt.state[p].values())]


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same(xs, ys):
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(xs, ys, strict=True))


def put_equal(params, opt, twins, plain):
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            p.copy_(q)
            for name, value in plain.state[q].items():
                opt.state[p][name].copy_(value)


def last_place(dtype):
    """The relative spacing of a format."""
    return 2.0**-3 if dtype.itemsize == 1 else torch.finfo(dtype).eps


def mostly_close(x, y, dtype, few):
    """float32 results of two roundings, then rounded to `dtype`: one step apart, and rarely."""
    x, y = x.detach().float(), y.detach().float()
    torch.testing.assert_close(x, y, rtol=last_place(dtype), atol=1e-6)
    far = (x - y).abs() > 4e-6 * y.abs().clamp(min=1)
    assert int(far.sum()) <= few, (dtype, int(far.sum()))


HALVES = [("fp32", "nearest"), ("bf16", "nearest"), ("bf16", "stochastic"), ("bf16", "master"),
          ("fp16", "nearest"), ("fp16", "master")]  # fmt: skip


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("kind", "half"), HALVES)
def test_kernels_are_the_reference(state, kind, half):
    """Every format, step by step from the same state; the scale and the gate; the shadow."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    params, opt = make(True, state, half, dtype)
    twins, plain = make(False, state, half, dtype)
    averages = [EMA(ps, 0.75).attach(o) for ps, o in ((params, opt), (twins, plain))]
    count = sum(p.numel() for p in params)
    for seed in range(5):
        found = torch.tensor(float(seed == 3), device=DEVICE)
        for ps, o, ema in ((params, opt, averages[0]), (twins, plain, averages[1])):
            set_grads(ps, seed, 3.0 * 10.0 ** (seed - 2))
            before = everything(ps, o)
            o.step(grad_scale=torch.tensor(3.0, device=DEVICE), found_inf=found)
            ema.update(found)
            assert seed != 3 or same(before, everything(ps, o))
        few = count // 500
        for p, q in zip(params, twins, strict=True):
            mostly_close(p, q, dtype, few)
            mine, theirs = opt.state[p], plain.state[q]
            assert mine.keys() == theirs.keys()
            for name in mine:
                assert mine[name].dtype == theirs[name].dtype
                if name != "exp_avg":
                    torch.testing.assert_close(mine[name], theirs[name], rtol=2e-6, atol=2e-6)
            if state == "fp8":
                mine = mine["exp_avg"].float() / per_element(mine["exp_avg_scale"], opt, p)
                theirs = theirs["exp_avg"].float() / per_element(theirs["exp_avg_scale"], plain, q)
                torch.testing.assert_close(mine, theirs, rtol=0.13, atol=1e-6)
            else:
                eps = last_place(mine["exp_avg"].dtype)
                torch.testing.assert_close(
                    mine["exp_avg"].float(), theirs["exp_avg"].float(), rtol=2 * eps, atol=1e-6
                )
        for x, y in zip(*(ema.shadow.values() for ema in averages), strict=True):
            mostly_close(x, y, dtype, few)
            x.copy_(y)
        put_equal(params, opt, twins, plain)


def per_element(values, opt, p):
    from optim.moments import per_element

    return per_element(values, opt.segments(p), p)


def test_kernel_against_float64():
    """20 steps, parameters of size 1: within 2e-6."""
    params, opt = make(True)
    opt.set_lr(1e-3)
    twins = [p.detach().double().cpu().requires_grad_() for p in params]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named = list(zip(SHAPES, twins, strict=True))
        oracle = AdamMini(named, float(opt.param_groups[0]["lr"]), num_heads=2)
    for seed in range(20):
        set_grads(params, seed, 3.0)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.double().cpu()
        opt.step(grad_scale=torch.tensor(3.0, device=DEVICE))
        oracle.step(grad_scale=torch.tensor(3.0))
    for p, q in zip(params, twins, strict=True):
        assert ((p.detach().double().cpu() - q.detach()).abs() <= 2e-6 * q.abs().clamp(min=1)).all()
        assert float(opt.state[p]["step"]) == 20


@pytest.mark.parametrize("state", STATES)
def test_gate_and_resume_to_the_bit(state):
    params, opt = make(True, state)
    for seed in range(3):
        set_grads(params, seed)
        opt.step()
    before = everything(params, opt)
    for p in params:
        p.grad.fill_(float("nan"))
    for flag in (1.0, 3.0, float("nan"), float("inf"), True):
        opt.step(found_inf=torch.tensor(flag, device=DEVICE))
        assert same(before, everything(params, opt))
    twins, fresh = make(True, state)
    set_grads(twins, 5)
    fresh.step()
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    fresh.load_state_dict(opt.state_dict())
    for seed in range(3):
        for ps, o in ((params, opt), (twins, fresh)):
            set_grads(ps, 10 + seed)
            o.step()
    assert same(everything(params, opt), everything(twins, fresh))


def test_clip_step_and_average():
    results = []
    for fused in (False, True):
        params, opt = make(fused)
        ema = EMA(params, 0.75).attach(opt)
        for seed in range(3):
            set_grads(params, seed, 3.0)
            norm, scale = opt.clip(1.0)
            torch.testing.assert_close(norm, global_grad_norm(params), rtol=1e-6, atol=0)
            opt.step(grad_scale=scale)
            ema.update()
        results.append([*(p.detach() for p in params), *ema.shadow.values()])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


def test_unaligned_storage_and_memory_order():
    base = torch.ones(4097, device=DEVICE)
    shapes = {"a.up.weight": (64, 64), "b.up.weight": (6, 4)}
    results = []
    for fused in (True, False):
        flat = base.clone()[1:].view(64, 64).requires_grad_()
        turned = torch.ones(4, 6, device=DEVICE).t().requires_grad_()
        params = [flat, turned]
        opt = AdamMini(zip(shapes, params, strict=True), 0.1, fused="on" if fused else "off")
        for seed in range(3):
            set_grads(params, seed)
            opt.step()
        results.append([p.detach() for p in params])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("tile", [64, 1024])
def test_tiles_cover_every_element_once(tile):
    parts = [segments_of("other", s, None, None) for s in ((), (5,), (3, 333), (64, 64), (0, 2))]
    parts += [segments_of("mlp", s, None, None) for s in ((7, 3), (9, 64), (4, 100), (3, 1601))]
    parts += [segments_of("qkv", (12 * 16, 24), 4, None), (Segment("tensor", 1, 16 * 70 + 3),)]
    cut = MiniTiles(parts, tile, 2 * tile, torch.device("cpu"))
    assert cut.tiles.shape == (cut.programs, 7)
    assert (cut.tiles[: cut.large_programs, 6] >= 0).all()
    assert (cut.tiles[cut.large_programs :, 6] == -1).all()
    assert cut.counts.min() >= 1 and cut.counts.sum() == cut.programs
    for t, segments in enumerate(parts):
        numel = sum(s.blocks * s.size for s in segments)
        want = torch.cat([
            *(torch.arange(s.blocks).repeat_interleave(s.size) for s in segments),
            torch.zeros(0, dtype=torch.int64),
        ])  # fmt: skip
        first = 0
        offsets = []
        for s in segments:
            offsets.append(torch.full((s.blocks * s.size,), first))
            first += s.blocks
        want = want + torch.cat([*offsets, torch.zeros(0, dtype=torch.int64)])
        got = torch.full((numel,), -1)
        for _, start, shape, width, rows, block, large in cut.tiles[cut.tiles[:, 0] == t].tolist():
            assert shape >= 16 or not (start % 16 or (width % 16 and rows))
            assert width <= (tile if shape % 16 == 15 else 1 << shape % 16)
            for r in range(rows):
                where = slice(start + r * width, start + (r + 1) * width)
                assert (got[where] == -1).all()
                got[where] = block + r
            if large >= 0:
                first_tile, tiles, _, own = cut.larges[large].tolist()
                assert own == block
                assert (cut.tiles[first_tile : first_tile + tiles, 6] == large).all()
        assert torch.equal(got, want)
