"""Any number and size of tensors in one launch; in the interpreter and on a GPU.

Not collected by itself, see `kernel_cases.py`.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import AdamATan2, AdamMini, AdamW

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
per_class = pytest.mark.parametrize("cls", [AdamW, AdamATan2, AdamMini])
NAMES = ("a.mlp.weight", "a.q.weight", "embed.weight", "gain")  # rows, heads, tokens, one block


def check(cls, shapes, seed, steps=2):
    """Kernels against the reference, step by step from the same state."""
    results = []
    for fused in ("on", "off"):
        rng = torch.Generator().manual_seed(seed)
        params = [torch.randn(s, generator=rng).to(DEVICE).requires_grad_() for s in shapes]
        named = [(f"{i}.{NAMES[i % 4]}", p) for i, p in enumerate(params)]
        options = {"num_heads": 1} if cls is AdamMini else {}
        opt = cls(named, 1e-2, fused=fused, **options)
        for _ in range(steps):
            for p in params:
                p.grad = torch.randn(p.shape, generator=rng).to(DEVICE)
            opt.step()
        assert all(float(opt.state[p]["step"]) == steps for p in params)
        results.append([p.detach() for p in params])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=4e-6, atol=4e-6)


@per_class
@given(
    shapes=st.lists(
        st.lists(st.sampled_from([0, 1, 2, 3, 7, 15, 16, 33, 64, 130]), max_size=3).map(tuple),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=6 if INTERPRETED else 20, deadline=None)
@pytest.mark.filterwarnings("ignore:no rule")
def test_odd_sizes(cls, shapes, seed):
    shapes = [s for s in shapes if torch.Size(s).numel() < 20_000] or [(1,)]
    check(cls, shapes, seed)


@per_class
@pytest.mark.filterwarnings("ignore:no rule")
def test_a_thousand_tensors_at_once(cls):
    check(cls, [(i % 7, i % 50) if i % 3 else (i % 50,) for i in range(1000)], 0, steps=1)
