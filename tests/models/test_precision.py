"""Dtypes: stablemax as accurate as float64, 8-bit products, models in every dtype."""

from __future__ import annotations

import pytest
import torch

from models import ARCHITECTURES, ModelDims, ModelError, build_model, fp8
from models.layers import Linear
from models.loss import log_stablemax
from models.recursion import split

CPU = torch.device("cpu")
E4M3 = 2.0**-4  # rounding to 3 bits of mantissa, at most, of each factor


def stablemax64(logits: torch.Tensor) -> torch.Tensor:
    """As it is defined, in float64."""
    x = logits.double()
    s = torch.where(x >= 0, x + 1, 1 / (1 - x))
    return (s / s.sum(-1, keepdim=True)).log()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_stablemax_in_float32_is_as_accurate_as_in_float64(scale):
    logits = scale * torch.randn(4096, 11, generator=torch.Generator().manual_seed(0))
    exact = stablemax64(logits)
    error = (log_stablemax(logits).double() - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() < 1e-6
    ours, theirs = logits.clone().requires_grad_(), logits.clone().double().requires_grad_()
    log_stablemax(ours)[:, 3].sum().backward()
    stablemax64(theirs)[:, 3].sum().backward()
    bound = 1e-5 * theirs.grad.abs().max()
    assert (ours.grad.double() - theirs.grad).abs().max() < bound


def test_stablemax_at_the_edges():
    logits = torch.tensor([[0.0, -0.0, 3e38, -3e38]], requires_grad=True)
    value = log_stablemax(logits)
    value[0, 2].backward()
    assert value.isfinite().all() and logits.grad.isfinite().all()


def test_products_in_8_bits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 32, 64, generator=generator).bfloat16()
    weight = torch.randn(48, 64, generator=generator)
    y = fp8.linear(x, *fp8.quantize(weight)).double()
    exact = x.double() @ weight.double().T
    assert y.shape == exact.shape and (y - exact).norm() < E4M3 * exact.norm()


def test_quantization_fills_the_range_and_survives_zeros():
    x = torch.tensor([[1e-9, -3e-9], [2e-9, 0.0]])
    small, unit = fp8.quantize(x)
    assert small.float().abs().max() == 448
    assert torch.allclose(small.float() * unit, x, rtol=E4M3)
    zeros, unit = fp8.quantize(torch.zeros(2, 2))
    assert (zeros.float() == 0).all() and unit > 0


def test_only_shapes_that_the_hardware_takes():
    assert fp8.fits(Linear(64, 48).weight)
    assert not fp8.fits(Linear(97, 256).weight) and not fp8.fits(Linear(256, 97).weight)


def test_8_bits_where_there_are_none():
    config = ARCHITECTURES["urm"](hidden_size=32, num_heads=2, fp8=True, forward_dtype="bfloat16")
    with pytest.raises(ModelError, match="fp8=true needs a CUDA device"):
        build_model(config, ModelDims(4, 5, 1), seed=0, device=CPU)
    assert not config.portable().fp8


def test_8_bits_where_all_cycles_carry_gradient(monkeypatch):
    """Nothing would be made in 8 bits: said, not passed over."""
    monkeypatch.setattr(fp8, "check_device", lambda device, dtype: None)
    for name, changes in (("transformer", {}), ("trm", {"H_cycles": 1})):
        config = ARCHITECTURES[name](hidden_size=32, num_heads=2, fp8=True, **changes)
        with pytest.raises(ModelError, match="all cycles of this model carry it; use fp8=false"):
            build_model(config, ModelDims(4, 5, 1), seed=0, device=CPU)


def test_weights_are_quantized_where_something_reads_them(monkeypatch):
    model, _, batch = eight_bit(monkeypatch)
    quantized, quantize = [], fp8.quantize
    monkeypatch.setattr(fp8, "quantize", lambda x: (quantized.append(x.shape), quantize(x))[1])
    maps = [m for m in model.levels.modules() if isinstance(m, Linear)]
    model(model.init_state(4), batch, schedule=split(model.schedule)[1])
    assert not quantized
    model(model.init_state(4), batch, schedule=split(model.schedule)[0])
    assert sum(shape == m.weight.shape for shape in quantized for m in maps) >= len(maps)


def eight_bit(monkeypatch, **changes):
    """A small URM with 8-bit products, on the CPU, its batch, and that model without them."""
    monkeypatch.setattr(fp8, "check_device", lambda device, dtype: None)
    config = ARCHITECTURES["urm"](hidden_size=32, num_heads=2, fp8=True, forward_dtype="bfloat16",
                                  puzzle_emb_ndim=0, expansion=1.0, num_layers=1, H_cycles=2,
                                  L_cycles=2, **changes)  # fmt: skip
    dims = ModelDims(16, 32, 1)
    models = (build_model(c, dims, seed=0, device=CPU) for c in (config, config.portable()))
    return *models, {"inputs": torch.arange(64).reshape(4, 16) % 32}


def test_8_bits_are_for_the_levels_alone(monkeypatch):
    model, plain, batch = eight_bit(monkeypatch)
    assert {m.fp8 for m in model.levels.modules() if isinstance(m, Linear)} == {True}
    assert not (model.lm_head.fp8 or model.q_head.fp8)
    logits, expected = (m(m.init_state(4), batch).logits.float() for m in (model, plain))
    assert 0 < (logits - expected).norm() < 0.5 * expected.norm()


@pytest.mark.parametrize("kept", ["none", "block", "cycle", "all"])
def test_8_bits_are_for_phases_without_gradient(monkeypatch, kept):
    """In training as in evaluation: both compute the same."""
    model, _, batch = eight_bit(monkeypatch, grad_checkpoint=kept)
    products, calls = fp8.linear, []

    def counted(*arguments):
        assert not torch.is_grad_enabled() and fp8.active()
        calls.append(len(arguments))
        return products(*arguments)

    monkeypatch.setattr(fp8, "linear", counted)
    trained = model(model.init_state(4), batch)
    of_free = len(calls)
    trained.logits.float().sum().backward()
    maps = sum(isinstance(m, Linear) for m in model.levels.modules())
    assert of_free == 2 * maps == len(calls) and not fp8.active()
    assert all(p.grad is not None for p in model.levels.parameters())
    with torch.no_grad():
        evaluated = model.eval()(model.init_state(4), batch)
    assert torch.equal(evaluated.logits, trained.logits) and len(calls) == 2 * of_free
    assert all(m.eight is None for m in model.levels.modules() if isinstance(m, Linear))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_models_compute_in_every_dtype(name, dtype):
    config = ARCHITECTURES[name](hidden_size=32, num_heads=2, forward_dtype=dtype,
                                 puzzle_emb_ndim=32, puzzle_emb_len="auto")  # fmt: skip
    model = build_model(config, ModelDims(6, 5, 2), seed=0, device=CPU)
    inputs = torch.arange(12).reshape(2, 6) % 5
    batch = {"inputs": inputs, "puzzle_ids": torch.tensor([0, 1])}
    output = model(model.init_state(2), batch)
    assert {v.dtype for v in output.state.values()} == {getattr(torch, dtype)}
    assert output.logits.dtype == getattr(torch, dtype) and output.q_logits.dtype == torch.float32
    exact = build_model(config.model_copy(update={"forward_dtype": "float64"}),
                        ModelDims(6, 5, 2), seed=0, device=CPU)  # fmt: skip
    expected = exact({k: v.double() for k, v in model.init_state(2).items()}, batch).logits
    bound = {"float16": 0.05, "bfloat16": 0.3, "float32": 1e-4, "float64": 1e-12}[dtype]
    assert (output.logits.double() - expected).abs().max() < bound * expected.abs().max()
