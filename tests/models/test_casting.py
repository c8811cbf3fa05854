"""Weights cast once a pass: the same numbers as casts at every use, gradients in full precision."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from models import ARCHITECTURES, ModelDims, build_model, reasoning
from models.layers import Linear

DIMS = ModelDims(seq_len=9, vocab_size=7, num_puzzle_ids=1)
SMALL = {"hidden_size": 64, "num_heads": 4, "puzzle_emb_ndim": 64, "puzzle_emb_len": 1}


def passes(name: str, dtype: str, monkeypatch, once: bool, **keys):
    """Logits and gradients of one ACT step with gradient."""
    if name == "trm_mlp":
        name, keys = "trm", {**keys, "mixer": "mlp", "pos_encodings": "none"}
    config = ARCHITECTURES[name](forward_dtype=dtype, **SMALL, **keys)
    model = build_model(config, DIMS, seed=0, device=torch.device("cpu"))
    torch.manual_seed(0)
    batch = {
        "inputs": torch.randint(1, 7, (3, 9)),
        "puzzle_ids": torch.zeros(3, dtype=torch.int64),
    }
    with monkeypatch.context() as patch:
        if not once:
            patch.setattr(reasoning, "cast_once", lambda *arguments: nullcontext())
        out = model(model.init_state(3), batch)
        (out.logits.float().square().sum() + out.q_logits.sum()).backward()
    assert all(m.half is None for m in model.modules() if isinstance(m, Linear))
    return [out.logits, *(p.grad for p in model.parameters())], model


@pytest.mark.parametrize("name", ["trm", "trm_mlp", "hrm", "urm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_numbers_as_casts_at_every_use(name, dtype, monkeypatch):
    (once, model), (each, _) = (passes(name, dtype, monkeypatch, flag) for flag in (True, False))
    assert torch.equal(once[0], each[0])
    for (label, parameter), a, b in zip(model.named_parameters(), once[1:], each[1:], strict=True):
        assert a.dtype == parameter.dtype == torch.float32
        assert torch.equal(a, b), label


def test_one_cast_for_all_uses(monkeypatch):
    """Of 2 × (3 + 1) uses of the level each weight is cast once, or not at all in its own dtype."""
    seen = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda a, b: (seen.append(len(a)), copy(a, b)))
    _, model = passes("trm", "bfloat16", monkeypatch, True)
    assert seen == [sum(isinstance(m, Linear) for m in model.levels.modules())]
    passes("trm", "float32", monkeypatch, True)
    assert len(seen) == 1


def test_recomputed_blocks_cast_for_themselves(monkeypatch):
    kept, _ = passes("trm", "bfloat16", monkeypatch, True)
    recomputed, _ = passes("trm", "bfloat16", monkeypatch, True, grad_checkpoint="block")
    for a, b in zip(kept, recomputed, strict=True):
        assert torch.equal(a, b)


def test_a_frozen_model_still_passes_its_gradient_on(monkeypatch):
    config = ARCHITECTURES["trm"](forward_dtype="bfloat16", **SMALL)
    model = build_model(config, DIMS, seed=0, device=torch.device("cpu")).requires_grad_(False)
    rows = torch.zeros(2, config.puzzle_emb_ndim, requires_grad=True)
    batch = {
        "inputs": torch.randint(1, 7, (2, 9)),
        "puzzle_ids": torch.zeros(2, dtype=torch.int64),
        "puzzle_rows": rows,
    }
    model(model.init_state(2), batch).logits.float().square().sum().backward()
    assert rows.grad.abs().sum() > 0
