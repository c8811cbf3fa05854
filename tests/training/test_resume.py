"""A resumed run is the run that was never stopped, bit for bit; and what cannot be is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optim import OPTIMIZERS
from tests.conftest import TINY
from tests.training.helpers import EVERY_5, metrics, newest, resolved, tensors, train
from training import checkpoint
from training.errors import ConfigError
from training.loop import Trainer


def finished(run_dir: Path) -> dict[str, object]:
    """summary.json without the fields that tell the time."""
    summary = json.loads((run_dir / "summary.json").read_text())
    return {k: v for k, v in summary.items() if "second" not in k}


def break_checkpoint(path: Path, how: str) -> None:
    if how == "truncated tensors":
        file = path / "ema.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "flipped byte":
        file = path / "optimizer.safetensors"
        data = bytearray(file.read_bytes())
        data[-7] ^= 1
        file.write_bytes(data)
    elif how == "truncated index":
        file = path / "index.json"
        file.write_text(file.read_text()[:-40])
    elif how == "edited index":
        file = path / "index.json"
        text = file.read_text()
        assert '"step": 10' in text
        file.write_text(text.replace('"step": 10', '"step": 11'))
    elif how == "missing tensors":
        (path / "carry.safetensors").unlink()
    elif how == "missing index":
        (path / "index.json").unlink()
    elif how == "empty folder":
        for file in path.iterdir():
            file.unlink()


DAMAGES = (
    "truncated tensors", "flipped byte", "truncated index", "edited index", "missing tensors",
    "missing index", "empty folder",
)  # fmt: skip


# ------------------------------------------------------------------------------------- to the bit


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("arch", ["trm", "trm_mlp"])
def test_resumed_is_never_stopped(tiny, monkeypatch, arch, optim, grad_accum):
    common = (*EVERY_5, f"arch={arch}", f"optim={optim}", f"grad_accum={grad_accum}")
    whole = train(monkeypatch, *tiny(*common, "run_name=whole"))
    first = train(monkeypatch, *tiny(*common, "run_name=first"), crash_before=8)
    assert newest(first).name == "step_00000006" or newest(first).name == "step_00000005"
    again = train(monkeypatch, f"load_checkpoint={first}")
    assert again.resolve() == first.resolve()
    assert newest(again).name == "step_00000012"
    assert tensors(newest(whole)) == tensors(newest(again))
    assert metrics(whole) == metrics(again)


def test_noise_and_stages_of_training_resume_too(tiny, monkeypatch):
    common = (*EVERY_5, "arch.random_init=true", "arch.state_noise=0.1",
              "arch.halt_curriculum=[[0.5,3],[0.7,5]]", "arch.loss.blanks_only=true")  # fmt: skip
    whole = train(monkeypatch, *tiny(*common, "run_name=whole"))
    plain = train(monkeypatch, *tiny(*EVERY_5, "run_name=plain"))
    first = train(monkeypatch, *tiny(*common, "run_name=first"), crash_before=8)
    again = train(monkeypatch, f"load_checkpoint={first}")
    assert tensors(newest(whole)) == tensors(newest(again)) != tensors(newest(plain))


@pytest.mark.parametrize("state", ["bf16", "fp8"])
def test_small_moments_resume_too(tiny, monkeypatch, state):
    common = (*EVERY_5, "optim=adam_mini", f"optim.state={state}")
    whole = train(monkeypatch, *tiny(*common, "run_name=whole"))
    first = train(monkeypatch, *tiny(*common, "run_name=first"), crash_before=8)
    again = train(monkeypatch, f"load_checkpoint={first}")
    assert tensors(newest(whole)) == tensors(newest(again))
    saved = load_file(newest(again) / "optimizer.safetensors")
    kinds = {t.dtype for name, t in saved.items() if name.endswith("/exp_avg")}
    assert kinds == {{"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[state]}


def test_the_carry_is_in_the_middle_of_thought(stopped):
    """Otherwise the test above would not notice a carry that is not restored."""
    carry = load_file(newest(stopped) / "carry.safetensors")
    assert not carry["halted"].all() and len(carry["steps"].unique()) > 1
    assert carry["state.z_H"].abs().max() > 0


@pytest.mark.parametrize("lost", ["carry", "ema", "optimizer"])
def test_every_file_matters(whole, run_dir, monkeypatch, lost):
    """Zeros in any file of the state change the end of the run: the comparison can fail."""
    path = newest(run_dir)
    file = path / f"{lost}.safetensors"
    save_file({k: torch.zeros_like(v) for k, v in load_file(file).items()}, file)
    index = json.loads((path / "index.json").read_text())
    del index["checksum"]
    index["files"][file.name] = checkpoint.file_sha256(file)
    text = json.dumps({**index, "checksum": checkpoint._index_checksum(index)})
    (path / "index.json").write_text(text)
    again = train(monkeypatch, f"load_checkpoint={run_dir}")
    assert tensors(newest(whole)) != tensors(newest(again))


def test_resuming_twice(whole, tiny, monkeypatch):
    part = train(monkeypatch, *tiny(*EVERY_5, "run_name=part"), crash_before=7)
    train(monkeypatch, f"load_checkpoint={part}", crash_before=9)
    train(monkeypatch, f"load_checkpoint={part}", crash_before=12)
    train(monkeypatch, f"load_checkpoint={part}")
    assert tensors(newest(whole)) == tensors(newest(part))
    assert metrics(whole) == metrics(part)


def test_a_complete_run_stays_as_it_is(tiny, monkeypatch, caplog):
    whole = train(monkeypatch, *tiny(*EVERY_5, "run_name=whole"))
    before, index = tensors(newest(whole)), (newest(whole) / "index.json").read_bytes()
    lines = (whole / "metrics.jsonl").read_bytes()
    summary = finished(whole)
    assert summary["finished"] and summary["step"] == 12
    with caplog.at_level("INFO"):
        train(monkeypatch, f"load_checkpoint={whole}")
    assert "the run is complete: 12 of 12 steps" in caplog.text
    assert tensors(newest(whole)) == before
    assert (newest(whole) / "index.json").read_bytes() == index
    assert (whole / "metrics.jsonl").read_bytes() == lines
    assert finished(whole) == summary


def test_a_complete_run_goes_on_with_more_steps(tiny, monkeypatch):
    constant = (*EVERY_5, "lr_min_ratio=1.0")  # a cosine would depend on the number of steps
    whole = train(monkeypatch, *tiny(*constant, "run_name=whole", "max_steps=16"))
    part = train(monkeypatch, *tiny(*constant, "run_name=part"))
    train(monkeypatch, f"load_checkpoint={part}", "max_steps=16")
    assert tensors(newest(whole)) == tensors(newest(part))


def test_the_run_keeps_its_id_and_says_what_it_restored(run_dir, caplog):
    index = checkpoint.read_index(newest(run_dir))
    with caplog.at_level("INFO"):
        run = resolved(f"load_checkpoint={run_dir}")
        trainer = Trainer(run)
    assert run.run_id == index["run_id"] and run.run_dir.resolve() == run_dir.resolve()
    assert trainer.state.step == 10
    assert "restored from" in caplog.text and "step 10, parameters" in caplog.text
    assert "adam_atan2" in caplog.text and "EMA yes" in caplog.text
    assert "no setting was changed" in caplog.text


# ------------------------------------------------------------------------------ which checkpoint


def test_latest_is_the_newest_of_all_runs(tiny, monkeypatch, run_dir):
    other = train(monkeypatch, *tiny("run_name=other", "max_steps=2"))
    run = resolved("load_checkpoint=latest", f"runs_dir={other.parent}")
    assert run.run_dir.resolve() == other.resolve()
    assert run.resume.index["step"] == 2


def test_an_older_checkpoint_sets_the_newer_ones_aside(whole, monkeypatch, run_dir, caplog):
    folder = run_dir / "checkpoints"
    kept = tensors(folder / "step_00000010")
    train(monkeypatch, f"load_checkpoint={folder / 'step_00000006'}", crash_before=7)
    assert "set aside" in caplog.text
    assert tensors(folder / "superseded-step_00000010") == kept
    assert checkpoint.list_steps(run_dir)[-1] == 6
    assert max(line["step"] for line in metrics(run_dir)) == 6
    aside = (run_dir / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside] == [8]
    train(monkeypatch, f"load_checkpoint={run_dir}")
    assert tensors(newest(whole)) == tensors(newest(run_dir))
    assert metrics(whole) == metrics(run_dir)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_reported_and_the_one_before_used(
    whole, monkeypatch, run_dir, caplog, damage
):
    break_checkpoint(run_dir / "checkpoints" / "step_00000010", damage)
    run = resolved(f"load_checkpoint={run_dir}")
    assert run.resume.path.name == "step_00000006"
    assert "step_00000010" in caplog.text and "taking the checkpoint before" in caplog.text
    Trainer(run).fit()
    assert tensors(newest(whole)) == tensors(newest(run_dir))


def test_all_damaged_is_refused_and_nothing_starts_at_zero(run_dir):
    for path in (run_dir / "checkpoints").glob("step_*"):
        break_checkpoint(path, "flipped byte")
    before = sorted(run_dir.parent.rglob("*"))
    with pytest.raises(ConfigError, match=r"every checkpoint in .* is damaged"):
        resolved(f"load_checkpoint={run_dir}")
    with pytest.raises(ConfigError, match=r"every checkpoint in .* is damaged"):
        resolved("load_checkpoint=latest", f"runs_dir={run_dir.parent}")
    assert sorted(run_dir.parent.rglob("*")) == before


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(run_dir):
    path = run_dir / "checkpoints" / "step_00000010"
    break_checkpoint(path, "flipped byte")
    with pytest.raises(ConfigError, match=r"optimizer.safetensors is damaged"):
        resolved(f"load_checkpoint={path}")


def test_a_run_without_any_checkpoint_is_refused(run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="holds no checkpoint yet"):
        resolved(f"load_checkpoint={run_dir}")


def test_another_format_is_refused_not_guessed_at(run_dir):
    path = newest(run_dir)
    index = json.loads((path / "index.json").read_text())
    del index["checksum"]
    index["format"] = 99
    text = json.dumps({**index, "checksum": checkpoint._index_checksum(index)})
    (path / "index.json").write_text(text)
    with pytest.raises(ConfigError, match="format 99; this version reads format 1"):
        resolved(f"load_checkpoint={run_dir}")


def test_a_copied_checkpoint_continues_in_a_new_run(whole, run_dir, tmp_path, monkeypatch):
    copy = shutil.copytree(newest(run_dir), tmp_path / "elsewhere" / "kept")
    new = train(monkeypatch, f"load_checkpoint={copy}", "run_name=new")
    assert new.name == "new" and sorted(p.name for p in copy.parent.iterdir()) == ["kept"]
    assert tensors(newest(whole)) == tensors(newest(new))


def test_another_run_name_leaves_the_old_run_alone(run_dir, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    new = train(monkeypatch, f"load_checkpoint={run_dir}", "run_name=fork", "lr=1e-3")
    assert new.name == "fork" and new.resolve() != run_dir.resolve()
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before
    assert checkpoint.list_steps(new)[-1] == 12


# ------------------------------------------------------------------------------------- overrides


def test_changes_are_listed_and_the_rest_is_the_checkpoints(run_dir, caplog):
    run = resolved(
        f"load_checkpoint={run_dir}", "lr=0.5", "optim.weight_decay=0.25", "eval.max_examples=4"
    )
    saved = run.resume.index["config"]
    assert set(run.resume.changes) == {
        f"lr: {saved['lr']} → 0.5",
        f"optim.weight_decay: {saved['optim']['weight_decay']} → 0.25",
        "eval.max_examples: 8 → 4",
    }
    assert run.config.lr == 0.5 and run.config.max_steps == 12 and run.config.ema_rate == 0.9
    assert run.config.arch.hidden_size == 32
    with caplog.at_level("INFO"):
        Trainer(run)
    assert "changed on the command line: lr:" in caplog.text


def test_the_same_command_line_again_changes_nothing(tiny, run_dir):
    again = tiny(*EVERY_5, "run_name=stopped", f"load_checkpoint={run_dir}")
    runs = {text.partition("=")[0]: text for text in again}
    runs["runs_dir"] = f"runs_dir={run_dir.parent}"
    run = resolved(*runs.values())
    assert [c for c in run.resume.changes if not c.startswith("runs_dir")] == []
    assert run.run_dir.resolve() == run_dir.resolve()


def test_keys_of_the_checkpoints_own_presets_can_be_changed(tiny, monkeypatch):
    part = train(
        monkeypatch, *tiny(*EVERY_5, "optim=adamw", "arch=trm", "run_name=part"), crash_before=7
    )
    run = resolved(f"load_checkpoint={part}", "optim.eps=1e-6", "arch.rope_theta=500.0")
    assert set(run.resume.changes) == {
        "optim.eps: 1e-08 → 1e-06", "arch.rope_theta: 10000.0 → 500.0"
    }  # fmt: skip


REFUSED = (
    ("arch.hidden_size=64", r"arch\.hidden_size=64 .*arch\.hidden_size=32"),
    ("arch.L_layers=3", r"arch\.L_layers=3"),
    ("arch.mixer=attention", r"arch\.mixer=attention"),
    ("optim=adamw", r"optim\.name=adamw .*optim\.name=adam_atan2"),
    ("seed=1", r"seed=1 .*seed=0"),
    ("global_batch_size=16", r"global_batch_size=16"),
    ("grad_accum=2", r"grad_accum=2"),
    ("ema=false", r"ema=False"),
    ("data.seed=9", r"data\.seed: 0 → 9: that is another dataset"),
    ("data=sudoku6", r"data\.box: .* another dataset"),
    ("data.num_train=40", r"data\.num_train: 60 → 40: that is another dataset"),
    ("optim.eps=1e-6", r"there is no key optim\.eps"),
    ("max_steps=0", r"max_steps=0 is not valid"),
    ("max_steps=7", r"max_steps: 12 → 7: the run would end at step 7, .* at step 10 already"),
    ("experiment=sudoku6", r"arch\.|data\.|global_batch_size"),
)


@pytest.mark.parametrize("override, message", REFUSED, ids=[r[0] for r in REFUSED])
def test_what_contradicts_the_state_is_refused(run_dir, tmp_path, override, message):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        resolved(f"load_checkpoint={run_dir}", f"datasets_dir={tmp_path / 'new'}", override)
    assert sorted(tmp_path.rglob("*")) == before


def test_changed_files_behind_the_same_dataset_folder_are_noticed(run_dir, tmp_path, monkeypatch):
    """A folder dataset has no settings that tell: its contents do."""
    run = resolved(f"load_checkpoint={run_dir}")
    copy = shutil.copytree(run.dataset_path, tmp_path / "folder")
    for split in ("train", "test"):
        file = copy / split / "dataset.json"
        meta = json.loads(file.read_text())
        del meta["loopwright"]
        file.write_text(json.dumps(meta))
    keys = [text for text in TINY if not text.startswith("data.")]
    part = train(
        monkeypatch, *keys, "data=folder", f"data.path={copy}", f"runs_dir={tmp_path / 'runs'}",
        "checkpoint_interval=5", crash_before=6,
    )  # fmt: skip
    assert resolved(f"load_checkpoint={part}").resume.index["step"] == 5
    labels = copy / "train" / "all__labels.npy"
    data = bytearray(labels.read_bytes())
    data[-1] = data[-2]
    data[-2] = (data[-2] - 1) % 4 + 2
    labels.write_bytes(data)
    with pytest.raises(ConfigError, match=r"data: .* another dataset: fingerprint"):
        resolved(f"load_checkpoint={part}")
