"""Every Triton kernel of optim/, compiled for GPUs that are not here.

Not collected by itself: `test_kernels.py` runs it, once per compute capability, in a process in
which Triton does not interpret: `python -m tests.optim.aot 90`.

A new kernel joins by one entry of `cases`; a test fails for a kernel without one.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import optim.kernels
from optim.kernels import (
    adam_mini,
    formats,
    large_blocks,
    momentum,
    muon,
    ns_kernels,
    ns_table,
    tiles,
)
from optim.kernels.adam import adam_kernel
from optim.kernels.norm import norm_kernel
from optim.kernels.sparse import (
    BLOCK_D,
    BLOCK_N,
    FEW,
    MOST_COLUMNS,
    sparse_signsgd_kernel,
)

# Bytes of shared memory that one program can have, by compute capability.
SHARED = {75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
SCALARS = {"lr_ptr": "*fp32", "scale_ptr": "*fp32", "found_ptr": "*fp32"}
FLAGS = {"HAS_SCALE": True, "HAS_FOUND": True, "ALIGNED": True}


@dataclass
class Case:
    """One specialization: types of the arguments, values of the constants."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    contains: tuple[str, ...] = ()  # what the PTX must have: 16 bytes moved at once, …
    options: dict[str, Any] = field(default_factory=dict)


def cases(capability: int) -> Iterator[Case]:
    """What is compiled for one architecture: the widest form of every kernel."""
    both = ("ld.global.v4", "st.global.v4")
    table = {"chunk_tensor": "*i32", "chunk_index": "*i32", "addresses": "*i64", "sizes": "*i64"}

    tile = tiles._BY_CAPABILITY.get(divmod(capability, 10), tiles._DEFAULT)
    types = {**table, "counts": "*i32", "tickets": "*i32", "ready": "*fp32", "numbers": "*fp64"}
    types |= {"powers": "*fp32", "seeds": "*i32", "tensors": "i32", **SCALARS}
    for rule, form in (("adamw", "bf16"), ("atan2_outside", "fp32"), ("atan2_inside", "fp16")):
        constants = {**FLAGS, "HAS_EMA": True, "POWF": True, "RULE": rule, "FORMAT": form}
        constants |= {"HAS_MASTER": form == "fp16", "STOCHASTIC": form == "bf16"}
        constants["DTYPE"] = formats.ELEMENTS[form]
        yield Case(adam_kernel, types, {**constants, "BLOCK": tile.block}, tile.warps, both)

    types = {**table, "partials": "*fp32", "ticket": "*i32", "out": "*fp32", "first": "i32"}
    types |= {"chunks": "i32", "max_norm": "fp32"}
    constants = {"DTYPE": tl.float32, "ALIGNED": True, "ROUNDS": 3, "COUNT": tile.norm_programs}
    constants["BLOCK"] = tile.norm_block
    yield Case(norm_kernel, types, constants, tile.norm_warps, both[:1])

    types = {"table": "*fp32", "ids": "*i64", "rows": "*fp32", "n": "i32", "width": "i32"}
    types |= {"table_stride": "i32", "weight_decay": "fp32", **SCALARS}
    constants = {"HAS_SCALE": True, "HAS_FOUND": True, "FEW": FEW, "BLOCK_N": BLOCK_N}
    constants |= {"BLOCK_D": BLOCK_D, "BLOCK_W": MOST_COLUMNS}
    yield Case(sparse_signsgd_kernel, types, constants, 4)

    mini = tiles._MINI_BY_CAPABILITY.get(divmod(capability, 10), tiles._MINI_DEFAULT)
    types = {"tiles": "*i64", "larges": "*i64", "addresses": "*i64", "counts": "*i32"}
    types |= {"partials": "*fp32", "peaks": "*fp32", "tickets": "*i32", "large_tickets": "*i32"}
    types |= {"ready": "*fp32", "next_scales": "*fp32", "seeds": "*i32", "numbers": "*fp64"}
    types |= {"tensors": "i32", **SCALARS}
    shapes = sum(1 << k for k in (9, 10, 12, 15, 16 + 4, 31))  # those of usual models
    fp8 = "fp8_cvt" if capability >= 89 else "fp8"
    for param, moment in (("fp32", "fp32"), ("fp32", fp8), ("bf16", "bf16"), ("bf16", fp8)):
        common = {**FLAGS, "MOMENT": moment, "SCALED": moment == fp8, "TILE": mini.block}
        elements = formats.ELEMENTS[param]
        constants = {**common, "GRAD": param, "GRAD_DTYPE": elements}
        yield Case(large_blocks.large_blocks_kernel, types, constants, mini.warps)
        constants = {**common, "PARAM": param, "PARAM_DTYPE": elements, "HAS_EMA": True}
        constants |= {"MOMENT_DTYPE": formats.ELEMENTS[moment], "SHAPES": shapes}
        constants |= {"HAS_MASTER": param == "bf16", "STOCHASTIC": moment == "bf16"}
        wide = both if param == "fp32" else ()
        yield Case(adam_mini.adam_mini_kernel, types, constants, mini.warps, wide)


def muon_cases(capability: int) -> Iterator[Case]:
    """Muon's own passes, and the products of the Newton–Schulz iteration."""
    table = {"chunk_tensor": "*i32", "chunk_index": "*i32", "addresses": "*i64", "sizes": "*i64"}
    flags = {"HAS_SCALE": True, "NESTEROV": True, "DTYPE": tl.float32, "ALIGNED": True}
    types = {**table, **SCALARS, "partials": "*fp32", "pieces": "i32", "momentum": "fp32"}
    constants = {**flags, "HAS_FOUND": True, "BLOCK": 2048}
    yield Case(muon.momentum_kernel, types, constants, 8, ("ld.global.v4",))
    constants = {k: v for k, v in constants.items() if k != "DTYPE"}
    lead = {**types, "tensors": "i32"}
    yield Case(momentum.lead_kernel, lead, constants, 8, ("ld.global.v4",))
    types |= {"buffers": "*u8", "tile_piece": "*i32", "tile_row": "*i32", "tile_column": "*i32"}
    types |= {"shapes": "*i32", "offsets": "*i64", "counts": "*i32", "safety": "fp32"}
    sides = {"FIELDS": muon.FIELDS, "SIDE": muon.SIDE, "WIDE": False}
    yield Case(muon.gather_kernel, types, {**flags, **sides, "GAIN": muon.GAIN}, 4)
    types |= {"sizes": "*fp32", "weight_decay": "fp32", "ema_take": "fp32"}
    flags = {"HAS_FOUND": True, "HAS_EMA": True, "DTYPE": tl.float32, "ALIGNED": True}
    yield Case(muon.apply_kernel, types, {**flags, **sides}, 4)
    types = {"x": "*fp32", "partials": "*fp32", "buffer": "*bf16", "size": "i32", "rows": "i32"}
    types |= dict.fromkeys(("columns", "tiles", "parts", "matrix", "length"), "i32")
    types |= {"safety": "fp32", "gain": "fp32"}
    yield Case(muon.squares_kernel, types, {"WIDTH": 2, "BLOCK": 4096}, 8)
    for tall in (False, True):
        constants = {"TALL": tall, "HALF": tall, "WIDE": False, "SIDE": muon.SIDE}
        yield Case(muon.fill_kernel, types, constants, 4)

    number = "fp16" if capability < 80 else "bf16"  # whose products the card has
    numbers = dict.fromkeys(("M", "K", *ns_kernels.PLACES), "i32")
    numbers |= dict.fromkeys(("alpha", "beta", "gamma", "delta"), "fp32")
    types = {**numbers, **dict.fromkeys(("x_ptr", "y_ptr", "out_ptr"), f"*{number}")}
    types["order"] = "*i32"
    for block in ns_table._CLASSIC.values():
        constants = {"HAS_ADD": True, "HAS_SECOND": True}
        constants |= {"BM": block.bm, "BN": block.bn, "BK": block.bk}
        stages = {"num_stages": block.stages}
        yield Case(ns_kernels.symmetric_kernel, types, constants, block.warps, options=stages)
    if capability < 90:
        return  # no tensor descriptors in hardware

    def descriptor(rows: int, columns: int) -> str:
        return f"tensordesc<bf16[{rows}, {columns}]>"

    for block in ns_table._HOPPER:
        square = descriptor(block.bm, block.bm)
        types = {**numbers, "order": "*i32", "add_desc": square, "out_desc": square}
        types |= {
            "x_desc": descriptor(block.bm, block.bk),
            "y_desc": descriptor(block.bn, block.bk),
        }
        constants = {"HAS_ADD": True, "HAS_SECOND": True, "BM": block.bm, "BN": block.bn}
        constants |= {"BK": block.bk, "FLATTEN": block.persistent}
        options = {"num_stages": block.stages}
        yield Case(
            ns_kernels.symmetric_tma_kernel, types, constants, block.warps, ("wgmma",), options
        )
    for block in ns_table._HOPPER_UPDATE:
        half = descriptor(block.bm, block.bn // 2)
        types = {**numbers, "add_desc": half, "out_desc": half}
        types |= {
            "p_desc": descriptor(block.bm, block.bk),
            "x_desc": descriptor(block.bk, block.bn),
        }
        constants = {"HAS_ADD": True, "BM": block.bm, "BN": block.bn, "BK": block.bk, "GROUP": 8}
        constants |= {"FLATTEN": block.persistent}
        options = {"num_stages": block.stages}
        yield Case(ns_kernels.update_tma_kernel, types, constants, block.warps, ("wgmma",), options)


def compile_case(case: Case, capability: int) -> int:
    """Compile, check, and return the bytes of shared memory."""
    names = case.kernel.arg_names
    signature = {n: case.types[n] for n in names if n not in case.constants}
    signature |= dict.fromkeys(case.constants, "constexpr")
    constants = {(names.index(n),): v for n, v in case.constants.items()}
    source = ASTSource(case.kernel, signature, constexprs=constants)
    options = {"num_warps": case.warps, "enable_fp_fusion": True, **case.options}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    name = case.kernel.fn.__name__
    assert done.metadata.shared <= SHARED[capability], (name, done.metadata.shared)
    for text in case.contains:
        assert text in done.asm["ptx"], (name, text)
    kinds = re.findall(r"\b(?:atom|red)\.[a-z0-9_.]+", done.asm["ptx"])
    assert all(k.endswith(("add.u32", "add.s32")) for k in kinds), (name, kinds)  # tickets only
    return done.metadata.shared


def every_kernel() -> set[str]:
    """Names of all kernels of the package: jitted functions called …_kernel."""
    found = set()
    for path in Path(optim.kernels.__file__).parent.glob("*.py"):
        text = path.read_text()
        if "@triton.jit" in text:
            module = import_module(f"optim.kernels.{path.stem}")
            own = re.findall(r"^def (\w+_kernel)\(", text, flags=re.MULTILINE)
            found |= {name for name in own if hasattr(getattr(module, name), "arg_names")}
    return found


def main() -> None:
    """Compile everything for the capability on the command line."""
    capability = int(sys.argv[1])
    compiled = set()
    for case in (*cases(capability), *muon_cases(capability)):
        shared = compile_case(case, capability)
        compiled.add(case.kernel.fn.__name__)
        print(f"sm_{capability} {case.kernel.fn.__name__}: {shared} bytes of shared memory")
    left = {name for name in every_kernel() - compiled if capability >= 90 or "_tma_" not in name}
    assert not left, f"without a case: {left}"


if __name__ == "__main__":
    main()
