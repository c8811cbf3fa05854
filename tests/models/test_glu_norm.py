"""SwiGLU and attention with an RMSNorm inside; no fused kernel takes SwiGLU for the plain one."""

from __future__ import annotations

import pytest
import torch

from models.layers import SwiGLU, normed_gate
from tests.models.test_recursion import batch, model_of


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


def test_the_formulas() -> None:
    wide = torch.randn(6, 512, dtype=torch.float64)
    gate, up = wide.chunk(2, dim=-1)
    product = gate.sigmoid() * (gate * up) / rms(gate * up)
    torch.testing.assert_close(normed_gate(wide, "product", 0.0), product)
    hidden = gate * gate.sigmoid() * up
    torch.testing.assert_close(normed_gate(wide, "hidden", 0.0), hidden / rms(hidden))


@pytest.mark.parametrize("norm", ["product", "hidden"])
def test_the_size_of_gate_and_up_does_not_matter(norm: str) -> None:
    mlp = SwiGLU(24, 4.0, torch.Generator().manual_seed(0), norm, 0.0).double()
    x = torch.randn(5, 24, dtype=torch.float64)
    inner = mlp.gate_up.weight.shape[0] // 2
    before = mlp(x)
    with torch.no_grad():
        mlp.gate_up.weight[inner:] *= 100  # what up is multiplied by, the norm divides by
    torch.testing.assert_close(mlp(x), before)


@pytest.mark.parametrize("norm", ["product", "hidden"])
@pytest.mark.parametrize("case", ["trm", "trm, mlp", "hrm", "urm"])
def test_models_learn_with_it_and_no_kernel_leaves_it_out(
    case: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("models.layers.usable", lambda name, x: asked.append(name) and False)
    monkeypatch.setattr("models.block.usable", lambda name, x: asked.append(name) and False)
    model = model_of(case, "float64", glu_norm=norm).double()
    plain = model_of(case, "float64").double()
    states = model.init_state(4)
    logits = model(states, batch()).logits
    if norm == "hidden":  # of which no kernel knows
        assert not {"swiglu", "mixer"} & set(asked)
    assert not torch.equal(logits, plain(states, batch()).logits)
    logits.square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if n.startswith("levels")]
    assert all(g is not None and g.isfinite().all() and g.any() for g in grads)


def test_a_norm_of_attention_needs_attention() -> None:
    with pytest.raises(ValueError, match="attn_norm=true needs mixer=attention"):
        model_of("trm, mlp", attn_norm=True)


def test_the_size_of_the_values_does_not_matter_to_a_normed_attention() -> None:
    keys = {"attn_norm": True, "rms_norm_eps": 1e-30}
    model = model_of("trm", "float64", **keys).double()
    attention = model.levels["L"].blocks[0].attention
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    before = attention(x, None)
    with torch.no_grad():
        attention.qkv.weight[64:] *= 100
    torch.testing.assert_close(attention(x, None), before)
    assert not torch.allclose(
        model_of("trm", "float64").double().levels["L"].blocks[0].attention(x, None), before
    )
