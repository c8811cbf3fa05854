"""The recursive-reasoning model: embed, recurse by a schedule, read out answer and halting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import chains
from models.casting import cast_once
from models.config import ModelDims, ReasoningConfig
from models.embedding import InputEmbedding
from models.layers import Linear, truncated_normal
from models.recursion import Schedule, run, split

State = dict[str, Tensor]  # latent name → (B, prefix + L, D)


class StepOutput(NamedTuple):
    """What one ACT step gives."""

    state: State  # detached
    logits: Tensor  # (B, L, vocab)
    q_logits: Tensor  # (B, 2) float32 at least: halt, continue
    earlier: tuple[Tensor, ...] = ()  # logits after earlier cycles, where these are trained, too


class ReasoningModel(nn.Module):
    """All architectures are this class, composed of different levels, states and schedules."""

    def __init__(
        self,
        config: ReasoningConfig,
        dims: ModelDims,
        *,
        levels: Mapping[str, nn.Module],
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config, self.dims = config, dims
        self.schedule = self.full_schedule = config.schedule()
        self.act_steps = config.halt_max_steps  # at most, at this stage of training
        self.embedding = InputEmbedding(config, dims, dtype, generator)
        self.levels = nn.ModuleDict(levels)
        for name in config.states:  # buffers: neither trained nor averaged
            init = truncated_normal((config.hidden_size,), 1.0, generator)
            self.register_buffer(f"{name}_init", init.to(dtype))
        if config.chains > 1:
            for name in config.states[1:]:
                further = truncated_normal((config.chains - 1, config.hidden_size), 1.0, generator)
                self.register_buffer(f"{name}_further_init", further.to(dtype))
        self.lm_head = Linear(config.hidden_size, dims.vocab_size, generator=generator)
        self.q_head = Linear(config.hidden_size, 2, bias=True, generator=generator)
        with torch.no_grad():  # halting starts improbable and independent of the state
            self.q_head.weight.zero_()
            self.q_head.bias.fill_(-5.0)

    def init_state(self, batch_size: int) -> State:
        """The latent states before the first ACT step, each (B, prefix + L, D), as views.

        In training with several chains, those of row i are of chain i modulo their number.
        """
        length = self.config.prefix_len + self.dims.seq_len
        states = {
            name: getattr(self, f"{name}_init").expand(batch_size, length, -1)
            for name in self.config.states
        }
        if self.config.chains == 1 or not self.training:
            return states
        further = {k: getattr(self, f"{k}_further_init") for k in self.config.states[1:]}
        return chains.initial(states, further, self.config.chains)

    def set_progress(self, progress: float) -> None:
        """Train by the schedule for this fraction of the steps; evaluation is by the full one."""
        self.act_steps = self.config.act_steps(progress)
        self.schedule = self.config.schedule(progress)

    def compile_levels(self, rows: int | None = None) -> bool:
        """torch.compile each level's stack of blocks (one graph, used by every update).

        Its blocks one by one where each is recomputed: recomputation stays outside of the graphs.
        With `rows`, a level stays as it is where a batch of so many meets fused kernels only:
        compiling takes seconds, and finds nothing to fuse. Returns whether any is to be compiled.
        """
        by_block = self.config.grad_checkpoint in ("block", "all")
        like = None if rows is None else next(iter(self.init_state(rows).values()))
        levels = [v for v in self.levels.values() if like is None or not v.fused(like)]
        for level in levels:
            for part in level.blocks if by_block else (level,):
                part.compile(dynamic=False)
        return bool(levels)

    def puzzle_rows(self, puzzle_ids: Tensor) -> Tensor | None:
        """Rows (B, puzzle_emb_ndim) of the puzzle table for `puzzle_ids` (B,), or None."""
        return self.embedding.puzzle_rows(puzzle_ids)

    def forward(
        self, state: State, batch: Mapping[str, Tensor], schedule: Schedule | None = None
    ) -> StepOutput:
        """One ACT step, or that part of it which `schedule` is.

        `batch` holds inputs (B, L), puzzle_ids (B,) and maybe puzzle_rows.
        """
        if schedule is None:
            schedule = self.schedule if self.training else self.full_schedule
        earlier: list[Tensor] = []

        trained = self.training and self.config.loss.cycle_weight > 0
        note = (lambda values: earlier.append(self.read_out(values)[0])) if trained else None
        state = self.think(state, batch, schedule, note)
        logits, q_logits = self.read_out(state)
        detached = {k: v.detach() for k, v in state.items()}
        return StepOutput(detached, logits, q_logits, tuple(earlier))

    def read_out(self, state: State) -> tuple[Tensor, Tensor]:
        """Logits (B, L, vocab) and halting logits (B, 2) float32 of the answer (B, prefix + L, D).

        One product for both heads and all positions: nothing of the answer is copied or cut out,
        nor does its gradient have to be put together.
        """
        answer, vocab = state[self.config.states[0]], self.dims.vocab_size
        weight = torch.cat((self.lm_head.weight, self.q_head.weight)).to(answer.dtype)
        if answer.is_cuda:
            weight = F.pad(weight, (0, 0, 0, -len(weight) % 8))  # aligned products are faster
        out = F.linear(answer, weight)
        q_logits = out[:, 0, vocab : vocab + 2]  # the first position also decides on halting
        q_logits = q_logits + self.q_head.bias.to(answer.dtype)
        return out[:, self.config.prefix_len :, :vocab], q_logits.to(torch.float32)

    def think(
        self,
        state: State,
        batch: Mapping[str, Tensor],
        schedule: Schedule,
        after_cycle: Callable[[State], None] | None = None,
    ) -> State:
        """The states (each (B, prefix + L, D)) after `schedule`; see `recursion.run`."""
        x_BLD = self.embedding(batch)
        kept = self.config.grad_checkpoint if torch.is_grad_enabled() else "none"
        eight = not all(phase.grad for phase in schedule)  # see `models.fp8`
        if kept != "none":  # what is recomputed after this pass casts for itself
            free, schedule = split(schedule)
            if free:
                with torch.no_grad(), cast_once(self.levels, x_BLD, eight):
                    state = run(free, state, x_BLD, self.levels)
        with cast_once(self.levels, x_BLD, eight) if kept == "none" else nullcontext():
            return run(schedule, state, x_BLD, self.levels, kept, after_cycle)
