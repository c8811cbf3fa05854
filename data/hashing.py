"""Counter-based random numbers: a draw is a hash of where it is needed, so there is no state.

The functions are written in operators that Python ints, NumPy int64 arrays and torch int64 tensors
share, and no intermediate leaves the range of int64 (32-bit value × constant below 2^31). So the
three agree to the bit on every device, and no result depends on a library's generator.

The mixing function is the two-round xor-shift-multiply finalizer with the constants
[16 21f0aaad 15 735a2d97 15] from the hash-prospector search (bias 0.107 of 2^-32 units).
"""

from typing import TypeVar

Words = TypeVar("Words")  # int, NumPy int64 array or torch int64 tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: keeps an all-zero key away from the fixed point 0


def mix32(x: Words) -> Words:
    """Bijection of [0, 2^32) in which every input bit flips every output bit half of the time."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def hash32(stream: Words, *words: Words) -> Words:
    """Hash non-negative 63-bit words to [0, 2^32); words broadcast against each other.

    `stream` separates the uses of equal words: one number per purpose.
    """
    h = mix32((stream + _GOLDEN) & _MASK)
    for word in words:
        h = mix32((word & _MASK) ^ h)
        h = mix32(((h + _GOLDEN) & _MASK) ^ (word >> 32))
    return h


def below(h: Words, bound: Words) -> Words:
    """Map hashes to [0, bound), uniform but for a bias of bound / 2^32; bound below 2^31."""
    return (h * bound) >> 32
