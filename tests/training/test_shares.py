"""What a rank keeps of the state of a sharded optimizer, for models as they are."""

from __future__ import annotations

import pytest
import torch

from models import ModelDims, build_model
from optim import OPTIMIZERS
from optim.layout import lay_out
from training.cli import compose_values
from training.config import RunConfig, validate

RANKS = (2, 3, 4, 8)
FORMS = [
    *OPTIMIZERS,
    "adam_mini optim.state=bf16",
    "adam_mini optim.state=fp8",
    "muon optim.split_fused=false",  # gate and up are one matrix: 46 % of trm_mlp's elements in two
]
PRESETS = [
    f"experiment=plain arch={arch} optim={form}"
    for arch in ("trm_mlp", "trm", "hrm", "urm")
    for form in FORMS
]


@pytest.mark.parametrize("preset", [*PRESETS, "experiment=sudoku_speedrun"])
def test_state_of_the_presets(preset):
    """No rank keeps more than its share and 2 % of the whole; all that is kept is counted."""
    overrides = [*preset.split(), "data=sudoku"]
    config = validate(RunConfig, compose_values("cfg_pretrain", overrides))
    model = build_model(config.arch, ModelDims(81, 11, 1), seed=0, device=torch.device("cpu"))
    names, params = zip(*model.named_parameters(), strict=True)
    group = {"params": list(params), "param_names": list(names), "lr": 0.0}
    whole = sum(kept(config.optim.build, [{**group, "params": list(model.named_parameters())}]))
    for ranks in RANKS:
        shares = []
        for rank in range(ranks):
            layout = lay_out(
                [group],
                cut=config.optim.elementwise,
                divide=config.optim.divide,
                rank=rank,
                world=ranks,
            )
            groups = [some for some in (layout.leads, layout.shares) if some]
            shares.append(sum(sum(kept(config.optim.build, some)) for some in groups))
        assert max(shares) <= whole * (1 / ranks + 0.02), f"{max(shares) / whole:.2%} of {ranks}"
        assert sum(shares) == pytest.approx(whole, rel=1e-3)


def kept(build, groups):
    """Bytes of every tensor that an optimizer of these groups keeps."""
    return [t.nbytes for state in build(groups, lr=0.0).state.values() for t in state.values()]
