"""Muon: momentum, orthogonalized; for the matrices inside a network. The rest gets Adam.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", with the scaling and
decoupled decay of Liu et al. 2025, "Muon is Scalable for LLM Training" (Moonlight),
arXiv:2502.16982.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from optim.adam_atan2 import adam_atan2_update
from optim.adamw import adamw_update
from optim.base import Fused, Half, Params, work_dtype, write_gated
from optim.checks import check_count, check_number
from optim.divide import divide_muon, matrices_in
from optim.muon_kernels import MuonKernels, pieces_of
from optim.muon_rule import Scaling, check_pieces, update_scale
from optim.orthogonal import COEFFICIENTS, Coefficients, newton_schulz


class Muon(MuonKernels):
    """Muon for the matrices of a network, AdamATan2 or AdamW for everything else, in one optimizer.

    Embeddings, heads (by name, see `partition.RULES`), biases, gains and whatever has not two
    dimensions go to Adam; so hand over names: `Muon(model.named_parameters())`. Each parameter is
    claimed once. Groups are split accordingly and carry `kind` ("muon" or "adam"), which may also
    be given. Equally shaped matrices are orthogonalized as one batch.

    A step of "muon" may be taken in two halves, by two optimizers: one of kind "momentum", over any
    parts of matrices, leaves in their gradients what is to be orthogonalized; one of kind
    "orthogonal" takes it from there and keeps no momentum. A `ShardedOptimizer` does so.

    Args:
        params: (name, tensor) pairs, tensors or groups.
        lr: learning rate of both halves, a number or a one-element tensor (whose value is copied).
        momentum: decay of the momentum.
        nesterov: whether to look one step ahead.
        weight_decay: decoupled; a step takes `lr * weight_decay` of a weight.
        scaling: "moonlight" or "keller", see `update_scale`.
        ns_steps: Newton–Schulz iterations.
        coefficients: "quintic" or "polar_express".
        split_fused: orthogonalize q, k and v, and gate and up, on their own where one parameter
            holds them.
        adam: rule of the rest, "adam_atan2" or "adamw".
        adam_lr_scale: its learning rate over `lr`.
        adam_weight_decay: its decay, which its own learning rate multiplies; None: `weight_decay`.
        betas: its decay rates.
        eps: of "adamw".
        fused: of the rest, see DeviceOptimizer.
        half: see DeviceOptimizer.
    """

    divide = staticmethod(divide_muon)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        scaling: Scaling = "moonlight",
        ns_steps: int = 5,
        coefficients: Coefficients = "quintic",
        split_fused: bool = True,
        adam: Literal["adam_atan2", "adamw"] = "adam_atan2",
        adam_lr_scale: float = 1.0,
        adam_weight_decay: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: Fused | None = None,
        half: Half = "nearest",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "scaling": scaling,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "split_fused": split_fused,
            "adam": adam,
            "adam_lr_scale": adam_lr_scale,
            "adam_weight_decay": adam_weight_decay,
            "betas": betas,
            "eps": eps,
            "half": half,
        }
        super().__init__(params, defaults, fused)

    own_options = ("kind", "pieces")
    _kinds = ("muon", "adam", "momentum", "orthogonal")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, split into a group of each `kind`, with the `pieces` of each matrix."""
        if not isinstance(param_group, Mapping) or "params" not in param_group:
            super().add_param_group(param_group)  # which refuses it
        if "kind" in param_group:
            super().add_param_group({"pieces": None, **param_group})
            return
        items = param_group["params"]
        items = [items] if isinstance(items, Tensor) else list(items)
        named = [item if isinstance(item, tuple) else ("", item) for item in items]
        groups: dict[str, list[Any]] = {}
        pieces: list[int] = []
        # What is no tensor, or appears twice, is named by the check of the base class.
        sound = all(isinstance(p, Tensor) for _, p in named)
        sound = sound and len({id(p) for _, p in named}) == len(named)
        found = matrices_in(named, {**self.defaults, **param_group}) if sound else []
        for item, number in zip(items, found, strict=False):
            groups.setdefault("muon" if number else "adam", []).append(item)
            if number:
                pieces.append(number)
        before = len(self.param_groups)
        try:
            for kind, some in (groups or {"adam": items}).items():
                own = pieces if kind == "muon" else None
                group = {**param_group, "params": some, "kind": kind, "pieces": own}
                decay = {**self.defaults, **group}["adam_weight_decay"]
                if kind == "adam" and decay is not None:
                    group["weight_decay"] = decay
                super().add_param_group(group)
        except (TypeError, ValueError):
            del self.param_groups[before:], self._lr_tensors[before:]
            raise

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        choices = {
            "kind": self._kinds,
            "scaling": ("moonlight", "keller"),
            "coefficients": tuple(COEFFICIENTS),
            "adam": ("adam_atan2", "adamw"),
        }
        for name, allowed in choices.items():
            if group[name] not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {group[name]!r}")
        check_pieces(group)
        check_number("momentum", group["momentum"], below=1.0)
        check_number("adam_lr_scale", group["adam_lr_scale"])
        if group.get("adam_weight_decay") is not None:  # older checkpoints do not have it
            check_number("adam_weight_decay", group["adam_weight_decay"])
        check_count("ns_steps", group["ns_steps"])

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        if group["kind"] == "adam":
            return self.moments
        return () if group["kind"] == "orthogonal" else ("momentum_buffer",)

    def _new_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        state = super()._new_state(group, param)
        if group["kind"] == "momentum":  # the other half counts the steps
            return {"momentum_buffer": state["momentum_buffer"]}
        return state

    # The half that is Adam

    def _rule(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        lr: Tensor,
    ) -> tuple[Tensor, ...]:
        options = {k: group[k] for k in ("betas", "weight_decay")}
        update = adam_atan2_update
        if group["adam"] == "adamw":
            update, options["eps"] = adamw_update, group["eps"]
        moments = (state["exp_avg"], state["exp_avg_sq"], state["step"])
        return update(param, grad, *moments, _adam_lr(group, lr), **options)

    # The half that is Muon

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if group["kind"] == "adam":
            super()._update(group, params, lr, grad_scale, found_inf)
            return
        if found_inf is not None and found_inf.device.type == "cpu":
            if found_inf:
                return
            found_inf = None
        if group["kind"] == "orthogonal":
            ahead = [p.grad.to(work_dtype(p.dtype)) for p in params]
        else:
            ahead = [self._momentum(group, p, grad_scale, found_inf) for p in params]
        if group["kind"] == "momentum":
            for p, u in zip(params, ahead, strict=True):
                p.grad.copy_(u)
            return
        batches: dict[tuple[Any, ...], list[int]] = {}
        pieces = pieces_of(group)
        for i, (p, u) in enumerate(zip(params, ahead, strict=True)):
            rows, columns = p.shape[0] // pieces[id(p)], p.shape[1]
            key = (min(rows, columns), max(rows, columns), u.dtype)
            batches.setdefault(key, []).append(i)
        for rows in batches.values():
            self._apply(group, [params[i] for i in rows], [ahead[i] for i in rows], lr, found_inf)

    def _momentum(
        self, group: dict[str, Any], p: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        """Move the momentum of `p` in place; returns what is to be orthogonalized."""
        state, momentum = self.state[p], group["momentum"]
        g = p.grad.to(work_dtype(p.dtype))
        g = g if grad_scale is None else g / grad_scale
        old = state["momentum_buffer"]
        m = old * momentum + g
        old.copy_(m if found_inf is None else torch.where(found_inf, old, m))
        return g + momentum * m if group["nesterov"] else m

    def _apply(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        ahead: list[Tensor],
        lr: Tensor,
        found_inf: Tensor | None,
    ) -> None:
        """Orthogonalize matrices of one shape (or its transpose) as one batch; update `params`."""
        pieces = [pieces_of(group)[id(p)] for p in params]
        stacks = [u.reshape(n, -1, u.shape[1]) for n, u in zip(pieces, ahead, strict=True)]
        lying = [s.shape[1] <= s.shape[2] for s in stacks]
        x = torch.cat([s if w else s.mT for s, w in zip(stacks, lying, strict=True)])
        x = newton_schulz(
            x,
            group["ns_steps"],
            coefficients=group["coefficients"],
            fused="off" if self.fused == "off" else "auto",
        )
        for p, w, s, o in zip(params, lying, stacks, x.split(pieces), strict=True):
            o = (o if w else o.mT).reshape(p.shape).to(s.dtype)
            size = lr * update_scale(*s.shape[1:], group["scaling"])
            self.state[p]["step"] += 1 if found_inf is None else ~found_inf
            wide = self._wide(group, p)
            new = (wide.to(s.dtype) * (1.0 - lr * group["weight_decay"]) - size * o).to(wide.dtype)
            write_gated(self._narrow(group, p, new), found_inf)


def _adam_lr(group: dict[str, Any], lr: Tensor) -> Tensor:
    return lr if group["adam_lr_scale"] == 1.0 else lr * group["adam_lr_scale"]
