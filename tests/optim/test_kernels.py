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


slow = pytest.mark.slow
FEW = "options2 or norm or special or shadow or sparse"


@pytest.mark.parametrize("some", [FEW, pytest.param(f"not ({FEW})", marks=slow)])
def test_kernels_in_the_interpreter(some):
    """In a process of its own: Triton decides at import whether to interpret."""
    out = run("-m", "pytest", "-q", "-k", some, "tests/optim/kernel_cases.py", TRITON_INTERPRET="1")
    assert "passed" in out


COMPILE = """
import re, sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optim.kernels.adam import adam_kernel
from optim.kernels.norm import norm_kernel
from optim.kernels.sparse import BLOCK_D, BLOCK_N, FEW, MOST_COLUMNS, sparse_signsgd_kernel
from optim.kernels.tiles import _BY_CAPABILITY, _DEFAULT

capability = int(sys.argv[1])

def compile(fn, types, constants, warps, wide=True):
    signature = {n: types.get(n, "fp32") for n in fn.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    values = {(fn.arg_names.index(n),): v for n, v in constants.items()}
    source = ASTSource(fn, signature, constexprs=values)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    done = triton.compile(source, target=target, options=options)
    assert done.metadata.shared <= 48 * 1024
    ptx = done.asm["ptx"]
    assert not wide or "ld.global.v4" in ptx  # 16 bytes at once
    kinds = re.findall(r"\\b(?:atom|red)\\.[a-z0-9_.]+", ptx)
    assert all(k.endswith(("add.u32", "add.s32")) for k in kinds), kinds  # tickets only
    return ptx

table = {"chunk_tensor": "*i32", "chunk_index": "*i32", "addresses": "*i64", "sizes": "*i64"}
adam = {**table, "counts": "*i32", "tickets": "*i32", "ready": "*fp32", "numbers": "*fp64",
        "tensors": "i32", "lr_ptr": "*fp32", "scale_ptr": "*fp32", "found_ptr": "*fp32",
        "powers": "*fp32"}
norm = {**table, "partials": "*fp32", "ticket": "*i32", "out": "*fp32", "first": "i32",
        "chunks": "i32", "max_norm": "fp32"}
t = _BY_CAPABILITY.get(divmod(capability, 10), _DEFAULT)
for rule in ("adamw", "atan2_outside", "atan2_inside"):
    flags = {"HAS_SCALE": True, "HAS_FOUND": True, "HAS_EMA": True, "ALIGNED": True, "POWF": True}
    dtype = tl.bfloat16 if rule == "adamw" and capability >= 80 else tl.float32
    flags |= {"RULE": rule, "DTYPE": dtype, "BLOCK": t.block}
    assert "st.global.v4" in compile(adam_kernel, adam, flags, t.warps)
flags = {"DTYPE": tl.float32, "ALIGNED": True, "ROUNDS": 3, "COUNT": t.norm_programs}
compile(norm_kernel, norm, {**flags, "BLOCK": t.norm_block}, t.norm_warps)
sparse = {"table": "*fp32", "ids": "*i64", "rows": "*fp32", "lr_ptr": "*fp32",
          "scale_ptr": "*fp32", "found_ptr": "*fp32", "n": "i32", "width": "i32",
          "table_stride": "i32"}
flags = {"HAS_SCALE": True, "HAS_FOUND": True, "FEW": FEW, "BLOCK_N": BLOCK_N,
         "BLOCK_D": BLOCK_D, "BLOCK_W": MOST_COLUMNS}
compile(sparse_signsgd_kernel, sparse, flags, 4, wide=False)
"""


@pytest.mark.parametrize("capability", [*(pytest.param(c, marks=slow) for c in (75, 86, 89)), 90])
def test_kernels_compile_ahead_of_time(tmp_path, capability):
    """A file, since Triton reads the source of what it compiles."""
    script = tmp_path / "compile_all.py"
    script.write_text(COMPILE)
    cache = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    run(str(script), str(capability), **cache)
