"""Short self-attention on Hopper GPUs, RoPE inside: attention_forward.cu, attention_backward.cu.

Heads of 64 features, at most 128 tokens, bfloat16. Equal to the Triton kernels of
`models.kernels.attention` in what they compute and round; deterministic; fit for CUDA graphs.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from models.kernels import hopper
from models.kernels.hopper.compile import cubin, sources
from models.kernels.hopper.driver import Kernel, load, tensor_map

MAX_TOKENS, HEAD_DIM = 128, 64


@dataclass(frozen=True)
class Plan:
    """The compile-time choices of attention_short.cu."""

    backward: bool
    length: int
    rope: bool
    causal: bool
    save: bool = False

    @property
    def rows(self) -> int:
        """Rows of a tile: the tokens, rounded up to a step of a product over them."""
        return -(-self.length // 16) * 16

    @property
    def blocks(self) -> int:
        """Warpgroups of a team."""
        return -(-self.length // 64)

    @property
    def teams(self) -> int:
        """Teams of a thread block: as many as the registers hold."""
        return (2 if self.backward or self.rows > 112 else 4) // self.blocks

    @property
    def threads(self) -> int:
        """Threads of a block: the teams, and the warpgroup that loads and lends its registers."""
        return 128 * (self.blocks * self.teams + 1)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: two stages a team, dS and sums, the table, barriers, alignment."""
        tile = 128 * self.rows
        stages = 2 * (5 if self.backward else 3) * tile
        own = 8192 * self.blocks**2 + 8 * self.rows if self.backward else 0
        table = 256 * self.length if self.rope else 0
        slack = 8192 if self.rows < 64 else 0
        return self.teams * (stages + own + 2 * 16) + table + slack + 1024

    def source(self) -> tuple[str, dict[str, int]]:
        """The kernel's text and its macros."""
        texts = [wgmma("scores", -(-self.length // 8) * 8, "ss", across=False)]
        texts += [wgmma("mix", 64, "rs", across=True), wgmma("across", 64, "ss", across=True)]
        names = ("common", "short", "backward" if self.backward else "forward")
        texts.append(sources(*(f"attention_{name}.cu" for name in names)))
        macros = {
            "LENGTH": self.length,
            "TEAMS": self.teams,
            "ROPE": int(self.rope),
            "CAUSAL": int(self.causal),
            "SAVE": int(self.save),
        }
        return "\n".join(texts), macros


def wgmma(name: str, columns: int, operands: str, across: bool) -> str:
    """The function `wgmma_NAME(d, a, b, accumulate)`: d (64, columns) (+)= a (64, 16) b.

    operands: "ss", a and b in shared memory, or "rs", a in four registers. across: b, and a in
    shared memory, lie with the 16 summed rows one below the other, else side by side.
    """
    values = columns // 2
    count = 4 if operands == "rs" else 1
    d = ", ".join(f"%{i}" for i in range(values))
    a = ", ".join(f"%{values + i}" for i in range(count))
    a = f"{{{a}}}" if operands == "rs" else a
    b, accumulate = values + count, values + count + 1
    turned = ", ".join([str(int(across))] * (1 if operands == "rs" else 2))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(values))
    kind, constraint = ("unsigned", "r") if operands == "rs" else ("unsigned long long", "l")
    parameters = ", ".join(f"{kind} a{i}" for i in range(count))
    inputs = ", ".join(f'"{constraint}"(a{i})' for i in range(count))
    return f"""
__device__ __forceinline__ void wgmma_{name}(float (&d)[{values}], {parameters},
                                             unsigned long long b, int accumulate) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{accumulate}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{d}}},"
    " {a}, %{b}, p, 1, 1, {turned};\\n}}"
    : {outputs} : {inputs}, "l"(b), "r"(accumulate));
}}
"""


@functools.cache
def _kernel(p: Plan, device: int) -> Kernel:
    code = cubin(*p.source())
    name = "attend_backward" if p.backward else "attend"
    return load(code, name, p.threads, p.shared_bytes, 1)


def supported(qkv: Tensor, cos: Tensor, heads: int, rope: bool) -> bool:
    """Whether `attend` takes qkv (B, L, 3 D), contiguous: bfloat16, short, heads of 64, Hopper."""
    if not (qkv.is_cuda and qkv.dtype == torch.bfloat16 and hopper.available(qkv.device.index)):
        return False
    table = not rope or (cos.dtype == torch.float32 and cos.data_ptr() % 16 == 0)
    fits = qkv.shape[1] <= MAX_TOKENS and qkv.shape[2] == 3 * heads * HEAD_DIM
    return fits and table and qkv.data_ptr() % 16 == 0 and qkv.shape[0] * heads < 2**31


def _run(p: Plan, maps: tuple[Tensor, ...], pointers: tuple[Tensor, ...], heads: int) -> None:
    items = maps[0].shape[0] * heads
    if not items:
        return
    with torch.cuda.device(maps[0].device):
        _kernel(p, maps[0].device.index).launch(
            items,
            torch.cuda.current_stream().cuda_stream,
            (
                *(tensor_map(t, (HEAD_DIM, p.rows, 1)) for t in maps),
                *(ctypes.c_void_p(t.data_ptr()) for t in pointers),
                ctypes.c_uint32(heads),
                ctypes.c_uint32(items),
            ),
        )


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, rope: bool, causal: bool, save: bool
) -> tuple[Tensor, Tensor]:
    """out (B, L, D) and, if `save`, lse (B heads, L); arguments as of `short_attention`."""
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = qkv.new_empty(batch, length, width)
    lse = qkv.new_empty((batch * heads, length) if save else (1,), dtype=torch.float32)
    _run(Plan(False, length, rope, causal, save), (qkv,), (cos, sin, out, lse), heads)
    return out, lse


def attend_backward(
    qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
    heads: int, rope: bool, causal: bool,
) -> Tensor:  # fmt: skip
    """dqkv (B, L, 3 D) of `attend`, from what it returned with `save`; all contiguous."""
    dqkv = torch.empty_like(qkv)
    p = Plan(True, qkv.shape[1], rope, causal)
    _run(p, (qkv, dout, out), (cos, sin, lse, dqkv), heads)
    return dqkv
