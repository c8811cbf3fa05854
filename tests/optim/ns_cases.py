"""Checks of the Newton–Schulz and Muon kernels that run in the interpreter and on a GPU.

Not collected by itself: `test_newton_schulz.py` runs it in a process with TRITON_INTERPRET=1 on the
CPU, `test_newton_schulz_gpu.py` imports it.
"""

import os

import pytest
import torch

from optim import EMA, Muon, newton_schulz
from optim.kernels.ns_batch import normalize
from optim.kernels.ns_launch import GAIN, iterate
from optim.kernels.ns_table import Block, Path
from optim.orthogonal import iterations

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# against float64: float32 in the interpreter, bfloat16 on the GPU
TOLERANCE = 1e-5 if INTERPRETED else 3e-2
SHAPES = [(40, 72), (3, 70, 50), (2, 2, 64, 64), (2, 130), (1, 1)]
SHAPES += [] if INTERPRETED else [(2, 257, 65), (640, 520), (129, 1000)]


def error(got, want):
    """Relative to the size of the whole."""
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def reference(matrix, steps=5, coefficients="quintic"):
    return newton_schulz(matrix.double(), steps, coefficients=coefficients)


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_against_float64(shape, coefficients):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE)
    got = newton_schulz(matrix, coefficients=coefficients, fused="on")
    assert got.shape == matrix.shape and got.is_contiguous()
    want, limit = reference(matrix, coefficients=coefficients), TOLERANCE
    if not INTERPRETED:  # of a single number the roundings do not average out
        plain = newton_schulz(matrix, coefficients=coefficients, fused="off")
        limit = max(limit, 1.05 * error(plain, want))
    assert error(got, want) <= limit, (error(got, want), limit)


@pytest.mark.parametrize("steps", [1, 4] if INTERPRETED else [1, 2, 3, 4, 7])
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("tma", [False, True])
def test_every_path(gram, tma, ratio, steps):
    """Both forms, both kinds of kernels, square and wide tiles, padded matrices."""
    if not INTERPRETED and tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs tensor descriptors")
    if not tma and (gram or ratio == 2) and not INTERPRETED:
        pytest.skip("the pointer kernels are for the standard form and square tiles")
    side = 32 if INTERPRETED else 64
    small = Block(side, side * ratio, side, 4, 2, persistent=ratio == 2)
    path = Path(tma, gram, small, small, small, small if tma else None, 64)
    rows, columns = 64 + 5, 128 + 9
    matrix = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    size, length = path.padded(rows, columns)
    numbers, safety = iterations("quintic", steps)
    x = torch.full((2, size, length), float("nan"), device=DEVICE)
    x = x if INTERPRETED else x.to(path.dtype)
    out = torch.full_like(x, float("nan"), dtype=None if INTERPRETED else torch.bfloat16)
    normalize(matrix, x, safety, GAIN if gram else 1.0, False)
    iterate(x, out, numbers, path)
    assert error(out[:, :rows, :columns], reference(matrix, steps)) < TOLERANCE
    assert (out[:, rows:] == 0).all() and (out[:, :, columns:] == 0).all()


def test_zero_gives_zero():
    assert not newton_schulz(torch.zeros(70, 40, device=DEVICE), fused="on").any()


SHAPES_OF = {
    "blocks.0.attention.qkv.weight": (96, 40),
    "blocks.0.attention.out.weight": (40, 40),
    "blocks.0.mlp.gate_up.weight": (80, 48),
    "blocks.0.mlp.down.weight": (48, 60),
    "blocks.0.mlp.down.bias": (7,),
    "embedding.tokens": (5, 40),
    "lm_head.weight": (5, 40),
}


def muon(fused, **options):
    rng = torch.Generator().manual_seed(1)
    named = [(n, torch.randn(s, generator=rng).to(DEVICE)) for n, s in SHAPES_OF.items()]
    for _, p in named:
        p.requires_grad_()
    return named, Muon(named, 0.02, fused=fused, **options)


def set_grads(named, seed):
    rng = torch.Generator().manual_seed(seed)
    for _, p in named:
        p.grad = torch.randn(p.shape, generator=rng).to(DEVICE) * 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "scaling": "keller", "adam": "adamw", "coefficients": "polar_express"},
    ],
)
def test_muon_against_its_reference(options):
    """Scaled gradients, a gated step, the average, a changed option; nothing left to torch."""
    tolerance = 2e-6 if INTERPRETED else 2e-3  # an update is 0.02 × 0.2 √rows × an error of a %
    results = []
    for fused in ("off", "on"):
        named, opt = muon(fused, **options)
        ema = EMA(named, 0.9).attach(opt)
        for seed in range(4):
            set_grads(named, seed)
            found = torch.tensor(float(seed == 2), device=DEVICE)
            opt.step(grad_scale=torch.tensor(3.0, device=DEVICE), found_inf=found)
            ema.update(found)
            if seed == 2:
                for group in opt.param_groups:
                    group["momentum"], group["weight_decay"] = 0.5, 0.3
                    group["scaling"] = "keller"
        results.append((named, opt, ema))
    (plain, one, shadows), (kernels, two, moved) = results
    for (name, p), (_, q) in zip(plain, kernels, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=tolerance, msg=name)
        torch.testing.assert_close(
            shadows.shadow[name], moved.shadow[name], rtol=1e-5, atol=tolerance
        )
        for key, value in one.state[p].items():
            torch.testing.assert_close(value, two.state[q][key], rtol=1e-5, atol=1e-5)


def test_muon_notices_what_changes_between_steps():
    """Against one that has no last step to repeat."""
    pair = []
    for forget in (False, True):
        named, opt = muon("on")
        for seed in range(6):
            set_grads(named, seed)
            if seed == 2:
                named[0][1].grad = None
            if seed == 3:
                opt.set_lr(0.5)
            if seed == 4:
                named[1][1].data = named[1][1].data.clone()
            if seed == 5:
                opt.load_state_dict(opt.state_dict())
                opt.state[named[0][1]]["momentum_buffer"].mul_(2.0)
            if forget:
                opt.__dict__.pop("_last", None)
                opt.__dict__.pop("_plans", None)
            opt.step()
        pair.append([p.detach().clone() for _, p in named])
    assert all(torch.equal(p, q) for p, q in zip(*pair, strict=True))


@pytest.mark.parametrize("options", [{}, {"nesterov": False, "coefficients": "polar_express"}])
@pytest.mark.parametrize("fused", ["off", "on"])
def test_two_halves_are_a_step_to_the_bit(fused, options):
    """Momenta kept in parts, one cut within a row; scaled gradients, a gated step, another rate."""
    named, whole = muon(fused, **options)
    twins = [(n, p.detach().clone().requires_grad_()) for n, p in named]
    matrices = next(g for g in whole.param_groups if g["kind"] == "muon")
    is_matrix = dict.fromkeys(matrices["param_names"], True)
    follow = Muon(
        [
            {"params": [t for t in twins if t[0] in is_matrix], "kind": "orthogonal",
             "pieces": matrices["pieces"]},
            {"params": [t for t in twins if t[0] not in is_matrix], "kind": "adam"},
        ],
        0.02, fused=fused, **options,
    )  # fmt: skip
    parts = []
    for name, q in twins:
        q.grad = torch.zeros_like(q)
        for a, b in ((0, 700), (700, q.numel())) if name in is_matrix else ():
            part = q.detach().view(-1)[a:b]
            part.grad = q.grad.view(-1)[a:b]
            parts.append(part)
    lead = Muon([{"params": parts, "kind": "momentum"}], 0.02, fused=fused, **options)
    assert [set(lead.state[p]) for p in parts] == [{"momentum_buffer"}] * len(parts)
    assert all("momentum_buffer" not in state for state in follow.state.values())
    for seed in range(5):
        set_grads(named, seed)
        for (_, p), (_, q) in zip(named, twins, strict=True):
            q.grad.copy_(p.grad)
        settings = {"found_inf": torch.tensor(float(seed == 2), device=DEVICE)}
        if seed != 3:
            settings["grad_scale"] = torch.tensor(3.0, device=DEVICE)
        if seed == 4:
            whole.set_lr(0.3)
            follow.set_lr(0.3)
        for optimizer in (whole, lead, follow):
            optimizer.step(**settings)
        for (name, p), (_, q) in zip(named, twins, strict=True):
            assert torch.equal(p, q), (name, seed)
    for name, p in named:
        kept = whole.state[p]
        assert torch.equal(kept["step"], follow.state[dict(twins)[name]]["step"])
    momenta = [lead.state[p]["momentum_buffer"] for p in parts]
    wanted = [whole.state[p]["momentum_buffer"].flatten() for n, p in named if n in is_matrix]
    assert torch.equal(torch.cat(momenta), torch.cat(wanted))
