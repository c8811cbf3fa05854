"""The cost of a step, counted on shapes, is that of the step."""

from __future__ import annotations

import gc
import runpy
from pathlib import Path

import pytest
import torch

from models import ACT, ARCHITECTURES, ModelDims, act_loss, build_model
from models.cost import _Meter, cost, updates_of

CPU = torch.device("cpu")
DIMS = ModelDims(seq_len=60, vocab_size=12, num_puzzle_ids=10)
SMALL = {"hidden_size": 64, "num_heads": 2, "puzzle_emb_ndim": 64, "puzzle_emb_len": "auto"}
ROOT = Path(__file__).parents[2]


def config_of(name: str, **fields):
    config = ARCHITECTURES[name]
    few = {"H_cycles": 2, "L_cycles": 2, "H_layers": 2, "L_layers": 2, "num_layers": 2}
    few = {k: v for k, v in few.items() if k in config.model_fields}
    return config(**{**SMALL, **few, **fields})


def peak(config, rows: int) -> int:
    """Bytes alive at most in a step that really takes place."""
    act = ACT(build_model(config, DIMS, seed=0, device=CPU)).train()
    for p in act.parameters():
        p.grad = torch.zeros_like(p)
    tokens = torch.zeros(rows, DIMS.seq_len, dtype=torch.int32)
    batch = {"inputs": tokens, "labels": tokens, "puzzle_ids": tokens[:, 0]}
    gc.collect()
    memory = _Meter()
    with memory:
        carry = act.refill(act.initial_carry(batch), batch)
        puzzle_rows = act.model.puzzle_rows(batch["puzzle_ids"]).requires_grad_()
        carry, output = act(carry, puzzle_rows)
        act_loss(carry, output, config.loss)[0].backward()
    return memory.peak


@pytest.mark.parametrize("mode", ["none", "block", "cycle", "all"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_memory_is_that_of_a_real_step(name, mode):
    config = config_of(name, grad_checkpoint=mode, forward_dtype="float32")
    counted = cost(config, DIMS, 4, CPU).activation_bytes
    assert counted == pytest.approx(peak(config, 4), rel=0.02)


def test_checkpointing_halves_the_memory_of_the_papers_step():
    """TRM attention, 900 tokens, H3 L4, batch 192: the promise, as far as counting tells."""
    dims = ModelDims(900, 12, 1000)
    found = {
        mode: cost(ARCHITECTURES["trm"](L_cycles=4, grad_checkpoint=mode,
                                        forward_dtype="bfloat16"), dims, 192, CPU)
        for mode in ("none", "block", "cycle", "all")
    }  # fmt: skip
    total = {k: c.forward_flops + c.gradient_flops for k, c in found.items()}
    for mode in ("block", "cycle", "all"):
        assert found[mode].activation_bytes < 0.3 * found["none"].activation_bytes
        assert 1.14 < total[mode] / total["none"] < 1.18
    assert total["none"] == pytest.approx(78.1e12, rel=0.01)
    assert found["none"].parameters == 6_829_058


def test_products_are_counted_once_forward_and_twice_backward():
    config = config_of("trm", mixer="mlp", pos_encodings="none", H_cycles=2, L_cycles=2)
    found = cost(config, DIMS, 8, CPU)
    assert (found.updates, found.grad_updates) == (3, 3)
    blocks = found.forward_flops // 6  # the head's products are small
    assert found.gradient_flops == pytest.approx(2 * 3 * blocks, rel=0.05)
    assert updates_of(config_of("hrm")) == {("L", False): 3, ("H", False): 1, ("L", True): 1,
                                            ("H", True): 1}  # fmt: skip


@pytest.mark.parametrize("arch", ["trm_mlp", "hrm"])
def test_the_script(arch, monkeypatch, capsys):
    small = [
        "arch.H_cycles=1",
        "arch.hidden_size=32",
        "arch.num_heads=2",
        "arch.puzzle_emb_ndim=32",
    ]
    monkeypatch.setattr("sys.argv", ["model_info.py", f"arch={arch}", *small, "device=cpu",
                                     "global_batch_size=4", "--seq-len", "16"])  # fmt: skip
    runpy.run_path(str(ROOT / "scripts" / "model_info.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "parameters + 32 in puzzle embeddings" in out and "TFLOP/s (measured on" in out
    assert [line.split()[0] for line in out.splitlines()[-5:-1]] == [
        "none",
        "block",
        "cycle",
        "all",
    ]
