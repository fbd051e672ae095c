"""Inputs made of others: bytes flipped, cut out, put in, doubled, joined with those of another."""

from __future__ import annotations

import random
from collections.abc import Sequence

#: What parsers trip over, now and then put in.
MORSELS = (
    b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"{",
    b"[", b"]", b"}", b'"', b"\\", b"\\ud800", b"\\u0000", b",", b":", b"null", b"true", b"-1",
    b"0", b"1e999", b"-1e999", b"NaN", b"9" * 30, b"9" * 400, b"0.1", b"18446744073709551616",
    b"\xc0", b"\xc1", b"\xcb" + b"\x7f\xf0" + bytes(6), b"\xcf" + b"\xff" * 8,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\n", b"\r\n", b"\xe2\x80\xa8",
)  # fmt: skip


def mutated(seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """One of `seeds` after a few changes; the same for the same state of `chance`."""
    data = bytearray(chance.choice(seeds))
    for _ in range(1 + min(int(chance.expovariate(0.7)), 8)):
        size = len(data)
        at = chance.randrange(size + 1)
        length = min(size - at, 1 + int(chance.expovariate(0.1)))
        match chance.randrange(7):
            case 0 if length:
                data[at] ^= 1 << chance.randrange(8)
            case 1 if length:
                data[at] = chance.randrange(256)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = chance.choice(MORSELS)
            case 4:
                data[at : at + length] = chance.choice(MORSELS)
            case 5:
                data[at:at] = data[at : at + length] * chance.choice((1, 2, 60))
            case _:
                other = chance.choice(seeds)
                start = chance.randrange(len(other) + 1)
                data[at:] = other[start:]
    return bytes(data)
