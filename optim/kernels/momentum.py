# ruff: noqa: ANN001, ANN201  (arguments of Triton functions have no Python types)
"""The first half of Muon by itself: momentum moved, gradients made what is to be orthogonalized.

Of each element it computes what `momentum_kernel` and `gather_kernel` of `kernels.muon` do, to the
bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from optim.kernels.launcher import Kernel
from optim.kernels.muon import _ahead
from optim.kernels.ns_table import path_for
from optim.kernels.table import TensorTable, addresses_of
from optim.kernels.tiles import tile_for


@triton.jit
def _lead(g_ptr, m_ptr, left, scale, momentum, HAS_SCALE: tl.constexpr, NESTEROV: tl.constexpr,
          MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One chunk: m = momentum * m + g; g = what is orthogonalized."""
    offsets = tl.arange(0, BLOCK)
    mask = offsets < left if MASKED else None
    g = tl.load(g_ptr + offsets, mask=mask)
    m = tl.load(m_ptr + offsets, mask=mask)
    if HAS_SCALE:
        g = tl.div_rn(g, scale)
    m = tl.fma(momentum, m, g)
    tl.store(m_ptr + offsets, m, mask=mask)
    tl.store(g_ptr + offsets, _ahead(g, m, momentum, NESTEROV), mask=mask)


@triton.jit
def lead_kernel(
    addresses,
    scale_ptr,
    found_ptr,
    chunk_tensor,
    chunk_index,
    sizes,
    tensors,
    momentum,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move momenta and make gradients what is orthogonalized, both float32, in this order the
    columns of addresses."""
    found = 0.0
    if HAS_FOUND:
        flag = tl.load(found_ptr).to(tl.float32)
        found = tl.where(flag == 0.0, 0.0, 1.0)  # NaN counts as found
    if found == 0.0:
        chunk = tl.program_id(0)
        t = tl.load(chunk_tensor + chunk)
        start = tl.load(chunk_index + chunk).to(tl.int64) * BLOCK
        left = tl.load(sizes + t) - start
        g_ptr = tl.load(addresses + t).to(tl.pointer_type(tl.float32))
        m_ptr = tl.load(addresses + tensors + t).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            g_ptr, m_ptr = tl.multiple_of(g_ptr, 16), tl.multiple_of(m_ptr, 16)
        scale = 1.0
        if HAS_SCALE:
            scale = tl.load(scale_ptr).to(tl.float32)
        if left >= BLOCK:
            _lead(g_ptr + start, m_ptr + start, left, scale, momentum,
                  HAS_SCALE, NESTEROV, False, BLOCK)  # fmt: skip
        else:
            _lead(g_ptr + start, m_ptr + start, left, scale, momentum,
                  HAS_SCALE, NESTEROV, True, BLOCK)  # fmt: skip


_launch = Kernel(lead_kernel)


def supported(p: Tensor) -> bool:
    """Whether the kernel takes this part of matrices: if kernels take matrices there, too."""
    fits = p.dtype == torch.float32 and p.is_contiguous()
    return fits and path_for(p.device, 1, 1, 1) is not None


class MomentumLaunch:
    """The launch of parts of matrices on one device.

    Args:
        params: as `supported` says.
        momenta: of each, float32, which keep their addresses.
    """

    def __init__(self, params: Sequence[Tensor], momenta: Sequence[Tensor]) -> None:
        self.params, self.momenta = list(params), list(momenta)
        self.device = self.params[0].device
        self.block = tile_for(self.device).block
        self.table = TensorTable([p.numel() for p in params], self.block, self.device)
        self.options = 0.0, False
        self.pointers: tuple[int, ...] = ()
        self.flat: tuple[int, ...] = ()

    def run(
        self,
        grads: Sequence[Tensor],
        momentum: float,
        nesterov: bool,
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Move the momenta in place, and let `grads` be what is to be orthogonalized.

        Args:
            grads: of each part, contiguous.
            momentum: decay of the momenta.
            nesterov: whether to look one step ahead.
            lr: 0-dim on the device, as the following; not used.
            grad_scale: divides the gradients.
            found_inf: where it is nonzero or NaN nothing is written.
        """
        self.options = momentum, nesterov
        self.repeat(addresses_of(self.params) + addresses_of(grads), lr, grad_scale, found_inf)

    def repeat(
        self,
        pointers: tuple[int, ...],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """`run` with the options of the last time; `pointers` of all parameters, then gradients."""
        if pointers != self.pointers:
            self.pointers = pointers
            self.flat = pointers[len(self.params) :] + addresses_of(self.momenta)
        momentum, nesterov = self.options
        addresses = self.table.addresses(self.flat)
        scale, found = (lr if t is None else t for t in (grad_scale, found_inf))
        _launch(
            (self.table.chunks,),
            self.device,
            (
                *(addresses, scale, found, self.table.chunk_tensor, self.table.chunk_index),
                *(self.table.sizes, len(self.params), momentum),
            ),
            {
                "HAS_SCALE": grad_scale is not None,
                "HAS_FOUND": found_inf is not None,
                "NESTEROV": nesterov,
                "ALIGNED": not any(x % 16 for x in self.flat),
                "BLOCK": self.block,
            },
            num_warps=8,
        )
