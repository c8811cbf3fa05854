"""CUDA C++ compiled at run time: NVRTC makes a cubin for sm_90a, kept in the user's cache folder.

NVRTC ships with PyTorch's CUDA wheels, so nothing has to be built or installed. A cubin's name is
the hash of all that it depends on (source, macros, NVRTC's version).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from pathlib import Path

_ARCHITECTURE = "sm_90a"


class CompileError(RuntimeError):
    """NVRTC is missing or refused the source."""


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """The NVRTC library that belongs to PyTorch's CUDA. Raises CompileError if there is none."""
    import torch

    major = (torch.version.cuda or "0").split(".")[0]
    name = f"libnvrtc.so.{major}"
    places = [Path(p) / "nvidia" for p in sys.path if (Path(p) / "nvidia").is_dir()]
    found = [str(f) for p in places for f in sorted(p.glob(f"*/lib/{name}*"))]
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64" / name
    for candidate in (*found, name, str(toolkit)):
        try:
            for builtins in sorted(Path(candidate).parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(builtins))  # NVRTC opens it by its bare name
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise CompileError(f"{name} was not found; it comes with PyTorch's CUDA packages")


def cache_folder() -> Path:
    """Where cubins are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "loopwright" / "cubin"


def sources(*names: str) -> str:
    """The text of these files of this folder, after basics.cu, which all of them build on."""
    folder = Path(__file__).parent
    return "\n".join((folder / n).read_text(encoding="utf-8") for n in ("basics.cu", *names))


def cubin(source: str, macros: dict[str, int]) -> bytes:
    """The machine code of `source` with `macros` defined, from the cache or compiled."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    options = [f"--gpu-architecture={_ARCHITECTURE}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in sorted(macros.items())]
    text = "\n".join((*options, f"{major.value}.{minor.value}", source))
    path = cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        code = compile_source(source, options)[0]
    try:  # written beside and renamed: another process may be doing the same
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)
    except OSError:
        pass  # a cache that cannot be written costs seconds, not the run
    return code


def compile_source(source: str, options: list[str]) -> tuple[bytes, str]:
    """(cubin, log) of one source. Raises CompileError with NVRTC's log."""
    library, program = nvrtc(), ctypes.c_void_p()
    arguments = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    status = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"gemm.cu", 0, None, None
    )
    if status:
        raise CompileError(f"nvrtcCreateProgram failed with status {status}")
    try:
        status = library.nvrtcCompileProgram(program, len(options), arguments)
        size = ctypes.c_size_t()
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        if status:
            raise CompileError(log.value.decode(errors="replace"))
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, code)
        return code.raw, log.value.decode(errors="replace")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def wgmma(columns: int, eight: bool = False) -> str:
    """The function `wgmma(d, a, b, accumulate)` of gemm.cu: d (64, columns) (+)= a (64, 16) bᵀ.

    eight: a (64, 32) and b in e4m3.
    """
    kind, straight = ("k32.f32.e4m3.e4m3", "") if eight else ("k16.f32.bf16.bf16", ", 0, 0")
    values = columns // 2
    registers = ", ".join(f"%{i}" for i in range(values))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(values))
    return f"""
__device__ __forceinline__ void wgmma(float (&d)[{values}], unsigned long long a,
                                      unsigned long long b, int accumulate) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{values + 2}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{columns}{kind} {{{registers}}},"
    " %{values}, %{values + 1}, p, 1, 1{straight};\\n}}"
    : {outputs} : "l"(a), "l"(b), "r"(accumulate));
}}
"""


def wgmma_named(
    name: str, columns: int, registers: bool, turned_a: bool = False, turned_b: bool = False
) -> str:
    """The function `name(d, a, b, accumulate)`, like `wgmma` above.

    registers: a comes in four registers, in bf16 pairs. turned_a, turned_b: a lies as (16, 64),
    b as (16, columns) in shared memory, not as (64, 16) and (columns, 16).
    """
    values = columns // 2
    d = ", ".join(f"%{i}" for i in range(values))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(values))
    parts = [f'"r"(a[{i}])' for i in range(4)] if registers else ['"l"(a)']
    a = ", ".join(f"%{values + i}" for i in range(len(parts)))
    a = f"{{{a}}}" if registers else a
    at = values + len(parts)  # of b; then comes whether d is added to
    kind = "const unsigned (&a)[4]" if registers else "unsigned long long a"
    turned = f"{int(turned_b)}" if registers else f"{int(turned_a)}, {int(turned_b)}"
    return f"""
__device__ __forceinline__ void {name}(float (&d)[{values}], {kind},
                                       unsigned long long b, int accumulate) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{at + 1}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{d}}},"
    " {a}, %{at}, p, 1, 1, {turned};\\n}}"
    : {outputs} : {", ".join(parts)}, "l"(b), "r"(accumulate));
}}
"""
