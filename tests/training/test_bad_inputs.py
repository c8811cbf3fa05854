"""Bad input: one sentence that names the key or file, exit code 2, at once, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from data import DataError
from tests.conftest import TINY
from tests.training.helpers import ROOT, call, resolved, resolved_evaluation, train
from training.errors import ConfigError, reported

# (command line, what the sentence has to hold); the files are those of the fixture `place`.
PRETRAIN = (
    # keys
    ("lrr=1", r"there is no key lrr; did you mean lr\?"),
    ("arch.nmae=trm", r"there is no key arch\.nmae"),
    ("hidden_size=64", r"no key hidden_size; did you mean arch\.hidden_size\?"),
    ("optim.lr=1", r"no key optim\.lr"),
    ("lr.x=3", r"no key lr\.x"),
    ("eval.interval=3", r"no key eval\.interval"),
    ("batch_size=3", r"no key batch_size"),
    ("LR=3", r"LR"),
    ("+foo=3", r"no key foo"),
    ("++foo.bar=3", r"no key foo\.bar"),
    ("_target_=os.system", r"_target_"),
    ("arch._target_=os.system", r"arch\._target_"),
    ("defaults=[]", r"no key defaults"),
    ("~lr", r"deletes a key; set lr"),
    ("~arch", r"deletes a key"),
    ("optim.eps=1", r"optim\.eps=1.* optim preset has no such key"),
    ("data.path=x", r"data\.path=x.* data preset has no such key"),
    ("optim.name=adamw", r"optim\.name comes with its preset; choose one with optim=NAME"),
    # groups and presets
    ("arch=nope", r"arch=nope does not exist; .* trm, trm_mlp"),
    ("arch=trm_mpl", r"arch=trm_mpl does not exist; did you mean trm_mlp\?"),
    ("arch=null", r"arch=null is not possible"),
    ("arch=", r"arch= does not exist"),
    ("arch=[trm]", r"arch=\[trm\] does not exist"),
    ("arch={a:1}", r"arch=\{a:1\}.*name of a preset"),
    ("arch@foo=trm", r"arch@foo=trm.* cannot be moved"),
    ("arch/foo=trm", r"arch/foo"),
    ("+arch=trm", r"leave out the \+"),
    ("optim=sgd", r"optim=sgd does not exist"),
    ("data=nope", r"data=nope does not exist"),
    ("experiment=x", r"experiment=x does not exist"),
    ("+experiment=smoke", r"leave out the \+"),
    ("experiment=null", r"experiment=null is not possible"),
    ("experiment=[smoke,plain]", r"experiment=\[smoke"),
    # types
    ("lr=abc", r'lr="abc" is not valid: .* number'),
    ("lr=", r'lr="" is not valid'),
    ("lr=null", r"lr=null"),
    ("lr=true", r"lr=true"),
    ("lr=[1e-3]", r"lr=\[0\.001\]"),
    ("lr={a:1}", r"lr=\{"),
    ('lr="1e-3"', r'lr="1e-3"'),
    ("seed=1.0", r"seed=1\.0"),
    ("seed=0x10", r"seed"),
    ("epochs=1e3", r"epochs=1000\.0 is not valid: .* integer"),
    ("max_steps=true", r"max_steps=true"),
    ("arch.hidden_size=64.0", r"arch\.hidden_size=64\.0"),
    ("arch.puzzle_emb_len=some", r'arch\.puzzle_emb_len="some"'),
    ("arch.loss=softmax", r"arch\.loss=.* group of keys, such as arch\.loss\."),
    ("eval=3", r"eval=3 .* group of keys"),
    ("wandb=null", r"wandb=null .* group of keys"),
    ("wandb.tags=a", r"wandb\.tags=.* list"),
    ("wandb.tags={a:b}", r"wandb\.tags"),
    ("wandb.tags=[1]", r"wandb\.tags\.0=1"),
    ("wandb.tags=[[null]]", r"wandb\.tags\.0"),
    ("optim.betas=0.9", r"optim\.betas"),
    ("optim.betas=[0.9]", r"optim\.betas"),
    ("optim.betas=[null,null]", r"optim\.betas\.0"),
    ("run_name=3", r"run_name=3"),
    ("load_checkpoint=[a]", r"load_checkpoint="),
    ("load_checkpoint=3", r"load_checkpoint=3"),
    # ranges and choices
    ("lr=-1e-4", r"lr=-0\.0001"),
    ("lr=1e400", r"lr=Infinity .* finite"),
    ("lr=nan", r"lr=NaN"),
    ("seed=-1", r"seed=-1"),
    ("seed=9223372036854775808", r"seed=9223372036854775808"),
    ("max_steps=0", r"max_steps=0"),
    ("max_steps=99999999999999999999999", r"max_steps=9+ is not valid"),
    ("epochs=0", r"epochs=0"),
    ("global_batch_size=0", r"global_batch_size=0"),
    ("global_batch_size=99999999999999", r"global_batch_size=9+"),
    ("eval_interval=0", r"eval_interval=0"),
    ("checkpoint_interval=0", r"checkpoint_interval=0"),
    ("log_interval=0", r"log_interval=0"),
    ("keep_checkpoints=0", r"keep_checkpoints=0"),
    ("eval.max_examples=0", r"eval\.max_examples=0"),
    ("eval={batch_size:0}", r"eval\.batch_size=0"),
    ("ema_rate=1", r"ema_rate=1"),
    ("grad_clip_norm=-1", r"grad_clip_norm=-1"),
    ("lr_min_ratio=1.5", r"lr_min_ratio=1\.5"),
    ("optim.betas=[0.9,1.0]", r"optim\.betas\.1=1\.0"),
    ("optim.weight_decay=inf", r"optim\.weight_decay=Infinity"),
    ("arch.loss.token_weight=inf", r"arch\.loss\.token_weight=Infinity"),
    ("arch.loss.kind=mse", r"arch\.loss\.kind=.*stablemax"),
    ("arch.hidden_size=99999999999", r"arch\.hidden_size=9+"),
    ("arch.L_layers=1000000000", r"arch\.L_layers"),
    ("arch.H_cycles=0", r"arch\.H_cycles=0"),
    ("arch.halt_max_steps=0", r"arch\.halt_max_steps=0"),
    ("arch.halt_exploration_prob=2", r"arch\.halt_exploration_prob=2"),
    ("arch.expansion=0", r"arch\.expansion=0"),
    ("arch.pos_encodings=sin", r"arch\.pos_encodings=.*'rope'"),
    ("arch.forward_dtype=float8", r"arch\.forward_dtype=.*'bfloat16'"),
    ("arch.mixer=conv", r"arch\.mixer"),
    ("on_nonfinite=ignore", r"on_nonfinite=.*'stop' or 'skip'"),
    ("compile=maybe", r"compile=.*'auto', 'on' or 'off'"),
    ("device=gpu", r"device=.*auto, cpu, mps, cuda"),
    ("device=cuda:99", r"device=cuda:99"),
    ("wandb.mode=on", r"wandb\.mode=.*'online'"),
    ("wandb.project=a/b", r"wandb\.project="),
    # combinations
    ("global_batch_size=7 grad_accum=2", r"grad_accum=2 does not divide the 7 rows"),
    ("arch=trm arch.num_heads=3", r"num_heads=3 does not divide hidden_size=64"),
    ("arch=trm arch.num_heads=64", r"even head size"),
    ("arch=hrm arch.H_grad_cycles=9", r"H_grad_cycles=9 is more than H_cycles"),
    ("arch=hrm arch.curriculum=[[2,1,1]]", r"curriculum: the fractions should rise"),
    ("arch=hrm arch.curriculum=3", r"arch\.curriculum=3 is not valid: should be a list"),
    ("arch=urm arch.grad_checkpoint=foo", r'arch\.grad_checkpoint="foo" is not valid'),
    ("arch=transformer arch.H_cycles=3", r"no key arch\.H_cycles; did you mean arch\.H_layers"),
    ("load_checkpoint=hf:foo", r"hf:foo should be hf:owner/name"),
    ("arch=trm_mlp arch.pos_encodings=rope", r"pos_encodings=rope needs mixer=attention"),
    ("arch.puzzle_emb_ndim=512 arch.puzzle_emb_len=1", r"puzzle_emb_ndim=512 does not fit"),
    ("arch.puzzle_emb_ndim=0 freeze_weights=true", r"freeze_weights=true leaves nothing"),
    ("data.num_aug=1000", r"data\.num_aug=1000 must be 0 for data\.box=\[2,2\]"),
    ("data.holdout_grids=288", r"data\.holdout_grids=288"),
    ("data.box=[3]", r"data\.box=\[3\]"),
    ("data.box=null", r"data\.box"),
    ("data.num_test=99999999", r"data\.num_test=9+"),
    ("data=sudoku data.train_csv=ok.csv", r"data\.train_csv.* data\.test_csv"),
    ("data=sudoku data.train_csv=ok.csv data.test_csv=ok.csv data.num_train=3",
     r"data\.num_train is for generated"),
    ("epochs=1 data.num_train=60 global_batch_size=512 max_steps=null",
     r"epochs=1 of 60 puzzles are fewer rows than one step"),
    ("arch=trm arch.hidden_size=65536 arch.num_heads=8 arch.expansion=64",
     r"the weights alone would take .* GiB.* hidden_size \(65536\)"),
    ("arch=trm arch.hidden_size=32768 arch.L_layers=1024", r"the weights alone would take"),
    ("arch.fp8=true device=cpu", r"arch\.fp8=true needs a CUDA device"),
    ("optim.fused=on device=cpu", r"optim\.fused=on needs a CUDA device"),
    ("arch=trm arch.puzzle_emb_ndim=64 arch.puzzle_emb_len=5000", r"puzzle_emb_len must be 0 to"),
    ("arch=trm arch.rope_theta=0", r"arch\.rope_theta=0"),
    ("arch=trm arch.latents=4 arch.L_cycles=2", r"latents=4 is more than L_cycles=2"),
    ("arch=trm arch.curriculum=[[0.5,1]]", r"arch\.curriculum"),
    ("arch=hrm arch.mixer=mlp", r"no key arch\.mixer|arch preset has no such key"),
    ("arch=urm arch.conv_kernel=65", r"arch\.conv_kernel=65"),
    ("optim=muon optim.ns_steps=2.5", r"optim\.ns_steps=2\.5"),
    ("optim=muon optim.momentum=1.5", r"optim\.momentum=1\.5"),
    ("optim=adam_mini optim.state=fp16", r"optim\.state=.*fp16"),
    ("data=maze data.size=[30]", r"data\.size"),
    ("data=maze data.walls=[0.5,0.3]", r"data\.walls"),
    ("data=mix data.parts=[]", r"data\.parts"),
    ("data=mix data.parts=[{name:sudoku,box:[2,2]}] data.weights=[1,2]", r"data\.weights has 2"),
    ("experiment=text data.files=[empty.csv]", r"data\.files: every file is empty"),
    ("experiment=text data.files=[file] arch.causal=false", r"arch\.causal=false"),
    # syntax
    ("foo", r"'foo' is not of the form key=value"),
    ("=3", r"'=3'"),
    ("lr==3", r"'lr==3' cannot be read"),
    ("lr=(", r"'lr=\(' cannot be read"),
    ("lr=[1", r"'lr=\[1' cannot be read"),
    ("lr=\N{COLLISION SYMBOL}", r"cannot be read"),
    ("ünïcode=3", r"'ünïcode=3'"),
    ("a..b=3", r"'a\.\.b=3'"),
    ("lr=${nope}", r"nope"),
    ("lr=${oc.env:LOOPWRIGHT_NOT_SET}", r"LOOPWRIGHT_NOT_SET"),
    ("lr=" + "9" * 9000, r"lr=9+"),
    ("seed=" + "[" * 300, r"seed="),
    ("", r"'' is not of the form"),
    # Hydra's own
    ("hydra.run.dir=here", r"hydra\.run\.dir is fixed here"),
    ("hydra=1", r"hydra is fixed here"),
    ("-m hydra.sweeper.params.seed=0,1", r"cannot be composed"),
    ("hydra/launcher=nope", r"hydra/launcher"),
    ("hydra.output_subdir=x", r"hydra\.output_subdir"),
    ("--config-name=nope", r"there is no option --config-name=nope"),
    ("--config-dir=.", r"there is no option --config-dir=\."),
    ("--foo", r"there is no option --foo"),
    ("-x", r"there is no option -x"),
    ("--cfg=wrong", r"--cfg wrong is not possible; .* job"),
    ("--cfg", r"--cfg alone"),
    ("--resolve", r"--resolve belongs to --cfg"),
    ("-m --cfg job", r"-m runs jobs"),
    # several values
    ("seed=0,1", r"'seed=0,1' gives several values; add -m"),
    ("lr=interval(1e-4,1e-3)", r"several values"),
    ("-m lr=1e-3,abc", r'lr="abc"'),
    ("-m arch=trm,nope", r"arch=nope does not exist"),
    ("-m arch=glob(*)", r"cannot be swept over"),
    ("-m seed=range(3,3)", r"gives no value"),
    ("-m seed=range(0,100000)", r"too many values"),
    ("-m seed=range(0,500) lr=1e-3,1e-4,1e-5", r"more than 1000 jobs"),
    ("-m seed=0,1 grad_accum=5", r"grad_accum=5 does not divide"),
    ("-m seed=0,1 load_checkpoint=nope", r"no checkpoint at nope"),
    ("-m hydra/launcher=joblib hydra.launcher.n_jobs=x seed=0,1", r"n_jobs=x: .* integer"),
    ("-m hydra/launcher=submitit hydra.launcher.cluster=x seed=0,1", r"cluster=x: .*'slurm'"),
    # files and folders
    ("run_name=good/inside runs_dir=.", r"run_name=good/inside: good is the folder of a run"),
    ("run_name=good runs_dir=.", r"run_name=good: good exists already"),
    ("run_name=file runs_dir=.", r"run_name=file: file exists already"),
    ("run_name=..", r'run_name="\.\."'),
    ("run_name=.", r'run_name="\."'),
    ("run_name=../x", r'run_name="\.\./x"'),
    ("run_name=a/..", r"run_name="),
    ("run_name=/tmp/x", r"run_name="),
    ("run_name=a/b/c", r"run_name="),
    ("run_name=''", r"run_name="),
    ("run_name=" + "x" * 300, r"run_name="),
    ("runs_dir=file", r"file/.* cannot be created"),
    ("runs_dir=/dev/null/x", r"/dev/null/x.* cannot be created"),
    ("runs_dir=", r"runs_dir="),
    ("datasets_dir=file", r"built in file"),
    ("datasets_dir=/dev/null/x", r"/dev/null/x"),
    ("data=folder", r"data\.path is missing"),
    ("data=folder data.path=nope", r"data\.path=nope does not exist"),
    ("data=folder data.path=file", r"data\.path=file is a file"),
    ("data=folder data.path=dir", r"dir/(test|train)/dataset\.json is missing"),
    ("data=folder data.path=set", r"set/(test|train)/dataset\.json"),
    ("data=sudoku_extreme", r"data\.(train|test)_csv is missing"),
    ("data=sudoku data.train_csv=nope.csv data.test_csv=ok.csv", r"data\.train_csv=nope\.csv"),
    ("data=sudoku data.train_csv=dir data.test_csv=ok.csv", r"data\.train_csv=dir is a folder"),
    ("data=sudoku data.train_csv=file data.test_csv=ok.csv", r"data\.train_csv=file must end"),
    ("data=sudoku data.train_csv=empty.csv data.test_csv=ok.csv", r"empty\.csv is empty"),
    ("data=sudoku data.train_csv=bytes.csv data.test_csv=ok.csv", r"bytes\.csv is not UTF-8"),
    ("data=sudoku data.train_csv=columns.csv data.test_csv=ok.csv", r"columns\.csv"),
    ("data=sudoku data.train_csv=wrong.csv data.test_fraction=0.5", r"wrong\.csv"),
    ("data=sudoku data.train_csv=ok.csv data.test_fraction=0.5", r"ok\.csv"),
    # checkpoints
    ("load_checkpoint=", r"load_checkpoint="),
    ("load_checkpoint=nope", r"there is no checkpoint at nope"),
    ("load_checkpoint=latest", r"no checkpoint in runs/ yet"),
    ("load_checkpoint=/dev/null", r"/dev/null"),
    ("load_checkpoint=dir", r"dir is neither a run folder nor a checkpoint"),
    ("load_checkpoint=file", r"file is not a file of weights"),
    ("load_checkpoint=bytes.safetensors", r"bytes\.safetensors is not a whole"),
    ("load_checkpoint=cut.safetensors", r"cut\.safetensors is not a whole"),
    ("load_checkpoint=foreign.safetensors", r"foreign\.safetensors holds no model that is known"),
    ("load_checkpoint=good/checkpoints/step_00000002/optimizer.safetensors", r"holds no model"),
    ("load_checkpoint=list.pt", r"list\.pt holds no model"),
    ("load_checkpoint=evil.pt", r"evil\.pt is refused: it holds .*foreign"),
    ("load_checkpoint=evil_second.pt", r"evil_second\.pt is refused: it holds .*foreign"),
    ("load_checkpoint=damagedrun", r"every checkpoint in damagedrun/checkpoints is damaged"),
    ("load_checkpoint=hf:a/b/../c", r"should be hf:owner/name"),
    ("load_checkpoint=emptyrun", r"emptyrun holds no checkpoint yet"),
    ("load_checkpoint=step_00000007", r"step_00000007/index\.json cannot be read"),
    ("load_checkpoint=good seed=5", r"seed=5 cannot continue"),
    ("load_checkpoint=good/config.yaml", r"config\.yaml is not a file of weights"),
    ("load_checkpoint=good run_name=../z", r'run_name="\.\./z"'),
    ("load_checkpoint=goood runs_dir=.", r"did you mean good\?"),
)  # fmt: skip

EVALUATE = (
    ("weights=ema", r"checkpoint is missing; give checkpoint="),
    ("checkpoint=", r"checkpoint="),
    ("checkpoint=nope", r"no checkpoint at nope"),
    ("checkpoint=latest", r"no checkpoint in runs/ yet"),
    ("checkpoint=dir", r"neither a run folder"),
    ("checkpoint=emptyrun", r"holds no checkpoint yet"),
    ("checkpoint=good/checkpoints/step_00000002/model.safetensors", r"bare file of weights"),
    ("checkpoint=[a]", r"checkpoint="),
    ("load_checkpoint=good", r"no key load_checkpoint"),
    ("checkpoint=good which=worst", r"which="),
    ("checkpoint=good weights=foo", r"weights="),
    ("checkpoint=good lr=3", r"no key lr"),
    ("checkpoint=good arch=trm", r"arch=trm is not possible: .* says what its model is"),
    ("checkpoint=good arch.hidden_size=64", r"arch\.hidden_size cannot differ from what"),
    ("checkpoint=good arch.hiden=64", r"no key arch\.hiden; did you mean arch\.hidden_size"),
    ("checkpoint=good arch.halt_max_steps=0", r"arch\.halt_max_steps=0 is not valid"),
    ("checkpoint=good experiment=smoke", r"no key experiment"),
    ("checkpoint=nope arch=null data=null", r"no checkpoint at nope"),
    ("checkpoint=good data=sudoku6", r"data=sudoku-6x6 does not fit .* 36 tokens"),
    ("checkpoint=good arch.fp8=true device=cpu", r"arch\.fp8=true needs a CUDA device"),
    ("checkpoint=good eval.add_votes=[file]", r"eval\.add_votes=file: only ARC has votes"),
    ("checkpoint=good eval.select=best", r"eval\.select="),
    ("checkpoint=good eval.depth=0", r"eval\.depth=0"),
    ("checkpoint=good eval.breadth=2", r"breadth=2 trajectories would all be the same"),
    ("checkpoint=good eval.breadth=2 eval.noise=-1", r"eval\.noise=-1"),
    ("checkpoint=foreign.safetensors data=sudoku4", r"holds no model that is known"),
    ("checkpoint=damagedrun", r"every checkpoint in damagedrun/checkpoints is damaged"),
    ("checkpoint=good device=cuda:99", r"device=cuda:99"),
    ("checkpoint=good eval.max_examples=0", r"eval\.max_examples=0"),
    ("checkpoint=good data=nope", r"data=nope does not exist"),
    ("checkpoint=good data={}", r"data=\{\}"),
    ("checkpoint=good data.foo=1", r"no key data\.foo"),
    ("checkpoint=good data.num_test=0", r"data\.num_test=0"),
    ("checkpoint=good data=folder data.path=nope", r"data\.path=nope"),
    ("checkpoint=good data=sudoku data.test_csv=nope.csv", r"data\.test_csv=nope\.csv"),
    ("checkpoint=good data=sudoku data.test_csv=wrong.csv", r"sudoku-9x9 does not fit .* 81 tok"),
    ("checkpoint=good output_dir=file", r"output_dir=file: file is a file"),
    ("checkpoint=good output_dir=/dev/null/x", r"output_dir=/dev/null/x"),
    ("-m checkpoint=good seed=0,1", r"-m is for pretrain\.py"),
    ("checkpoint=good seed=0,1", r"several values"),
    ("--config-name=nope", r"no option --config-name"),
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, datasets_dir) -> Path:
    """The files that the table speaks of, and `good`, a finished run of two steps."""
    place = tmp_path_factory.mktemp("place")
    header = "source,question,answer,rating\n"
    (place / "file").write_text("some text, long enough to be no header\n")
    (place / "empty.csv").write_text("")
    (place / "ok.csv").write_text(header)
    (place / "wrong.csv").write_text(f"{header}s,{'1' * 81},{'1' * 81},0\n")
    (place / "columns.csv").write_text("a,b\n1,2\n")
    (place / "bytes.csv").write_bytes(bytes(range(256)))
    (place / "bytes.safetensors").write_bytes(bytes(range(256)))
    (place / "dir").mkdir()
    (place / "set" / "train").mkdir(parents=True)
    (place / "set" / "test").mkdir()
    (place / "set" / "train" / "dataset.json").write_text("{}")
    (place / "emptyrun" / "checkpoints").mkdir(parents=True)
    (place / "step_00000007").mkdir()
    (place / "foreign.safetensors").write_bytes(safetensors({"a": 2}))
    (place / "cut.safetensors").write_bytes(safetensors({"lm_head.weight": 9})[:-4])
    (place / "list.pt").write_bytes(pickle.dumps([1, 2]))
    (place / "evil.pt").write_bytes(pickle.dumps(os.system, 2))
    (place / "evil_second.pt").write_bytes(pickle.dumps(1, 2) + pickle.dumps(os.system, 2))
    with pytest.MonkeyPatch.context() as patch:
        train(patch, *TINY, "max_steps=2", f"datasets_dir={datasets_dir}", f"runs_dir={place}",
              "run_name=good")  # fmt: skip
    shutil.copytree(place / "good", place / "damagedrun")
    for index in place.glob("damagedrun/checkpoints/*/index.json"):
        values = json.loads(index.read_text())
        index.write_text(json.dumps({**values, "files": []}))
    return place


def safetensors(sizes: dict[str, int]) -> bytes:
    """A file of float32 vectors of zeros."""
    header, end = {}, 0
    for name, size in sizes.items():
        header[name] = {
            "dtype": "F32",
            "shape": [size],
            "data_offsets": [end, end := end + 4 * size],
        }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


@pytest.fixture
def place(prepared, monkeypatch) -> Path:
    """It is the working directory; whatever is written there fails the test."""
    monkeypatch.chdir(prepared)
    before = listing(prepared)
    yield prepared
    new = listing(prepared).keys() - before.keys()
    for path in new:  # for the tests that follow
        shutil.rmtree(path, ignore_errors=True)
    assert not new
    assert listing(prepared) == before


def listing(place: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file() or p.is_dir()}


def split(line: str) -> list[str]:
    return line.split(" ") if not line.startswith("lr=${") else [line]


def refusal(run, line: str, capsys) -> str:
    """The sentence with which `run` ends, as a user sees it."""
    with pytest.raises(SystemExit) as ended, reported():
        run(*split(line))
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def assert_a_sentence(text: str, message: str) -> None:
    assert text.count("\n") == 1 and text.endswith("\n"), text
    assert ": error: " in text and len(text) < 1400
    assert re.search(message, text), text
    for noise in ("Traceback", "object at 0x", "Error(", "pydantic", "omegaconf", "<class"):
        assert noise not in text


@pytest.mark.parametrize("line, message", PRETRAIN, ids=[line[:60] for line, _ in PRETRAIN])
def test_pretrain_refuses(place, capsys, line, message):
    assert_a_sentence(refusal(resolved, line, capsys), message)


@pytest.mark.parametrize("line, message", EVALUATE, ids=[line[:60] for line, _ in EVALUATE])
def test_evaluate_refuses(place, capsys, line, message):
    assert_a_sentence(refusal(resolved_evaluation, line, capsys), message)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("WORLD_SIZE", "3", r"WORLD_SIZE=3"),
        ("WORLD_SIZE", "0", r"WORLD_SIZE=0"),
        ("WORLD_SIZE", "x", r"WORLD_SIZE=x"),
        ("WORLD_SIZE", "²", r"WORLD_SIZE=²"),
        ("WORLD_SIZE", "", r"WORLD_SIZE= "),
        ("RANK", "5", r"RANK=5"),
        ("RANK", "-1", r"RANK=-1"),
        ("LOCAL_RANK", "a", r"LOCAL_RANK=a"),
    ],
)
def test_environment_variables_are_checked(place, capsys, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    assert_a_sentence(refusal(resolved, "experiment=smoke", capsys), message)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("key", ["runs_dir", "datasets_dir"])
def test_a_folder_without_rights_is_named(tmp_path, monkeypatch, capsys, key):
    monkeypatch.chdir(tmp_path)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert_a_sentence(refusal(resolved, f"experiment=smoke {key}=locked/x", capsys), r"locked")


def test_a_failed_dataset_leaves_no_run_folder(place, capsys):
    refusal(resolved, "data=sudoku data.train_csv=wrong.csv data.test_fraction=0.5", capsys)
    assert not (place / "runs").exists() and not (place / "datasets").exists()


def test_weights_that_do_not_fit_leave_no_run_folder(prepared, monkeypatch, tiny, tmp_path):
    """Their shapes show only when the model is there."""
    from training.loop import train as train_run

    weights = prepared / "good" / "checkpoints" / "step_00000002" / "model.safetensors"
    run = resolved(*tiny("arch.hidden_size=16", f"load_checkpoint={weights}"))
    assert run.run_dir.exists()
    with pytest.raises(ConfigError, match=r"has shape .* there and .* here"):
        train_run(run)
    assert not run.run_dir.exists() and not run.run_dir.parent.exists()


def test_data_errors_are_reported_like_the_others(capsys):
    with pytest.raises(SystemExit) as ended, reported():
        raise DataError("x.csv:\n  is   wrong.")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{Path(sys.argv[0]).name}: error: x.csv: is wrong.\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), reported():
        1 / 0  # noqa: B018
    with pytest.raises(FileNotFoundError), reported():
        Path("there is no such file").read_text()


def test_a_full_disk_is_said_in_one_sentence(capsys):
    import errno

    with pytest.raises(SystemExit) as ended, reported():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/summary.json")
    assert ended.value.code == 1
    assert "runs/a/summary.json: No space left on device" in capsys.readouterr().err


PROCESSES = (
    ("pretrain.py", "lrr=3", r"did you mean lr\?"),
    ("pretrain.py", "-m seed=0,1 lr=abc", r'lr="abc"'),
    ("pretrain.py", "global_batch_size=7 grad_accum=2", r"grad_accum=2"),
    ("pretrain.py", "data=sudoku data.train_csv=wrong.csv data.test_fraction=0.5", r"wrong\.csv"),
    ("pretrain.py", "load_checkpoint=good arch.hidden_size=64", r"arch\.hidden_size=64"),
    ("evaluate.py", "checkpoint=nope", r"no checkpoint at nope"),
)
SPY = """
import atexit, sys
heavy = ("torch", "wandb")
atexit.register(lambda: sys.stdout.write(" ".join(m for m in heavy if m in sys.modules)))
"""


@pytest.mark.parametrize("script, line, message", PROCESSES, ids=[p[1][:40] for p in PROCESSES])
def test_as_a_process(place, tmp_path, script, line, message):
    (tmp_path / "sitecustomize.py").write_text(SPY)
    started = time.monotonic()
    done = call(place, script, *line.split(), PYTHONPATH=str(tmp_path))
    assert time.monotonic() - started < 10  # on a busy machine; 1.5 s on an idle one
    assert done.returncode == 2
    assert done.stdout == "", "torch or wandb was imported"
    assert_a_sentence(done.stderr, message)
    assert done.stderr.startswith(f"{script}: error: ")


def test_the_spy_does_see_torch(tmp_path):
    import subprocess

    (tmp_path / "sitecustomize.py").write_text(SPY)
    seen = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['torch'] = sys"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert seen.stdout == "torch"
