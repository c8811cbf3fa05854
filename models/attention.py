"""Multi-head self-attention with rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.attention_backends import attend
from models.config import ReasoningConfig
from models.kernels import usable
from models.layers import Linear, RotaryTable


def _tables(rope: RotaryTable | None) -> tuple[Tensor | None, Tensor | None]:
    """Cosines and sines, (L, head_dim) each, or None where nothing is rotated."""
    return (None, None) if rope is None else (rope.cos, rope.sin)


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(head_dim)) v over all tokens (or the earlier ones, if causal)."""

    qkv_t: Tensor | None = None  # the weights as a fused backward takes them, like `Linear.half`
    out_t: Tensor | None = None

    def __init__(self, config: ReasoningConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.causal = config.causal
        self.norm_eps = config.rms_norm_eps if config.attn_norm else None
        self.fusible = config.attention_backend == "auto"
        self.backend = "sdpa"  # `build_model` knows the device, and what is best there
        width = config.hidden_size
        self.qkv = Linear(width, 3 * width, generator=generator)
        self.out = Linear(width, width, generator=generator)

    def forward(self, x_BLD: Tensor, rope: RotaryTable | None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        return self.out(self.mix(x_BLD, rope)[0])

    def fused(self, x_BLD: Tensor) -> bool:
        """Whether a fused kernel follows the first map on activations like x_BLD."""
        return self._kernel(x_BLD) is not None

    def _kernel(self, x_BLD: Tensor) -> Callable[..., Tensor] | None:
        """The fused attention (qkv, heads, cos, sin) for activations like x_BLD, or None."""
        if not (self.fusible and usable("attention", x_BLD)):
            return None
        from models.kernels import attention as short
        from models.kernels import long_attention as long

        if short.supported(x_BLD.shape[1], x_BLD.shape[2] // self.num_heads):
            return partial(short.short_attention, causal=self.causal)
        if not self.causal and long.supported(x_BLD, self.num_heads):
            return long.long_attention
        return None

    def prepare(self, x_BLD: Tensor) -> None:
        """Lay the weights out as kernels take them, for all uses on activations like x_BLD."""
        if self.qkv.half is not None and usable("residual", x_BLD):
            from models.kernels.residual import takes

            if takes(x_BLD, *reversed(self.qkv.half.shape)):
                self.qkv_t = self.qkv.half.t().contiguous()
            if takes(x_BLD, *self.out.half.shape) and torch.is_grad_enabled():
                self.out_t = self.out.half.t().contiguous()

    def release(self) -> None:
        """Forget what `prepare` laid out."""
        self.qkv_t = self.out_t = None

    def _to_qkv(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """The first map (B, L, 3 D), and x_BLD for whatever else it is used for."""
        if self.qkv_t is None or self.qkv.in_eight:
            return self.qkv(x_BLD), x_BLD
        from models.kernels.residual import linear_beside, linear_half

        if torch.is_grad_enabled():
            return linear_beside(x_BLD, self.qkv.weight, self.qkv.half, self.qkv_t)
        return linear_half(x_BLD.contiguous(), self.qkv.half), x_BLD

    def _projects(self, kernel: Callable[..., Tensor] | None, x_BLD: Tensor) -> bool:
        """Whether the fused attention makes q, k and v itself: the one over many tokens."""
        if kernel is None:
            return False
        from models.kernels import long_attention as long

        return kernel is long.long_attention and long.takes_product(x_BLD)

    def mix(self, x_BLD: Tensor, rope: RotaryTable | None) -> tuple[Tensor, Tensor]:
        """What the heads have gathered, side by side, before the last map; and x_BLD.

        Both (B, L, D). With the second in its residual a block spares its backward pass a sum.
        """
        kernel = self._kernel(x_BLD)
        if self._projects(kernel, x_BLD) and not self.qkv.in_eight:
            from models.kernels.long_attention import projected_attention

            weights = self.qkv.weight, self.num_heads, *_tables(rope), self.qkv.half, self.qkv_t
            mixed, x_BLD = projected_attention(x_BLD, *weights)
        else:
            qkv, x_BLD = self._to_qkv(x_BLD)
            mixed = self._gather(qkv, rope, kernel)
        return self._normed(mixed), x_BLD

    def mix_eight(self, x_BLD: Tensor, small_BLD: Tensor, rope: RotaryTable | None) -> Tensor:
        """`mix` of x_BLD by fused kernels, where the first map reads small_BLD, x_BLD in 8 bits."""
        from models.kernels import eight
        from models.kernels.long_attention import attend_turned

        kernel = self._kernel(x_BLD)
        if self._projects(kernel, x_BLD):
            turned = eight.turned_qkv(small_BLD, *self.qkv.eight, *_tables(rope))
            return self._normed(attend_turned(turned, self.num_heads))
        return self._normed(self._gather(eight.linear(small_BLD, *self.qkv.eight), rope, kernel))

    def _normed(self, mixed: Tensor) -> Tensor:
        if self.norm_eps is None:
            return mixed
        # bounds what the last map is given, as in `normed_gate`
        return F.rms_norm(mixed, mixed.shape[-1:], eps=self.norm_eps)

    def _gather(
        self, qkv: Tensor, rope: RotaryTable | None, kernel: Callable[..., Tensor] | None
    ) -> Tensor:
        """[q | k | v] (B, L, 3 D) → (B, L, D), by a fused kernel where there is one."""
        if kernel is not None:
            return kernel(qkv, self.num_heads, *_tables(rope))
        qkv = rearrange(qkv, "b l (n h d) -> n b l h d", n=3, h=self.num_heads)
        q, k, v = qkv.unbind(0)
        if rope is not None:
            q, k = rope(q), rope(k)
        mixed = attend(q, k, v, causal=self.causal, backend=self.backend)
        return rearrange(mixed, "b l h d -> b l (h d)")
