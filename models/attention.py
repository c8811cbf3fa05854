"""Multi-head self-attention with rotary positions."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from models.attention_backends import attend
from models.config import ReasoningConfig
from models.kernels import usable
from models.layers import Linear, RotaryTable


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(head_dim)) v over all tokens (or the earlier ones, if causal)."""

    def __init__(self, config: ReasoningConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.causal = config.causal
        self.fusible = config.attention_backend == "auto"
        self.backend = "sdpa"  # `build_model` knows the device, and what is best there
        width = config.hidden_size
        self.qkv = Linear(width, 3 * width, generator=generator)
        self.out = Linear(width, width, generator=generator)

    def forward(self, x_BLD: Tensor, rope: RotaryTable | None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        return self.out(self.mix(x_BLD, rope))

    def fused(self, x_BLD: Tensor) -> bool:
        """Whether a fused kernel follows the first map on activations like x_BLD."""
        if not (self.fusible and usable("attention", x_BLD)) or self.qkv.fp8:
            return False
        from models.kernels import long_attention as long
        from models.kernels.attention import supported

        if supported(x_BLD.shape[1], x_BLD.shape[2] // self.num_heads):
            return True
        qkv = torch.empty((), dtype=x_BLD.dtype, device=x_BLD.device)
        qkv = qkv.expand(*x_BLD.shape[:2], 3 * x_BLD.shape[2])
        return not self.causal and long.supported(qkv, self.num_heads)

    def mix(self, x_BLD: Tensor, rope: RotaryTable | None) -> Tensor:
        """What the heads have gathered, side by side, before the last map: (B, L, D)."""
        qkv = self.qkv(x_BLD)
        if self.fusible and usable("attention", qkv):
            from models.kernels.attention import short_attention, supported

            tables = (None, None) if rope is None else (rope.cos, rope.sin)
            if supported(x_BLD.shape[1], x_BLD.shape[2] // self.num_heads):
                return short_attention(qkv, self.num_heads, *tables, self.causal)
            from models.kernels import long_attention as long

            if not self.causal and long.supported(qkv, self.num_heads):
                return long.long_attention(qkv, self.num_heads, *tables)
        qkv = rearrange(qkv, "b l (n h d) -> n b l h d", n=3, h=self.num_heads)
        q, k, v = qkv.unbind(0)
        if rope is not None:
            q, k = rope(q), rope(k)
        mixed = attend(q, k, v, causal=self.causal, backend=self.backend)
        return rearrange(mixed, "b l h d -> b l (h d)")
