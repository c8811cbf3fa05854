"""Muon: the iteration, the rule in one batch and one by one, who gets which parameter."""

import copy

import pytest
import torch

from optim import AdamATan2, AdamW, Muon, muon_update, newton_schulz, partition_parameters
from optim.config import MuonConfig


def orthogonal(x):
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (9, 5), (3, 6, 4), (2, 3, 4, 4)])
@pytest.mark.parametrize(("kind", "tolerance"), [("quintic", 0.35), ("polar_express", 0.16)])
def test_singular_values_become_one(shape, kind, tolerance):
    """Bounds of the polynomials on [0.01, 1]: quintic 0.68 … 1.21, Polar Express 0.87 … 1.13."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    y = newton_schulz(x, coefficients=kind)
    assert y.shape == x.shape and y.dtype == torch.float64
    assert (torch.linalg.svdvals(y) - 1).abs().max() < tolerance
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    mid = u.mT @ y @ v.mT  # the iteration keeps the singular vectors
    assert (mid - torch.diag_embed(torch.diagonal(mid, dim1=-2, dim2=-1))).abs().max() < 1e-9


def test_iteration_converges_and_does_not_mind_the_scale():
    x = torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = newton_schulz(x, 12, coefficients="polar_express")
    torch.testing.assert_close(y, orthogonal(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(newton_schulz(x * 1e4), newton_schulz(x), rtol=1e-6, atol=1e-6)
    assert (newton_schulz(torch.zeros(3, 4)) == 0).all()
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        newton_schulz(torch.zeros(3))


class Net(torch.nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        shapes = {
            "embedding.tokens": (11, 6),
            "blocks.0.attention.qkv.weight": (18, 6),
            "blocks.0.attention.out.weight": (6, 6),
            "blocks.0.mlp.gate_up.weight": (20, 6),
            "blocks.0.mlp.down.weight": (6, 10),
            "blocks.0.mlp.down.bias": (6,),
            "blocks.0.norm.weight": (6,),
            "lm_head.weight": (11, 6),
            "q_head.weight": (2, 6),
        }
        self.named = [
            (n, torch.randn(s, generator=rng, dtype=dtype).requires_grad_())
            for n, s in shapes.items()
        ]

    def set_grads(self, seed):
        rng = torch.Generator().manual_seed(seed)
        for _, p in self.named:
            p.grad = torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p.dtype)


def test_roles():
    roles = {
        part.name.split(".")[-2]: part.role
        for part in partition_parameters(Net().named, warn=False)
    }
    assert roles == {
        "embedding": "embedding",
        "qkv": "qkv",
        "out": "projection",
        "gate_up": "gate_up",
        "down": "vector",  # its bias comes last
        "norm": "vector",
        "lm_head": "head",
        "q_head": "head",
    }
    with pytest.raises(ValueError, match="twice"):
        partition_parameters([Net().named[0]] * 2)


def test_every_parameter_is_claimed_once_by_its_half():
    net = Net()
    opt = Muon(net.named)
    claimed = [p for g in opt.param_groups for p in g["params"]]
    assert sorted(map(id, claimed)) == sorted(id(p) for _, p in net.named)
    assert [g["kind"] for g in opt.param_groups] == ["adam", "muon"]
    kinds = kinds_of(opt)
    assert kinds["blocks.0.attention.qkv.weight"] == ("muon", 3)
    assert kinds["blocks.0.mlp.gate_up.weight"] == ("muon", 2)
    assert kinds["blocks.0.mlp.down.weight"] == ("muon", 1)
    for name in ("embedding.tokens", "lm_head.weight", "q_head.weight", "blocks.0.mlp.down.bias"):
        assert kinds[name] == ("adam", 1)
    whole = Muon(Net().named, split_fused=False)
    assert {pieces for kind, pieces in kinds_of(whole).values() if kind == "muon"} == {1}
    with pytest.raises(ValueError, match="equal pieces"):
        Muon([{"params": [torch.zeros(4, 6).requires_grad_()], "kind": "muon", "pieces": [3]}])
    with pytest.raises(ValueError, match="one number per parameter"):
        Muon([{"params": [torch.zeros(4, 6).requires_grad_()], "kind": "muon", "pieces": [2, 2]}])


def kinds_of(opt):
    """Name → (kind, pieces)."""
    found = {}
    for g in opt.param_groups:
        pieces = g["pieces"] or [1] * len(g["params"])
        found |= {n: (g["kind"], k) for n, k in zip(g["param_names"], pieces, strict=True)}
    return found


@pytest.mark.parametrize("adam", ["adam_atan2", "adamw"])
@pytest.mark.parametrize("decay", [None, 0.7])
@pytest.mark.parametrize("options", [{}, {"nesterov": False, "scaling": "keller"}])
def test_a_step_is_the_rule_of_each_parameter(adam, options, decay):
    """Batches against `muon_update` one by one; the rest against AdamATan2 or AdamW alone."""
    net, twin = Net(), Net()
    opt = Muon(net.named, 0.02, adam=adam, adam_lr_scale=0.5, adam_weight_decay=decay, **options)
    kind_of = {n: g for g in opt.param_groups for n in g["param_names"]}
    rest = [(n, p) for n, p in twin.named if kind_of[n]["kind"] == "adam"]
    alone = {"adam_atan2": AdamATan2, "adamw": AdamW}[adam]
    other = alone(rest, 0.01, weight_decay=0.1 if decay is None else decay)
    buffers = {n: torch.zeros_like(p) for n, p in twin.named}
    for seed in range(4):
        net.set_grads(seed)
        twin.set_grads(seed)
        opt.step(grad_scale=torch.tensor(2.0, dtype=torch.float64))
        other.step(grad_scale=torch.tensor(2.0, dtype=torch.float64))
        with torch.no_grad():
            for n, p in twin.named:
                if kind_of[n]["kind"] == "muon":
                    new, buffers[n] = muon_update(
                        p, p.grad / 2, buffers[n], 0.02, pieces=kinds_of(opt)[n][1], **options
                    )
                    p.copy_(new)
    for (name, p), (_, q) in zip(net.named, twin.named, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=name)


def test_moonlight_updates_are_as_large_as_those_of_adam():
    p = torch.zeros(64, 256).requires_grad_()
    p.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    opt = Muon([("w", p)], 1.0, weight_decay=0.0)
    opt.step()
    assert 0.15 < float(p.detach().square().mean().sqrt()) < 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("flag", [1.0, float("nan")])
def test_found_inf_leaves_every_bit(dtype, flag):
    net = Net(dtype)
    opt = Muon(net.named, 0.01)
    net.set_grads(0)
    opt.step()

    def everything():
        return [t.clone() for _, p in net.named for t in (p.detach(), *opt.state[p].values())]

    before = everything()
    for _, p in net.named:
        p.grad.fill_(float("nan"))
    opt.step(found_inf=torch.tensor(flag))
    group = next(g for g in opt.param_groups if g["kind"] == "muon")
    with torch.no_grad():  # as on another device: every write is a `where`
        params = group["params"]
        for p in params:
            opt._momentum(group, p, None, torch.tensor(True))
        ahead = [p.grad.to(opt.state[p]["momentum_buffer"].dtype) for p in params]
        for p, u in zip(params, ahead, strict=True):
            opt._apply(group, [p], [u], group["lr"], torch.tensor(True))
    assert all(torch.equal(x, y) for x, y in zip(before, everything(), strict=True))


def test_loading_then_stepping_is_never_having_saved():
    net, twin = Net(torch.float32), Net(torch.float32)
    one, two = Muon(net.named, 0.01), Muon(twin.named, 0.5, momentum=0.5)
    for seed in range(3):
        net.set_grads(seed)
        one.step()
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    with torch.no_grad():
        for (_, p), (_, q) in zip(net.named, twin.named, strict=True):
            q.copy_(p)
    for seed in range(3, 6):
        net.set_grads(seed)
        twin.set_grads(seed)
        one.step()
        two.step()
    for (_, p), (_, q) in zip(net.named, twin.named, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(one.state[p][k], two.state[q][k]) for k in one.state[p])


def test_errors_are_sentences():
    p = torch.zeros(4, 4, requires_grad=True)
    for options, message in [
        ({"momentum": 1.0}, "momentum must be in"),
        ({"ns_steps": 0}, "ns_steps must"),
        ({"scaling": "other"}, "scaling must be one of"),
        ({"coefficients": "other"}, "coefficients must be one of"),
        ({"adam": "sgd"}, "adam must be one of"),
        ({"adam_lr_scale": -1.0}, "adam_lr_scale must"),
        ({"adam_weight_decay": -1.0}, "adam_weight_decay must"),
        ({"lr": -1.0}, "lr must"),
    ]:
        with pytest.raises(ValueError, match=message):
            Muon([p], **options)
    with pytest.raises(ValueError, match="twice"):
        Muon([p, p])
    with pytest.raises(TypeError, match="takes tensors, got int"):
        Muon([3])
    opt = Muon([p])
    with pytest.raises(ValueError, match="complex"):
        opt.add_param_group({"params": [torch.zeros(3, 3), torch.zeros(3, dtype=torch.complex64)]})
    assert len(opt.param_groups) == len(opt._lr_tensors) == 1


def test_config_builds_it():
    net = Net(torch.float32)
    opt = MuonConfig(weight_decay=0.2, adam="adamw").build(net.named, 3e-4)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.2}
    opt.set_lr(1e-3)
    assert {round(float(g["lr"]), 9) for g in opt.param_groups} == {1e-3}
    net.set_grads(0)
    opt.step()
