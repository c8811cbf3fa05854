"""From a batch to the embedded input: [puzzle prefix | tokens] + positions, scaled by sqrt(D)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelDims, ReasoningConfig
from models.layers import truncated_normal


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
        x_BLD = F.embedding(batch["inputs"], self.tokens.to(self.dtype))
        if self.puzzles is not None:
            rows = batch.get("puzzle_rows")
            rows = self.puzzle_rows(batch["puzzle_ids"]) if rows is None else rows
            width = x_BLD.shape[-1]
            rows = F.pad(rows.to(self.dtype), (0, self.prefix_len * width - rows.shape[-1]))
            x_BLD = torch.cat((rows.view(-1, self.prefix_len, width), x_BLD), dim=1)
        if self.positions is not None:
            # 1/sqrt(2) keeps the variance of the sum of two embeddings
            x_BLD = math.sqrt(0.5) * (x_BLD + self.positions.to(self.dtype))
        return self.scale * x_BLD
