"""The sets of parameters and the implementations that `bench_optim.py` times."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from optim import EMA, AdamATan2, AdamMini, AdamW, Muon, adam_atan2_update, adamw_update

Step = Callable[[], Any]
Named = list[tuple[str, Tensor]]
LR, MAX_NORM, RATE = 1e-4, 1.0, 0.999
RULE = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.1}
HEAD = 64
MINI_BYTES = {"fp32": 20, "bf16": 16, "fp8": 14}  # per parameter that a step must move


def shapes_of(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a parameter set."""
    if name == "single":
        return [("weight", (4096, 1024))]
    if name == "tiny":
        return [(f"blocks.{i}.weight", (64, 96)) for i in range(4)]
    if name == "trm7m":  # two blocks of width 512, vocabulary 12
        layer = {"qkv": (1536, 512), "out": (512, 512), "gate_up": (3072, 512), "down": (512, 1536)}
        shapes = [(f"blocks.{i}.{k}.weight", s) for i in range(2) for k, s in layer.items()]
        rest = {"tokens": (12, 512), "lm_head": (12, 512), "q_head": (2, 512), "q_head.bias": (2,)}
        return shapes + list(rest.items())
    layer = {"ln_1": (1024,), "qkv": (3072, 1024), "proj": (1024, 1024), "ln_2": (1024,)}
    layer |= {"fc": (4096, 1024), "down": (1024, 4096)}
    shapes = [(f"blocks.{i}.{k}.weight", s) for i in range(24) for k, s in layer.items()]
    return [*shapes, ("embed", (50304, 1024)), ("ln_f", (1024,))]


def heads_of(named: Named) -> int:
    """Attention heads of 64 of a model of this width."""
    return max(1, min(p.shape[-1] for _, p in named if p.ndim > 1) // HEAD)


def official_name(name: str) -> str:
    """The name by which adam-mini finds blocks of about the same kind."""
    known = {"qkv": "wq", "out": "wo", "proj": "wo", "tokens": "embed", "q_head": "output"}
    known |= dict.fromkeys(("gate_up", "down", "fc"), "mlp")
    return ".".join(known.get(part, part) for part in name.split("."))


def make_params(name: str, device: str) -> list[tuple[str, Tensor]]:
    """Fresh parameters with a gradient each."""
    rng = torch.Generator(device).manual_seed(0)
    named = []
    for n, shape in shapes_of(name):
        p = (torch.randn(shape, device=device, generator=rng) * 0.02).requires_grad_()
        p.grad = torch.randn(shape, device=device, generator=rng) * 1e-3
        named.append((n, p))
    return named


def contenders(device: str) -> dict[str, tuple[Callable[[Named], Step], int]]:
    """Name → (from named parameters to a step, bytes per parameter the rule must move).

    A step that is not a method of its optimizer has it as the attribute `optimizer`.
    """
    cuda = device == "cuda"
    table = {
        "ours AdamW": (ours(AdamW, "auto"), 28),
        "ours AdamATan2": (ours(AdamATan2, "auto"), 28),
        "ours AdamW, reference": (ours(AdamW, "off"), 28),
        "ours AdamATan2, reference": (ours(AdamATan2, "off"), 28),
        "AdamW rule, compiled": (compiled(adamw_update, {"eps": 1e-8}), 28),
        "AdamATan2 rule, compiled": (compiled(adam_atan2_update, {}), 28),
        "torch AdamW, loop": (torch_adamw(cuda, foreach=False), 28),
        "torch AdamW, foreach": (torch_adamw(cuda, foreach=True), 28),
        "torch AdamW, fused": (torch_adamw(cuda, fused=True), 28),
        "clip + AdamW + EMA: ours": (all_in_one(AdamW), 40),
        "clip + AdamATan2 + EMA: ours": (all_in_one(AdamATan2), 40),
        "clip + AdamW + EMA: torch": (lambda named: peers_in_turn(named, cuda), 40),
        "ours Muon": (ours(Muon, "auto"), 20),
        "ours Muon, reference": (ours(Muon, "off"), 20),
    }
    if cuda:
        table["torch AdamW, fused, in a graph"] = (fused_in_a_graph, 28)
    for state, size in MINI_BYTES.items():
        table[f"ours AdamMini {state}"] = (mini(state), size)
    if find_spec("adam_atan2_pytorch"):
        from adam_atan2_pytorch import AdamAtan2

        table["adam-atan2-pytorch"] = (
            lambda named: AdamAtan2([p for _, p in named], lr=LR, weight_decay=0.1).step,
            28,
        )
    if find_spec("adam_mini"):
        from adam_mini import Adam_mini

        def official(named: Named) -> Step:
            heads = heads_of(named)
            named = [(official_name(n), p) for n, p in named]
            options = {"dim": heads * HEAD, "n_heads": heads, "verbose": False, **RULE}
            return Adam_mini(named, **options).step

        table["adam-mini, official"] = (official, 20)
    return table


def ours(cls: type, fused: str) -> Callable[[Named], Step]:
    """An optimizer of this project."""
    return lambda named: cls(named, LR, fused=fused).step


def mini(state: str) -> Callable[[Named], Step]:
    """Adam-mini with first moments of this format."""
    return lambda named: (
        AdamMini(named, LR, num_heads=heads_of(named), state=state, fused="auto").step
    )


def torch_adamw(cuda: bool, **kind: bool) -> Callable[[Named], Step]:
    """torch's AdamW, in one of its forms."""
    options = {**RULE, "capturable": cuda, **kind}
    return lambda named: torch.optim.AdamW([p for _, p in named], **options).step


def fused_in_a_graph(named: Named) -> Step:
    """Replays of one captured step of torch's fused AdamW."""
    step = torch_adamw(True, fused=True)(named)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        graph.replay()

    replay.optimizer = step.__self__
    return replay


def compiled(rule: Callable[..., Any], options: dict[str, Any]) -> Callable[[Named], Step]:
    """A reference rule over all parameters under torch.compile."""

    def build(named: Named) -> Step:
        params = [p.detach() for _, p in named]
        grads = [p.grad for _, p in named]
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
        count = torch.zeros((), device=params[0].device)

        @torch.no_grad()
        def update() -> None:
            count.add_(1)
            for p, g, (m, v) in zip(params, grads, moments, strict=True):
                news = rule(p, g, m, v, count, LR, weight_decay=0.1, **options)
                for old, new in zip((p, m, v), news, strict=True):
                    old.copy_(new)

        return torch.compile(update)

    return build


def all_in_one(cls: type) -> Callable[[Named], Step]:
    """Clipping, an optimizer of this project and the average."""

    def build(named: Named) -> Step:
        opt = cls(named, LR, fused="auto")
        ema = EMA(named, RATE).attach(opt)

        def step() -> None:
            opt.step(grad_scale=opt.clip(MAX_NORM)[1])
            ema.update()

        step.optimizer = opt
        return step

    return build


def peers_in_turn(named: Named, cuda: bool) -> Step:
    """The same three, as torch does them."""
    params = [p for _, p in named]
    opt = torch_adamw(cuda, fused=True)(named).__self__
    shadows = [p.detach().clone() for p in params]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(shadows, [p.detach() for p in params], 1 - RATE)

    step.optimizer = opt
    return step
