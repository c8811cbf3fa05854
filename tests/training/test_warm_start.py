"""Warm starts from weights alone; files that do not fit or are no weights are refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.legacy import our_name
from tests.training.helpers import newest, resolved
from training.errors import ConfigError
from training.loop import Trainer


def warm(tiny, path, *more):
    return Trainer(resolved(*tiny(f"load_checkpoint={path}", *more)))


@pytest.fixture
def weights(run_dir) -> dict[str, torch.Tensor]:
    return load_file(newest(run_dir) / "model.safetensors")


def assert_warm(trainer: Trainer, weights: dict[str, torch.Tensor], caplog) -> None:
    state = trainer.state
    own = state.model.state_dict()
    assert state.step == 0 and own.keys() == weights.keys()
    assert all(torch.equal(own[k], weights[k]) for k in weights)
    assert all(torch.equal(t, own[k]) for k, t in state.ema.shadow.items())
    moments = state.files()["optimizer"]
    assert all(not t.any() for k, t in moments.items() if not k.endswith("/lr"))
    assert "warm start: weights from" in caplog.text and "at step 0" in caplog.text


def test_warm_start_from_safetensors(tiny, run_dir, weights, caplog):
    caplog.set_level("INFO")
    assert_warm(warm(tiny, newest(run_dir) / "model.safetensors"), weights, caplog)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "_orig_mod.model."])
def test_warm_start_from_a_torch_file(tiny, weights, tmp_path, caplog, prefix):
    caplog.set_level("INFO")
    torch.save({prefix + k: v for k, v in weights.items()}, tmp_path / "weights.pt")
    assert_warm(warm(tiny, tmp_path / "weights.pt"), weights, caplog)


@pytest.mark.parametrize("old_format", [False, True])
def test_warm_start_from_the_references_names(tiny, weights, tmp_path, caplog, old_format):
    from models import legacy

    caplog.set_level("INFO")
    back = {ours: theirs for theirs, ours in legacy._WHOLE.items()}
    segments = {ours: theirs for theirs, ours in legacy._SEGMENTS.items() if "." not in ours}
    named = {}
    for name, value in weights.items():
        theirs = back.get(name)
        if theirs is None:
            parts = name.replace("levels.L", "L_level").split(".")
            theirs = ".".join(segments.get(p, p) for p in parts)
        assert our_name(theirs) == name
        named[f"_orig_mod.model.inner.{theirs}"] = value
    path = tmp_path / "step_1234"  # the reference gives no ending
    torch.save(named, path, _use_new_zipfile_serialization=not old_format)
    assert_warm(warm(tiny, path), weights, caplog)


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def save_evil_torch(payload: object, path: Path) -> None:
    torch.save({"lm_head.weight": payload}, path)


def save_evil_old_torch(payload: object, path: Path) -> None:
    torch.save({"lm_head.weight": payload}, path, _use_new_zipfile_serialization=False)


def save_evil_pickle(payload: object, path: Path) -> None:
    path.write_bytes(pickle.dumps({"lm_head.weight": payload}))


@pytest.mark.parametrize("save", [save_evil_torch, save_evil_old_torch, save_evil_pickle])
def test_a_malicious_pickle_is_refused_and_never_run(tiny, tmp_path, save):
    mark, path = tmp_path / "executed", tmp_path / "evil.pt"
    save(Malicious(mark), path)
    with pytest.raises(ConfigError, match=r"evil\.pt"):
        warm(tiny, path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists()  # the payload does work where pickles are trusted


def rename_one(weights):
    return {("extra" if k == "z_H_init" else k): v for k, v in weights.items()}


BAD_WEIGHTS = {
    "shapes": (lambda w: {k: v[..., :1] for k, v in w.items()}, "has shape"),
    "names": (rename_one, r"1 tensors are missing, such as z_H_init; 1 .* such as extra"),
    "no tensors": (lambda w: {"lm_head.weight": 1}, "not a state dict"),
    "a list": (lambda w: list(w.values()), r"holds no model .* lm_head\.weight"),
    "without its head": (
        lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"},
        "holds no model",
    ),
    "nested": (lambda w: {"model": w}, "not a state dict"),
    "foreign names": (
        lambda w: {
            "embed_tokens.embedding_weight": w["embedding.tokens"],
            "lm_head.weight": w["lm_head.weight"],
            "x.y": w["z_H_init"],
        },
        "no counterpart for the reference tensor 'x.y'",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(tiny, weights, tmp_path, case):
    change, message = BAD_WEIGHTS[case]
    torch.save(change(weights), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=message):
        warm(tiny, tmp_path / "weights.pt")


@pytest.mark.parametrize("cut", [0, 5, 100, 3000])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_truncated_weights_are_refused(tiny, weights, tmp_path, kind, cut):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    assert path.stat().st_size > 3000
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ConfigError, match=r"w\.(pt|safetensors)"):
        warm(tiny, path)
