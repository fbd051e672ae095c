"""Which of two writes is the newer one: what keeps a worker that lost its partitions, and does not
know it yet, from undoing what the next owner wrote. No I/O.

What is stored ends in a **mark**: for each partition that went into it, the last record that did.
The scripts here run inside Redis. They refuse a write that lacks the last record of what is stored
(docs/delivery.md says why nothing is lost by that). So they compare places in the log, not clocks.

The mark, big-endian: 24 bytes for each partition, the newest last (hash of topic and partition,
8 bytes; offset, int64; its record time in epoch milliseconds, int64); their number, 1 byte; `SR1`.
It lies at the end, so that a release that does not know it reads the rest as ever.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

import msgspec

#: What Kafka counts in; anything may be stored, and marks hold no more.
Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
#: Topic, partition, last applied offset, its record time in epoch milliseconds.
Applied = tuple[str, int, Int64, Int64]

_PLACE = struct.Struct(">8sqq")
#: The mark of one partition, as nearly all have it.
_SINGLE = struct.Struct(">8sqqB3s")
_MAGIC = b"SR1"
#: Partitions in a mark, the newest; their number is one byte.
MAX_PLACES = 255

#: Writes a user's history and list, or any one value with a mark.
#: KEYS: the marked value; optionally the list beside it.
#: ARGV: marked value, its seconds to live; optionally the list (empty: there shall be none) and its
#: milliseconds to live. Returns 1, or 0 where the write was refused.
WRITE = b"""
local call, unpack, data = redis.call, struct.unpack, ARGV[1]
local stored = call('GETRANGE', KEYS[1], -28, -1)
if #stored == 28 and string.sub(stored, 26) == 'SR1' then
  local place, offset, time = unpack('>c8i8i8', stored)
  local count = string.sub(data, -3) == 'SR1' and string.byte(data, -4) or 0
  local newer = false
  for back = 1, count do
    local own, own_offset, own_time = unpack('>c8i8i8', data, #data - 3 - 24 * back)
    if own == place then
      newer = own_offset >= offset or own_time > time
      break
    end
  end
  if not newer then return 0 end
end
call('SET', KEYS[1], data, 'EX', ARGV[2])
if ARGV[3] == '' then
  call('DEL', KEYS[2])
elseif ARGV[3] then
  call('SET', KEYS[2], ARGV[3], 'PX', ARGV[4])
end
return 1
"""

#: Writes changes of a popularity table.
#: KEYS: the hash. ARGV: offset, record time, seconds to live, number of arguments that are fields
#: with their values, those, and fields to remove. Returns 1, or 0 where the write was refused.
WRITE_TABLE = b"""
local call = redis.call
local stored = call('HGET', KEYS[1], 'offset')
if stored then
  local offset, time = string.match(stored, '^(-?%d+):(-?%d+)$')
  if offset and tonumber(ARGV[1]) < tonumber(offset) and tonumber(ARGV[2]) <= tonumber(time) then
    return 0
  end
end
call('HSET', KEYS[1], 'offset', ARGV[1] .. ':' .. ARGV[2])
-- By the thousand: Lua hands on no more than some thousand values at once.
local last = 4 + ARGV[4]
for at = 5, last, 1000 do
  call('HSET', KEYS[1], unpack(ARGV, at, math.min(at + 999, last)))
end
for at = last + 1, #ARGV, 1000 do
  call('HDEL', KEYS[1], unpack(ARGV, at, math.min(at + 999, #ARGV)))
end
call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""

#: Writes a number unless a larger one is stored. KEYS: the number. ARGV: the number.
ADVANCE = b"""
local stored = tonumber(redis.call('GET', KEYS[1]) or -1)
if stored < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
return 1
"""


def mark(applied: Sequence[Applied]) -> bytes:
    """The mark of what holds `applied`, the newest last; empty where that is nothing."""
    if len(applied) == 1:
        topic, partition, offset, time_ms = applied[0]
        return _SINGLE.pack(_hashed(topic, partition), offset, time_ms, 1, _MAGIC)
    if not applied:
        return b""
    newest = applied[-MAX_PLACES:]
    places = (_PLACE.pack(_hashed(one[0], one[1]), one[2], one[3]) for one in newest)
    return b"".join((*places, bytes([len(newest)]), _MAGIC))


@lru_cache(maxsize=4096)
def _hashed(topic: str, partition: int) -> bytes:
    return hashlib.blake2b(f"{partition} {topic}".encode(), digest_size=8).digest()


def digest(script: bytes) -> str:
    """The name by which Redis knows a script."""
    return hashlib.sha1(script, usedforsecurity=False).hexdigest()
