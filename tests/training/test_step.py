"""The training step: accumulation, clipping, freezing, holding back what is not finite."""

from __future__ import annotations

import pytest
import torch

from data import read_dataset
from training.state import TrainState
from training.step import train_step

CPU = torch.device("cpu")


def build(run, device=CPU) -> TrainState:
    return TrainState(run, read_dataset(run.dataset_path, "train"), device)


def snapshot(state: TrainState, *stems: str) -> dict[str, torch.Tensor]:
    files = state.files()
    return {f"{s}/{k}": t.clone() for s in stems or files for k, t in files[s].items()}


def steps(state: TrainState, run, count: int) -> None:
    for _ in range(count):
        train_step(state, run.config, run.total_steps)


@pytest.mark.parametrize("arch", ["trm", "trm_mlp"])
def test_accumulated_micro_batches_are_the_whole_batch(resolve_run, arch):
    common = (f"arch={arch}", "arch.forward_dtype=float64", "arch.halt_max_steps=3")
    states = []
    for accum in (1, 2, 4):
        run = resolve_run(*common, f"grad_accum={accum}")
        state = build(run)
        state.model.q_head.bias.data.fill_(0.1)  # rows halt at different steps
        steps(state, run, 6)
        states.append(snapshot(state))
    for other in states[1:]:
        for name, tensor in states[0].items():
            assert torch.allclose(tensor.double(), other[name].double(), rtol=1e-9, atol=1e-11), (
                name
            )


def test_embedding_gradients_go_to_their_own_puzzles(resolve_run):
    run = resolve_run("grad_accum=4", "lr_warmup_steps=0")
    state = build(run)
    with torch.no_grad():  # tell the rows of the batch apart
        state.model.embedding.puzzles = torch.zeros(20, 32)
    table = state.model.embedding.puzzles
    state.optimizers["sparse_signsgd"].param_groups[0]["params"][0] = table
    ids = torch.tensor([3, 3, 5, 7, 11, 3, 5, 13], dtype=torch.int32)
    batch = state.loader.batch
    state.loader.batch = lambda step: {**batch(step), "puzzle_ids": ids}
    steps(state, run, 1)
    touched = table.abs().sum(1).nonzero().flatten().tolist()
    assert touched == [3, 5, 7, 11, 13]


@pytest.mark.parametrize("optim", ["adam_atan2", "adamw"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_nan_never_reaches_the_state(resolve_run, optim, policy):
    run = resolve_run(f"optim={optim}", f"on_nonfinite={policy}", "ema_rate=0.5")
    state = build(run)
    steps(state, run, 3)
    before = snapshot(state, "model", "ema", "optimizer")
    hook = state.model.register_forward_hook(
        lambda m, i, out: out._replace(logits=out.logits * float("nan"))
    )
    steps(state, run, 2)
    hook.remove()
    after = snapshot(state, "model", "ema", "optimizer")
    for name, tensor in before.items():
        assert name.endswith("/lr") or torch.equal(tensor, after[name]), name
    assert int(state.nonfinite) == 2
    assert all(t.isfinite().all() for t in state.carry.state.values())
    steps(state, run, 1)
    moved = not torch.equal(before["model/lm_head.weight"], state.model.lm_head.weight)
    assert moved == (policy == "skip")
    assert int(state.nonfinite) == (3 if policy == "stop" else 2)


def test_clipping_bounds_the_gradient_and_zero_switches_it_off(resolve_run):
    moves = {}
    for clip in (0.0, 1e-3, 1e3):
        run = resolve_run(
            "optim=adamw", "optim.eps=1.0", "optim.weight_decay=0", f"grad_clip_norm={clip}",
            "lr_warmup_steps=0",
        )  # fmt: skip
        state = build(run)
        before = state.model.lm_head.weight.detach().clone()
        steps(state, run, 1)
        moves[clip] = (state.model.lm_head.weight - before).abs().max().item()
        assert state.sums["grad_norm"] > 0
    assert moves[0.0] == moves[1e3] > 100 * moves[1e-3] > 0


def test_frozen_weights_train_only_the_embeddings(resolve_run):
    run = resolve_run("freeze_weights=true")
    state = build(run)
    before = snapshot(state, "model")
    steps(state, run, 4)
    after = snapshot(state, "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model/embedding.puzzles"}
    assert list(state.optimizers) == ["sparse_signsgd"]


def test_lr_zero_moves_nothing(resolve_run):
    run = resolve_run("lr=0", "puzzle_emb_lr=0")
    state = build(run)
    before = snapshot(state, "model", "ema")
    steps(state, run, 3)
    after = snapshot(state, "model", "ema")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_exploration_is_a_function_of_seed_step_and_row(resolve_run):
    from models import counter_uniform

    rows = torch.arange(4096)
    draws = counter_uniform(7, torch.tensor(3), rows, 2)
    assert draws.shape == (2, 4096) and draws.min() >= 0 and draws.max() < 1
    assert torch.equal(draws[:, 1000:], counter_uniform(7, torch.tensor(3), rows[1000:], 2))
    assert abs(draws.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(draws)[0, 1]) < 0.05
    for other in (counter_uniform(8, torch.tensor(3), rows, 2),
                  counter_uniform(7 + 2**32, torch.tensor(3), rows, 2),
                  counter_uniform(7, torch.tensor(4), rows, 2)):  # fmt: skip
        assert (other != draws).float().mean() > 0.99
        assert abs(torch.corrcoef(torch.stack([other[0], draws[0]]))[0, 1]) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("optim", ["adam_atan2", "adamw"])
def test_a_step_never_waits_for_the_gpu(resolve_run, optim):
    run = resolve_run(f"optim={optim}", "device=cuda")
    state = build(run, torch.device("cuda", 0))
    steps(state, run, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(state, run, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
