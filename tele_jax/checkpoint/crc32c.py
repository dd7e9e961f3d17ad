"""CRC-32C in numpy, for the chunk files that chunks.py reads and writes without TensorStore.

A CRC is the remainder of the message, a polynomial over GF(2), divided by P. P divides x^6777 + x^484 + x^100 + 1 and,
squaring, x^(6777 u) + x^(484 u) + x^(100 u) + 1 for every power of two u. So a unit of u bits is worth the same as
itself at three later places at once, 6777 - 484, 6777 - 100 and 6777 units further on, and all but the last 6777 units
can be folded away by exclusive or of whole blocks: with u = 64 about 5 GB/s a core (2026-11-23, docs/grow_stream.md).
What is left is looked up.

The three gaps are ours, found by searching all i < j < k < 12000 for x^k + x^j + x^i + 1 = 0 mod P; a large least gap
makes for long blocks.
"""

import functools

import numpy as np

_P = 0x82F63B78  # of CRC-32C (Castagnoli), lowest power in the highest bit
_GAPS = (6777 - 484, 6777 - 100, 6777)
_KEPT = _GAPS[-1]  # units that are left
_BLOCK = _GAPS[0]  # units that do not depend on each other
_BLOCKS = 4  # in the buffer before it is wound back: 0.3 MB in all, so that it stays in the cache


def crc32c(data: np.ndarray) -> int:
    """The CRC-32C of uint8[n].

    >>> hex(crc32c(np.frombuffer(b"123456789", np.uint8)))
    '0xe3069283'
    """
    whole = len(data) // 8 * 8
    end = np.zeros(4, np.uint8)  # the remainder is that of the message times x^32
    if whole > 8 * _KEPT:
        words = _fold(data[:whole].view(np.uint64), first=0xFFFFFFFF)
        data = np.concatenate([words.view(np.uint8), data[whole:], end])
    else:
        data = np.concatenate([data, end])
        data[:4] ^= 0xFF
    if len(data) > _KEPT:
        data = _fold(data)
    bits = np.unpackbits(data, bitorder="little")
    return int(np.bitwise_xor.reduce(_powers()[len(bits) - 1 - np.flatnonzero(bits)], initial=0)) ^ 0xFFFFFFFF


def _fold(units: np.ndarray, first: int = 0) -> np.ndarray:
    """The last _KEPT units, worth what all units[n] are; first: flips bits of the first unit."""
    folded = len(units) - _KEPT
    values = np.zeros(_KEPT + _BLOCKS * _BLOCK, units.dtype)  # of the units folded last, preceded by zeros
    end = _KEPT
    for start in range(0, folded, _BLOCK):
        size = min(_BLOCK, folded - start)
        if end + size > len(values):
            values[:_KEPT] = values[end - _KEPT : end]
            end = _KEPT
        value = values[end : end + size]
        np.bitwise_xor(units[start : start + size], values[end - _GAPS[0] :][:size], out=value)
        np.bitwise_xor(value, values[end - _GAPS[1] :][:size], out=value)
        np.bitwise_xor(value, values[end - _GAPS[2] :][:size], out=value)
        if start == 0:
            value[0] ^= units.dtype.type(first)
        end += size
    left = units[folded:].copy()
    for gap in _GAPS:
        left[:gap] ^= values[end - gap : end]
    return left


@functools.cache
def _powers() -> np.ndarray:
    """uint32[n], x^e mod P for every e that a byte which is left can have."""
    powers, value = np.empty(8 * _KEPT, np.uint32), 0x80000000
    for exponent in range(len(powers)):
        powers[exponent] = value
        value = (value >> 1) ^ (_P if value & 1 else 0)
    return powers
