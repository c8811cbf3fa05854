"""What a rank keeps of the state of a sharded optimizer, for models as they are."""

from __future__ import annotations

import pytest
import torch

from models import ModelDims, build_model
from optim.cuts import share_out
from training.cli import compose_values
from training.config import RunConfig, validate

# What a rank keeps at most, on 2, 4 and 8: a hundredth above the least that whole matrices allow.
# Of trm_mlp six equal matrices make up 94 %, so of 4 ranks one has two: more than 1/4 + 2 %.
LEAST = {
    ("trm", "muon"): (0.51, 0.27, 0.155),
    ("trm_mlp", "muon"): (0.51, 0.313, 0.157),
    ("hrm", "muon"): (0.51, 0.26, 0.13),
    ("urm", "muon"): (0.51, 0.26, 0.135),
    ("trm", "adam_mini"): (0.51, 0.26, 0.13),
    ("trm_mlp", "adam_mini"): (0.51, 0.26, 0.13),
    ("trm", "muon optim.split_fused=false"): (0.51, 0.27, 0.231),  # gate and up are one matrix
}


@pytest.mark.parametrize("arch, optim", LEAST)
def test_state_of_the_presets(arch, optim):
    overrides = [f"arch={arch}", "experiment=plain", "data=sudoku", *f"optim={optim}".split()]
    config = validate(RunConfig, compose_values("cfg_pretrain", overrides))
    model = build_model(config.arch, ModelDims(81, 11, 1), seed=0, device=torch.device("cpu"))
    named = list(model.named_parameters())
    cuts = config.optim.divide(named, {})
    for ranks, most in zip((2, 4, 8), LEAST[arch, optim], strict=True):
        loads = [0] * ranks
        share_out([p.numel() for _, p in named], cuts, loads)
        assert max(loads) <= most * sum(loads), f"{max(loads) / sum(loads):.1%} on {ranks} ranks"
