"""What the tests of every optimizer share: odd parameters, gradients, snapshots."""

import pytest
import torch

from optim import AdamATan2, AdamMini, AdamW, Muon

CLASSES = [AdamATan2, AdamW, AdamMini]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
per_class = pytest.mark.parametrize("cls", CLASSES)
per_any = pytest.mark.parametrize("cls", [*CLASSES, Muon])  # Muon splits groups
per_dtype = pytest.mark.parametrize("dtype", DTYPES)


def make_params(dtype=torch.float32, seed=0):
    """Odd shapes and memory orders: 0-d, empty, transposed, strided, expanded storage."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=rng).to(dtype)

    tensors = [
        randn(5, 3),
        randn(),
        randn(0, 3),
        randn(4, 5).t(),
        randn(6, 8)[:, ::2],
        randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        randn(1),
    ]
    return [t.requires_grad_() for t in tensors]


def set_grads(params, seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=rng) * scale).to(p.dtype)


def snapshot(opt):
    """Every tensor of parameters and states, cloned."""
    params = [p for g in opt.param_groups for p in g["params"]]
    return [p.detach().clone() for p in params] + [
        s.clone() for p in params for s in opt.state[p].values()
    ]


def same(xs, ys):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
