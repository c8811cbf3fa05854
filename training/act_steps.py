"""ACT steps without gradient, replayed from CUDA graphs of their own on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from models import ACT, Carry
from models.act import ACTOutput
from training.graph import GraphedWork

Steps = Callable[[Carry], tuple[Carry, ACTOutput]]  # an `ACT`, or `ACTSteps`


class ACTSteps:
    """`act` in evaluation, as a function of the carry: `carry, output = steps(carry)`.

    Each number of rows has a graph, which holds for the weights whose addresses it was captured
    with: averages that take the place of the parameters (`EMA.applied`) have one of their own.
    Training's graph is another and stays valid. What a call returns is overwritten by the next
    call with as many rows.
    """

    def __init__(self, act: ACT, device: torch.device, *, graphed: bool = True) -> None:
        self.act = act
        self.work = GraphedWork(device) if graphed and device.type == "cuda" else None
        self.places: dict[Hashable, _Place] = {}

    @torch.no_grad()
    def __call__(self, carry: Carry) -> tuple[Carry, ACTOutput]:
        """One ACT step of a refilled carry, as `ACT.forward`; nothing waits for the device."""
        if self.work is None:
            return self.act(carry)
        weights = (p.data_ptr() for p in self.act.parameters())
        key = (carry.steps.shape[0], *weights)
        if key not in self.places:
            self.places[key] = _Place(carry)
        place = self.places[key]
        place.take(carry)
        self.work.run(key, lambda: place.step(self.act))
        assert place.output is not None
        return place.carry, place.output


class _Place:
    """A carry and the output of its last step, on fixed addresses."""

    def __init__(self, like: Carry) -> None:
        self.carry = Carry(
            {k: torch.empty_like(v, memory_format=torch.contiguous_format)
             for k, v in like.state.items()},
            torch.empty_like(like.steps),
            torch.empty_like(like.halted),
            {k: torch.empty_like(v) for k, v in like.batch.items()},
        )  # fmt: skip
        self.output: ACTOutput | None = None

    def take(self, carry: Carry) -> None:
        """Copy a carry that is not the one here already."""
        if carry is self.carry:
            return
        for mine, other in ((self.carry.state, carry.state), (self.carry.batch, carry.batch)):
            for name, tensor in mine.items():
                tensor.copy_(other[name])
        self.carry.steps.copy_(carry.steps)
        self.carry.halted.copy_(carry.halted)

    def step(self, act: ACT) -> None:
        """Advance the carry in place."""
        after, output = act(self.carry)
        for name, tensor in self.carry.state.items():
            tensor.copy_(after.state[name])
        self.carry.steps.copy_(after.steps)
        self.carry.halted.copy_(after.halted)
        if self.output is None:  # in the first call, which is not captured
            self.output = ACTOutput(
                output.logits.clone(), output.q_halt.clone(), output.q_continue.clone()
            )
            return
        self.output.logits.copy_(output.logits)
        self.output.q_halt.copy_(output.q_halt)
        self.output.q_continue.copy_(output.q_continue)
