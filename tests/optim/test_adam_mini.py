"""Adam-mini: the blocks, the rule against the paper and the official package, small moments."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optim.adam_mini
from optim import AdamMini, adam_mini_update, partition_parameters
from optim.moments import block_amax, fp8_scale, from_fp8, to_fp8
from optim.partition import Segment, role_of, segments_of


class Attention(torch.nn.Module):
    def __init__(self, width, kv):
        super().__init__()
        self.q_proj = torch.nn.Linear(width, width, bias=False)
        self.k_proj = torch.nn.Linear(width, kv, bias=False)
        self.v_proj = torch.nn.Linear(width, kv, bias=False)
        self.o_proj = torch.nn.Linear(width, width, bias=False)


class Net(torch.nn.Module):
    """Names that both this package and the official one know."""

    def __init__(self, width=24, kv=24):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(13, width)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({
                "attn": Attention(width, kv),
                "mlp": torch.nn.Sequential(
                    torch.nn.Linear(width, 3 * width, bias=False),
                    torch.nn.Linear(3 * width, width, bias=False),
                ),
                "norm": torch.nn.LayerNorm(width, bias=False),
            })
            for _ in range(2)
        )  # fmt: skip
        self.lm_head = torch.nn.Linear(width, 13, bias=False)


def set_grads(params, seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=rng) * scale).to(p.dtype)


# The blocks


def test_partition_of_a_transformer():
    parts = partition_parameters(Net(24, 12).named_parameters(), num_heads=4, num_kv_heads=2)
    kinds = {p.name: [(s.kind, s.blocks, s.size) for s in p.segments] for p in parts}
    assert kinds["embed_tokens.weight"] == [("token", 13, 24)]
    assert kinds["lm_head.weight"] == [("token", 13, 24)]
    assert kinds["layers.0.attn.q_proj.weight"] == [("head", 4, 6 * 24)]
    assert kinds["layers.0.attn.k_proj.weight"] == [("head", 2, 6 * 24)]
    assert kinds["layers.0.attn.v_proj.weight"] == [("neuron", 12, 24)]
    assert kinds["layers.0.attn.o_proj.weight"] == [("neuron", 24, 24)]
    assert kinds["layers.1.mlp.0.weight"] == [("neuron", 72, 24)]
    assert kinds["layers.1.mlp.1.weight"] == [("neuron", 24, 72)]
    assert kinds["layers.1.norm.weight"] == [("tensor", 1, 24)]
    text = str(parts)
    assert len(text.splitlines()) == 1 + len(parts)
    assert "layers.0.attn.q_proj.weight  24×24  query" in text


def test_heads_inside_a_fused_qkv():
    want = (Segment("head", 4, 60), Segment("head", 2, 60), Segment("neuron", 12, 10))
    assert segments_of("qkv", (48, 10), 4, 2) == want
    assert segments_of("qkv", (48, 10), 4, None) == (
        Segment("head", 4, 40),
        Segment("head", 4, 40),
        Segment("neuron", 16, 10),
    )
    assert segments_of("qkv", (50, 10), 4, None) is None
    assert segments_of("mlp", (0, 4), None, None) == ()
    assert segments_of("mlp", (3, 2, 2), None, None) == (Segment("neuron", 3, 4),)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("output.weight", "head"),
        ("h.0.attn.c_attn.weight", "qkv"),
        ("blocks.0.self_attn.in_proj_weight", "qkv"),
        ("layers.3.attention.wq.weight", "query"),
        ("layers.3.attention.wk.weight", "key"),
        ("layers.3.attention.wv.weight", "value"),
        ("layers.3.attention.wo.weight", "projection"),
        ("h.0.attn.c_proj.weight", "projection"),
        ("layers.3.feed_forward.w1.weight", "mlp"),
        ("h.0.mlp.c_fc.weight", "mlp"),
        ("layers.0.linear1.weight", "mlp"),
        ("levels.L.blocks.0.mlp.gate_up.weight", "gate_up"),
        ("conv.weight", "other"),
    ],
)
def test_roles_by_name(name, role):
    assert role_of(name, torch.zeros(4, 4)) == role
    assert role_of(name, torch.zeros(4)) == "vector"


def test_warnings_when_a_name_falls_through():
    strange = [
        ("stem.kernel", torch.zeros(4, 4)),
        ("b", torch.zeros(3)),
        ("x.q", torch.zeros(6, 2)),
    ]
    with pytest.warns(UserWarning, match=r"no rule .* knows stem\.kernel: each is one block"):
        parts = partition_parameters(strange, num_heads=2)
    assert parts[0].role == "other" and parts[0].blocks == 1
    with pytest.warns(UserWarning, match=r"x\.q cannot be cut .* num_heads is not given"):
        partition_parameters(strange[2:])
    with pytest.warns(UserWarning, match=r"they do not fit 4 heads"):
        partition_parameters(strange[2:], num_heads=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition_parameters(strange, warn=False)
        own = (("mlp", "kernel", False),)
        assert partition_parameters(strange, 2, rules=own)[0].blocks == 4
        partition_parameters(Net().named_parameters(), num_heads=4)
        AdamMini(Net().named_parameters(), num_heads=4)
    with pytest.warns(UserWarning, match="no rule"):
        AdamMini([torch.zeros(3, 3, requires_grad=True)])


def test_groups_have_their_own_heads_and_options():
    named = dict(Net().named_parameters())
    query = "layers.0.attn.q_proj.weight"
    key = "layers.0.attn.k_proj.weight"
    opt = AdamMini([{"params": [(query, named[query])], "num_heads": 2, "lr": 0.5}], num_heads=4)
    opt.add_param_group({"params": [(key, named[key])], "state": "bf16", "weight_decay": 0.0})
    assert opt.state[named[query]]["exp_avg_sq"].shape == (2,)
    assert opt.state[named[key]]["exp_avg_sq"].shape == (4,)
    assert opt.state[named[key]]["exp_avg"].dtype == torch.bfloat16
    assert [p.blocks for p in opt.partition] == [2, 4]
    assert float(opt.param_groups[0]["lr"]) == 0.5
    set_grads(named.values(), 0)
    before = named[key].detach().clone()
    opt.set_lr(0.0)
    opt.step()
    assert torch.equal(named[key], before)


# The rule


def oracle(p, g, m, v, t, lr, betas, eps, wd, blocks):
    """The paper's algorithm in NumPy float64; `blocks` is a list of slices of the flat tensor."""
    b1, b2 = betas
    p, g, m, v = p * (1 - lr * wd), g.reshape(-1), m.copy(), v.copy()
    flat = p.reshape(-1).copy()
    for i, where in enumerate(blocks):
        m[where] = b1 * m[where] + (1 - b1) * g[where]
        v[i] = b2 * v[i] + (1 - b2) * np.mean(g[where] ** 2)
        h = np.sqrt(v[i] / (1 - b2**t)) + eps
        flat[where] -= lr * m[where] / (1 - b1**t) / h
    return flat.reshape(p.shape), m, v


def slices(segments):
    out, start = [], 0
    for s in segments:
        for _ in range(s.blocks):
            out.append(slice(start, start + s.size))
            start += s.size
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    shape=st.sampled_from([(), (1,), (0, 3), (7,), (6, 5), (12, 1), (6, 3, 2)]),
    role=st.sampled_from(["mlp", "qkv", "query", "other", "embedding"]),
    seed=st.integers(0, 2**31),
    lr=st.sampled_from([0.0, 1e-4, 1e-2]),
    wd=st.sampled_from([0.0, 0.1]),
    betas=st.sampled_from([(0.9, 0.95), (0.0, 0.999), (0.95, 0.0)]),
)
@settings(max_examples=25, deadline=None)
def test_adam_mini_follows_the_paper(dtype, shape, role, seed, lr, wd, betas):
    rng = np.random.default_rng(seed)
    role = role if len(shape) > 1 else "other"
    segments = segments_of(role, shape, 2, None) or segments_of("other", shape, None, None)
    blocks = slices(segments)
    p = torch.tensor(rng.normal(size=shape), dtype=dtype)
    m, v = torch.zeros_like(p), torch.zeros(len(blocks), dtype=dtype)
    want, wm, wv = p.double().numpy(), np.zeros(p.numel()), np.zeros(len(blocks))
    size = 1.0  # the largest weight on the way: without a memory in v, steps may be long
    for t in range(1, 21):
        g = torch.tensor(rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3), dtype=dtype)
        p, m, v = adam_mini_update(
            p, g, m, v, torch.tensor(float(t)), lr,
            segments=segments, betas=betas, eps=1e-8, weight_decay=wd,
        )  # fmt: skip
        args = (t, lr, betas, 1e-8, wd, blocks)
        want, wm, wv = oracle(want, g.double().numpy(), wm, wv, *args)
        size = max(size, np.abs(want).max(initial=0.0))
    tol = (1e-13 if dtype == torch.float64 else 2e-6 * (1 + 20 * lr)) * size
    np.testing.assert_allclose(p.double().numpy(), want, rtol=0, atol=tol)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kv", [None, 2])
def test_official_package_on_the_same_partition(weight_decay, kv):
    """adam-mini 1.1.1, float32, 100 steps, to 1e-6 (of parameters of size up to 1)."""
    official = pytest.importorskip("adam_mini")
    torch.manual_seed(0)
    ours = Net(24, 24 if kv is None else 12)
    theirs = copy.deepcopy(ours)
    named = list(ours.named_parameters())
    groups = [
        {"params": [x for x in named if "norm" not in x[0]]},
        {"params": [x for x in named if "norm" in x[0]], "weight_decay": 0.0},  # as theirs
    ]
    options = {"betas": (0.9, 0.95), "weight_decay": weight_decay}
    opt = AdamMini(groups, 1e-3, num_heads=4, num_kv_heads=kv, **options)
    ref = official.Adam_mini(
        list(theirs.named_parameters()), lr=1e-3, dim=24, n_heads=4, n_kv_heads=kv,
        verbose=False, **options,
    )  # fmt: skip
    for seed in range(100):
        for net, o in ((ours, opt), (theirs, ref)):
            set_grads(list(net.parameters()), seed, 10.0 ** (seed % 5 - 2))
            o.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-6
        assert opt.state[p]["exp_avg_sq"].numel() == ref.state[q]["vmean"].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_path_without_temporaries_is_the_rule_to_the_bit(dtype):
    shapes = {"a.qkv": (36, 7), "a.mlp": (5, 33), "norm": (9,), "empty": (0, 4), "gain": ()}
    named = [(n, torch.randn(s, dtype=dtype).requires_grad_()) for n, s in shapes.items()]
    opt = AdamMini(named, 1e-2, num_heads=3)
    for t in range(1, 6):
        set_grads([p for _, p in named], t)
        want = []
        for _, p in named:
            state, lr = opt.state[p], opt.param_groups[0]["lr"]
            moments = [state[k].clone() for k in ("exp_avg", "exp_avg_sq")]
            step, grad = torch.tensor(float(t)), p.grad / torch.tensor(3.0)
            segments = opt.segments(p)
            want.append(adam_mini_update(p.detach(), grad, *moments, step, lr, segments=segments))
        opt.step(grad_scale=torch.tensor(3.0))
        for (_, p), values in zip(named, want, strict=True):
            state = opt.state[p]
            for got, value in zip((p, state["exp_avg"], state["exp_avg_sq"]), values, strict=True):
                assert torch.equal(got, value)


# Small moments


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    power=st.integers(-20, 20),
)
@settings(max_examples=200, deadline=None)
def test_fp8_scale_keeps_the_largest_in_range(values, power):
    x = torch.tensor(values, dtype=torch.float32)
    segments = (Segment("tensor", 1, x.numel()),)
    amax = block_amax(x, segments)
    scale = fp8_scale(amax, torch.tensor([2.0**power]))
    assert torch.frexp(scale)[0] == 0.5  # a power of two: unscaling is exact
    if 2.0**-118 < amax < 2.0**127:
        assert 56 <= amax * scale <= 448
        back = from_fp8(to_fp8(x, scale, segments), scale, segments)
        bound = torch.maximum(x.abs() * 2.0**-4, torch.full_like(x, 2.0**-10) / scale)
        assert ((back - x).abs() <= bound).all()
    assert torch.equal(fp8_scale(amax, scale), scale)


def test_fp8_scale_stays_while_it_can():
    one = torch.ones(5)
    amax = torch.tensor([60.0, 448.0, 0.0, float("inf"), float("nan")])
    assert torch.equal(fp8_scale(amax, one), one)
    moved = fp8_scale(torch.tensor([55.0, 449.0, 1.75, 1.76, 1e-30]), one)
    assert torch.equal(moved * torch.tensor([55.0, 449.0, 1.75, 1.76, 1e-30]) <= 448, one > 0)
    assert torch.equal(moved[:4], torch.tensor([8.0, 0.5, 256.0, 128.0]))


@pytest.mark.parametrize("state", ["bf16", "fp8"])
def test_small_moments_follow_the_large_one(state):
    """A regression to a fixed matrix: the loss falls with a small moment as with float32."""
    losses = {}
    for kind in ("fp32", state):
        torch.manual_seed(0)
        x, y = torch.randn(256, 24), torch.randn(256, 24)
        layer = torch.nn.Linear(24, 24, bias=False)
        opt = AdamMini([("mlp.weight", layer.weight)], 1e-2, weight_decay=0.0, state=kind)
        for _ in range(200):
            opt.zero_grad()
            loss = (layer(x) - y).square().mean()
            loss.backward()
            opt.step()
        losses[kind] = loss.item()
    assert losses[state] == pytest.approx(losses["fp32"], rel=1e-3)


def test_state_bytes():
    p = torch.zeros(64, 512, requires_grad=True)
    sizes = {}
    for state in ("fp32", "bf16", "fp8"):
        opt = AdamMini([("mlp.weight", p)], state=state)
        tensors = [v for k, v in opt.state[p].items() if k != "step"]
        sizes[state] = sum(t.numel() * t.element_size() for t in tensors) / p.numel()
    assert sizes == {"fp32": 4 + 4 / 512, "bf16": 2 + 4 / 512, "fp8": 1 + 8 / 512}


def test_fallback_to_bf16_with_one_warning(monkeypatch):
    monkeypatch.setattr(optim.adam_mini, "fp8_missing", lambda device: "this GPU has no fp8")
    named = list(Net().named_parameters())
    with pytest.warns(UserWarning) as caught:
        opt = AdamMini(named, num_heads=4, state="fp8")
    assert [str(w.message) for w in caught] == [
        "this GPU has no fp8: the first moment is kept in bf16"
    ]
    assert all(opt.state[p]["exp_avg"].dtype == torch.bfloat16 for _, p in named)
    assert "exp_avg_scale" not in opt.state[named[0][1]]


def test_options_are_checked():
    p = [("mlp.weight", torch.zeros(4, 4, requires_grad=True))]
    for options in ({"state": "int8"}, {"num_heads": 0}, {"num_kv_heads": -1}, {"eps": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            AdamMini(p, **options)
