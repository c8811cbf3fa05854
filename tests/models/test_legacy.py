"""The ancestors' checkpoints, with the tensors that their own code produced (the goldens)."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from models import ModelError, files, load_pretrained
from models.legacy import describe, resize_puzzles, to_reference

GOLDENS = sorted((Path(__file__).parents[1] / "goldens").glob("*.npz"))
PREFIXES = ("_orig_mod.model.inner.", "model.inner.", "module.model.inner.", "inner.", "")


class Golden:
    def __init__(self, path: Path) -> None:
        self.arrays = np.load(path)
        self.config = json.loads(bytes(self.arrays["config"]))
        self.family = self.config["arch"].partition("_")[0]

    def tensors(self, prefix: str, names: str = "model.inner.") -> dict[str, torch.Tensor]:
        """Tensors of the group `prefix`, their names beginning with `names`."""
        return {
            names + k.removeprefix(prefix).removeprefix("model.inner."): torch.from_numpy(
                np.asarray(self.arrays[k])
            )
            for k in self.arrays.files
            if k.startswith(prefix)
        }

    def write_config(self, folder: Path) -> None:
        arch = {k: v for k, v in self.config.items() if k not in ("train", "arch", "batch_size")}
        arch["loss"] = {"loss_type": self.config["train"]["loss"]}
        (folder / "all_config.yaml").write_text(yaml.safe_dump({"arch": arch, "epochs": 7}))


@pytest.fixture(params=GOLDENS, ids=lambda f: f.stem)
def golden(request) -> Golden:
    return Golden(request.param)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_there_and_back(golden, tmp_path, prefix):
    theirs = golden.tensors("init/", prefix)
    torch.save(theirs, tmp_path / "step_10")
    state = files.read_file(tmp_path / "step_10")
    assert state.reference and state.average is None
    back = to_reference(state.weights)
    expected = golden.tensors("init/")
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[k], expected[k]) for k in back)


def test_shapes_tell_what_model_it_is(golden, tmp_path):
    torch.save(golden.tensors("init/"), tmp_path / "step_10")
    weights, c = files.read_file(tmp_path / "step_10").weights, golden.config
    for given in ({}, c):
        name, fields, dims = describe(weights, given)
        assert name == golden.family
        assert (fields["hidden_size"], fields["puzzle_emb_ndim"]) == (32, 32)
        assert dims.vocab_size == c["vocab_size"] and dims.num_puzzle_ids == 5
        layers = {k: c[k] for k in ("H_layers", "L_layers", "num_layers") if c.get(k)}
        assert fields.items() >= layers.items()
    tells = c["pos_encodings"] == "learned" or c.get("mlp_t")
    assert dims.seq_len == (c["seq_len"] if tells else 0)


def test_answers_are_those_of_the_reference(golden, tmp_path):
    """A file with its all_config.yaml, loaded for use: the predictions of the golden evaluation."""
    torch.save(golden.tensors("final/", "_orig_mod.model.inner."), tmp_path / "step_6")
    golden.write_config(tmp_path)
    solver = load_pretrained(tmp_path, device="cpu", seq_len=golden.config["seq_len"])
    batch = golden.tensors("eval/batch/", "")
    answer = solver(batch["inputs"], batch["puzzle_identifiers"])
    assert torch.equal(answer.tokens, torch.from_numpy(golden.arrays["eval/out/preds"]))
    q_halt = torch.from_numpy(golden.arrays["eval/out/q_halt_logits"])
    # the stored weights are rounded to float32, which the recursion amplifies
    assert torch.allclose(answer.confidence, q_halt.sigmoid(), atol=1e-3)


def training_state(golden) -> dict[str, object]:
    """As a fork saves it: other things beside the weights, an average of the parameters."""
    weights = golden.tensors("init/", "_orig_mod.model.inner.")
    average = {k: v + 1 for k, v in weights.items() if "init" not in k and "puzzle" not in k}
    return {
        "step": 123,
        "model_state_dict": weights,
        "optimizer_states": [{"state": {0: {"step": 3.0, "exp_avg": torch.ones(3)}},
                              "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0]}]}],
        "ema_shadow": average,
        "rng_state": torch.zeros(16, dtype=torch.uint8),
        "cuda_rng_state": [torch.zeros(16, dtype=torch.uint8)],
    }  # fmt: skip


def test_a_forks_training_state(golden, tmp_path):
    content = training_state(golden)
    torch.save(content, tmp_path / "state.pt")
    state = files.read_file(tmp_path / "state.pt")
    assert state.step == 123 and state.reference
    for name, value in content["model_state_dict"].items():
        assert torch.equal(to_reference(state.weights)["model.inner." + name[22:]], value)
    assert state.average and all(
        (v == state.weights[k] + 1).all() for k, v in state.average.items()
    )
    states = [load_pretrained(tmp_path / "state.pt", device="cpu", seq_len=16, num_heads=2,
                              puzzle_emb_len=golden.config.get("puzzle_emb_len", "auto"),
                              weights=w).model.state_dict() for w in ("ema", "model")]  # fmt: skip
    assert torch.equal(states[0]["lm_head.weight"], states[1]["lm_head.weight"] + 1)
    assert torch.equal(states[0]["embedding.puzzles"], states[1]["embedding.puzzles"])


def test_puzzle_embeddings_of_another_dataset():
    table = torch.arange(12.0).reshape(4, 3)
    mean = table.mean(0)
    assert torch.equal(resize_puzzles(table, 6), mean.expand(6, 3))
    resized = resize_puzzles(table, 3, ["<blank>", "a", "b", "c"], ["<blank>", "c", "new"])
    assert torch.equal(resized, torch.stack([table[0], table[3], mean]))
    assert torch.equal(resize_puzzles(table, 2, ["a"] * 9, ["b", "b", "c"]), mean.expand(2, 3))


def test_what_belongs_to_no_model_is_refused(tmp_path):
    torch.save({"embed_tokens.embedding_weight": torch.ones(3, 4)}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"a\.pt holds no model that is known here"):
        load_pretrained(tmp_path / "a.pt")
    golden = Golden(GOLDENS[0])
    torch.save(golden.tensors("final/"), tmp_path / "step_6")
    (tmp_path / "all_config.yaml").write_text("arch: {num_heads: 7, H_cycles: none}")
    with pytest.raises(ModelError, match="step_6 belongs to no model known here: H_cycles"):
        load_pretrained(tmp_path)
    (tmp_path / "all_config.yaml").write_text("arch: [")
    with pytest.raises(ModelError, match=r"all_config\.yaml cannot be read"):
        load_pretrained(tmp_path)
    torch.save({"model_state_dict": {}, "step": 3}, tmp_path / "b.pt")
    with pytest.raises(ModelError, match=r"b\.pt holds no model that is known"):
        load_pretrained(tmp_path / "b.pt")
    with pytest.raises(ModelError, match="there is no checkpoint at"):
        load_pretrained(tmp_path / "c")


# ------------------------------------------------------------------------------------------ the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the package huggingface_hub, which serves the files of `tmp_path / "hub"`."""
    fake, folder = types.ModuleType("huggingface_hub"), tmp_path / "hub"
    folder.mkdir()
    fake.downloads = []

    def list_repo_files(repository):
        if repository != "owner/name":
            raise RuntimeError(f"401 Client Error\nfor {repository}")
        return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]

    def hf_hub_download(repository, name):
        fake.downloads.append(name)
        return str(folder / name)

    monkeypatch.setattr(files, "_require_network", lambda text: None)
    fake.list_repo_files, fake.hf_hub_download = list_repo_files, hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    fake.folder = folder
    return fake


def test_a_hubs_id(hub):
    golden = Golden(GOLDENS[0])
    for number in (9, 10):
        (hub.folder / "run").mkdir(exist_ok=True)
        torch.save(golden.tensors("final/"), hub.folder / "run" / f"step_{number}")
    golden.write_config(hub.folder / "run")
    solver = load_pretrained("hf:owner/name", device="cpu", seq_len=16)
    assert hub.downloads == ["run/all_config.yaml", "run/step_10"]
    assert solver.model.config.name == golden.family
    assert files.from_hub("hf:owner/name/run/step_9") == hub.folder / "run" / "step_9"


def test_a_hubs_id_that_cannot_be(hub, monkeypatch):
    for text, message in (
        ("hf:name", "should be hf:owner/name"),
        ("hf:owner/name", "name a file of it, as in hf:owner/name/FILE; it holds nothing"),
        ("hf:other/name", "cannot be downloaded: 401 Client Error"),
    ):
        with pytest.raises(ModelError, match=message):
            files.from_hub(text)
    (hub.folder / "README.md").write_text("x")
    (hub.folder / "checkpoint").write_text("x")  # as HRM's are called
    assert files.from_hub("hf:owner/name").name == "checkpoint"
    (hub.folder / "more.bin").write_text("x")
    with pytest.raises(ModelError, match=r"it holds (checkpoint, more\.bin|more\.bin, checkpoint)"):
        files.from_hub("hf:owner/name")
    save_file({"a": torch.ones(1)}, hub.folder / "a.safetensors")
    assert files.from_hub("hf:owner/name").name == "a.safetensors"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match="needs the package huggingface_hub"):
        files.from_hub("hf:owner/name")
