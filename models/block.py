"""The post-norm block (token mixer, then MLP) and a stack of blocks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from models import fp8
from models.attention import Attention
from models.config import ModelDims, ReasoningConfig
from models.kernels import usable
from models.layers import ConvSwiGLU, RotaryTable, SwiGLU, grid_positions, rms_norm
from models.recursion import recomputed

Mixer = Literal["attention", "mlp"]


class Block(nn.Module):
    """`x = norm(x + mix(x)); x = norm(x + mlp(x))`."""

    def __init__(
        self,
        config: ReasoningConfig,
        length: int,
        mixer: Mixer,
        generator: torch.Generator | None = None,
        conv_kernel: int = 0,
    ) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.attention = Attention(config, generator) if mixer == "attention" else None
        self.normed = config.glu_norm == "product"  # inside SwiGLU, as Hopper's kernels know it
        self.fusible = self.normed or config.glu_norm == "none"
        width, expansion = config.hidden_size, config.expansion
        within = config.glu_norm, config.rms_norm_eps
        self.token_mlp = SwiGLU(length, expansion, generator, *within) if mixer == "mlp" else None
        if conv_kernel:
            self.mlp: nn.Module = ConvSwiGLU(width, expansion, conv_kernel, generator, *within)
        else:
            self.mlp = SwiGLU(width, expansion, generator, *within)

    def forward(self, x_BLD: Tensor, rope: RotaryTable | None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        if self.attention is not None:
            x_BLD = self._attend(x_BLD, rope)
        else:
            x_BLD = self._mix_tokens(x_BLD)
        if self._fuses_mlp(x_BLD) and not self.mlp.gate_up.in_eight:
            from models.kernels.residual import swiglu_norm

            gate_up, down = self.mlp.gate_up.weight, self.mlp.down.weight
            fused = swiglu_norm(x_BLD, gate_up, down, self.eps, self.mlp.halves, self.normed)
            if fused is not None:
                return fused
        return rms_norm(x_BLD + self.mlp(x_BLD), self.eps)

    def fused(self, x_BLD: Tensor) -> bool:
        """Whether fused kernels do all of it on activations like x_BLD: nothing is to compile."""
        if not self._fuses_mlp(x_BLD):
            return False
        from models.kernels.residual import takes, takes_swiglu

        if self.attention is None:
            mixes = self._fuses_mixer(x_BLD)
        else:
            out = self.attention.out
            mixes = takes(x_BLD, *out.weight.shape) and self.attention.fused(x_BLD)
        return mixes and takes_swiglu(x_BLD, self.mlp.gate_up.weight, self.mlp.down.weight)

    def takes_eight(self, x_BLD: Tensor) -> bool:
        """Whether `forward_eight` takes x_BLD: where the weights are at hand, as `fused`."""
        return self.mlp.gate_up.eight is not None and self.fused(x_BLD)

    def forward_eight(
        self, x_BLD: Tensor, small_BLD: Tensor | None, rope: RotaryTable | None, again: bool
    ) -> tuple[Tensor, Tensor]:
        """`forward` with 8-bit products; small_BLD is x_BLD in 8 bits, which attention reads.

        The second result is the first in 8 bits, if `again`.
        """
        from models.kernels import eight

        if self.attention is None:
            x_BLD = self._mix_tokens(x_BLD)
            small_BLD = eight.to_eight(x_BLD)
        else:
            mixed = self.attention.mix_eight(x_BLD, small_BLD, rope)
            x_BLD, small_BLD = eight.linear_norm(mixed, self.attention.out.half, x_BLD, self.eps)
        weights = *self.mlp.gate_up.eight, *self.mlp.down.eight
        return eight.swiglu_norm(x_BLD, small_BLD, *weights, self.eps, self.normed, again)

    def _fuses_mlp(self, x_BLD: Tensor) -> bool:
        fusible = self.fusible and type(self.mlp) is SwiGLU
        return fusible and usable("residual", x_BLD)

    def _fuses_mixer(self, x_BLD: Tensor) -> bool:
        if not self.fusible or not usable("mixer", x_BLD):
            return False
        from models.kernels.mixer import MAX_TOKENS, on_hopper_kernel

        if self.normed and not on_hopper_kernel(x_BLD, self.token_mlp.down.weight.shape[1]):
            return False
        return x_BLD.shape[1] <= MAX_TOKENS

    def prepare(self, x_BLD: Tensor) -> None:
        """Lay the weights out as the kernels take them, for all uses on activations like x_BLD."""
        if self.fusible and usable("swiglu", x_BLD) and self.mlp.gate_up.half is not None:
            from models.kernels.swiglu import cast_weights

            self.mlp.halves = cast_weights(self.mlp.gate_up.half, self.mlp.down.half, x_BLD.dtype)
        if self.attention is not None:
            self.attention.prepare(x_BLD)
        mlp = self.token_mlp
        if mlp is not None and mlp.gate_up.half is not None and self._fuses_mixer(x_BLD):
            from models.kernels.mixer import cast_weights

            mlp.halves = cast_weights(x_BLD, mlp.gate_up.half, mlp.down.half)

    def release(self) -> None:
        """Forget what `prepare` laid out."""
        for mlp in (self.mlp, self.token_mlp):
            if mlp is not None:
                mlp.halves = None
        if self.attention is not None:
            self.attention.release()

    def _attend(self, x_BLD: Tensor, rope: RotaryTable | None) -> Tensor:
        (mixed, x_BLD), out = self.attention.mix(x_BLD, rope), self.attention.out
        if usable("residual", x_BLD) and not out.in_eight:
            from models.kernels.residual import linear_norm

            half, half_t = out.half, self.attention.out_t
            fused = linear_norm(mixed, out.weight, x_BLD, self.eps, half, half_t)
            if fused is not None:
                return fused
        return rms_norm(x_BLD + out(mixed), self.eps)

    def _mix_tokens(self, x_BLD: Tensor) -> Tensor:
        """The token mixer works, and normalizes, along the tokens of each feature."""
        if self._fuses_mixer(x_BLD):
            from models.kernels.mixer import token_mixer

            gate_up, down = self.token_mlp.gate_up.weight, self.token_mlp.down.weight
            halves = self.token_mlp.halves
            return token_mixer(x_BLD, gate_up, down, self.eps, halves, self.normed)
        x_BDL = x_BLD.transpose(1, 2)
        return rms_norm(x_BDL + self.token_mlp(x_BDL), self.eps).transpose(1, 2)


class BlockStack(nn.Module):
    """One level of the recursion: `num_layers` blocks on the sum of a state and an injection."""

    def __init__(
        self,
        config: ReasoningConfig,
        dims: ModelDims,
        num_layers: int,
        mixer: Mixer = "attention",
        generator: torch.Generator | None = None,
        conv_kernel: int = 0,
    ) -> None:
        super().__init__()
        length = config.prefix_len + dims.seq_len
        self.rope = None
        if mixer == "attention" and config.pos_encodings in ("rope", "rope_2d"):
            head_dim = config.hidden_size // config.num_heads
            grid = config.pos_encodings == "rope_2d"
            where = (
                grid_positions(config.prefix_len, dims.seq_len) if grid else torch.arange(length)
            )
            self.rope = RotaryTable(head_dim, where, config.rope_theta)
        self.blocks = nn.ModuleList(
            Block(config, length, mixer, generator, conv_kernel) for _ in range(num_layers)
        )

    def fused(self, x_BLD: Tensor) -> bool:
        """Whether all blocks are `Block.fused`."""
        return all(block.fused(x_BLD) for block in self.blocks)

    def forward(
        self, state_BLD: Tensor, injection_BLD: Tensor | None, recompute: int = 0
    ) -> Tensor:
        """(B, L, D), (B, L, D) → (B, L, D); the backward pass recomputes the first `recompute`."""
        if fp8.active() and all(block.takes_eight(state_BLD) for block in self.blocks):
            return self._forward_eight(state_BLD, injection_BLD)
        x_BLD = state_BLD if injection_BLD is None else state_BLD + injection_BLD
        for number, block in enumerate(self.blocks):
            if number < recompute:
                x_BLD = recomputed(block, x_BLD, self.rope)
            else:
                x_BLD = block(x_BLD, self.rope)
        return x_BLD

    def _forward_eight(self, state_BLD: Tensor, injection_BLD: Tensor | None) -> Tensor:
        from models.kernels import eight

        reads = self.blocks[0].attention is not None  # what a block is given, in 8 bits
        if injection_BLD is None or not reads:
            x_BLD = state_BLD if injection_BLD is None else state_BLD + injection_BLD
            x_BLD = x_BLD.contiguous()
            small_BLD = eight.to_eight(x_BLD) if reads else None
        else:
            x_BLD, small_BLD = eight.sum_in_eight(
                state_BLD.contiguous(), injection_BLD.contiguous()
            )
        for block in self.blocks:
            again = reads and block is not self.blocks[-1]
            x_BLD, small_BLD = block.forward_eight(x_BLD, small_BLD, self.rope, again)
        return x_BLD
