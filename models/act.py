"""Adaptive computation time: every row of a batch thinks until it halts, then takes new data.

The carry persists from one optimizer step to the next; one call is one ACT step of every row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import chains
from models.kernels import usable
from models.reasoning import ReasoningModel, State
from models.recursion import split

IGNORE_LABEL = -100
Batch = dict[str, Tensor]  # inputs (B, L), labels (B, L), puzzle_ids (B,)


@dataclass
class Carry:
    """Where every row stands: its latent state, its ACT steps, and the puzzle it works on."""

    state: State  # name → (B, prefix + L, D)
    steps: Tensor  # (B,) int32, ACT steps taken on the current puzzle
    halted: Tensor  # (B,) bool, takes new data at the next step
    batch: Batch

    def at(self, rows: Tensor | slice) -> Carry:
        """Some of the rows: a slice, or their numbers."""
        return Carry(
            {k: v[rows] for k, v in self.state.items()},
            self.steps[rows],
            self.halted[rows],
            {k: v[rows] for k, v in self.batch.items()},
        )


@dataclass
class ACTOutput:
    """What the loss needs of one ACT step."""

    logits: Tensor  # (B, L, vocab)
    q_halt: Tensor  # (B,)
    q_continue: Tensor  # (B,)
    target_q_continue: Tensor | None = None  # (B,) in [0, 1]; only where q_continue is learned
    winner: Tensor | None = None  # (B,) bool, rows that learn; only in training with chains …
    chains: int = 1  # … of which that many share a puzzle
    earlier: tuple[Tensor, ...] = ()  # (B, L, vocab) after earlier cycles, with cycle_weight


def _rows(mask_B: Tensor, like: Tensor) -> Tensor:
    return mask_B.view(-1, *([1] * (like.ndim - 1)))


def choose(mask: Tensor, then: Tensor, other: Tensor, out: Tensor | None = None) -> Tensor:
    """`then` where `mask` (B,), or the scalar (), is true, else `other` (B, L, D); into `out`."""
    if other.is_contiguous() and usable("rows", other):
        from models.kernels.rows import select_rows

        return select_rows(mask, then, other, out)
    return torch.where(_rows(mask, other) if mask.ndim else mask, then, other, out=out)


class ACT(nn.Module):
    """Halting around a `ReasoningModel` (HRM paper, section 2.3; TRM drops q_continue)."""

    def __init__(self, model: ReasoningModel) -> None:
        super().__init__()
        self.model = model

    @property
    def chains(self) -> int:
        """Rows of a puzzle: several in training only."""
        return self.model.config.chains if self.training else 1

    def initial_carry(self, batch: Batch) -> Carry:
        """A carry in which every row has halted, so that the first step takes `batch` whole."""
        rows, device = batch["inputs"].shape[0], batch["inputs"].device
        return Carry(
            state={k: v.clone() for k, v in self.model.init_state(rows).items()},
            steps=torch.zeros(rows, dtype=torch.int32, device=device),
            halted=torch.ones(rows, dtype=torch.bool, device=device),
            batch={k: v.clone() for k, v in batch.items()},
        )

    @torch.no_grad()
    def refill(self, carry: Carry, batch: Batch) -> Carry:
        """Halted rows start anew on their row of `batch`; the others keep theirs."""
        halted = carry.halted
        fresh = self.model.init_state(halted.shape[0])
        if self.chains > 1:
            batch = {k: chains.grouped(v, self.chains) for k, v in batch.items()}
        return Carry(
            state={k: choose(halted, fresh[k], v) for k, v in carry.state.items()},
            steps=torch.where(halted, 0, carry.steps),
            halted=torch.zeros_like(halted),
            batch={k: torch.where(_rows(halted, v), batch[k], v) for k, v in carry.batch.items()},
        )

    def forward(
        self, carry: Carry, puzzle_rows: Tensor | None = None, draws: Tensor | None = None
    ) -> tuple[Carry, ACTOutput]:
        """One ACT step of a refilled carry.

        `puzzle_rows` (B, puzzle_emb_ndim) stands in for the puzzle table, to collect its gradient.
        `draws` (2, B), uniform in [0, 1), are the random numbers of exploration while training.
        In evaluation every row runs all `halt_max_steps`.
        """
        config = self.model.config
        batch = carry.batch if puzzle_rows is None else {**carry.batch, "puzzle_rows": puzzle_rows}
        if self.chains == 1:
            state, logits, q_logits, earlier = self.model(carry.state, batch)
            output = ACTOutput(logits, q_logits[:, 0], q_logits[:, 1], earlier=earlier)
            q_halt = output.q_halt
        else:
            state, output, of_row = self._race(carry.state, batch)
            q_halt = output.q_halt[of_row]
            draws = None if draws is None else chains.grouped(draws.t(), self.chains).t()
        with torch.no_grad():
            steps = carry.steps + 1
            most = self.model.act_steps if self.training else config.halt_max_steps
            last = steps >= most
            halted = last
            if self.training and most > 1:
                threshold = 0 if config.no_act_continue else output.q_continue
                halted = last | (q_halt > threshold)
                if draws is not None:
                    halted = halted & (steps >= self._minimum_steps(draws))
                if not config.no_act_continue and config.loss.continue_weight:
                    output.target_q_continue = self._bootstrap(state, batch, last)
        return Carry(state, steps, halted, carry.batch), output

    def _race(self, state: State, batch: Batch) -> tuple[State, ACTOutput, Tensor]:
        """All chains' step: states with the winner's answer, output, each row's winner (B,).

        No chain thinks with gradient. The winners then repeat the part of the schedule that
        carries it, and theirs are the rows of the output with gradient.
        """
        from models.loss import token_loss

        model, config = self.model, self.model.config
        free, rest = split(model.schedule)
        with torch.no_grad():
            middle = model.think(state, batch, free)
            every = model(middle, batch, rest)
            loss = token_loss(every.logits, batch["labels"], config.loss.kind).sum(-1)
            of_row = chains.winners(loss, self.chains)
            rows = of_row[:: self.chains]
        won = model(
            {name: x.index_select(0, rows) for name, x in middle.items()},
            {name: x.index_select(0, rows) for name, x in batch.items()},
            rest,
        )
        q_logits = every.q_logits.index_copy(0, rows, won.q_logits)
        output = ACTOutput(
            every.logits.index_copy(0, rows, won.logits),
            q_logits[:, 0],
            q_logits[:, 1],
            winner=of_row == torch.arange(len(of_row), device=of_row.device),
            chains=self.chains,
            earlier=tuple(every.logits.index_copy(0, rows, x) for x in won.earlier),
        )
        answer = config.states[0]
        return {**every.state, answer: every.state[answer][of_row]}, output, of_row

    def _minimum_steps(self, draws: Tensor) -> Tensor:
        """With the exploration probability a minimum from U{2..max}, else none: (B,) int32."""
        config = self.model.config
        span = self.model.act_steps - 1
        minimum = 2 + (draws[1] * span).to(torch.int32).clamp(max=span - 1)
        return torch.where(draws[0] < config.halt_exploration_prob, minimum, 0)

    def _bootstrap(self, state: State, batch: Batch, last: Tensor) -> Tensor:
        """Target of q_continue: the value of the best action at the next step (no target net)."""
        next_q = self.model(state, batch).q_logits
        best = torch.where(last, next_q[:, 0], next_q.amax(dim=1))
        return torch.sigmoid(best)
