"""Sizes that are refused; docs/limits.md lists them all, and where the others are tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import tiny_bundle
from worker.bundle import open_bundle
from worker.bundle_files import MAX_FILES
from worker.errors import BundleError, SettingsError
from worker.events import Decoder, EventBatch, Reason, Records
from worker.history import MAX_STORED_BYTES, History
from worker.manifest import MANIFEST_FILE, MAX_ITEMS, MAX_MANIFEST_BYTES
from worker.releases import MAX_RELEASE_BYTES, decode_release
from worker.rules import MAX_RULES_BYTES, read_rules

NOW_MS = 1_764_000_000_000


def decode(value: bytes) -> EventBatch:
    records = Records("t", 0, [0], [b"u"], [value], [NOW_MS])
    return Decoder(max_bytes=65536, max_future_ms=0).decode(records, now_ms=NOW_MS)


def nested(depth: int) -> bytes:
    fields = {"user_id": "u", "item_id": "i", "event_type": "view", "timestamp": NOW_MS}
    head = json.dumps({**fields, "surface": "posts"})[:-1]
    return f'{head}, "context": {{"deep": {"[" * depth}{"]" * depth}}}}}'.encode()


def test_json_may_be_nested_as_events_are_and_not_without_end() -> None:
    assert len(decode(nested(100)).events) == 1
    (rejected,) = decode(nested(30_000)).rejected
    assert (rejected.reason, rejected.detail) == (Reason.NOT_JSON, "nested too deeply")


@pytest.mark.parametrize("field", ["user_id", "item_id", "event_id"])
def test_an_id_has_at_most_256_characters(field: str) -> None:
    event = {"user_id": "u", "item_id": "i", "event_type": "view", "timestamp": NOW_MS}
    for length, reasons in ((256, [Reason.WRONG_KEY] * (field == "user_id")), (257, None)):
        value = json.dumps({**event, "surface": "posts", field: "\u00e9" * length})
        found = [one.reason for one in decode(value.encode()).rejected]
        assert found == ([Reason.INVALID_VALUE] if reasons is None else reasons)


def test_a_stored_history_beyond_any_that_is_written_is_damaged() -> None:
    with pytest.raises(ValueError, match="more than any"):
        History.from_bytes(b"x" * (MAX_STORED_BYTES + 1), 200)


def test_a_rules_file_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    # Spaces are JSON: only the size is wrong.
    file.write_bytes(b"{}" + b" " * MAX_RULES_BYTES)
    with pytest.raises(SettingsError, match=f"more than {MAX_RULES_BYTES} bytes"):
        read_rules(file)
    file.write_bytes(b"{}" + b" " * (MAX_RULES_BYTES - 2))
    read_rules(file)


def test_a_release_is_bounded() -> None:
    release = b'{"stable":"v1"}'
    assert decode_release(release.ljust(MAX_RELEASE_BYTES), "here").stable == "v1"
    with pytest.raises(BundleError, match="here is damaged: it has more than"):
        decode_release(release.ljust(MAX_RELEASE_BYTES + 1), "here")


def test_a_manifest_is_bounded(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "v1")
    with (bundle / MANIFEST_FILE).open("ab") as file:
        file.write(b" " * MAX_MANIFEST_BYTES)
    with pytest.raises(BundleError, match=f"more than {MAX_MANIFEST_BYTES} bytes"):
        open_bundle(bundle)


def changed(bundle: Path, **fields: object) -> Path:
    file = bundle / MANIFEST_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return bundle


@pytest.mark.parametrize("count", [0, MAX_ITEMS + 1, 1 << 62])
def test_a_model_has_a_bounded_number_of_items(tmp_path: Path, count: int) -> None:
    with pytest.raises(BundleError, match=f"a model has 1 to {MAX_ITEMS} items"):
        open_bundle(changed(tiny_bundle(tmp_path / "v1"), item_count=count))


def test_a_bundle_has_a_bounded_number_of_files(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "v1")
    files = json.loads((bundle / MANIFEST_FILE).read_text())["files"]
    many = {**files, **{f"f{n}": {"sha256": "", "bytes": 0} for n in range(MAX_FILES)}}
    with pytest.raises(BundleError, match=f"at most {MAX_FILES}"):
        open_bundle(changed(bundle, files=many))
