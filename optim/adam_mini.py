"""Adam-mini: AdamW whose second moment is one number per block of a parameter.

Zhang et al. 2024, "Adam-mini: Use Fewer Learning Rates To Gain More" (arXiv:2406.16793), in the
form of the official package adam-mini 1.1.1; the blocks are those of `optim.partition`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from optim.adam_like import AdamLike, Bucket, Plan
from optim.base import Fused, Half, Params, bias_correction, work_dtype, write_gated
from optim.checks import check_count, warn
from optim.divide import divide_mini
from optim.moments import block_amax, fp8_missing, fp8_scale, from_fp8, to_fp8
from optim.partition import Partition, Rule, Segment, check_rules, partition_parameters

State = Literal["fp32", "bf16", "fp8"]


def adam_mini_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float | Tensor,
    *,
    segments: Sequence[Segment],
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rule, as a pure function of one parameter.

        p = p * (1 - lr * weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * mean(g²)       per block
        p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Args:
        param: any shape and floating dtype; the arithmetic is in float64 for float64, else float32.
        grad: of that shape.
        exp_avg: m, of that shape, in the dtype of the arithmetic.
        exp_avg_sq: v, (blocks,), likewise.
        step: 0-dim float32, t, this update included (1 at the first).
        lr: a number or a 0-dim tensor.
        segments: the blocks of `param`, see `optim.partition`.
        betas: decay rates of m and v, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled.

    Returns:
        New (param, m, v): param in its dtype, the moments in theirs.
    """
    beta1, beta2 = betas
    dtype = work_dtype(param.dtype)
    c1, c2 = bias_correction(step, beta1), bias_correction(step, beta2)
    keep = 1.0 - lr * weight_decay
    flat = [x.to(dtype).reshape(-1) for x in (param, grad, exp_avg)]
    new: tuple[list[Tensor], ...] = ([flat[0][:0]], [flat[2][:0]], [exp_avg_sq[:0]])
    for (p, g, m), v in _by_segment(segments, flat, exp_avg_sq):
        m = torch.lerp(m, g, 1.0 - beta1)
        v = torch.add(v * beta2, _squares(g), alpha=(1.0 - beta2) / g.shape[1])
        size = (lr / c1) / (v.sqrt() / c2.sqrt() + eps)
        p = torch.addcmul(p * keep, m, size.to(dtype).unsqueeze(1), value=-1.0)
        for parts, part in zip(new, (p, m, v), strict=True):
            parts.append(part.reshape(-1))
    p, m, v = map(torch.cat, new)
    return p.reshape(param.shape).to(param.dtype), m.reshape(param.shape), v


def _by_segment(
    segments: Sequence[Segment], flat: Sequence[Tensor], per_block: Tensor
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Views of each segment: (blocks, size) of the `flat` tensors, (blocks,) of `per_block`."""
    start = block = 0
    for s in segments:
        stop = start + s.blocks * s.size
        views = [x[start:stop].view(s.blocks, s.size) for x in flat]
        yield views, per_block[block : block + s.blocks]
        start, block = stop, block + s.blocks


def _squares(g: Tensor) -> Tensor:
    """Sum of the squares of each row; not a dot product, whose bits depend on its address."""
    return torch.linalg.vector_norm(g, dim=1).square()


class AdamMini(AdamLike):
    """Adam-mini over groups of parameters; the rule is `adam_mini_update`.

    Hand over names, by which the blocks are found: `AdamMini(model.named_parameters(),
    num_heads=8)`. `print(optimizer.partition)` shows what became of them.

    Args:
        params: (name, tensor) pairs, tensors or groups.
        lr: learning rate, a number or a one-element tensor (whose value is copied).
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; a step takes `lr * weight_decay` of a weight.
        num_heads: attention heads; without it queries and keys are one block each, with a warning.
        num_kv_heads: heads of keys and values, where there are fewer.
        state: the first moment is kept in "fp32", "bf16" or "fp8" (e4m3 with a power of two per
            block, see `optim.moments`). Where a device or torch has no fp8, bf16 is taken, with a
            warning. float64 parameters keep float64 with "fp32".
        rules: go before `partition.RULES`, in the same form.
        fused: see DeviceOptimizer.
        half: see DeviceOptimizer.
    """

    divide = staticmethod(divide_mini)
    own_options = ("segments",)  # of parts of parameters, see `ShardedOptimizer`

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        state: State = "fp32",
        rules: Sequence[Rule] = (),
        fused: Fused | None = None,
        half: Half = "nearest",
    ) -> None:
        self._rules = tuple(rules)
        self._segments: dict[Tensor, tuple[Segment, ...]] = {}
        self._warned = False
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "state": state,
            "half": half,
        }
        super().__init__(params, defaults, fused)

    # The blocks

    @property
    def partition(self) -> Partition:
        """Every parameter with its role and blocks, over all groups."""
        return Partition(part for g in self.param_groups for part in self._parts(g, warn=False))

    def _parts(self, group: dict[str, Any], *, warn: bool) -> Partition:
        names = group.get("param_names") or [""] * len(group["params"])
        named = zip(names, group["params"], strict=True)
        heads = (group["num_heads"], group["num_kv_heads"])
        given = group.get("segments")  # of parts of parameters
        parts = partition_parameters(named, *heads, rules=self._rules, warn=warn and given is None)
        if given is None:
            return parts
        pairs = zip(parts, given, strict=True)
        return Partition(
            replace(part, segments=tuple(Segment(*s) for s in some)) for part, some in pairs
        )

    def segments(self, p: Tensor) -> tuple[Segment, ...]:
        """The blocks of a parameter of this optimizer."""
        return self._segments[p]

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        if group["state"] not in ("fp32", "bf16", "fp8"):
            raise ValueError(f"state must be 'fp32', 'bf16' or 'fp8', got {group['state']!r}")
        check_rules(self._rules)
        for name in ("num_heads", "num_kv_heads"):
            if group[name] is not None:
                check_count(name, group[name])

    # State

    def _new_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        if param not in self._segments:
            parts = self._parts(group, warn=True)
            self._segments.update({part.param: part.segments for part in parts})
        blocks = sum(s.blocks for s in self._segments[param])
        wide = work_dtype(param.dtype)
        dtype = self._moment_dtype(group, param, wide)
        state = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros(param.shape, dtype=dtype, device=param.device),
            "exp_avg_sq": torch.zeros(blocks, dtype=wide, device=param.device),
        }
        if dtype.itemsize == 1:
            state["exp_avg_scale"] = torch.ones(blocks, dtype=torch.float32, device=param.device)
        return state | self._master(group, param)

    def _moment_dtype(self, group: dict[str, Any], param: Tensor, wide: torch.dtype) -> torch.dtype:
        if group["state"] == "fp32":
            return wide
        if group["state"] == "fp8":
            missing = fp8_missing(param.device)
            if not missing:
                return torch.float8_e4m3fn
            if not self._warned:
                self._warned = True
                warn(f"{missing}: the first moment is kept in bf16")
        return torch.bfloat16

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rules": self._rules, "_warned": self._warned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._segments = {part.param: part.segments for part in self.partition}

    # The step

    def _launch(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[Tensor]:
        from optim.kernels.mini_launch import mini_numbers

        plan = self._plan_of(group, params)
        for bucket in plan.buckets:
            rate = self.ema.begin_fused(bucket.names) if bucket.names else 1.0
            values = mini_numbers(group["betas"], group["weight_decay"], group["eps"], rate)
            grads = [p.grad.contiguous() for p in bucket.params]
            bucket.launch.run(grads, values, lr, grad_scale, found_inf)
        self._remember(group, plan, lr)
        return plan.rest

    def _plan(self, group: dict[str, Any], params: list[Tensor]) -> Plan:
        from optim.kernels.mini_launch import MiniLaunch, supported

        buckets = []
        for some, names, shadows in self._split([p for p in params if supported(p)]):
            states = [self.state[p] for p in some]
            segments = [self._segments[p] for p in some]
            launch = MiniLaunch(some, states, segments, shadows, self._seeds(group, some))
            buckets.append(Bucket(some, names, launch))
        return Plan(params, self.ema, buckets, [p for p in params if not supported(p)])

    def _update_one(
        self,
        group: dict[str, Any],
        p: Tensor,
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        state, segments = self.state[p], self._segments[p]
        grad = p.grad.to(work_dtype(p.dtype))
        grad = grad if grad_scale is None else grad / grad_scale
        plain = p.device.type == "cpu" and found_inf is None and p.is_contiguous()
        if plain and p.dtype == grad.dtype == state["exp_avg"].dtype:
            self._update_in_place(group, p, grad, lr)
            return
        state["step"] += 1 if found_inf is None else ~found_inf
        old = state["exp_avg"]
        m = from_fp8(old, state["exp_avg_scale"], segments) if "exp_avg_scale" in state else old
        moments = (m.to(grad.dtype), state["exp_avg_sq"], state["step"])
        options = {k: group[k] for k in ("betas", "eps", "weight_decay")}
        wide = self._wide(group, p)
        new_p, m, v = adam_mini_update(wide, grad, *moments, lr, segments=segments, **options)
        writes = [*self._narrow(group, p, new_p), (state["exp_avg_sq"], v)]
        if "exp_avg_scale" in state:
            scale = fp8_scale(block_amax(m, segments), state["exp_avg_scale"])
            codes = to_fp8(m, scale, segments)
            # bits, since torch selects among few dtypes
            writes += [(state["exp_avg_scale"], scale)]
            writes += [(old.view(torch.uint8), codes.view(torch.uint8))]
        else:
            writes += [(old, m.to(old.dtype))]
        write_gated(writes, found_inf)

    def _update_in_place(self, group: dict[str, Any], p: Tensor, grad: Tensor, lr: Tensor) -> None:
        """`adam_mini_update` without temporaries as large as `p`, whose page faults cost most."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"].add_(1)
        c1, c2 = bias_correction(t, beta1), bias_correction(t, beta2)
        keep = 1.0 - lr * group["weight_decay"]
        flat = [x.detach().reshape(-1) for x in (p, grad, m)]
        for (p_, g_, m_), v_ in _by_segment(self._segments[p], flat, v):
            m_.lerp_(g_, 1.0 - beta1)
            v_.mul_(beta2).add_(_squares(g_), alpha=(1.0 - beta2) / g_.shape[1])
            size = (lr / c1) / (v_.sqrt() / c2.sqrt() + group["eps"])
            p_.mul_(keep).addcmul_(m_, size.to(p.dtype).unsqueeze(1), value=-1.0)
