"""One optimizer step = one ACT step of every row. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from models import Carry, act_loss, choose, counter_uniform, perturbed
from optim import clip_scale, learning_rate
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
    load_step(state, config, total_steps)
    if state.graph is None:
        advance(state, config)
    else:
        stage = state.model.schedule, state.model.act_steps
        state.graph.run(stage, lambda: advance(state, config))


def load_step(state: TrainState, config: RunConfig, total_steps: int) -> None:
    """The host's part: the batch and the learning rates of the next step go to the device."""
    batch = state.loader.batch(state.step)
    for name, tensor in state.incoming.items():
        tensor.copy_(batch[name], non_blocking=True)
    state.step += 1
    state.model.set_progress(state.step / total_steps)
    rates = learning_rates(config, state.step, total_steps)
    for name, optimizer in state.optimizers.items():
        optimizer.set_lr(rates[name])


def advance(state: TrainState, config: RunConfig) -> None:
    """The device's part, on fixed addresses: it can be captured in a CUDA graph."""
    state.step_counter += 1
    fresh, carry = state.carry.halted, state.act.refill(state.carry, state.incoming)
    carry = perturbed(carry, fresh, config.arch, seed=config.seed, step=state.step_counter,
                      rows=state.row_numbers)  # fmt: skip
    draws = counter_uniform(config.seed, state.step_counter, state.row_numbers, streams=2)
    parts, losses, sums, finite, embedded = [], [], {}, [], []
    rows_per_part = draws.shape[1] // config.grad_accum
    for first in range(0, draws.shape[1], rows_per_part):
        rows = slice(first, first + rows_per_part)
        if state.buckets is not None and rows.stop == draws.shape[1]:
            state.buckets.arm()
        part, loss, metrics, puzzle_rows = _forward_backward(state, config, carry, draws, rows)
        parts.append(part)
        losses.append(loss)
        if puzzle_rows is not None:
            embedded.append(puzzle_rows)
            finite.append(torch.isfinite(puzzle_rows.grad).all())
        sums = {k: sums[k] + v if k in sums else v for k, v in metrics.items()}

    finite.append(torch.isfinite(sum(losses)))
    bad = _anywhere(state, ~torch.stack(finite).all())
    _give_rows(state, carry, embedded)
    if state.buckets is not None:
        state.buckets.finish()
    norm, scale = _norm_and_scale(state, config)
    bad = bad | ~torch.isfinite(norm)
    counted = bad
    if state.loss_scale is not None:  # an overflow lowers the scale; it counts if that cannot help
        counted = state.loss_scale.update(bad)
    if config.on_nonfinite == "stop":
        stopped = state.nonfinite > 0
        bad, counted = bad | stopped, counted | stopped
    state.nonfinite += counted
    found_inf = bad.to(torch.float32)
    _update_weights(state, scale, found_inf)
    _keep(state.carry, bad, carry, _join(parts))
    with torch.no_grad():
        for name, value in {**sums, "grad_norm": norm, "train_steps": 1}.items():
            state.sums[name] += torch.where(bad, 0, value) if name in LOGGED_IF_GOOD else value
    if state.sharded is not None:  # its parameters have been on their way meanwhile
        state.sharded.wait()
    if state.ema is not None:
        state.ema.update(found_inf)


LOGGED_IF_GOOD = ("lm_loss", "q_halt_loss", "q_continue_loss", "grad_norm")


def _forward_backward(
    state: TrainState, config: RunConfig, carry: Carry, draws: Tensor, rows: slice
) -> tuple[Carry, Tensor, dict[str, Tensor], Tensor | None]:
    """One micro-batch: its new carry, loss, metric sums, and its puzzle rows with their gradient.

    Gradients accumulate in the parameters.
    """
    part = carry.at(rows)
    puzzle_rows = state.model.puzzle_rows(part.batch["puzzle_ids"])
    if puzzle_rows is not None:
        puzzle_rows = puzzle_rows.detach().requires_grad_()
    part, output = state.act(part, puzzle_rows, draws[:, rows])
    loss, metrics = act_loss(part, output, config.arch.loss)
    scaled = loss / config.global_batch_size
    if state.loss_scale is not None:
        scaled = scaled * state.loss_scale.scale
    scaled.backward()
    return part, loss.detach(), metrics, puzzle_rows


def _anywhere(state: TrainState, flag: Tensor) -> Tensor:
    """Whether the 0-dim `flag` is true on any rank."""
    if state.ranks.size == 1:
        return flag
    return state.ranks.sum(flag.to(torch.float32)) > 0


def _give_rows(state: TrainState, carry: Carry, embedded: list[Tensor]) -> None:
    """Hand the gradients of all ranks' puzzle rows to their optimizer, in the order of the batch.

    Micro-batches and ranks change nothing then: duplicates of an id are summed in that order.
    """
    if not embedded:
        return
    grads = torch.cat([rows.grad for rows in embedded]) if len(embedded) > 1 else embedded[0].grad
    ids, grads = state.ranks.rows(carry.batch["puzzle_ids"]), state.ranks.rows(grads)
    state.optimizers["sparse_signsgd"].add_rows(state.model.embedding.puzzles, ids, grads)


def _norm_and_scale(state: TrainState, config: RunConfig) -> tuple[Tensor, Tensor | None]:
    """The norm of the weights' gradients, and what they are divided by to unscale and clip them."""
    optimizer = state.optimizers.get(config.optim.name)
    if optimizer is None:  # only puzzle embeddings are trained
        return torch.zeros((), device=state.device), None
    if state.loss_scale is None:
        norm, scale = optimizer.clip(config.grad_clip_norm)
        return norm, scale if config.grad_clip_norm > 0 else None
    loss_scale = state.loss_scale.scale.clone()  # which this step may change
    norm = optimizer.clip(0)[0] / loss_scale
    return norm, loss_scale * clip_scale(norm, config.grad_clip_norm)


def _update_weights(state: TrainState, scale: Tensor | None, found_inf: Tensor) -> None:
    for name, optimizer in state.optimizers.items():  # sparse_signsgd looks at signs only
        settings = {"wait": False} if optimizer is state.sharded else {}
        grad_scale = None if name == "sparse_signsgd" else scale
        optimizer.step(grad_scale=grad_scale, found_inf=found_inf, **settings)
    state.clear_gradients()


def _join(parts: list[Carry]) -> Carry:
    if len(parts) == 1:
        return parts[0]
    return Carry(
        {k: torch.cat([p.state[k] for p in parts]) for k in parts[0].state},
        torch.cat([p.steps for p in parts]),
        torch.cat([p.halted for p in parts]),
        {k: torch.cat([p.batch[k] for p in parts]) for k in parts[0].batch},
    )


@torch.no_grad()
def _keep(carry: Carry, bad: Tensor, before: Carry, after: Carry) -> None:
    """Write `after` into `carry`; where the step was bad, the latent states stay as they were
    before it, with every row halted."""
    for name, tensor in carry.state.items():
        choose(bad, before.state[name], after.state[name], out=tensor)
    for name, tensor in carry.batch.items():
        tensor.copy_(after.batch[name])
    carry.steps.copy_(after.steps)
    torch.logical_or(after.halted, bad, out=carry.halted)
