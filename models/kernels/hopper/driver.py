"""Kernels launched through the CUDA driver: modules, tensor maps, clusters (by ctypes).

Everything here runs on PyTorch's current device, context and stream, and can be captured in a
CUDA graph: nothing waits, nothing is allocated.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_KINDS = {1: 0, 2: 9}  # of CUtensorMap, by the bytes of an element: uint8, bfloat16
_PROMOTE_256B = 3
_SWIZZLES = {64: 2, 128: 3}  # bytes of a row of the box


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, call: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise DriverError(f"{call}: {(text.value or b'?').decode()}")


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared_bytes")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    ]


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel of persistent thread blocks, in clusters of a size fixed at compile time."""

    module: ctypes.c_void_p
    function: ctypes.c_void_p
    threads: int
    shared_bytes: int
    cluster: int
    resident: int  # clusters that the device holds at once

    def launch(self, clusters: int, stream: int, arguments: tuple) -> None:
        """Start min(clusters, resident) clusters; `arguments` are ctypes values."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        blocks = min(clusters, self.resident) * self.cluster
        status = _driver().cuLaunchKernel(
            self.function, blocks, 1, 1, self.threads, 1, 1, self.shared_bytes,
            ctypes.c_void_p(stream), pointers, None,
        )  # fmt: skip
        _check(status, "cuLaunchKernel")


def load(code: bytes, name: str, threads: int, shared_bytes: int, cluster: int) -> Kernel:
    """The kernel `name` of a cubin, loaded on the current device."""
    cuda = _driver()
    module, function, resident = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    _check(cuda.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
    _check(
        cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode()),
        "cuModuleGetFunction",
    )
    _check(
        cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes), "cuFuncSetAttribute"
    )
    # One CUlaunchAttribute: an identifier, and from byte 8 the dimensions of the cluster.
    attribute = (ctypes.c_uint32 * 18)(_CLUSTER_DIMENSION, 0, cluster, 1, 1)
    config = _LaunchConfig(
        cluster, 1, 1, threads, 1, 1, shared_bytes, None, ctypes.addressof(attribute), 1
    )
    _check(
        cuda.cuOccupancyMaxActiveClusters(ctypes.byref(resident), function, ctypes.byref(config)),
        "cuOccupancyMaxActiveClusters",
    )
    return Kernel(module, function, threads, shared_bytes, cluster, resident.value)


def _encode(
    pointer: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    bytes_each: int = 2,
) -> ctypes.Array[ctypes.c_uint64]:
    """A tensor map of bfloat16 or 8 bits (128 bytes): sizes and box in elements, fastest dimension
    first; strides in bytes, of all dimensions but the fastest. A row of the box, 64 or 128 bytes,
    is swizzled by as much."""
    room = (ctypes.c_uint64 * 24)()  # the map needs 64-byte alignment: 16 words of 24
    at = -ctypes.addressof(room) % 64
    result = (ctypes.c_uint64 * 16).from_buffer(room, at)
    rank = len(sizes)
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.byref(result),
        _KINDS[bytes_each],
        rank,
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        *(0, _SWIZZLES[bytes_each * box[0]], _PROMOTE_256B, 0),  # last: outside is read as zero
    )
    _check(status, "cuTensorMapEncodeTiled")
    return result


@functools.lru_cache(maxsize=1024)
def _row_map(pointer: int, rows: int, columns: int, each: int, box_rows: int) -> ctypes.Array:
    return _encode(pointer, [columns, rows], [each * columns], [128 // each, box_rows], each)


@functools.lru_cache(maxsize=1024)
def _weight_map(pointer: int, rows: int, columns: int, each: int, box_rows: int) -> ctypes.Array:
    row = each * columns
    return _encode(
        pointer,
        [columns, 2, 4, 4, rows // 32],
        [row, 8 * row, 2 * row, 32 * row],
        [128 // each, 2, 4, 4, box_rows // 32],
        each,
    )


def row_map(x: Tensor, box_rows: int) -> ctypes.Array:
    """Tensor map of x (rows, columns), 8 or 16 bits, in swizzled boxes of box_rows × 128 bytes."""
    return _row_map(x.data_ptr(), *x.shape, x.element_size(), box_rows)


def weight_map(w: Tensor, box_rows: int) -> ctypes.Array:
    """The same of a weight whose rows are laid in the order that gemm.cu explains at its top."""
    return _weight_map(w.data_ptr(), *w.shape, w.element_size(), box_rows)


@functools.lru_cache(maxsize=1024)
def _tensor_map(
    pointer: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> ctypes.Array:
    return _encode(pointer, sizes, strides, box)


def tensor_map(x: Tensor, box: tuple[int, ...]) -> ctypes.Array:
    """Tensor map of x, contiguous, in boxes (of elements) whose fastest dimension comes first."""
    sizes = tuple(reversed(x.shape))
    strides = tuple(2 * math.prod(sizes[:i]) for i in range(1, len(sizes)))
    return _tensor_map(x.data_ptr(), sizes, strides, box)
