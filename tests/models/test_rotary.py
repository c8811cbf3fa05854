"""Rotary positions, along the tokens and along a grid's rows and columns."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import ModelDims, build_model
from models.errors import ModelError
from models.layers import RotaryTable, grid_positions
from models.reasoning import ReasoningModel
from models.trm import TRMConfig
from tests.models.test_recursion import SMALL


def scores(table: RotaryTable, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The products of q, turned to every position, with k, turned to every position: (L, L)."""
    length = table.cos.shape[0]
    q, k = (table.double()(x.expand(1, length, 1, -1))[0, :, 0] for x in (q, k))
    return q @ k.T


@settings(deadline=None, max_examples=25)
@given(side=st.integers(1, 6), prefix=st.integers(0, 9), quarter=st.integers(1, 8))
def test_a_score_depends_on_rows_and_columns_between(side: int, prefix: int, quarter: int) -> None:
    positions = grid_positions(prefix, side * side)
    table = RotaryTable(4 * quarter, positions, 100.0)
    q, k = torch.randn(2, 4 * quarter, dtype=torch.float64)
    found: dict[tuple[int, int], float] = {}
    for i, row in enumerate(scores(table, q, k).tolist()):
        for j, score in enumerate(row):
            apart = tuple((positions[i] - positions[j]).int().tolist())
            assert math.isclose(found.setdefault(apart, score), score, abs_tol=1e-5)


def test_the_cells_of_a_grid_lie_below_its_prefix() -> None:
    assert grid_positions(3, 4).int().tolist() == [
        [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 1]
    ]  # fmt: skip


def test_each_axis_turns_its_half_of_the_pairs() -> None:
    positions = grid_positions(0, 9)
    both = RotaryTable(8, positions, 10.0)
    for axis in (0, 1):
        alone = RotaryTable(4, positions[:, axis], 10.0)
        torch.testing.assert_close(both.cos[:, 2 * axis : 2 * axis + 2], alone.cos[:, :2])
        torch.testing.assert_close(both.sin[:, 2 * axis : 2 * axis + 2], alone.sin[:, :2])


def build(seq_len: int, kind: str = "rope_2d") -> ReasoningModel:
    config = TRMConfig(**{**SMALL, "pos_encodings": kind})
    return build_model(config, ModelDims(seq_len, 11, 1), seed=0, device=torch.device("cpu"))


def test_its_weights_are_those_of_any_other_rotary_model_and_its_answers_are_not() -> None:
    flat, grid = build(16, "rope"), build(16)
    assert all(torch.equal(v, grid.state_dict()[k]) for k, v in flat.state_dict().items())
    batch = {"inputs": torch.arange(16)[None] % 11, "puzzle_ids": torch.zeros(1, dtype=torch.long)}
    logits = [model(model.init_state(1), batch).logits for model in (flat, grid)]
    assert not torch.allclose(*logits)


def test_what_is_no_square_grid_is_refused() -> None:
    with pytest.raises(ModelError, match=r"rope_2d needs puzzles on a square grid.* 15 cells"):
        build(15)
    with pytest.raises(ValueError, match="rope_2d needs a head size that 4 divides"):
        TRMConfig(**{**SMALL, "pos_encodings": "rope_2d", "num_heads": 16})
    with pytest.raises(ValueError, match="rope_2d needs mixer=attention"):
        TRMConfig(pos_encodings="rope_2d", mixer="mlp")
