"""What a record may hold, and what becomes of one that breaks the contract."""

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.events import Decoder, EventBatch, Reason, Records, json_schema

NOW_MS = 1_764_000_000_000
GOOD = {
    "user_id": "u",
    "item_id": "i",
    "event_type": "view",
    "timestamp": NOW_MS,
    "surface": "posts",
}


def decode(value: bytes | None, key: bytes | None = b"u") -> EventBatch:
    decoder = Decoder(max_bytes=2000, max_future_ms=60_000)
    return decoder.decode(Records("t", 0, [7], [key], [value], [NOW_MS]), now_ms=NOW_MS)


def event(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


@pytest.mark.parametrize(
    ("timestamp", "expected_ms"),
    [
        (NOW_MS, NOW_MS),
        (float(NOW_MS), NOW_MS),
        ("2025-11-24T16:00:00Z", NOW_MS),
        ("2025-11-24T17:00:00+01:00", NOW_MS),
        ("2025-11-24T16:00:00", NOW_MS),
    ],
)
def test_timestamps_are_epoch_milliseconds_or_iso_8601(timestamp: object, expected_ms: int) -> None:
    (decoded,) = decode(event(timestamp=timestamp)).events
    assert decoded.timestamp_ms == expected_ms


def test_unknown_fields_are_ignored_and_optional_ones_kept() -> None:
    (decoded,) = decode(event(event_id="e1", text="hi", context={"a": 1}, later=[1, 2])).events
    assert decoded.event_id == "e1"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"{", Reason.NOT_JSON),
        (b"[" * 1900, Reason.WRONG_TYPE),
        (b'{"user_id":"\xff"}', Reason.NOT_UTF8),
        (event(later="x").replace(b'"x"', b'"\xff"'), Reason.NOT_UTF8),
        (event(text="x" * 2000), Reason.TOO_LARGE),
        (b"null", Reason.WRONG_TYPE),
        (event(user_id=3), Reason.WRONG_TYPE),
        (event(context=3), Reason.WRONG_TYPE),
        (json.dumps({"user_id": "u"}).encode(), Reason.MISSING_FIELD),
        (event(event_type="poke"), Reason.UNKNOWN_VALUE),
        (event(surface="mail"), Reason.UNKNOWN_VALUE),
        (event(user_id=""), Reason.INVALID_VALUE),
        (event(item_id="x" * 257), Reason.INVALID_VALUE),
        (event(timestamp="yesterday"), Reason.INVALID_VALUE),
        (event(schema_version=2), Reason.UNSUPPORTED_VERSION),
        (event(timestamp=NOW_MS // 1000), Reason.TIMESTAMP_RANGE),
        (event(timestamp=-1), Reason.TIMESTAMP_RANGE),
        (event(timestamp=NOW_MS + 60_001), Reason.TIMESTAMP_FUTURE),
        (event(user_id="somebody else"), Reason.WRONG_KEY),
    ],
)
def test_each_violation_has_its_reason(value: bytes | None, reason: Reason) -> None:
    batch = decode(value)
    assert not batch.events
    (rejected,) = batch.rejected
    assert rejected.reason is reason
    assert rejected.detail
    assert rejected.record.value == value


@pytest.mark.parametrize("digits", [400, 1500])
def test_a_number_too_long_to_print_is_still_explained(digits: int) -> None:
    value = event().replace(str(NOW_MS).encode(), b"9" * digits)
    assert decode(value).rejected[0].reason in {Reason.TIMESTAMP_RANGE, Reason.NOT_JSON}


def test_a_bad_record_between_good_ones_costs_nothing_else() -> None:
    records = Records("t", 0, [0, 1, 2], [b"u"] * 3, [event(), b"{", event()], [NOW_MS] * 3)
    batch = Decoder(max_bytes=2000, max_future_ms=0).decode(records, now_ms=NOW_MS)
    assert [e.offset for e in batch.events] == [0, 2]
    assert [r.record.offset for r in batch.rejected] == [1]


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_decoder(value: bytes) -> None:
    batch = decode(value)
    assert len(batch.events) + len(batch.rejected) == 1


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from([*GOOD, "event_id", "text", "context", "schema_version"]),
        st.none() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
    )
)
def test_no_field_values_crash_the_decoder(fields: dict[str, object]) -> None:
    batch = decode(json.dumps({**GOOD, **fields}).encode())
    assert len(batch.events) + len(batch.rejected) == 1


def test_the_published_schema_is_the_one_in_force() -> None:
    published = Path(__file__).parents[2] / "docs" / "schema" / "user-event.v1.json"
    assert msgspec.json.decode(published.read_bytes()) == msgspec.to_builtins(json_schema())
