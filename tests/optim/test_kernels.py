"""The Triton kernels without a GPU: in the interpreter, and compiled for every architecture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_kernels_in_the_interpreter():
    """In a process of its own: Triton decides at import whether to interpret."""
    out = run("-m", "pytest", "-q", "tests/optim/kernel_cases.py", TRITON_INTERPRET="1")
    assert "passed" in out


COMPILE = """
import itertools, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optim.kernels.adam import adam_kernel
from optim.kernels.norm import norm_finish_kernel, norm_kernel
from optim.kernels.tiles import _DEFAULT

def compile(fn, types, constants, capability, warps):
    signature = {n: types.get(n, "fp32") for n in fn.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    values = {(fn.arg_names.index(n),): v for n, v in constants.items()}
    source = ASTSource(fn, signature, constexprs=values)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert done.metadata.shared <= 48 * 1024
    return done.asm["ptx"]

table = {"chunk_tensor": "*i32", "chunk_index": "*i32", "addresses": "*i64", "sizes": "*i64"}
adam = {**table, "counts": "*i32", "tickets": "*i32", "ready": "*fp32", "tensors": "i32",
        "lr_ptr": "*fp32", "scale_ptr": "*fp32", "found_ptr": "*fp32"}
t = _DEFAULT
for capability in (75, 86, 89, 90):
    for rule in ("adamw", "atan2_outside", "atan2_inside"):
        flags = {"HAS_SCALE": True, "HAS_FOUND": True, "HAS_EMA": True, "ALIGNED": True}
        dtype = tl.bfloat16 if rule == "adamw" and capability >= 80 else tl.float32
        flags |= {"RULE": rule, "DTYPE": dtype, "BLOCK": t.block}
        ptx = compile(adam_kernel, adam, flags, capability, t.warps)
        assert "ld.global.v4" in ptx and "st.global.v4" in ptx  # 16 bytes at once
    flags = {"DTYPE": tl.float32, "ALIGNED": True, "ROUNDS": 3, "BLOCK": t.norm_block}
    norm = {**table, "partials": "*fp32", "chunks": "i32"}
    ptx = compile(norm_kernel, norm, flags, capability, t.norm_warps)
    assert "ld.global.v4" in ptx and "atom" not in ptx
    types = {"partials": "*fp32", "norm": "*fp32"}
    compile(norm_finish_kernel, types, {"N": 256, "BLOCK": 1024}, capability, 4)
"""


def test_kernels_compile_ahead_of_time(tmp_path):
    """For sm_75 to sm_90; a file, since Triton reads the source of what it compiles."""
    script = tmp_path / "compile_all.py"
    script.write_text(COMPILE)
    run(str(script), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path / "cache"))
