"""What is fuzzed: everything that reads bytes which others wrote.

A target takes bytes and returns, or raises one of the errors that it documents. Anything else is a
finding, as are a hang and memory that grows. What it accepted must keep the promises checked here.
"""

from __future__ import annotations

import atexit
import base64
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import msgspec

from tests.conftest import ITEMS, tiny_bundle, tiny_model
from worker.bundle import open_bundle
from worker.cache import decode as decode_list
from worker.cache import encode as encode_list
from worker.errors import BundleError, CacheError, HistoryFormatError, SettingsError
from worker.events import MAX_ID_LENGTH, Decoder, Event, EventType, Records, Surface
from worker.histories import _shown
from worker.history import History, StoredHistory1
from worker.item_ids import read_item_ids
from worker.manifest import (
    MANIFEST_FILE,
    FileSpec,
    check_manifest,
    decode_manifest,
    encode_manifest,
)
from worker.memory import expected_bytes
from worker.outbox import dead_letter_record, fitted, shorter_list
from worker.ranking import Origin, Recommendations
from worker.readable import as_text
from worker.release_channel import _take
from worker.releases import Canary, Promotion, Release, decode_release, encode_release, newer, plan
from worker.rules import decode_rules
from worker.settings import ModelChoice
from worker.signing import check_signature
from worker.text import grams
from worker.trials import PartitionTally, decode_tally
from worker.weights import check_onnx

NOW_MS = 1_764_000_000_000
LENGTH = 8


@dataclass(frozen=True)
class Target:
    """A function of bytes, bytes to begin with, and what it may raise."""

    name: str
    run: Callable[[bytes], object]
    seeds: Sequence[bytes]
    raises: tuple[type[Exception], ...] = ()
    #: Longest that one input may take, in seconds.
    time_s: float = 1.0

    def check(self, data: bytes) -> bool:
        """Whether `data` was accepted.

        Raises:
            Exception: a finding.
        """
        try:
            self.run(data)
        except self.raises:
            return False
        return True


# -- events: the key up to the first newline, then the value; without one, no key

_DECODER = Decoder(max_bytes=4096, max_future_ms=60_000)


def _decode_event(data: bytes) -> None:
    before, newline, after = data.partition(b"\n")
    key, value = (before, after or None) if newline else (None, before)
    records = Records("t", 0, [7], [key], [value], [NOW_MS])
    batch = _DECODER.decode(records, now_ms=NOW_MS)
    assert len(batch.events) + len(batch.tombstones) + len(batch.rejected) == 1
    for event in batch.events:
        for one in (event.user_id, event.item_id, event.event_id or "-"):
            assert 0 < len(one) <= MAX_ID_LENGTH
        assert event.user_id.encode("utf-8", "surrogatepass") == key
        assert 0 < event.timestamp_ms <= NOW_MS + 60_000
    for tombstone in batch.tombstones:
        assert tombstone.user_id.encode("utf-8", "surrogatepass") == key
    for rejected in batch.rejected:
        letter = fitted(dead_letter_record("d", rejected), 8192)
        assert letter.value == (value and value[:4096])
        assert all(isinstance(header, bytes) for _, header in letter.headers)


def _event(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "user_id": "u", "item_id": "i", "event_type": "view", "timestamp": NOW_MS,
        "surface": "posts",
    } | changes  # fmt: skip
    return b"u\n" + msgspec.json.encode(fields)


_EVENTS = [
    _event(),
    _event(event_id="e", text="some text", context={"a": [1, None, True]}, schema_version=1),
    _event(timestamp="2025-11-24T16:00:00+01:00", event_type="hide", surface="friends"),
    _event(timestamp=1e12, user_id="\u00e9", item_id="\U0001f600"),
    b"u\n" + rb'{"user_id":"\ud800\u0000","item_id":"\"","event_type":"follow"}',
    b"u\n",
    b"{}",
    b"u\n" + b"[" * 60 + b"]" * 60,
]


# -- what Redis holds

_PROBE = Event("u", "new", EventType.LIKE, Surface.FRIENDS, NOW_MS, "e", None, "t", 0, 99, NOW_MS)


def _read_history(data: bytes) -> None:
    history = History.from_bytes(data, LENGTH)
    for _ in range(2):
        assert len(history.items) == len(history.timestamps) <= LENGTH
        assert len(history.hidden) <= LENGTH
        history.refresh_window({"i1": 1}, ["i1"], "catalogue", "version")
        again = History.from_bytes(history.to_bytes(), LENGTH)
        assert again.to_bytes() == history.to_bytes()
        history.apply(_PROBE)


def _histories() -> list[bytes]:
    full = History(LENGTH)
    for number in range(12):
        kind = [EventType.VIEW, EventType.HIDE, EventType.FOLLOW][number % 3]
        full.apply(
            Event("u", f"i{number}", kind, Surface.FRIENDS, NOW_MS + number, f"e{number}", None,
                  "t", number % 2, number, NOW_MS)
        )  # fmt: skip
    old = StoredHistory1(1, ["a"], [NOW_MS], ["b"], [1 << 62], {"t": {0: (7, NOW_MS)}}, ["c"])
    return [full.to_bytes(), History(LENGTH).to_bytes(), msgspec.msgpack.encode(old)]


def _read_list(data: bytes) -> None:
    _shown(data)
    found = decode_list(data)
    as_text(msgspec.to_builtins(found))
    assert len(shorter_list(data, 300)) <= 300 or not decode_list(shorter_list(data, 300)).items
    assert decode_list(encode_list(found)) == found


_LISTS = [
    encode_list(
        Recommendations("u", Surface.POSTS, list(items), [0.5 - n for n in range(len(items))],
                        "posts@v1", "model", NOW_MS, Origin("t", 0, 7))
    )
    for items in (ITEMS[:10], (), ("\u00e9" * 200, "\n" * 200))
]  # fmt: skip


def _read_tally(data: bytes) -> None:
    decode_tally(data, 7).merged(PartitionTally(period=7)).evidence()


# -- releases

_CHOICE = ModelChoice("posts", None)


def _read_release(data: bytes) -> None:
    release = decode_release(data, "here")
    assert decode_release(encode_release(release), "here") == release
    assert newer(release, None) == release
    plan(release, ["v1", "v2", "v3"], _CHOICE, where="here")


def _read_push(data: bytes) -> None:
    key, _, value = data.partition(b"\n")
    _take(key, value, lambda name, release: None)


_RELEASE = encode_release(
    Release(
        "v1",
        (Promotion("v0", "2026-11-24T10:00:00+00:00", "a@b"), Promotion("v1", rollback=True)),
        revision=7,
        period=7,
        canary=Canary("v2", 0.1, datetime(2026, 11, 24, tzinfo=UTC)),
        shadow="v3",
        quarantined={"v4": "gate: quality"},
    )
)
_RELEASES = [_RELEASE, b'{"stable":"v1"}', b'{"stable":"v1","revision":9007199254740993}']


# -- bundles

_BUNDLES = Path(tempfile.mkdtemp(prefix="streamrec-fuzz-"))
atexit.register(shutil.rmtree, _BUNDLES, ignore_errors=True)
_GOOD = tiny_bundle(_BUNDLES / "v1")
_PARTS = {file.name: file.read_bytes() for file in sorted(_GOOD.iterdir())}
_MANIFEST = _PARTS[MANIFEST_FILE]
#: Between the files of a bundle in one input.
_MARK = b"\xf0--streamrec--\xf0"


def _read_manifest(data: bytes) -> None:
    manifest = decode_manifest(data, "here")
    check_manifest(manifest)
    assert expected_bytes(manifest, rows=64) > 0
    assert decode_manifest(encode_manifest(manifest), "here") == manifest


def _read_bundle(data: bytes) -> None:
    """Manifest, ids, graph; sizes and checksums in the manifest are made right where it can be
    read, so that what comes after them is reached."""
    parts = dict(zip(sorted(_PARTS), data.split(_MARK), strict=False))
    directory = _BUNDLES / "mutated"
    directory.mkdir(exist_ok=True)
    try:
        manifest = decode_manifest(parts.get(MANIFEST_FILE, b""), "here")
        files = {
            name: FileSpec(sha256(content).hexdigest(), len(content))
            for name, content in parts.items()
            if name in manifest.files
        }
        parts[MANIFEST_FILE] = encode_manifest(
            msgspec.structs.replace(manifest, files={**manifest.files, **files})
        )
    except BundleError:
        pass
    for name, content in parts.items():
        (directory / name).write_bytes(content)
    try:
        open_bundle(directory, memory_budget_bytes=256 << 20)
    finally:
        shutil.rmtree(directory)


def _read_items(data: bytes) -> None:
    half = len(data) // 2
    index = read_item_ids(iter([data[:half], data[half:]]), data.count(b"\n") or 1)
    assert list(index.values()) == list(range(1, len(index) + 1))


_RULES = [
    b'{"block":["a"],"surfaces":{"ads":{"allow":["c"],"max_per_author":2}},"authors":{"c":"d"}}',
    b"{}",
    b'{"surfaces":{"posts":{"max_per_author":0}}}',
]


def _read_text(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    found = grams(text, buckets=1000, limit=64)
    assert len(found) == len(set(found)) <= 64
    assert all(0 < gram <= 1000 for gram in found)


TARGETS = {
    target.name: target
    for target in (
        Target("event", _decode_event, _EVENTS),
        Target("history", _read_history, _histories(), (ValueError, HistoryFormatError)),
        Target("list", _read_list, _LISTS, (CacheError,)),
        Target("tally", _read_tally, [msgspec.msgpack.encode(PartitionTally(period=7))]),
        Target("release", _read_release, _RELEASES, (BundleError,)),
        Target("push", _read_push, [b"posts\n" + one for one in _RELEASES]),
        Target("manifest", _read_manifest, [_MANIFEST], (BundleError,)),
        Target(
            "items",
            _read_items,
            ["".join(f"{item}\n" for item in ITEMS).encode(), b"\xc3\xa9\n"],
            (BundleError,),
        ),
        Target("onnx", lambda data: check_onnx("m", iter([data])), [tiny_model()], (BundleError,)),
        Target(
            "bundle",
            _read_bundle,
            [_MARK.join(_PARTS[name] for name in sorted(_PARTS))],
            (BundleError,),
            10.0,
        ),
        Target(
            "signature",
            lambda data: check_signature(_MANIFEST, data, [bytes(32)]),
            [base64.b64encode(bytes(range(64))) + b"\n"],
            (BundleError,),
        ),
        Target("rules", lambda data: decode_rules(data, "here"), _RULES, (SettingsError,)),
        Target("text", _read_text, [b"A text of WORDS, \xc3\xa9 and 42"]),
    )
}
