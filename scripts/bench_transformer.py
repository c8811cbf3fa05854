"""Train a small Transformer with each optimizer, in turn: seconds, peak memory, loss.

    python scripts/bench_transformer.py [--steps 1000] [--runs 5] [--only REGEX] [--out FILE]

Embedding 1024×512, 2 layers of 8 heads, MLP 2048, batch 8×64, float32; next-token prediction of a
fixed random Markov chain. Runs are interleaved, times are medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from optim import AdamATan2, AdamMini, AdamW

VOCAB, WIDTH, HEADS, LAYERS, HIDDEN, BATCH, LENGTH = 1024, 512, 8, 2, 2048, 8, 64
LR, BETAS, DECAY = 3e-4, (0.9, 0.95), 0.1
Factory = Callable[[nn.Module], torch.optim.Optimizer]


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN, bias=False), nn.GELU(), nn.Linear(HIDDEN, WIDTH, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        h = self.norm1(x)
        q, k, v = (
            f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Token embedding, blocks, untied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) → (batch, length, vocabulary)
        return self.lm_head(self.norm(self.blocks(self.embed(tokens))))


def contenders() -> dict[str, Factory]:
    """Name → from a model to its optimizer."""

    def ours(cls: type, **options: Any) -> Factory:
        return lambda m: cls(
            m.named_parameters(), LR, betas=BETAS, weight_decay=DECAY, fused="auto", **options
        )

    def theirs(**options: Any) -> Factory:
        common = {"lr": LR, "betas": BETAS, "weight_decay": DECAY}
        return lambda m: torch.optim.AdamW(m.parameters(), **common, **options)

    table: dict[str, Factory] = {
        "torch AdamW": theirs(),
        "torch AdamW, fused": theirs(fused=True),
        "ours AdamW": ours(AdamW),
        "ours AdamATan2": ours(AdamATan2),
        **{
            f"ours AdamMini {s}": ours(AdamMini, state=s, num_heads=HEADS)
            for s in ("fp32", "bf16", "fp8")
        },
    }
    if find_spec("adam_mini"):
        from adam_mini import Adam_mini

        table["adam-mini, official"] = lambda m: Adam_mini(
            list(m.named_parameters()), lr=LR, betas=BETAS, weight_decay=DECAY,
            dim=WIDTH, n_heads=HEADS, verbose=False,
        )  # fmt: skip
    return table


def batches(steps: int, device: str) -> Tensor:
    """(steps, batch, length + 1) tokens of a random chain in which four tokens can follow each."""
    rng = torch.Generator().manual_seed(0)
    follow = torch.randint(VOCAB, (VOCAB, 4), generator=rng)
    tokens = torch.randint(VOCAB, (steps, BATCH, 1), generator=rng)
    for _ in range(LENGTH):
        choice = torch.randint(4, (steps, BATCH), generator=rng)
        tokens = torch.cat([tokens, follow[tokens[..., -1], choice].unsqueeze(-1)], dim=-1)
    return tokens.to(device)


def train(factory: Factory, data: Tensor, device: str) -> tuple[float, float, float]:
    """Seconds, peak MB and mean loss of the last tenth (its floor is the entropy, ln 4)."""
    gc.collect()
    torch.manual_seed(0)
    cuda = device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    model = Transformer().to(device)
    optimizer = factory(model)
    losses = []

    def step(tokens: Tensor) -> None:
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    for tokens in data[:3]:  # compilation and lazy initialization
        step(tokens)
    float(losses[-1])
    begin = time.perf_counter()
    for tokens in data:
        step(tokens)
    float(losses[-1])
    seconds = time.perf_counter() - begin
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if cuda else math.nan
    return seconds, peak, float(torch.stack(losses[-max(1, len(data) // 10) :]).mean())


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="regular expression over the names")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    data = batches(args.steps, args.device)
    table = {name: make for name, make in contenders().items() if re.search(args.only, name)}
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in table}
    for _ in range(args.runs):
        for name, factory in table.items():
            results[name].append(train(factory, data, args.device))
    rows = []
    print(f"{'optimizer':24}{'s':>9}{'min s':>9}{'peak MB':>9}{'loss':>9}")
    for name, runs in results.items():
        seconds = [r[0] for r in runs]
        row = {"optimizer": name, "s": statistics.median(seconds), "min_s": min(seconds)}
        row |= {"peak_MB": runs[-1][1], "loss": runs[-1][2], "runs": seconds}
        rows.append(row)
        cells = (f"{row[k]:9.3f}" for k in ("s", "min_s", "peak_MB", "loss"))
        print(f"{name:24}" + "".join(cells), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"steps": args.steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
