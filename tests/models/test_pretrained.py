"""Models outside of training: shapes, halting, what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from models import ACT, ARCHITECTURES, ModelDims, ModelError, build_model, load_pretrained
from models.pretrained import Solver

DIMS = ModelDims(seq_len=6, vocab_size=5, num_puzzle_ids=3)
CPU = torch.device("cpu")


def model_of(name: str, **fields):
    small = {"hidden_size": 32, "num_heads": 2, "puzzle_emb_ndim": 32, "puzzle_emb_len": "auto",
             "halt_max_steps": 4, "H_cycles": 1, "L_cycles": 2, "H_grad_cycles": 1}  # fmt: skip
    known = ARCHITECTURES[name].model_fields
    small = {k: v for k, v in small.items() if k in known}
    config = ARCHITECTURES[name](**{"forward_dtype": "float64", **small, **fields})
    model = build_model(config, DIMS, seed=0, device=CPU)
    model.q_head.weight.data.normal_(std=1.0, generator=torch.Generator().manual_seed(3))
    model.q_head.bias.data.zero_()  # halts at different steps
    return model


@pytest.fixture(params=ARCHITECTURES)
def solver(request) -> Solver:
    return Solver(model_of(request.param))


def puzzles(rows: int) -> torch.Tensor:
    return torch.randint(0, 5, (rows, 6), generator=torch.Generator().manual_seed(1))


def by_hand(solver: Solver, rows: torch.Tensor, steps: int):
    """Every step's predictions, halting logits, whether they halt, and by what margin."""
    batch = {
        "inputs": rows,
        "labels": rows,
        "puzzle_ids": torch.zeros(len(rows), dtype=torch.int32),
    }
    act = ACT(solver.model).eval()
    carry = act.refill(act.initial_carry(batch), batch)
    found = []
    with torch.no_grad():
        for _ in range(steps):
            carry, output = act(carry)
            threshold = 0 if solver.model.config.no_act_continue else output.q_continue
            margin = output.q_halt - threshold
            found.append((output.logits.argmax(-1), output.q_halt, margin > 0, margin))
    return [torch.stack(values) for values in zip(*found, strict=True)]


@pytest.mark.parametrize("batch_size", [3, 512])
def test_answers_and_halting(solver, batch_size):
    rows = puzzles(8)
    solver.model.q_head.bias.data[0] -= by_hand(solver, rows, 4)[3].median()  # half of them halt
    predictions, q_halt, halts, _ = by_hand(solver, rows, 4)
    answer = solver(rows, batch_size=batch_size)
    assert torch.equal(answer.tokens, predictions[-1])
    assert torch.allclose(answer.confidence, q_halt[-1].sigmoid(), rtol=1e-4)
    first = torch.where(halts.any(0), halts.int().argmax(0) + 1, 4)
    assert torch.equal(answer.steps, first) and len(first.unique()) > 1
    early = solver(rows, stop_early=True)
    at = (first - 1).unsqueeze(0)
    assert torch.equal(early.steps, first)
    assert torch.equal(early.tokens, predictions.gather(0, at.unsqueeze(-1).expand(1, 8, 6))[0])
    assert torch.allclose(early.confidence, q_halt.gather(0, at)[0].sigmoid(), rtol=1e-4)
    more = solver(rows, max_steps=7)
    assert torch.equal(more.tokens, by_hand(solver, rows, 7)[0][-1])


def test_shapes_of_puzzles(solver):
    rows = puzzles(4)
    whole = solver(rows)
    for given, leading in (
        (rows[0], ()), (rows[0].reshape(2, 3), ()), (rows[:1], (1,)), (rows, (4,)),
        (rows.reshape(4, 2, 3), (4,)), (rows.reshape(2, 2, 6), (2, 2)),
    ):  # fmt: skip
        for form in (given, given.numpy(), given.tolist(), given.to(torch.int16)):
            answer = solver(form)
            assert answer.tokens.shape == given.shape
            assert answer.steps.shape == answer.confidence.shape == leading
            assert torch.equal(answer.tokens.reshape(-1, 6), whole.tokens[: given.numel() // 6])


def test_puzzle_ids_choose_the_embedding(solver):
    solver.model.embedding.puzzles.normal_(std=3, generator=torch.Generator().manual_seed(1))
    rows = puzzles(1).expand(3, 6)
    mixed, alone = solver(rows, [0, 1, 2]), [solver(rows[0], i) for i in range(3)]
    assert torch.equal(mixed.tokens, torch.stack([a.tokens for a in alone]))
    assert len(mixed.confidence.unique()) == 3
    assert torch.allclose(mixed.confidence, torch.stack([a.confidence for a in alone]), rtol=1e-3)


@pytest.mark.parametrize(
    "puzzle, ids, message",
    [
        ([1, 2, 3], 0, r"a puzzle has 6 tokens here, but the given shape is \[3\]"),
        ([[1] * 4] * 3, 0, r"shape is \[3, 4\]"),
        (torch.zeros(0, dtype=torch.int64), 0, "has 6 tokens"),
        (torch.zeros(0, 6, dtype=torch.int64), 0, "has 6 tokens"),
        ([1.0] * 6, 0, "made of integers"),
        ([5] * 6, 0, "tokens should be 0 to 4"),
        ([-1] * 6, 0, "tokens should be 0 to 4"),
        ([1] * 6, 3, "puzzle_ids should be 0 to 2"),
        ([1] * 6, -1, "puzzle_ids should be 0 to 2"),
    ],
)
def test_what_is_no_puzzle_is_refused(puzzle, ids, message):
    with pytest.raises(ModelError, match=message):
        Solver(model_of("transformer"))(puzzle, ids)


@pytest.mark.parametrize("option", ["max_steps", "batch_size"])
def test_options_that_cannot_be(option):
    with pytest.raises(ModelError, match=option):
        Solver(model_of("transformer"))([1] * 6, **{option: 0})


def test_a_file_that_says_what_it_is(tmp_path):
    model = model_of("urm", num_layers=2, conv_kernel=3)
    told = {"arch": model.config.model_dump(mode="json"), "dims": asdict(DIMS)}
    save_file(model.state_dict(), tmp_path / "m.safetensors",
              metadata={"loopwright": json.dumps(told)})  # fmt: skip
    solver = load_pretrained(tmp_path / "m.safetensors", device="cpu")
    assert solver.model.config == model.config and solver.model.dims == DIMS
    rows = puzzles(3)
    assert torch.equal(solver(rows).tokens, Solver(model)(rows).tokens)
    deeper = load_pretrained(tmp_path / "m.safetensors", device="cpu", halt_max_steps=9)
    assert deeper.model.config.halt_max_steps == 9
    with pytest.raises(ModelError, match=r"m\.safetensors: num_layers: Input should be"):
        load_pretrained(tmp_path / "m.safetensors", num_layers=0)
    with pytest.raises(ModelError, match=r"m\.safetensors does not fit arch=urm"):
        load_pretrained(tmp_path / "m.safetensors", num_layers=3)


def test_a_file_that_does_not_tell_the_length(tmp_path):
    model = model_of("hrm")
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(
        ModelError, match="does not tell how many tokens a puzzle has; give seq_len"
    ):
        load_pretrained(tmp_path / "m.safetensors")
    fields = {k: getattr(model.config, k) for k in ("H_cycles", "L_cycles", "H_grad_cycles")}
    solver = load_pretrained(tmp_path / "m.safetensors", seq_len=6, num_heads=2, device="cpu",
                             forward_dtype="float64", halt_max_steps=4, **fields)  # fmt: skip
    assert torch.equal(solver(puzzles(5)).confidence, Solver(model)(puzzles(5)).confidence)
