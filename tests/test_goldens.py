"""Training and evaluation against numbers that the reference implementations produced in float64.

`GOLDENS_DIR` names another directory of such files; every size is taken from a file's `config`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from models import ACT, ARCHITECTURES, ModelDims, act_loss, build_model
from models.legacy import describe, from_reference, our_name, reference_fields, to_reference
from optim import AdamATan2, SparseSignSGD

GOLDENS = Path(os.environ.get("GOLDENS_DIR", Path(__file__).parent / "goldens"))
FILES = sorted(GOLDENS.glob("*.npz"))
TOLERANCE = 1e-6  # of the array's largest magnitude; float32 storage of states costs 6e-8


def close(ours: torch.Tensor, golden: np.ndarray, what: str) -> None:
    golden = np.asarray(golden, dtype=np.float64)
    ours = ours.detach().double().numpy()
    assert ours.shape == golden.shape, what
    error = np.abs(ours - golden).max(initial=0)
    bound = TOLERANCE * max(np.abs(golden).max(initial=0), 1e-12)
    assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"


class Golden:
    def __init__(self, path: Path) -> None:
        self.arrays = np.load(path)
        self.config = c = json.loads(bytes(self.arrays["config"]))
        self.train = c["train"]
        family = c["arch"].partition("_")[0]  # trm_att, trm_mlp and trm_learned are one class
        given = reference_fields(c, family)
        given["loss"] = {"kind": self.train["loss"].removesuffix("_cross_entropy")}
        if "step0/metrics/q_continue_loss" not in self.arrays:  # the baseline does not learn it
            given["loss"]["continue_weight"] = 0
        self.dims = ModelDims(c["seq_len"], c["vocab_size"], c["num_puzzle_identifiers"])
        model = build_model(
            ARCHITECTURES[family](**given), self.dims, seed=0, device=torch.device("cpu")
        )
        weights = from_reference(self.tensors("init/"))
        model.load_state_dict(weights, strict=True)
        assert to_reference(weights).keys() == self.tensors("init/").keys()
        assert describe(weights, c)[0] == family
        assert describe(weights, c)[1].items() >= {k: v for k, v in given.items() if k != "loss"
                                                   and k != "expansion"}.items()  # fmt: skip
        self.act = ACT(model)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {
            k.removeprefix(prefix): torch.from_numpy(np.asarray(self.arrays[k]))
            for k in self.arrays.files
            if k.startswith(prefix)
        }

    def batch(self, where: str) -> dict[str, torch.Tensor]:
        raw = self.tensors(f"{where}/batch/")
        return {
            "inputs": raw["inputs"],
            "labels": raw["labels"],
            "puzzle_ids": raw["puzzle_identifiers"],
        }

    def compare_outputs(self, where: str, carry, output, loss, metrics) -> None:
        arrays = self.arrays
        close(loss, arrays[f"{where}/loss"], f"{where} loss")
        close(output.logits, arrays[f"{where}/out/logits"], f"{where} logits")
        close(output.q_halt, arrays[f"{where}/out/q_halt_logits"], f"{where} q_halt")
        if f"{where}/out/q_continue_logits" in arrays:
            close(output.q_continue, arrays[f"{where}/out/q_continue_logits"], "q_continue")
        predictions = output.logits.argmax(-1).numpy()
        assert (predictions == arrays[f"{where}/out/preds"]).all()
        for name, value in self.tensors(f"{where}/metrics/").items():
            close(metrics[name].double(), value.numpy(), f"{where} {name}")
        if f"{where}/carry/halted" in arrays:
            assert (carry.halted.numpy() == arrays[f"{where}/carry/halted"]).all()
            assert (carry.steps.numpy() == arrays[f"{where}/carry/steps"]).all()


@pytest.fixture(params=FILES, ids=lambda f: f.stem)
def golden(request) -> Golden:
    return Golden(request.param)


def test_there_are_goldens():
    assert FILES, f"no golden of a known architecture in {GOLDENS}"


def test_training_and_evaluation(golden: Golden):
    act, train = golden.act, golden.train
    model = act.model
    adam = AdamATan2(
        model.parameters(),
        lr=train["lr"],
        betas=tuple(train["betas"]),
        weight_decay=train["weight_decay"],
        bias_correction=train["bias_correction"],
    )
    table = model.embedding.puzzles
    sparse = None
    if table is not None:
        sparse = SparseSignSGD(
            [table], lr=train["puzzle_emb_lr"], weight_decay=train["puzzle_emb_weight_decay"]
        )
    loss_config = model.config.loss
    act.train()
    carry = None
    for step in range(train["steps"]):
        batch = golden.batch(f"step{step}")
        carry = act.refill(carry or act.initial_carry(batch), batch)
        rows = model.puzzle_rows(carry.batch["puzzle_ids"])
        if rows is not None:
            rows.requires_grad_()
        carry, output = act(carry, rows)
        loss, metrics = act_loss(carry, output, loss_config)
        golden.compare_outputs(f"step{step}", carry, output, loss, metrics)
        (loss / golden.config["batch_size"]).backward()
        for name, grad in golden.tensors(f"step{step}/grad/").items():
            ours = model.get_parameter(our_name(name)).grad
            close(ours, grad.numpy(), f"step{step} gradient of {name}")
        adam.step()
        adam.zero_grad()
        if sparse is not None:
            sparse.add_rows(table, carry.batch["puzzle_ids"], rows.grad)
            sparse.step()
    for name, value in golden.tensors("final/").items():
        close(model.state_dict()[our_name(name)], value.numpy(), f"final {name}")

    act.eval()
    batch = golden.batch("eval")
    carry = act.refill(act.initial_carry(batch), batch)
    steps = 0
    with torch.no_grad():
        while not carry.halted.all():
            carry, output = act(carry)
            steps += 1
    assert steps == golden.arrays["eval/steps"]
    loss, metrics = act_loss(carry, output, loss_config)
    golden.compare_outputs("eval", carry, output, loss, metrics)
