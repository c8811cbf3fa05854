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
FEW = "options2 or norm or special or shadow or sparse or (half and ATan2)"


@pytest.mark.parametrize("some", [FEW, pytest.param(f"not ({FEW})", marks=slow)])
def test_kernels_in_the_interpreter(some):
    """In a process of its own: Triton decides at import whether to interpret."""
    out = run("-m", "pytest", "-q", "-k", some, "tests/optim/kernel_cases.py", TRITON_INTERPRET="1")
    assert "passed" in out


@pytest.mark.parametrize("some", ["odd and Mini", pytest.param("not (odd and Mini)", marks=slow)])
def test_sizes_in_the_interpreter(some):
    out = run("-m", "pytest", "-q", "-k", some, "tests/optim/size_cases.py", TRITON_INTERPRET="1")
    assert "passed" in out


MINI_FEW = "resume and fp8 or tiles or unaligned or (reference and fp32-nearest)"


@pytest.mark.parametrize("some", [MINI_FEW, pytest.param(f"not ({MINI_FEW})", marks=slow)])
def test_adam_mini_in_the_interpreter(some):
    out = run("-m", "pytest", "-q", "-k", some, "tests/optim/mini_cases.py", TRITON_INTERPRET="1")
    assert "passed" in out


@pytest.mark.parametrize("capability", [*(pytest.param(c, marks=slow) for c in (75, 86, 89)), 90])
def test_kernels_compile_ahead_of_time(tmp_path, capability):
    """Every kernel of the package, within the shared memory of the architecture."""
    cache = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    assert f"sm_{capability} adam_kernel" in run("-m", "tests.optim.aot", str(capability), **cache)
