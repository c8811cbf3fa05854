"""Checks of the Triton kernels that run the same in the interpreter and on a GPU.

Not collected by itself: `test_kernels.py` runs it in a process with TRITON_INTERPRET=1 on the CPU,
`test_kernels_gpu.py` imports it.
"""

import math
import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from optim import EMA, AdamATan2, AdamW, SparseSignSGD, clip_scale, global_grad_norm
from optim.kernels.atan2 import atan2
from optim.kernels.launch import AdamLaunch, NormLaunch, numbers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
RULES = [
    (AdamW, {}),
    (AdamW, {"eps": 1e-3, "weight_decay": 0.0, "betas": (0.0, 0.999)}),
    (AdamATan2, {}),
    (AdamATan2, {"bias_correction": "inside", "a": 1.27, "b": 1.1, "betas": (0.9, 0.99)}),
]
per_rule = pytest.mark.parametrize(("cls", "options"), RULES)
SHAPES = [(), (0, 3), (2048,), (3, 5, 137)]


def make(cls, options, fused, shapes=SHAPES, dtype=torch.float32, seed=0, device=DEVICE):
    rng = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=rng).to(device, dtype).requires_grad_() for s in shapes]
    opt = cls(params, 1e-2, **options)
    opt.fused = "on" if fused else "off"
    return params, opt


def set_grads(params, seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=rng) * scale).to(p.device, p.dtype)


def everything(params, opt):
    return [t.clone() for p in params for t in (p.detach(), *opt.state[p].values())]


def same(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@per_rule
def test_kernel_against_float64(cls, options):
    """20 steps, parameters of size 1: within 2e-6, at lr 1e-2 with float32 rounding of the size."""
    params, opt = make(cls, options, True)
    opt.set_lr(1e-3)
    twins = [p.detach().double().cpu().requires_grad_() for p in params]
    oracle = cls(twins, float(opt.param_groups[0]["lr"]), **options)
    for seed in range(20):
        set_grads(params, seed, 3.0)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.double().cpu()
        opt.step(grad_scale=torch.tensor(3.0, device=DEVICE))
        oracle.step(grad_scale=torch.tensor(3.0))
    for p, q in zip(params, twins, strict=True):
        assert ((p.detach().double().cpu() - q.detach()).abs() <= 2e-6 * q.abs().clamp(min=1)).all()
        assert float(opt.state[p]["step"]) == 20


@per_rule
def test_gate_leaves_every_bit(cls, options):
    params, opt = make(cls, options, True)
    set_grads(params, 0)
    opt.step()
    before = everything(params, opt)
    for p in params:
        p.grad.fill_(float("nan"))
    for flag in (1.0, 3.0, float("nan"), float("inf"), True):
        opt.step(found_inf=torch.tensor(flag, device=DEVICE))
        assert same(before, everything(params, opt))
    set_grads(params, 1)
    opt.step(found_inf=torch.tensor(0.0, device=DEVICE))
    assert float(opt.state[params[0]]["step"]) == 2


@per_rule
def test_loading_a_state_resumes_to_the_bit(cls, options):
    """Also the bias corrections that the kernel carries from step to step."""
    params, opt = make(cls, options, True)
    for seed in range(3):
        set_grads(params, seed)
        opt.step()
    twins, fresh = make(cls, options, True, seed=9)
    set_grads(twins, 5)
    fresh.step()
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    fresh.load_state_dict(opt.state_dict())
    for seed in range(3):
        set_grads(params, 10 + seed)
        set_grads(twins, 10 + seed)
        opt.step()
        fresh.step()
    assert same(everything(params, opt), everything(twins, fresh))


def test_changed_betas_take_effect():
    params, opt = make(AdamATan2, {}, True, [(9,)])
    twins, plain = make(AdamATan2, {}, False, [(9,)])
    for seed in range(4):
        for ps, o in ((params, opt), (twins, plain)):
            o.param_groups[0]["betas"] = (0.9, 0.95) if seed < 2 else (0.5, 0.6)
            set_grads(ps, seed)
            o.step()
    torch.testing.assert_close(params[0], twins[0], rtol=2e-6, atol=2e-6)


@per_rule
def test_a_step_notices_what_changed_since_the_last(cls, options):
    """Against one that has no last step to repeat: the same bits."""
    results = []
    for forget in (False, True):
        params, opt = make(cls, options, True, [(30, 20), (7,), (2, 20)])
        ema = EMA(params, 0.9)
        for seed in range(12):
            set_grads(params, seed)
            if seed == 2:
                params[1].grad = None
            if seed == 4:  # another memory order at a new place
                params[0].grad = params[0].grad.t().contiguous().t()
            if seed == 5:
                opt.set_lr(0.3)
            if seed == 6:
                opt.param_groups[0]["weight_decay"] = 0.4
            if seed == 7:
                params[0].data = params[0].data.clone()
            if seed == 8:
                ema.attach(opt)
            if seed == 9:
                ema.rate = 0.5
            if seed == 10:
                opt.load_state_dict(opt.state_dict())
                opt.state[params[0]]["step"].fill_(2.0)
            if seed == 11:
                extra = torch.ones(5, device=DEVICE).requires_grad_()
                extra.grad = torch.ones_like(extra)
                opt.add_param_group({"params": [extra]})
                params.append(extra)
            if forget:
                for name in ("_last", "_plans", "_norms"):
                    opt.__dict__.pop(name, None)
            opt.step(grad_scale=opt.clip(1.0)[1])
            ema.update()
        results.append([*everything(params, opt), *ema.shadow.values()])
    assert same(*results)


def test_wrong_gradients_are_named_also_after_a_good_step():
    params, opt = make(AdamW, {}, True, [(4, 5)])
    set_grads(params, 0)
    opt.step()
    params[0].grad = torch.ones(4, 5, device=DEVICE).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()


def test_memory_order_skipped_and_unaligned_parameters():
    base = torch.zeros(5, 12, device=DEVICE)
    params = [
        torch.ones(4, 6, device=DEVICE).t(),
        base[:, ::2],  # gaps: not for the kernel
        torch.ones(9, device=DEVICE)[1:],  # 4 bytes off
        torch.ones(3, device=DEVICE),  # gets no gradient
    ]
    params = [p.requires_grad_() for p in params]
    opt = AdamATan2(params, 0.1)
    opt.fused = "on"
    twins = [p.detach().clone().requires_grad_() for p in params]
    plain = AdamATan2(twins, 0.1)
    for seed in range(3):
        set_grads(params[:3], seed)
        set_grads(twins[:3], seed)
        opt.step()
        plain.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
    assert (base[:, 1::2] == 0).all()


def test_shadow_in_the_same_pass():
    params, opt = make(AdamATan2, {}, False, [(2050,), ()])
    shadows = [torch.randn_like(p) for p in params]
    want = [s.clone() for s in shadows]
    launch = AdamLaunch(params, [opt.state[p] for p in params], shadows)
    values = numbers("atan2_outside", (0.9, 0.95), 0.1, ema_rate=0.75)
    for seed in range(3):
        set_grads(params, seed)
        with torch.no_grad():
            grads = [p.grad for p in params]
            launch.run(grads, "atan2_outside", values, opt.param_groups[0]["lr"], None, None)
        want = [0.75 * w + 0.25 * p.detach() for w, p in zip(want, params, strict=True)]
    for s, w in zip(shadows, want, strict=True):
        torch.testing.assert_close(s, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shapes", [SHAPES, [(3,)] * 40])
def test_norm(shapes):
    params, _ = make(AdamW, {}, False, shapes)
    grads = [p.detach() for p in params]
    norm = NormLaunch(grads)
    want = global_grad_norm(grads)
    first, one = (t.clone() for t in norm.run(grads))
    torch.testing.assert_close(first, want, rtol=1e-6, atol=0)
    assert one == 1
    for max_norm in (1e-3, 0.7, 1e6):
        again, scale = norm.run(grads, max_norm)
        assert torch.equal(first, again)
        torch.testing.assert_close(scale, clip_scale(want, max_norm), rtol=1e-6, atol=0)
    grads[-1].view(-1)[0] = float("nan")
    assert all(t.isnan() for t in norm.run(grads, 1.0))


@per_rule
def test_clip_step_and_average_in_two_kernels(cls, options):
    """Against the same three without kernels; `update` does not move a shadow twice."""
    results = []
    for fused in (False, True):
        params, opt = make(cls, options, fused)
        ema = EMA(params, 0.75).attach(opt)
        for seed in range(4):
            set_grads(params, seed, 3.0)
            norm, scale = opt.clip(1.0)
            torch.testing.assert_close(norm, global_grad_norm(params), rtol=1e-6, atol=0)
            found = torch.tensor(float(seed == 2), device=DEVICE)
            opt.step(grad_scale=scale, found_inf=found)
            ema.update(found)
        results.append([*(p.detach() for p in params), *ema.shadow.values()])
        with ema.applied():
            if fused:
                with pytest.raises(RuntimeError, match="applied"):
                    opt.step()
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_a_shadow_the_kernel_cannot_move_is_moved_by_update():
    params, opt = make(AdamATan2, {}, True, [(40,), (7,)])
    ema = EMA(params[:1], 0.5, dtype=torch.float64).attach(opt)
    want = ema.shadow["0"].clone()
    for seed in range(2):
        set_grads(params, seed)
        opt.step()
        ema.update()
        want = 0.5 * want + 0.5 * params[0].detach()
    torch.testing.assert_close(ema.shadow["0"], want)


@pytest.mark.parametrize("cls", [AdamW, AdamATan2])
@pytest.mark.parametrize(
    ("dtype", "half"),
    [(torch.bfloat16, h) for h in ("nearest", "stochastic", "master")]
    + [(torch.float16, h) for h in ("nearest", "master")],
)
def test_half_precision_is_the_reference(cls, dtype, half):
    """From the same state each step; a float32 result may round to the other side, rarely."""
    shapes = [(33, 65), (), (0, 3), (2500,)]
    params, opt = make(cls, {"half": half}, True, shapes, dtype)
    twins, plain = make(cls, {"half": half}, False, shapes, dtype)
    averages = [EMA(ps, 0.75).attach(o) for ps, o in ((params, opt), (twins, plain))]
    count = sum(p.numel() for p in params)
    for seed in range(4):
        for ps, o, ema in ((params, opt, averages[0]), (twins, plain, averages[1])):
            set_grads(ps, seed)
            o.step()
            ema.update()
        differ = 0
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=torch.finfo(dtype).eps, atol=1e-6)
            differ += int((p != q).sum())
            mine, theirs = opt.state[p], plain.state[q]
            assert ("master" in mine) == (half == "master")
            for name in mine.keys() | theirs.keys():
                torch.testing.assert_close(mine[name], theirs[name], rtol=2e-6, atol=2e-6)
                mine[name].copy_(theirs[name])
            with torch.no_grad():
                p.copy_(q)
        assert differ <= count // 500, differ
        for x, y in zip(*(ema.shadow.values() for ema in averages), strict=True):
            torch.testing.assert_close(x, y, rtol=torch.finfo(dtype).eps, atol=1e-6)
            x.copy_(y)


@pytest.mark.parametrize("rows", [10, 1, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_signsgd(rows, dtype):
    """Whole numbers, whose sums are exact in any order; from one id for all to few duplicates."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    n, width = 70, 130
    rng = torch.Generator().manual_seed(rows)
    start = torch.randn(rows, width, generator=rng)
    tables = [start.to(DEVICE, dtype, copy=True) for _ in range(2)]
    pair = [SparseSignSGD([tables[i]], 0.1, 0.2, fused=f) for i, f in enumerate(("on", "off"))]
    for flag in (0.0, 1.0, 0.0):
        ids = torch.randint(rows, (n,), generator=rng).to(DEVICE)
        grads = torch.randint(-3, 4, (n, width), generator=rng).float().to(DEVICE)
        for table, opt in zip(tables, pair, strict=True):
            opt.add_rows(table, ids[:50], grads[:50])
            opt.add_rows(table, ids[50:], grads[50:])
            scale, found = torch.tensor(2.0, device=DEVICE), torch.tensor(flag, device=DEVICE)
            opt.step(grad_scale=scale, found_inf=found)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(tables[0], tables[1], rtol=2 * eps, atol=eps)
    assert not torch.equal(tables[0], start.to(DEVICE, dtype))


@triton.jit
def atan2_kernel(y_ptr, x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + i, mask=i < n)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr + i, atan2(y, x), mask=i < n)


def run_atan2(y, x):
    y, x = y.to(DEVICE), x.to(DEVICE)
    out = torch.full_like(y, 9.0)
    block = 1 << 20 if INTERPRETED else 1024
    atan2_kernel[(triton.cdiv(y.numel(), block),)](
        y, x, out, y.numel(), BLOCK=block, enable_fp_fusion=True
    )
    return out.cpu().numpy()


def ulps(got, y, x):
    """Distance from float64's atan2, in units of the float32 spacing there."""
    want = np.arctan2(y.double().numpy(), x.double().numpy())
    return np.abs(got.astype(np.float64) - want) / np.spacing(np.abs(want).astype(np.float32))


@pytest.mark.parametrize("kind", ["normal", "bits", "first_octant"])
def test_atan2_to_4_ulp(kind):
    n = 10_000_000
    rng = np.random.default_rng(0)
    if kind == "bits":  # every exponent, denormals included
        y, x = rng.integers(0, 2**32, (2, n), dtype=np.uint32).view(np.float32)
        finite = np.isfinite(y) & np.isfinite(x)
        y, x = y[finite], x[finite]
    else:
        y, x = rng.normal(size=(2, n)).astype(np.float32)
        if kind == "first_octant":
            y, x = np.abs(y) * 1e-3, np.abs(x)
    y, x = torch.tensor(y), torch.tensor(x)
    error = ulps(run_atan2(y, x), y, x)
    assert error.max() <= 4.0, error.max()


def test_atan2_of_special_values():
    values = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, -1e-45, 1e-39, 3e38, -3e38]
    y, x = torch.cartesian_prod(torch.tensor(values), torch.tensor(values)).T.contiguous()
    got = run_atan2(y, x)
    want = np.arctan2(y.double().numpy(), x.double().numpy()).astype(np.float32)
    assert (np.signbit(got) == np.signbit(want)).all()
    assert ulps(got, y, x).max() <= 4.0
    nan = torch.tensor(math.nan)
    y = torch.stack([nan, torch.tensor(1.0), nan])
    assert np.isnan(run_atan2(y, torch.stack([torch.tensor(1.0), nan, nan]))).all()
