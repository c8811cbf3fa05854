"""Schedules, and gradient checkpointing, which changes memory and nothing else."""

from __future__ import annotations

import pytest
import torch

from models import ARCHITECTURES, ModelDims, act_loss, build_model, counter_uniform
from models.act import ACT
from models.recursion import INPUT, Phase, Update, run, truncated

MODES = ("none", "block", "cycle", "all")
DIMS = ModelDims(seq_len=10, vocab_size=7, num_puzzle_ids=3)
SMALL = {"hidden_size": 32, "num_heads": 2, "puzzle_emb_ndim": 40, "puzzle_emb_len": "auto",
         "expansion": 1.0, "halt_max_steps": 3}  # fmt: skip
CASES = {
    "hrm": {"H_cycles": 3, "L_cycles": 2, "H_layers": 2, "L_layers": 3},
    "hrm, two cycles": {"H_cycles": 3, "L_cycles": 2, "H_grad_cycles": 2, "H_layers": 1},
    "trm": {"H_cycles": 2, "L_cycles": 3},
    "trm, all cycles": {"H_cycles": 3, "L_cycles": 2, "H_grad_cycles": 3},
    "trm, mlp": {"mixer": "mlp", "pos_encodings": "none", "H_cycles": 2, "L_cycles": 2},
    "trm, one state": {"latents": 0, "H_cycles": 3, "L_cycles": 2, "H_grad_cycles": 2},
    "trm, three latents": {"latents": 3, "H_cycles": 2, "L_cycles": 4, "H_grad_cycles": 2},
    "urm": {"H_cycles": 2, "L_cycles": 3, "num_layers": 2},
    "urm, last update": {"H_cycles": 2, "L_cycles": 3, "num_layers": 2, "H_grad_cycles": 0},
    "transformer": {"H_layers": 3},
}


def model_of(case: str, dtype: str = "float32", **fields):
    config = ARCHITECTURES[case.partition(",")[0]](
        **{**SMALL, **CASES[case], "forward_dtype": dtype, **fields}
    )
    return build_model(config, DIMS, seed=0, device=torch.device("cpu"))


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 7, (2, rows, DIMS.seq_len), generator=generator)
    return {"inputs": tokens[0], "labels": tokens[1], "puzzle_ids": torch.arange(rows) % 3}


def gradients(model) -> dict[str, torch.Tensor]:
    """Gradients of one ACT step, those of the puzzle rows included."""
    act = ACT(model).train()
    data = batch()
    carry = act.refill(act.initial_carry(data), data)
    rows = model.puzzle_rows(carry.batch["puzzle_ids"]).requires_grad_()
    carry, output = act(carry, rows)
    loss, _ = act_loss(carry, output, model.config.loss)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {**found, "puzzle rows": rows.grad, "loss": loss.detach(), **carry.state}


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("case", CASES)
def test_gradient_checkpointing_changes_no_gradient(case, mode):
    plain, checkpointed = (gradients(model_of(case, grad_checkpoint=m)) for m in ("none", mode))
    assert all(g is not None for g in plain.values())
    for name, expected in plain.items():
        error = (checkpointed[name] - expected).abs().max()
        assert error <= 1e-6 * expected.abs().max(), name


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_under_the_compiler(mode):
    model = model_of("trm, all cycles", grad_checkpoint=mode)
    expected = gradients(model_of("trm, all cycles"))
    for level in model.levels.values():
        compile = type(level).compile
        level.compile = lambda dynamic, level=level, c=compile: c(level, backend="aot_eager")
        for block in level.blocks:
            b = type(block).compile
            block.compile = lambda dynamic, x=block, b=b: b(x, backend="aot_eager")
    model.compile_levels()
    for name, value in gradients(model).items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-6), name


class Noisy(torch.nn.Module):
    """A level that draws numbers: from a counter, so that a second computation draws the same."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
        self.calls = 0

    def forward(self, state, injection, recompute=0):
        self.calls += 1
        step, rows = torch.zeros((), dtype=torch.int64), torch.arange(state.shape[0])
        noise = counter_uniform(7, step, rows, streams=8).T
        return torch.tanh(self.blocks[0](state + injection) * noise)


def test_recomputation_draws_the_same_numbers():
    cycle = (Update("z", (INPUT,), "L"),)
    found = []
    for mode in ("none", "cycle"):
        torch.manual_seed(0)
        level, x = Noisy(), torch.ones(4, 8)
        state = {"z": torch.zeros(4, 8)}
        schedule = truncated(cycle, cycles=3, grad_cycles=3)
        run(schedule, state, x, {"L": level}, mode)["z"].sum().backward()
        found.append((level.blocks[0].weight.grad, level.calls))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1], found[1][1]) == (3, 5), "the last update is not computed twice"


def test_truncation():
    a, b = Update("z_L", ("z_H",), "L"), Update("z_H", ("z_L",), "H")
    assert truncated((a, b), cycles=3, grad_cycles=1) == (
        Phase((a, b), 2, False),
        Phase((a, b), 1, True),
    )
    assert truncated((a, b), cycles=3, grad_cycles=9) == (Phase((a, b), 3, True),)
    assert truncated((a, a, b), cycles=2, grad_cycles=0, tail=2) == (
        Phase((a, a, b), 1, False),
        Phase((a,), 1, False),
        Phase((a, b), 1, True),
    )
    assert truncated((b,), cycles=1, grad_cycles=0) == (Phase((b,), 1, True),)


@pytest.mark.parametrize("case", ["trm", "hrm", "urm"])
def test_more_cycles_with_gradient_change_the_gradient_and_not_the_output(case):
    cycles = {"H_cycles": 3, "L_cycles": 2}
    found = [gradients(model_of(case, "float64", **cycles, H_grad_cycles=n)) for n in range(4)]
    for other in found[1:]:
        assert torch.equal(found[0]["loss"], other["loss"])
        key = "levels.L.blocks.0.mlp.down.weight"
        assert not torch.allclose(found[0][key], other[key], rtol=1e-3)


def test_the_gradient_through_all_cycles_is_the_derivative():
    """Finite differences see through every cycle; so does H_grad_cycles = H_cycles."""
    model = model_of("trm, all cycles", "float64")
    found = gradients(model)["lm_head.weight"], gradients_of(model, "levels.L.blocks.0.mlp.down")
    assert found[0].abs().max() > 0
    exact, numeric = found[1]
    assert abs(exact - numeric) <= 1e-5 * abs(numeric)


def gradients_of(model, name: str) -> tuple[float, float]:
    """The derivative of the loss along one random direction of a weight: exact, and numeric."""
    weight = model.get_parameter(f"{name}.weight")
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).double()
    exact = float((weight.grad * direction).sum())
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-6 * direction
        model.zero_grad()
        losses.append(float(gradients(model)["loss"]))
        with torch.no_grad():
            weight -= sign * 1e-6 * direction
    return exact, (losses[0] - losses[1]) / 2e-6


def test_latents_take_turns():
    config = ARCHITECTURES["trm"](**SMALL, latents=3, H_cycles=1, L_cycles=4)
    (phase,) = config.schedule()
    assert [u.target for u in phase.updates] == ["z_L1", "z_L2", "z_L3", "z_L1", "z_H"]
    assert phase.updates[0].sources == ("z_L2", "z_L3", "z_H", INPUT)
    assert config.states == ("z_H", "z_L1", "z_L2", "z_L3")
    single = ARCHITECTURES["trm"](**SMALL, latents=0, H_cycles=1, L_cycles=2)
    (phase,) = single.schedule()
    assert phase.updates == (Update("z_L", (INPUT,), "L"),) * 2 + (Update("z_L", (), "L"),)


def test_a_curriculum_is_a_schedule():
    config = ARCHITECTURES["trm"](**SMALL, curriculum=((0.3, 1, 2), (0.6, 2, 4)))
    assert [config.cycles(p) for p in (0.0, 0.29, 0.3, 0.59, 0.6, 1.0)] == [
        (1, 2), (1, 2), (2, 4), (2, 4), (3, 6), (3, 6)
    ]  # fmt: skip
    model = build_model(config, DIMS, seed=0, device=torch.device("cpu"))
    model.set_progress(0.1)
    assert model.schedule == config.schedule(0.1) != config.schedule()
    plain = build_model(config.model_copy(update={"curriculum": ()}), DIMS, seed=0,
                        device=torch.device("cpu"))  # fmt: skip
    state, data = model.init_state(4), batch()
    assert not torch.equal(model(state, data).logits, plain(state, data).logits)
    model.eval()  # evaluation is by the full schedule at any time
    assert torch.equal(model(state, data).logits, plain(state, data).logits)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"latents": 4, "L_cycles": 3}, "latents=4 is more than L_cycles=3: some would never"),
        ({"H_cycles": 2, "H_grad_cycles": 3}, "H_grad_cycles=3 is more than H_cycles=2"),
        ({"curriculum": ((0.5, 1, 1), (0.4, 2, 2))}, "fractions should rise"),
        ({"curriculum": ((1.5, 1, 1),)}, "at most 1"),
        ({"curriculum": ((0.5, 0, 1),)}, "H and L cycles"),
    ],
)
def test_impossible_cycles_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ARCHITECTURES["trm"](**SMALL, **fields)
