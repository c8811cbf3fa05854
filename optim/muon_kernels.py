"""Muon's way to its kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optim.adam_like import AdamLike, Bucket, Last, Plan, same_order
from optim.muon_rule import update_scale
from optim.orthogonal import iterations


class MuonKernels(AdamLike):
    """The half of `optim.Muon` that launches kernels; see there."""

    def _kernel_rule(self, group: dict[str, Any]) -> tuple[str, dict[str, float]]:
        scale = {"lr_scale": group["adam_lr_scale"]}
        if group["adam"] == "adamw":
            return "adamw", {"eps": group["eps"], **scale}
        return "atan2_outside", scale

    def _launch(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[Tensor]:
        if group["kind"] == "adam":
            return super()._launch(group, params, lr, grad_scale, found_inf)
        if group["kind"] == "momentum" and not all(p.grad.is_contiguous() for p in params):
            return params  # gradients are written to
        plan = self._plan_of(group, params)
        if group["kind"] == "momentum":
            for bucket in plan.buckets:
                grads = [p.grad for p in bucket.params]
                options = float(group["momentum"]), group["nesterov"]
                bucket.launch.run(grads, *options, lr, grad_scale, found_inf)
        else:
            self._launch_matrices(group, plan, lr, grad_scale, found_inf)
        self._remember(group, plan, lr)
        return plan.rest

    def _launch_matrices(
        self,
        group: dict[str, Any],
        plan: Plan,
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        from optim.kernels.muon_launch import Options

        rows, safety = iterations(group["coefficients"], group["ns_steps"])
        momentum = float(group["momentum"]), group["nesterov"]
        if group["kind"] == "orthogonal":  # the gradient is all that there is
            momentum, grad_scale = (0.0, False), None
        for bucket in plan.buckets:
            rate = self.ema.begin_fused(bucket.names) if bucket.names else 1.0
            decay = float(group["weight_decay"])
            options = Options(*momentum, decay, tuple(rows), safety, 1.0 - rate)
            grads = [same_order(p.grad, p) for p in bucket.params]
            bucket.launch.run(grads, options, lr, grad_scale, found_inf)

    def _repeat(
        self,
        last: Last,
        pointers: list[tuple[int, ...]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        scale = None if last.group["kind"] == "orthogonal" else grad_scale
        super()._repeat(last, pointers, scale, found_inf)

    def _plan_options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        pieces = tuple(group["pieces"] or ())
        return (*super()._plan_options(group), group["kind"], group["scaling"], pieces)

    def _plan(self, group: dict[str, Any], params: list[Tensor]) -> Plan:
        if group["kind"] == "adam":
            return super()._plan(group, params)
        if group["kind"] == "momentum":
            return self._plan_momenta(params)
        from optim.kernels.muon_launch import MuonLaunch, supported

        pieces = pieces_of(group)
        # the kernels round to the nearest
        taken = [p for p in params if self._wide(group, p) is p and supported(p, pieces[id(p)])]
        if group["kind"] == "orthogonal":  # gradients are as wide as momenta
            taken = [p for p in taken if p.dtype == torch.float32]
        buckets = []
        for some, names, shadows in self._split(taken):
            own = [pieces[id(p)] for p in some]
            sizes = [
                update_scale(p.shape[0] // n, p.shape[1], group["scaling"])
                for p, n in zip(some, own, strict=True)
            ]
            launch = MuonLaunch(some, [self.state[p] for p in some], own, sizes, shadows)
            buckets.append(Bucket(some, names, launch))
        here = set(map(id, taken))
        return Plan(params, self.ema, buckets, [p for p in params if id(p) not in here])

    def _plan_momenta(self, params: list[Tensor]) -> Plan:
        from optim.kernels.momentum import MomentumLaunch, supported

        taken = [p for p in params if supported(p)]
        rest = [p for p in params if not supported(p)]
        if not taken:
            return Plan(params, self.ema, [], rest)
        launch = MomentumLaunch(taken, [self.state[p]["momentum_buffer"] for p in taken])
        return Plan(params, self.ema, [Bucket(taken, frozenset(), launch)], rest)


def pieces_of(group: dict[str, Any]) -> dict[int, int]:
    """Number of pieces by the id of a parameter."""
    pieces = group["pieces"] or [1] * len(group["params"])
    return {id(p): n for p, n in zip(group["params"], pieces, strict=True)}
