"""One optimizer step = one ACT step of every row. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from models import Carry, act_loss, counter_uniform
from optim import clip_scale, global_grad_norm, learning_rate
from training.config import RunConfig
from training.state import TrainState


def learning_rates(config: RunConfig, step: int, total_steps: int) -> dict[str, float]:
    """The learning rate of each optimizer at `step` (counted from 1)."""

    def scheduled(base: float) -> float:
        return learning_rate(
            step,
            base_lr=base,
            warmup_steps=config.lr_warmup_steps,
            total_steps=total_steps,
            min_ratio=config.lr_min_ratio,
        )

    return {
        config.optim.name: scheduled(config.lr),
        "sparse_signsgd": scheduled(config.puzzle_emb_lr),
    }


def train_step(state: TrainState, config: RunConfig, total_steps: int) -> None:
    """Advance `state` by one step, in place.

    A step whose loss or gradient is not finite changes no parameter, moment, average or
    embedding: a flag on the device holds all of them. With on_nonfinite=stop the state stays
    frozen from then on; with skip every row starts anew on fresh data.
    """
    batch = state.loader.batch(state.step)
    state.step += 1
    state.step_counter += 1
    state.model.set_progress(state.step / total_steps)
    carry = state.act.refill(state.carry, batch)
    draws = counter_uniform(config.seed, state.step_counter, state.row_numbers, streams=2)
    parts, losses, sums, finite = [], [], {}, []
    rows_per_part = draws.shape[1] // config.grad_accum
    for first in range(0, draws.shape[1], rows_per_part):
        rows = slice(first, first + rows_per_part)
        part, loss, metrics, embedding_ok = _forward_backward(state, config, carry, draws, rows)
        parts.append(part)
        losses.append(loss)
        finite.append(embedding_ok)
        sums = {k: sums[k] + v if k in sums else v for k, v in metrics.items()}

    norm = global_grad_norm([p for p in state.model.parameters() if p.grad is not None])
    if state.loss_scale is not None:
        norm = norm / state.loss_scale.scale
    finite += [torch.isfinite(norm), torch.isfinite(sum(losses))]
    bad = ~torch.stack(finite).all()
    scale, counted = None, bad
    if state.loss_scale is not None:  # an overflow lowers the scale; it counts if that cannot help
        scale = state.loss_scale.scale.clone()
        counted = state.loss_scale.update(bad)
    if config.on_nonfinite == "stop":
        stopped = state.nonfinite > 0
        bad, counted = bad | stopped, counted | stopped
    state.nonfinite += counted
    _update_weights(state, config, norm, scale, bad, total_steps)
    state.carry = _hold(bad, carry, _join(parts))
    with torch.no_grad():
        for name, value in {**sums, "grad_norm": norm, "train_steps": 1}.items():
            state.sums[name] += torch.where(bad, 0, value) if name in LOGGED_IF_GOOD else value


LOGGED_IF_GOOD = ("lm_loss", "q_halt_loss", "q_continue_loss", "grad_norm")


def _forward_backward(
    state: TrainState, config: RunConfig, carry: Carry, draws: Tensor, rows: slice
) -> tuple[Carry, Tensor, dict[str, Tensor], Tensor]:
    """One micro-batch: its new carry, loss, metric sums, and whether its row gradients are finite.

    Gradients accumulate in the parameters; those of the puzzle rows go to their own ids.
    """
    part = _slice(carry, rows)
    ids = part.batch["puzzle_ids"]
    puzzle_rows = state.model.puzzle_rows(ids)
    if puzzle_rows is not None:
        puzzle_rows = puzzle_rows.detach().requires_grad_()
    part, output = state.act(part, puzzle_rows, draws[:, rows])
    loss, metrics = act_loss(part, output, config.arch.loss)
    scaled = loss / config.global_batch_size
    if state.loss_scale is not None:
        scaled = scaled * state.loss_scale.scale
    scaled.backward()
    finite = torch.ones((), dtype=torch.bool, device=state.device)
    if puzzle_rows is not None:
        sparse = state.optimizers["sparse_signsgd"]
        sparse.add_rows(state.model.embedding.puzzles, ids, puzzle_rows.grad)
        finite = torch.isfinite(puzzle_rows.grad).all()
    return part, loss.detach(), metrics, finite


def _update_weights(
    state: TrainState,
    config: RunConfig,
    norm: Tensor,
    loss_scale: Tensor | None,
    bad: Tensor,
    total_steps: int,
) -> None:
    """Step the optimizers and the average. `norm` is that of the gradients / `loss_scale`."""
    rates = learning_rates(config, state.step, total_steps)
    found_inf = bad.to(torch.float32)
    for name, optimizer in state.optimizers.items():
        optimizer.set_lr(rates[name])
        scale = None
        if name != "sparse_signsgd":  # which looks at signs only
            scale = loss_scale
            if config.grad_clip_norm > 0:
                clip = clip_scale(norm, config.grad_clip_norm)
                scale = clip if loss_scale is None else clip * loss_scale
        optimizer.step(grad_scale=scale, found_inf=found_inf)
        optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update(found_inf)


def _slice(carry: Carry, rows: slice) -> Carry:
    return Carry(
        {k: v[rows] for k, v in carry.state.items()},
        carry.steps[rows],
        carry.halted[rows],
        {k: v[rows] for k, v in carry.batch.items()},
    )


def _join(parts: list[Carry]) -> Carry:
    if len(parts) == 1:
        return parts[0]
    return Carry(
        {k: torch.cat([p.state[k] for p in parts]) for k in parts[0].state},
        torch.cat([p.steps for p in parts]),
        torch.cat([p.halted for p in parts]),
        {k: torch.cat([p.batch[k] for p in parts]) for k in parts[0].batch},
    )


def _hold(bad: Tensor, before: Carry, after: Carry) -> Carry:
    """`after`, or, where the step was bad, the latent states before it with every row halted."""
    return Carry(
        {k: torch.where(bad, before.state[k], v) for k, v in after.state.items()},
        after.steps,
        after.halted | bad,
        after.batch,
    )
