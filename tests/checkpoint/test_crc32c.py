"""CRC-32C against its definition, one bit at a time, and against published values."""

import numpy as np
import pytest

from tele_jax.checkpoint.crc32c import crc32c


def by_definition(data: bytes) -> int:
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = (remainder >> 1) ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"123456789", 0xE3069283),  # the check value of the catalogue of CRCs
        (bytes(32), 0x8A9136AA),  # this and the following: RFC 3720, appendix B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ],
)
def test_published_values(data, expected):
    assert crc32c(np.frombuffer(data, np.uint8)) == expected


# Around every length at which another part of the folding begins: 6777 bytes, 6777 words, a block, the whole buffer.
@pytest.mark.parametrize("edge", [4, 6773, 6777, 54216, 54216 + 50344, 54216 + 4 * 50344, 54216 + 5 * 50344])
def test_every_length(edge):
    data = np.random.default_rng(edge).integers(0, 256, edge + 9, np.uint8)
    for size in range(edge - 4, edge + 9, 4 if edge > 60_000 else 1):
        assert crc32c(data[:size]) == by_definition(data[:size].tobytes()), size


def test_a_flipped_bit_is_seen_wherever_it_is():
    data = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8)
    whole = crc32c(data)
    for place in [0, 7, 54_215, 150_000, 299_999]:
        data[place] ^= 16
        assert crc32c(data) != whole
        data[place] ^= 16
    assert crc32c(data) == whole
