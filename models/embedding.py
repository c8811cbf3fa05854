"""From a batch to the embedded input: [puzzle prefix | tokens] + positions, scaled by sqrt(D)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelDims, ReasoningConfig
from models.layers import truncated_normal


def _lookup(ids_BL: Tensor, table: Tensor, prefix_BPD: Tensor | None) -> Tensor:
    """[prefix | rows of the table]: (B, P + L, D)."""
    x_BLD = F.embedding(ids_BL, table)
    return x_BLD if prefix_BPD is None else torch.cat((prefix_BPD, x_BLD), dim=1)


class _Lookup(torch.autograd.Function):
    """`_lookup` in a small table, whose gradient is a product with the one-hot ids.

    torch's own sums duplicates after a sort of the ids, or with atomics, whose order varies.
    """

    @staticmethod
    def forward(ctx: Any, ids_BL: Tensor, table: Tensor, prefix_BPD: Tensor | None) -> Tensor:
        ctx.save_for_backward(ids_BL)
        ctx.rows, ctx.prefix = table.shape[0], 0 if prefix_BPD is None else prefix_BPD.shape[1]
        return _lookup(ids_BL, table, prefix_BPD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor | None]:
        (ids,) = ctx.saved_tensors
        ids = F.pad(ids, (ctx.prefix, 0), value=-1)  # no row's: all of the gradient as it lies
        rows = -(-ctx.rows // 8) * 8  # aligned products
        one_hot = ids.reshape(-1, 1) == torch.arange(rows, device=ids.device, dtype=ids.dtype)
        total = one_hot.to(grad.dtype).t() @ grad.reshape(-1, grad.shape[-1])
        return None, total[: ctx.rows], grad[:, : ctx.prefix] if ctx.prefix else None


_SMALL_TABLE = 1024  # rows; the one-hot ids of a batch are this wide


class InputEmbedding(nn.Module):
    """Token, position and puzzle embeddings.

    The puzzle table is a buffer, zero at first: no dense gradient of a million rows is ever
    formed. A training step looks its rows up (`puzzle_rows`), makes them a leaf, passes them as
    `batch["puzzle_rows"]`, and gives their gradient to a sparse optimizer.
    """

    def __init__(
        self,
        config: ReasoningConfig,
        dims: ModelDims,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        width, self.prefix_len, self.dtype = config.hidden_size, config.prefix_len, dtype
        self.scale = math.sqrt(width)
        std = 1.0 / self.scale
        self.tokens = nn.Parameter(truncated_normal((dims.vocab_size, width), std, generator))
        self.positions = None
        if config.pos_encodings == "learned":
            length = self.prefix_len + dims.seq_len
            self.positions = nn.Parameter(truncated_normal((length, width), std, generator))
        table = None
        if self.prefix_len:
            table = torch.zeros(dims.num_puzzle_ids, config.puzzle_emb_ndim)
        self.register_buffer("puzzles", table)

    def puzzle_rows(self, puzzle_ids_B: Tensor) -> Tensor | None:
        """The table's rows (B, puzzle_emb_ndim) of these ids, or None without a prefix."""
        return None if self.puzzles is None else self.puzzles[puzzle_ids_B]

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """`inputs` (B, L) and `puzzle_ids` (B,) → (B, prefix + L, D).

        `puzzle_rows` (B, puzzle_emb_ndim), where present, stands in for the table's rows.
        """
        ids, table = batch["inputs"], self.tokens.to(self.dtype)
        before = self.scale if self.positions is None else 1.0  # fewer numbers to scale than after
        prefix = None
        if self.puzzles is not None:
            rows = batch.get("puzzle_rows")
            rows = self.puzzle_rows(batch["puzzle_ids"]) if rows is None else rows
            rows = rows.to(self.dtype)
            rows = F.pad(rows, (0, self.prefix_len * table.shape[1] - rows.shape[-1]))
            prefix = before * rows.view(-1, self.prefix_len, table.shape[1])
        small = ids.is_cuda and table.shape[0] <= _SMALL_TABLE
        x_BLD = (_Lookup.apply if small else _lookup)(ids, before * table, prefix)
        if self.positions is None:
            return x_BLD
        # 1/sqrt(2) keeps the variance of the sum of two embeddings
        return self.scale * (math.sqrt(0.5) * (x_BLD + self.positions.to(self.dtype)))
