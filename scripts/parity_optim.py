"""Every fused optimizer against its reference, and against torch and the official packages.

    python scripts/parity_optim.py [--quick] [--steps 5 50 1000] [--only REGEX] [--out FILE.json]

Each row: the same gradients for so many steps; largest and mean difference of parameters and of
states (of float32 states; moments in bf16 or fp8 as what they stand for). Without a GPU the Triton
kernels run in Triton's interpreter, where bfloat16 is left to Adam-mini. "here" are this machine's
own fast paths without Triton.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"  # before Triton
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from optim import AdamATan2, AdamMini, AdamW, Muon, SparseSignSGD, muon_update
from optim.base import DeviceOptimizer
from optim.moments import from_fp8

Named = list[tuple[str, Tensor]]
States = dict[Tensor, dict[str, Tensor]]
Runner = tuple[Callable[[], Any], Callable[[Tensor], dict[str, Tensor]]]  # step, states of p
CUDA = torch.cuda.is_available()
LR, DECAY, BETAS, HEADS = 1e-3, 0.1, (0.9, 0.95), 2
DEVICE = "cuda" if CUDA else "cpu"
SHAPES = {
    "odd": {"mlp.0.weight": (7, 5), "q_proj.weight": (6, 3), "norm.weight": (1,), "gain": ()},
    "even": {"embed.weight": (32, 64), "q_proj.weight": (64, 64), "mlp.weight": (16, 512)},
    "large": {"embed.weight": (1024, 512), "k_proj.weight": (512, 512), "mlp.up": (96, 5000)},
}


def parameters(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Named:
    """Named parameters of size about 1."""
    rng = torch.Generator().manual_seed(0)
    return [
        (n, torch.randn(s, generator=rng).to(DEVICE, dtype).requires_grad_())
        for n, s in shapes.items()
    ]


def ours(make: Callable[[Named], DeviceOptimizer]) -> Callable[[Named], Runner]:
    """An optimizer of this package, as it steps by itself."""

    def build(named: Named) -> Runner:
        optimizer = make(named)
        return optimizer.step, lambda p: states(optimizer, p)

    return build


def reference(make: Callable[[Named], DeviceOptimizer]) -> Callable[[Named], Runner]:
    """The pure functions of an optimizer of this package, parameter after parameter."""

    def build(named: Named) -> Runner:
        optimizer = make(named)

        @torch.no_grad()
        def step() -> None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    state, lr = optimizer.state[p], group["lr"]
                    if group.get("kind") == "muon":
                        keys = ("momentum", "nesterov", "weight_decay", "scaling", "ns_steps")
                        options = {k: group[k] for k in (*keys, "coefficients")}
                        pieces = dict(zip(group["params"], group["pieces"], strict=True))
                        options["pieces"] = pieces[p]
                        new, m = muon_update(p, p.grad, state["momentum_buffer"], lr, **options)
                        p.copy_(new)
                        state["momentum_buffer"].copy_(m)
                    elif isinstance(optimizer, AdamMini):
                        optimizer._update_one(group, p, lr, None, None)
                    else:
                        DeviceOptimizer._update_one(optimizer, group, p, lr, None, None)

        return step, lambda p: states(optimizer, p)

    return build


def states(optimizer: DeviceOptimizer, p: Tensor) -> dict[str, Tensor]:
    """Moments of a parameter as float numbers."""
    state = dict(optimizer.state[p])
    if "exp_avg_scale" in state:
        scale = state.pop("exp_avg_scale")
        state["exp_avg"] = from_fp8(state["exp_avg"], scale, optimizer.segments(p))
    return {k: v for k, v in state.items() if k != "step"}


def in_float64(make: Callable[[Named], DeviceOptimizer]) -> Callable[[Named], Runner]:
    """The pure functions on float64 copies."""

    def build(named: Named) -> Runner:
        twins = [(n, p.detach().double().requires_grad_()) for n, p in named]
        step, of = reference(make)(twins)
        where = {p: q for (_, p), (_, q) in zip(named, twins, strict=True)}

        @torch.no_grad()
        def both() -> None:
            for p, q in where.items():
                q.grad = p.grad.double()
            step()
            for p, q in where.items():
                p.copy_(q)

        return both, lambda p: of(where[p])

    return build


def foreign(
    make: Callable[[Named], torch.optim.Optimizer], names: dict[str, str]
) -> Callable[[Named], Runner]:
    """An optimizer of another package; `names` maps our names of states to theirs."""

    def build(named: Named) -> Runner:
        optimizer = make(named)

        def of(p: Tensor) -> dict[str, Tensor]:
            return {k: optimizer.state[p][v] for k, v in names.items() if v in optimizer.state[p]}

        return optimizer.step, of

    return build


def pairs() -> Iterator[tuple[str, Callable[[Named], Runner], str, Callable[[Named], Runner]]]:
    """(optimizer, its runner, what it is compared with, the runner of that)."""
    makers: dict[str, tuple[type, dict[str, Any]]] = {
        "AdamW": (AdamW, {}),
        "AdamATan2 outside": (AdamATan2, {}),
        "AdamATan2 inside": (AdamATan2, {"bias_correction": "inside", "a": 1.27}),
        **{f"AdamMini {s}": (AdamMini, {"state": s, "num_heads": HEADS})
           for s in ("fp32", "bf16", "fp8")},
        "Muon": (Muon, {}),
    }  # fmt: skip
    fused = "on" if find_spec("triton") else "off"

    def maker(name: str, how: str) -> Callable[[Named], DeviceOptimizer]:
        cls, options = makers[name]
        if cls is not Muon:
            options = {**options, "betas": BETAS}
        return lambda named: cls(named, LR, weight_decay=DECAY, fused=how, **options)

    moments = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    for name in makers:
        if fused == "on":
            yield name, ours(maker(name, fused)), "reference", reference(maker(name, "off"))
            if name.split()[-1] not in ("bf16", "fp8"):
                yield name, ours(maker(name, fused)), "float64", in_float64(maker(name, "off"))
        yield f"{name}, here", ours(maker(name, "off")), "reference", reference(maker(name, "off"))
    options: dict[str, Any] = {"lr": LR, "betas": BETAS, "weight_decay": DECAY}
    for kind in ("fused", "foreach"):
        make = lambda named, kind=kind: torch.optim.AdamW(  # noqa: E731
            [p for _, p in named], **options, **{kind: True}
        )
        yield "AdamW", ours(maker("AdamW", fused)), f"torch {kind}", foreign(make, moments)
    if find_spec("adam_atan2_pytorch"):
        from adam_atan2_pytorch import AdamAtan2

        make = lambda named: AdamAtan2([p for _, p in named], **options)  # noqa: E731
        name = "AdamATan2 inside"
        yield name, ours(maker(name, fused)), "adam-atan2-pytorch", foreign(make, moments)
    if find_spec("adam_mini"):
        name = "AdamMini fp32"
        names = {"exp_avg": "m", "exp_avg_sq": "vmean"}
        yield name, ours(maker(name, fused)), "adam-mini, official", foreign(official_mini, names)


def official_mini(named: Named) -> torch.optim.Optimizer:
    """adam-mini over the same blocks: heads of as many elements as `q_proj` and `k_proj` have."""
    from adam_mini import Adam_mini

    optimizer = Adam_mini(named, LR, BETAS, weight_decay=DECAY, dim=2, n_heads=1, verbose=False)
    heads = [p.numel() for n, p in named if n.startswith(("q_proj", "k_proj"))]
    optimizer.head_numel = heads[0] // HEADS if heads else 1
    for group in optimizer.param_groups:
        group["weight_decay"] = DECAY  # also of norms
    return optimizer


def compare(
    left: Callable[[Named], Runner], right: Callable[[Named], Runner], shapes: str,
    dtype: torch.dtype, steps: int,
) -> dict[str, float]:  # fmt: skip
    """Largest and mean differences after `steps` steps with the same gradients."""
    sides = []
    for build in (left, right):
        named = parameters(SHAPES[shapes], dtype)
        sides.append((named, *build(named)))
    rng = torch.Generator(DEVICE).manual_seed(1)
    for _ in range(steps):
        for (_, p), (_, q) in zip(sides[0][0], sides[1][0], strict=True):
            p.grad = torch.randn(p.shape, device=DEVICE, generator=rng).to(dtype)
            q.grad = p.grad.clone()
        for _, step, _ in sides:
            step()
    found: dict[str, list[Tensor]] = {"parameters": [], "states": []}
    for (_, p), (_, q) in zip(sides[0][0], sides[1][0], strict=True):
        found["parameters"].append((p.detach().double() - q.detach().double()).abs().flatten())
        mine, theirs = sides[0][2](p), sides[1][2](q)
        for k in mine.keys() & theirs.keys():
            gap = mine[k].double().flatten() - theirs[k].double().flatten()
            found["states"].append(gap.abs())
    result = {}
    for kind, gaps in found.items():
        every = torch.cat(gaps)
        result[f"{kind} max"], result[f"{kind} mean"] = float(every.max()), float(every.mean())
    return result


def compare_sparse(steps: int) -> dict[str, float]:
    """SparseSignSGD's kernel against its reference; whole gradients, whose sums are exact."""
    rng = torch.Generator().manual_seed(0)
    tables = [torch.randn(50, 40, generator=rng).to(DEVICE)]
    tables.append(tables[0].clone())
    pair = [SparseSignSGD([t], LR, DECAY, fused=f) for t, f in zip(tables, ("on", "off"))]  # noqa: B905
    for _ in range(steps):
        ids = torch.randint(50, (30,), generator=rng).to(DEVICE)
        rows = torch.randint(-3, 4, (30, 40), generator=rng).float().to(DEVICE)
        for table, optimizer in zip(tables, pair, strict=True):
            optimizer.add_rows(table, ids, rows)
            optimizer.step()
    gap = (tables[0] - tables[1]).abs()
    return {"parameters max": float(gap.max()), "parameters mean": float(gap.mean())}


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 50, 1000])
    parser.add_argument("--quick", action="store_true", help="5 and 20 steps, small shapes")
    parser.add_argument("--only", default="", help="regular expression over optimizer and peer")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    steps = [5, 20] if args.quick else args.steps
    shapes = ["odd", "even"] if args.quick or not CUDA else list(SHAPES)
    where = torch.cuda.get_device_name() if CUDA else "CPU, Triton interpreted"
    print(f"{where}, torch {torch.__version__}; lr {LR}, decay {DECAY}; differences, max and mean")
    heads = ("param max", "param mean", "state max", "state mean")
    print(f"{'optimizer':24}{'against':22}{'dtype':10}{'shapes':7}{'steps':>6}"
          + "".join(f"{h:>12}" for h in heads))  # fmt: skip
    rows: list[dict[str, Any]] = []

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        cells = [row[f"{k} {s}"] for k in ("parameters", "states") for s in ("max", "mean")
                 if f"{k} {s}" in row]  # fmt: skip
        print(f"{row['optimizer']:24}{row['against']:22}{row['dtype']:10}{row['shapes']:7}"
              f"{row['steps']:6d}" + "".join(f"{c:12.2e}" for c in cells), flush=True)  # fmt: skip

    for name, left, peer, right in pairs():
        if not re.search(args.only, f"{name} {peer}"):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            half = dtype == torch.bfloat16
            if half and (peer not in ("reference", "float64") or "Muon" in name):
                continue  # the peers' states are as narrow as their parameters
            if half and not CUDA and not ("Mini" in name or "here" in name):
                continue  # not in the interpreter
            for kind in shapes:
                for n in steps:
                    if n > 50 and not CUDA and kind != "odd":
                        continue
                    row = {"optimizer": name, "against": peer, "shapes": kind, "steps": n}
                    row["dtype"] = str(dtype).removeprefix("torch.")
                    show(row | compare(left, right, kind, dtype, n))
    if find_spec("triton") and re.search(args.only, "SparseSignSGD reference"):
        for n in steps:
            row = {"optimizer": "SparseSignSGD", "against": "reference", "shapes": "50×40"}
            show({**row, "dtype": "float32", "steps": n, **compare_sparse(n)})
    if args.out:
        report = {"device": where, "torch": torch.__version__, "rows": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
