"""Typed configuration that every architecture shares. Free of torch, so that it validates fast."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.attention_backends import check_installed
from models.errors import ModelError

if TYPE_CHECKING:
    import torch

    from models.block import BlockStack
    from models.reasoning import ReasoningModel
    from models.recursion import Schedule


@dataclass(frozen=True)
class ModelDims:
    """What the dataset decides about a model's shape."""

    seq_len: int  # tokens of one puzzle, without the prefix
    vocab_size: int
    num_puzzle_ids: int


def physical_memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


class LossConfig(BaseModel):
    """The training objective: token loss + halting losses, each with its weight."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["stablemax", "softmax"] = Field(
        "stablemax", description="map from logits to probabilities"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of the target that is spread over the whole vocabulary"
    )
    blanks_only: bool = Field(
        False, description="token loss where the label is not the input's token already"
    )
    token_weight: float = Field(1.0, ge=0, description="weight of the token loss")
    cycle_weight: float = Field(
        0.0, ge=0, description="weight of the token loss after earlier H cycles with gradient"
    )
    halt_weight: float = Field(0.5, ge=0, description="weight of the halting loss")
    continue_weight: float = Field(0.5, ge=0, description="weight of the q_continue loss")


GradCheckpoint = Literal["none", "block", "cycle", "all"]


class ReasoningConfig(BaseModel):
    """Fields common to all architectures; an architecture adds its recursion and its layers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Fields that may change when a run is resumed: they alter no tensor of the training state.
    tunable: ClassVar[frozenset[str]] = frozenset(
        {
            "halt_max_steps",
            "halt_exploration_prob",
            "halt_curriculum",
            "random_init",
            "state_noise",
            "rms_norm_eps",
            "rope_theta",
            "loss",
            "attention_backend",
            "fp8",
            "grad_checkpoint",
        }
    )

    name: str
    hidden_size: int = Field(512, ge=1, le=2**16, description="width of a token's state")
    num_heads: int = Field(
        8, ge=1, le=2**16, description="attention heads; must divide hidden_size"
    )
    expansion: float = Field(4.0, gt=0, le=64, description="SwiGLU width over hidden_size, × 2/3")
    pos_encodings: Literal["rope", "rope_2d", "learned", "none"] = Field(
        "rope", description="position encoding; rope_2d: by rows and columns of a square grid"
    )
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    glu_norm: Literal["none", "product", "hidden"] = Field(
        "none", description="RMSNorm in SwiGLU: of gate ⊙ up, or of what goes into the last map"
    )
    attn_norm: bool = Field(False, description="RMSNorm of what the heads gathered, too")
    rms_norm_eps: float = Field(1e-5, gt=0, description="added to the mean square before the root")
    causal: bool = Field(False, description="attention sees earlier positions only")
    puzzle_emb_ndim: int = Field(
        512, ge=0, le=2**20, description="numbers per puzzle embedding; 0: none"
    )
    puzzle_emb_len: int | Literal["auto"] = Field(
        16, description="prefix tokens they fill; 0: none; auto: just enough"
    )
    chains: int = Field(
        1, ge=1, le=64, description="trajectories of a puzzle in training; the best one learns"
    )
    halt_max_steps: int = Field(16, ge=1, le=4096, description="ACT steps at most")
    halt_exploration_prob: float = Field(
        0.1, ge=0, le=1, description="chance of a drawn minimum of ACT steps"
    )
    halt_curriculum: tuple[tuple[float, int], ...] = Field(
        (), description="[[until, steps], …]: ACT steps at most up to that fraction of training"
    )
    random_init: bool = Field(
        False, description="puzzles begin with normal random states in training"
    )
    state_noise: float = Field(
        0.0, ge=0, le=100, description="normal noise on the states before a training ACT step"
    )
    no_act_continue: bool = Field(True, description="halt by q_halt alone, without q_continue")
    attention_backend: Literal["auto", "fa3", "fa2", "sdpa", "math"] = Field(
        "auto", description="FlashAttention 3, 2, torch's, or plain; auto: the best here"
    )
    forward_dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto", description="activations; auto: bfloat16 on CUDA, else float32"
    )
    fp8: bool = Field(
        False, description="8-bit products where there is no gradient (Ada, Hopper or newer)"
    )
    grad_checkpoint: GradCheckpoint = Field(
        "none", description="recompute all but: nothing, or the inputs of blocks, updates, cycles"
    )
    loss: LossConfig = LossConfig()

    @model_validator(mode="after")
    def _check_prefix(self) -> ReasoningConfig:
        if self.puzzle_emb_len != "auto":
            if not 0 <= self.puzzle_emb_len <= 4096:
                raise ValueError("puzzle_emb_len must be 0 to 4096, or auto")
            if 0 < self.puzzle_emb_len * self.hidden_size < self.puzzle_emb_ndim:
                raise ValueError(
                    f"puzzle_emb_ndim={self.puzzle_emb_ndim} does not fit into "
                    f"puzzle_emb_len × hidden_size = {self.puzzle_emb_len * self.hidden_size} "
                    "numbers; use puzzle_emb_len=auto"
                )
        return self

    @model_validator(mode="after")
    def _check_chains(self) -> ReasoningConfig:
        if self.chains > 1 and not self.no_act_continue:
            raise ValueError(f"chains={self.chains} needs no_act_continue=true")
        if self.chains > 1 and len(self.states) < 2:
            raise ValueError(f"chains={self.chains} needs latent states beside the answer's")
        return self

    @property
    def has_attention(self) -> bool:
        """Whether tokens exchange by attention, so that the heads must fit the hidden size."""
        return True

    @model_validator(mode="after")
    def _check_heads(self) -> ReasoningConfig:
        if not self.has_attention:
            return self
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}"
            )
        head_dim = self.hidden_size // self.num_heads
        if self.pos_encodings == "rope" and head_dim % 2:
            raise ValueError(
                f"pos_encodings=rope needs an even head size, but hidden_size / num_heads = "
                f"{head_dim}"
            )
        if self.pos_encodings == "rope_2d" and head_dim % 4:
            raise ValueError(
                f"pos_encodings=rope_2d needs a head size that 4 divides, but hidden_size / "
                f"num_heads = {head_dim}"
            )
        return self

    @model_validator(mode="after")
    def _check_halt_curriculum(self) -> ReasoningConfig:
        before = 0.0
        for until, steps in self.halt_curriculum:
            if not before < until <= 1:
                raise ValueError(
                    "halt_curriculum: the fractions should rise from above 0 to at most 1"
                )
            if not 1 <= steps <= 4096:
                raise ValueError("halt_curriculum: ACT steps should be 1 to 4096")
            before = until
        return self

    @model_validator(mode="after")
    def _check_cycle_weight(self) -> ReasoningConfig:
        if self.loss.cycle_weight and getattr(self, "H_grad_cycles", 1) < 2:
            raise ValueError(
                f"loss.cycle_weight={self.loss.cycle_weight:g} trains the answers of earlier H "
                "cycles with gradient, of which there are none; set H_grad_cycles to 2 or more"
            )
        return self

    def act_steps(self, progress: float = 1.0) -> int:
        """ACT steps at most at this fraction of the training steps; 1: as trained."""
        for until, steps in self.halt_curriculum:
            if progress < until:
                return steps
        return self.halt_max_steps

    @property
    def prefix_len(self) -> int:
        """Number of tokens that the puzzle embedding puts before the puzzle."""
        if self.puzzle_emb_len == "auto":
            return -(-self.puzzle_emb_ndim // self.hidden_size)
        return self.puzzle_emb_len if self.puzzle_emb_ndim else 0

    def check_machine(self) -> None:
        """Raise ModelError if this machine lacks a package that is asked for, or the memory."""
        if self.has_attention:
            check_installed(self.attention_backend)
        needed, there = 4 * self.least_parameters(), physical_memory()
        if there is not None and needed > there:
            raise ModelError(
                f"arch: the weights alone would take {needed / 2**30:,.0f} GiB, and this machine "
                f"has {there / 2**30:,.0f}; lower hidden_size ({self.hidden_size}), expansion "
                f"({self.expansion:g}) or the number of layers"
            )

    def least_parameters(self) -> int:
        """Parameters of the blocks' large matrices: a lower bound that needs no torch."""
        layers = sum(self.levels(lambda layers, *_, **__: layers).values())
        per_layer = (4 if self.has_attention else 0) + 2 * self.expansion  # × hidden_size²
        return round(layers * per_layer * self.hidden_size**2)

    def portable(self) -> ReasoningConfig:
        """The same model, without what only some machines have."""
        everywhere = self.attention_backend in ("sdpa", "math")
        backend = self.attention_backend if everywhere else "auto"
        return self.model_copy(update={"attention_backend": backend, "fp8": False})

    # What an architecture is

    @property
    def states(self) -> tuple[str, ...]:
        """Its latent states; the answer is read from the first."""
        raise NotImplementedError

    def levels(self, stack: Callable[..., BlockStack]) -> dict[str, BlockStack]:
        """Its networks: `stack(num_layers, …)` makes a stack of blocks."""
        raise NotImplementedError

    def schedule(self, progress: float = 1.0) -> Schedule:
        """Which state is updated when, at this fraction of the training steps; 1: as trained."""
        raise NotImplementedError

    def build(
        self, dims: ModelDims, *, dtype: torch.dtype, generator: torch.Generator
    ) -> ReasoningModel:
        """Compose the model on the CPU, initialized from `generator`."""
        from models.block import BlockStack
        from models.reasoning import ReasoningModel

        stack = partial(BlockStack, self, dims, generator=generator)
        return ReasoningModel(
            self, dims, levels=self.levels(stack), dtype=dtype, generator=generator
        )


class RecursiveConfig(ReasoningConfig):
    """Fields of the architectures whose states are updated in slow (H) and fast (L) cycles."""

    tunable: ClassVar[frozenset[str]] = ReasoningConfig.tunable | {
        "H_cycles",
        "L_cycles",
        "H_grad_cycles",
        "curriculum",
    }

    H_cycles: int = Field(3, ge=1, le=1024, description="slow cycles of one ACT step")
    L_cycles: int = Field(6, ge=1, le=1024, description="fast updates in each slow cycle")
    H_grad_cycles: int = Field(
        1, ge=0, le=1024, description="H cycles with gradient; 0: the last updates only"
    )
    curriculum: tuple[tuple[float, int, int], ...] = Field(
        (), description="[[until, H, L], …]: cycles up to that fraction of training"
    )

    @model_validator(mode="after")
    def _check_cycles(self) -> RecursiveConfig:
        if self.H_grad_cycles > self.H_cycles:
            raise ValueError(
                f"H_grad_cycles={self.H_grad_cycles} is more than H_cycles={self.H_cycles}"
            )
        before = 0.0
        for until, slow, fast in self.curriculum:
            if not before < until <= 1:
                raise ValueError("curriculum: the fractions should rise from above 0 to at most 1")
            if not (1 <= slow <= 1024 and 1 <= fast <= 1024):
                raise ValueError("curriculum: H and L cycles should be 1 to 1024")
            before = until
        return self

    def cycles(self, progress: float = 1.0) -> tuple[int, int]:
        """(H, L) at this fraction of the training steps: the curriculum's, then the full ones."""
        for until, slow, fast in self.curriculum:
            if progress < until:
                return slow, fast
        return self.H_cycles, self.L_cycles
