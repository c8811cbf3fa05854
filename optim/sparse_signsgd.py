"""SignSGD for large embedding tables of which a batch touches few rows.

Bernstein et al. 2018, "signSGD", with the decoupled weight decay of the sparse puzzle embeddings
of HRM and TRM: only rows of the batch are read or written, and there are no moments.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from optim.base import DeviceOptimizer, Fused, work_dtype


def sum_duplicates(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the rows that share an id, in an order that depends on nothing but the input.

    Stable sort by id, a segmented inclusive scan by doubling (log2 n passes), then every entry
    takes the value at the end of its segment. No atomics, no data-dependent shape, no host
    synchronization; in exchange an id keeps its duplicates, all with the same sum.

    Args:
        ids: (n,) integers.
        rows: (n, width) floating point.

    Returns:
        ids (n,) ascending, and sums (n, width).
    """
    n = ids.shape[0]
    ids, order = torch.sort(ids, stable=True)
    sums = rows[order]
    d = 1
    while d < n:
        same = (ids[d:] == ids[:-d]).unsqueeze(1)
        zero = sums.new_zeros(())
        sums = torch.cat([sums[:d], sums[d:] + torch.where(same, sums[:-d], zero)])
        d *= 2
    last = torch.searchsorted(ids, ids, right=True) - 1
    return ids, sums[last]


def sparse_signsgd_update(
    table: Tensor,
    ids: Tensor,
    row_grads: Tensor,
    lr: float | Tensor,
    *,
    weight_decay: float = 0.1,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule, as a pure function: `w = w * (1 - lr * weight_decay) - lr * sign(sum of grads)`.

    Args:
        table: (rows, width).
        ids: (n,) int32 or int64; duplicates are summed.
        row_grads: (n, width), summed in float32 (float64 if it is float64).
        lr: a number or a 0-dim tensor.
        weight_decay: decoupled.
        grad_scale: 0-dim, divides the sums.
        found_inf: 0-dim bool; where it is true the rows come back as they are.

    Returns:
        ids (n,) int64, ascending, with duplicates, and their new rows (n, width): the updated
        table is `table.index_put((ids,), rows)`. Entries of one id are bitwise equal, so it does
        not matter which of them is written last.
    """
    ids, sums = sum_duplicates(ids.long(), row_grads.to(work_dtype(row_grads.dtype)))
    if grad_scale is not None:
        sums = sums / grad_scale
    old = table[ids]
    w = old.to(work_dtype(table.dtype))
    new = (w * (1.0 - lr * weight_decay) - lr * sums.sign()).to(table.dtype)
    return ids, new if found_inf is None else torch.where(found_inf, old, new)


class SparseSignSGD(DeviceOptimizer):
    """SignSGD on the rows of a batch; the rule is `sparse_signsgd_update`.

    Gradients come as a sparse `table.grad` (`nn.Embedding(sparse=True)`), or by `add_rows` before
    `step()`; both may be given several times, which accumulates. There is no state but `lr`.

    Args:
        tables: tensors (rows, width), parameters or plain buffers, or groups of them.
        lr: learning rate, a number or a one-element tensor (whose value is copied).
        weight_decay: decoupled, of the rows of the batch only.
        fused: see DeviceOptimizer. The kernel sums duplicates in another (fixed) order, so a sum
            that nearly cancels may have another sign.
    """

    counts_steps = False
    accepts_sparse = True

    def __init__(
        self,
        tables: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-4,
        weight_decay: float = 0.1,
        fused: Fused | None = None,
    ) -> None:
        super().__init__(tables, {"lr": lr, "weight_decay": weight_decay}, fused)
        self._rows: dict[Tensor, list[tuple[Tensor, Tensor]]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rows = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add tables; each must have two dimensions."""
        super().add_param_group(param_group)
        for table in self.param_groups[-1]["params"]:
            if table.ndim != 2:
                for p in self.param_groups.pop()["params"]:
                    del self.state[p]
                self._lr_tensors.pop()
                raise ValueError(f"a table must have 2 dimensions, got shape {tuple(table.shape)}")

    def add_rows(self, table: Tensor, ids: Tensor, row_grads: Tensor) -> None:
        """Hand over gradients of rows for the next step; several calls accumulate.

        Args:
            table: one of the tables of this optimizer.
            ids: int32 or int64, any shape, within the table.
            row_grads: the shape of `ids` plus the width of the table. Both are copied.

        Raises:
            ValueError: for a foreign table, wrong dtypes or shapes, and (on the CPU, where looking
                costs nothing) for an id outside the table.
        """
        for name, given in (("table", table), ("ids", ids), ("row_grads", row_grads)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
        if not any(table is t for g in self.param_groups for t in g["params"]):
            raise ValueError(f"no table of shape {tuple(table.shape)} belongs to this optimizer")
        if ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
        if row_grads.shape != (*ids.shape, table.shape[1]):
            raise ValueError(
                f"row_grads must have shape {(*ids.shape, table.shape[1])} for ids of shape "
                f"{tuple(ids.shape)}, got {tuple(row_grads.shape)}"
            )
        if not row_grads.is_floating_point():
            raise ValueError(f"row_grads must be floating point, got {row_grads.dtype}")
        if not ids.device == row_grads.device == table.device:
            raise ValueError(
                f"ids are on {ids.device}, row_grads on {row_grads.device}, the table on "
                f"{table.device}"
            )
        outside = ((ids < 0) | (ids >= table.shape[0])) if ids.device.type == "cpu" else None
        if outside is not None and outside.any():
            bad = ids[outside].flatten()[0]
            raise ValueError(f"id {bad} is outside a table of {table.shape[0]} rows")
        rows = row_grads.detach().reshape(-1, table.shape[1]).clone()
        self._rows.setdefault(table, []).append((ids.detach().reshape(-1).long(), rows))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, rows handed over included."""
        super().zero_grad(set_to_none)
        self._rows.clear()

    def _buckets(self, group: dict[str, Any]) -> dict[torch.device, list[Tensor]]:
        buckets = super()._buckets(group)
        for table in group["params"]:
            if table.grad is not None and not table.grad.is_sparse:
                raise RuntimeError(
                    f"the gradient of the table of shape {tuple(table.shape)} is dense: use "
                    "nn.Embedding(sparse=True) or add_rows()"
                )
            if table.grad is None and table in self._rows:
                buckets.setdefault(table.device, []).append(table)
        return buckets

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        for table in params:
            ids, rows = self._take(table)
            new = sparse_signsgd_update(
                table,
                ids,
                rows,
                lr,
                weight_decay=group["weight_decay"],
                grad_scale=grad_scale,
                found_inf=found_inf,
            )
            table.index_put_((new[0],), new[1])

    def _launch(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[Tensor]:
        from optim.kernels.sparse import sparse_signsgd_launch, supported

        rest = []
        for table in params:
            n = sum(part[0].numel() for part in self._rows.get(table, []))
            n += 0 if table.grad is None else table.grad._nnz()
            if not supported(table, n):
                rest.append(table)
                continue
            ids, rows = self._take(table)
            sparse_signsgd_launch(
                table, ids, rows, lr, group["weight_decay"], grad_scale, found_inf
            )
        return rest

    def _take(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (n,) and gradients (n, width) of all rows handed over, which are forgotten."""
        parts = self._rows.pop(table, [])
        if table.grad is not None:
            parts.append((table.grad._indices()[0], table.grad._values()))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
