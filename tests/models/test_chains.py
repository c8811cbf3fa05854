"""Several trajectories of a puzzle in training: who wins, who learns, and what evaluation sees."""

from __future__ import annotations

import pytest
import torch

from models import act_loss, chains, counter_uniform
from models.act import ACT
from tests.conftest import TINY
from tests.models.test_recursion import batch, model_of
from tests.training.helpers import newest, resolved, tensors, train
from training.errors import ConfigError


def racing(rows: int = 6, number: int = 3, **fields) -> tuple[ACT, dict[str, torch.Tensor]]:
    model = model_of("trm, mlp", "float64", chains=number, halt_max_steps=4, **fields).double()
    with torch.no_grad():  # untrained chains would hardly differ, and never halt
        model.q_head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
        model.q_head.bias.zero_()
    return ACT(model).train(), batch(rows)


def test_the_first_smallest_loss_of_a_group_wins() -> None:
    loss = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 4.0])
    assert chains.winners(loss, 3).tolist() == [1, 1, 1, 4, 4, 4]
    assert chains.grouped(torch.arange(6), 3).tolist() == [0, 0, 0, 3, 3, 3]


def test_a_group_is_one_puzzle_from_several_latents() -> None:
    act, rows = racing()
    carry = act.refill(act.initial_carry(rows), rows)
    for name, value in carry.batch.items():
        assert torch.equal(value, chains.grouped(rows[name], 3)), name
    z_L, z_H = carry.state["z_L"], carry.state["z_H"]
    assert torch.equal(z_L[0], act.model.z_L_init.expand_as(z_L[0]))
    assert not torch.equal(z_L[0], z_L[1]) and not torch.equal(z_L[1], z_L[2])
    assert torch.equal(z_L[:3], z_L[3:]) and torch.equal(z_H[0], z_H[1])


def test_only_the_winner_learns_and_all_take_its_answer() -> None:
    act, rows = racing()
    carry = act.refill(act.initial_carry(rows), rows)
    draws = counter_uniform(0, torch.tensor(1), torch.arange(6), streams=2)
    for _ in range(3):
        before = {k: v.clone() for k, v in carry.state.items()}
        carry, output = act(carry, draws=draws)
        assert output.winner.view(2, 3).sum(1).tolist() == [1, 1]
        winner = output.winner.view(2, 3).int().argmax(1)
        for name in ("z_H", "z_L"):
            grouped = carry.state[name].view(2, 3, *carry.state[name].shape[1:])
            same = torch.equal(grouped[:, 0], grouped[:, 1])
            assert same == (name == "z_H")
        assert torch.equal(carry.steps.view(2, 3)[:, :1].expand(2, 3), carry.steps.view(2, 3))
        assert torch.equal(carry.halted.view(2, 3)[:, :1].expand(2, 3), carry.halted.view(2, 3))
    # the loss is that of the winners alone, each standing for its group
    loss, metrics = act_loss(carry, output, act.model.config.loss)
    assert metrics["count"] == carry.halted[::3].sum()
    chosen = [3 * g + int(w) for g, w in enumerate(winner)]
    one = ACT(act.model).eval()
    alone = type(carry)(
        {k: v[chosen] for k, v in before.items()}, carry.steps[chosen] - 1,
        torch.zeros(2, dtype=torch.bool), {k: v[chosen] for k, v in carry.batch.items()},
    )  # fmt: skip
    act.model.schedule = act.model.full_schedule
    kept, plain = one(alone)
    expected, _ = act_loss(kept, plain, act.model.config.loss)
    torch.testing.assert_close(loss, 3 * expected)
    torch.testing.assert_close(output.logits[chosen], plain.logits)
    weights = [p for p in act.parameters() if p.requires_grad]
    for got, want in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(got, 3 * want)


def test_losers_carry_no_gradient_through_the_schedule() -> None:
    """Of 4 rows, the gradient's part of the step is done by all once, and by the winners again."""
    act, rows = racing(4, 2, H_cycles=3)
    seen = []
    for level in act.model.levels.values():
        level.register_forward_pre_hook(
            lambda _, inputs: seen.append((len(inputs[0]), torch.is_grad_enabled()))
        )
    act(act.refill(act.initial_carry(rows), rows))
    assert {rows for rows, grad in seen if grad} == {2}
    assert {rows for rows, grad in seen if not grad} == {4}
    assert sum(not grad for _, grad in seen) == 3 * sum(grad for _, grad in seen)


def test_earlier_cycles_are_trained_on_the_winner_alone() -> None:
    fields = {"H_grad_cycles": 2, "loss": {"cycle_weight": 0.5}}
    act, rows = racing(4, 2, H_cycles=3, **fields)
    carry, output = act(act.refill(act.initial_carry(rows), rows))
    (earlier,) = output.earlier
    loss, _ = act_loss(carry, output, act.model.config.loss)
    (grad,) = torch.autograd.grad(loss, earlier)
    assert (grad.flatten(1).abs().sum(1) > 0).tolist() == output.winner.tolist()


def test_evaluation_has_one_trajectory_from_the_first_latent() -> None:
    act, rows = racing()
    act.eval()
    carry = act.refill(act.initial_carry(rows), rows)
    assert torch.equal(carry.batch["inputs"], rows["inputs"])
    assert torch.equal(carry.state["z_L"][1], carry.state["z_L"][0])
    _, output = act(carry)
    assert output.winner is None


def test_a_run_with_chains_resumes_to_the_bit(tmp_path, datasets_dir, monkeypatch) -> None:
    keys = (*TINY, "arch.chains=4", f"datasets_dir={datasets_dir}", "checkpoint_interval=5")
    whole = train(monkeypatch, *keys, f"runs_dir={tmp_path}", "run_name=a")
    cut = train(monkeypatch, *keys, f"runs_dir={tmp_path}", "run_name=b", crash_before=8)
    again = train(monkeypatch, f"load_checkpoint={cut}", f"runs_dir={tmp_path}")
    assert tensors(newest(whole)) == tensors(newest(again))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("arch.chains=3",), "arch.chains=3 does not divide the 8 rows"),
        (("arch.chains=2", "grad_accum=8"), "does not divide the 1 rows"),
        (("arch=hrm", "arch.chains=2"), "no_act_continue=true"),
        (("arch=trm_single", "arch.chains=2"), "needs latent states"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, datasets_dir, keys, message) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(*TINY, f"datasets_dir={datasets_dir}", f"runs_dir={tmp_path}", *keys)
