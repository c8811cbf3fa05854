"""Random initial states and noise in training; the number of ACT steps by stages; blanks only."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from models import ACT, ModelDims, TRMConfig, act_loss, build_model, perturbed
from models.act import ACTOutput, Carry
from models.config import LossConfig
from models.random import counter_normal

STEP, ROWS = torch.tensor(7), torch.arange(6)
DIMS = ModelDims(seq_len=16, vocab_size=6, num_puzzle_ids=1)


def config(**fields) -> TRMConfig:
    return TRMConfig(hidden_size=32, num_heads=2, expansion=1.0, puzzle_emb_ndim=0, H_cycles=1,
                     L_cycles=1, **fields)  # fmt: skip


def test_the_numbers_are_standard_normal_and_of_their_row_alone():
    x = counter_normal(3, STEP, torch.arange(200), 1000)
    assert x.shape == (200, 1000) and torch.isfinite(x).all()
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01  # 200,000 numbers: 0.0022 is one sigma
    assert abs((x.abs() > 1.96).float().mean() - 0.05) < 0.003
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 0.01 and abs((x[1:] * x[:-1]).mean()) < 0.01
    assert torch.equal(x[50:60], counter_normal(3, STEP, torch.arange(50, 60), 1000))
    for seed, step in ((4, STEP), (3, STEP + 1)):
        y = counter_normal(seed, step, torch.arange(200), 1000)
        assert abs((x * y).mean()) < 0.01


def carry_of(model, rows=6) -> Carry:
    batch = {"inputs": torch.ones(rows, 16, dtype=torch.int32),
             "labels": torch.ones(rows, 16, dtype=torch.int32),
             "puzzle_ids": torch.zeros(rows, dtype=torch.int32)}  # fmt: skip
    return ACT(model).initial_carry(batch)


def test_random_states_begin_puzzles_and_noise_joins_every_step():
    model = build_model(config(), DIMS, seed=0, device=torch.device("cpu"))
    carry, fresh = carry_of(model), torch.tensor([True, False] * 3)

    def of(**fields):
        made = config(**fields)
        return perturbed(carry, fresh, made, seed=0, step=STEP, rows=ROWS).state

    assert perturbed(carry, fresh, config(), seed=0, step=STEP, rows=ROWS) is carry
    for name, x in carry.state.items():
        begun = of(random_init=True)[name]
        assert torch.equal(begun[~fresh], x[~fresh])
        assert abs(begun[fresh].std() - 1) < 0.05 and not torch.equal(begun[0], begun[2])
        noisy = of(state_noise=0.1)[name]
        assert abs((noisy - x).std() - 0.1) < 0.005
        both = of(random_init=True, state_noise=0.1)[name]
        assert torch.equal(both[fresh], begun[fresh]) and torch.equal(both[~fresh], noisy[~fresh])
    drawn = of(random_init=True)
    assert not torch.equal(drawn["z_H"], drawn["z_L"])


def test_act_steps_by_stages():
    made = config(halt_max_steps=8, halt_curriculum=((0.25, 2), (0.5, 4)), halt_exploration_prob=1)
    assert [made.act_steps(p) for p in (0.0, 0.24, 0.25, 0.49, 0.5, 1.0)] == [2, 2, 4, 4, 8, 8]
    model = build_model(made, DIMS, seed=0, device=torch.device("cpu"))
    act = ACT(model)
    taken = {}
    for progress in (0.1, 0.3, 0.9):
        model.set_progress(progress)
        for training in (True, False):
            act.train(training)
            carry, steps = act.refill(carry_of(model), carry_of(model).batch), 0
            draws = torch.full((2, 6), 0.999)  # no row halts before the last step
            while not carry.halted.all():
                carry, _ = act(carry, draws=draws if training else None)
                steps += 1
            taken[progress, training] = steps
    assert taken == {(0.1, True): 2, (0.1, False): 8, (0.3, True): 4, (0.3, False): 8,
                     (0.9, True): 8, (0.9, False): 8}  # fmt: skip


@pytest.mark.parametrize(
    "stages", [((0.5, 2), (0.5, 4)), ((0.0, 2),), ((1.5, 2),), ((0.5, 0),), ((0.5, 5000),)]
)
def test_stages_that_make_no_sense(stages):
    with pytest.raises(ValidationError, match="halt_curriculum"):
        config(halt_curriculum=stages)


def test_the_loss_of_blanks_is_that_of_a_puzzle_without_the_rest():
    torch.manual_seed(0)
    inputs = torch.tensor([[1, 3, 1, 4, 0], [2, 1, 1, 1, 0]])
    labels = torch.tensor([[2, 3, 5, 4, -100], [2, 3, 4, 5, -100]])
    blanks = torch.where(inputs == labels, -100, labels)
    logits = torch.randn(2, 5, 6, requires_grad=True)
    q = torch.zeros(2, requires_grad=True)

    def loss(labels, **options):
        batch = {"inputs": inputs, "labels": labels}
        carry = Carry({}, torch.ones(2), torch.ones(2, dtype=torch.bool), batch)
        return act_loss(carry, ACTOutput(logits, q, q), LossConfig(halt_weight=0, **options))

    ours, metrics = loss(labels, blanks_only=True)
    theirs, _ = loss(blanks)
    torch.testing.assert_close(ours, theirs)
    grad = torch.autograd.grad(ours, logits)[0]
    assert not grad[inputs == labels].any() and grad[0, 0].any()
    whole, plain = loss(labels)
    assert not torch.equal(whole, ours)
    for name in ("accuracy", "exact_accuracy", "q_halt_accuracy"):  # of all tokens, either way
        assert metrics[name] == plain[name]


def test_a_puzzle_without_blanks_has_no_token_loss():
    tokens = torch.tensor([[2, 3]])
    carry = Carry({}, torch.ones(1), torch.ones(1, dtype=torch.bool),
                  {"inputs": tokens, "labels": tokens})  # fmt: skip
    q = torch.zeros(1)
    loss, _ = act_loss(carry, ACTOutput(torch.randn(1, 2, 6), q, q),
                       LossConfig(halt_weight=0, blanks_only=True))  # fmt: skip
    assert loss == 0


def test_answers_of_earlier_cycles_are_trained():
    """Beside the same recursion cut after each cycle, read out by hand."""
    made = TRMConfig(hidden_size=32, num_heads=2, expansion=1.0, puzzle_emb_ndim=0, H_cycles=4,
                     L_cycles=1, H_grad_cycles=3, forward_dtype="float64",
                     loss=LossConfig(cycle_weight=0.5, halt_weight=0))  # fmt: skip
    model = build_model(made, DIMS, seed=0, device=torch.device("cpu"))
    act = ACT(model).train()
    carry = act.refill(carry_of(model), carry_of(model).batch)
    _, output = act(carry)
    assert len(output.earlier) == 2
    cut = []
    for cycles in (2, 3, 4):
        shorter = made.model_copy(update={"H_cycles": cycles, "H_grad_cycles": 1})
        model.schedule = shorter.schedule()
        cut.append(act(carry)[1].logits)
    for ours, theirs in zip((*output.earlier, output.logits), cut, strict=True):
        torch.testing.assert_close(ours, theirs)
    loss, metrics = act_loss(carry, output, made.loss)
    apart = [
        act_loss(carry, ACTOutput(x, output.q_halt, output.q_continue), LossConfig(halt_weight=0))
        for x in (*output.earlier, output.logits)
    ]
    expected = apart[2][0] + 0.5 * (apart[0][0] + apart[1][0]) / 2
    torch.testing.assert_close(loss, expected)
    assert metrics["lm_loss"] == apart[2][1]["lm_loss"]
    model.schedule = made.schedule()
    grads = {}
    for mode in ("none", "block", "cycle", "all"):
        model.config = made.model_copy(update={"grad_checkpoint": mode})
        model.zero_grad()
        act_loss(carry, act(carry)[1], made.loss)[0].backward()
        grads[mode] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for mode, some in grads.items():
        for ours, theirs in zip(some, grads["none"], strict=True):
            torch.testing.assert_close(ours, theirs, msg=mode)
    act.eval()
    with torch.no_grad():
        assert act(carry)[1].earlier == ()


def test_without_earlier_cycles_there_is_nothing_to_weigh():
    with pytest.raises(ValidationError, match="H_grad_cycles"):
        config(loss=LossConfig(cycle_weight=0.5))
