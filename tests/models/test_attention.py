"""Attention backends: equal within the dtype's rounding, chosen and refused as documented."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from models import ModelDims, ModelError, build_model, fp8
from models.attention_backends import attend, resolve_backend
from models.hrm import HRMConfig
from models.trm import TRMConfig

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def qkv(dtype, length=19, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(3, 2, length, 3, head_dim, generator=generator, dtype=torch.float64)
    return draws.to(dtype).unbind(0)


def slowly(q, k, v, causal):
    """One query at a time, in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    out = torch.empty_like(q)
    for i in range(q.shape[1]):
        seen = slice(0, i + 1) if causal else slice(None)
        scores = torch.einsum("bhd,blhd->bhl", q[:, i], k[:, seen]) / q.shape[-1] ** 0.5
        out[:, i] = torch.einsum("bhl,blhd->bhd", scores.softmax(-1), v[:, seen])
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_backends_agree(backend, causal, dtype):
    q, k, v = qkv(dtype)
    mixed = attend(q, k, v, causal=causal, backend=backend)
    assert mixed.dtype == dtype and mixed.shape == q.shape
    assert (mixed.double() - slowly(q, k, v, causal)).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_agree(causal):
    found = []
    for backend in ("sdpa", "math"):
        tensors = [t.clone().requires_grad_() for t in qkv(torch.float64)]
        attend(*tensors, causal=causal, backend=backend).square().sum().backward()
        found.append([t.grad for t in tensors])
    for ours, other in zip(*found, strict=True):
        assert torch.allclose(ours, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "backend, package", [("fa3", "flash_attn_interface"), ("fa2", "flash_attn")]
)
@pytest.mark.parametrize("with_lse", [False, True])
def test_flash_attention_is_called_by_its_interface(backend, package, with_lse, monkeypatch):
    """Its layout, arguments and return values, with a stand-in: there is no such package here."""
    calls = []

    def flash_attn_func(q, k, v, causal=False, deterministic=False):
        calls.append(deterministic)
        mixed = slowly(q, k, v, causal).to(q.dtype)
        return (mixed, None) if with_lse else mixed

    fake = types.ModuleType(package)
    fake.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, package, fake)
    q, k, v = qkv(torch.bfloat16)
    mixed = attend(q, k, v, causal=True, backend=backend)
    assert torch.allclose(mixed, attend(q, k, v, causal=True, backend="math"), atol=2e-2)
    assert calls == [False]


def test_auto_takes_the_best_that_is_installed_and_fits(monkeypatch):
    installed, hopper = {"flash_attn", "flash_attn_interface"}, (9, 0)
    monkeypatch.setattr(
        "models.attention_backends.importlib.util.find_spec", lambda name: name in installed or None
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: hopper)
    cuda, half = torch.device("cuda"), torch.bfloat16
    assert resolve_backend("auto", cuda, half, 64) == "fa3"
    hopper = (8, 0)
    assert resolve_backend("auto", cuda, half, 64) == "fa2"
    hopper, installed = (9, 0), {"flash_attn"}
    assert resolve_backend("auto", cuda, half, 64) == "fa2"
    assert resolve_backend("fa2", cuda, half, 64) == "fa2"
    for device, dtype, head_dim in ((CPU, half, 64), (cuda, torch.float32, 64), (cuda, half, 12)):
        assert resolve_backend("auto", device, dtype, head_dim) == "sdpa"
        with pytest.raises(ModelError, match="attention_backend=fa2 needs a CUDA device"):
            resolve_backend("fa2", device, dtype, head_dim)
    installed = set()
    assert resolve_backend("auto", cuda, half, 64) == "sdpa"


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_a_forced_backend_that_is_missing_is_a_clear_error(backend, monkeypatch):
    monkeypatch.setattr("models.attention_backends.importlib.util.find_spec", lambda name: None)
    config = HRMConfig(hidden_size=32, num_heads=2, attention_backend=backend)
    with pytest.raises(ModelError, match=f"attention_backend={backend} needs the package flash_at"):
        config.check_machine()
    with pytest.raises(ModelError, match="not installed"):
        build_model(config, ModelDims(4, 5, 1), seed=0, device=CPU)
    assert config.portable().attention_backend == "auto"
    TRMConfig(mixer="mlp", pos_encodings="none", attention_backend=backend).check_machine()


@pytest.mark.parametrize("causal", [False, True])
def test_models_of_either_backend_agree(causal):
    found = []
    for backend in ("sdpa", "math", "auto"):
        config = HRMConfig(hidden_size=32, num_heads=2, puzzle_emb_ndim=0, expansion=1.0,
                           attention_backend=backend, causal=causal)  # fmt: skip
        model = build_model(config, ModelDims(6, 5, 1), seed=0, device=CPU).eval()
        inputs = torch.arange(12).reshape(2, 6) % 5
        found.append(model(model.init_state(2), {"inputs": inputs}).logits)
        if causal:  # a change of the last token changes nothing before it
            inputs = inputs.clone()
            inputs[:, -1] = (inputs[:, -1] + 1) % 5
            logits = model(model.init_state(2), {"inputs": inputs}).logits
            assert torch.equal(logits[:, :-1], found[-1][:, :-1])
            assert not torch.equal(logits[:, -1], found[-1][:, -1])
    assert torch.allclose(found[0], found[1], atol=1e-4) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("rotated", [True, False])
def test_the_long_kernel_makes_its_own_product(rotated, monkeypatch):
    """Where it takes the activations, and not else; either way the result is the plain one."""
    long = pytest.importorskip("models.kernels.long_attention")
    from models.attention import Attention
    from models.layers import RotaryTable

    config = TRMConfig(hidden_size=128, num_heads=2, attention_backend="math")
    layer = Attention(config, torch.Generator().manual_seed(0))
    rope = RotaryTable(64, torch.arange(140), 10000.0) if rotated else None
    x = torch.randn(2, 140, 128, generator=torch.Generator().manual_seed(1))
    expected, calls = layer.mix(x, rope)[0], []

    def plain(name):
        def kernel(given, *arguments):
            calls.append(name)
            if name == "product":
                weight, heads, cos, sin, half, half_t = arguments
                assert weight is layer.qkv.weight and half is half_t is None
                qkv = layer.qkv(given)
            else:
                qkv, (heads, cos, sin) = given, arguments
            assert heads == 2 and (cos is not None) == (sin is not None) == rotated
            mixed = layer._gather(qkv, rope, None)
            return (mixed, given) if name == "product" else mixed

        return kernel

    monkeypatch.setattr(long, "projected_attention", plain("product"))
    monkeypatch.setattr(long, "long_attention", plain("attention"))
    monkeypatch.setattr(Attention, "_kernel", lambda *_: long.long_attention)
    assert torch.equal(layer.mix(x, rope)[0], expected)
    layer.qkv.fp8 = True
    assert torch.equal(layer.mix(x, rope)[0], expected)
    monkeypatch.setattr(Attention, "_to_qkv", lambda self, x: (x @ self.qkv.weight.mT, x))
    with fp8.eight_bits(True):  # a product in 8 bits is made apart
        torch.testing.assert_close(layer.mix(x, rope)[0], expected)
    assert calls == ["product", "product", "attention"]
