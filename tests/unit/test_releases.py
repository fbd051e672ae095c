"""Which version serves: every change, what is never allowed, copies that agree, the commands."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import tiny_bundle
from worker import release_channel
from worker.cli import main
from worker.errors import BundleError, ReleaseRefusedError
from worker.manifest import MODEL_FILE
from worker.registry import LocalRegistry
from worker.releases import (
    MAX_HISTORY,
    Canary,
    Plan,
    Promotion,
    Release,
    canary_ended,
    canary_promoted,
    decode_release,
    encode_release,
    newer,
    plan,
    promoted,
    rolled_back,
    unquarantined,
    with_canary,
    with_quarantined,
    with_shadow,
)
from worker.settings import ModelChoice

NOW = datetime(2026, 11, 24, 10, 30, tzinfo=UTC)
NOW_MS = 1795516200000
ANY = ModelChoice("posts", None)

Step = Callable[[Release | None], Release]


def after(*versions: str) -> Release:
    """A release after these promotions, oldest first."""
    release: Release | None = None
    for version in versions:
        release = promoted(release, version, at=NOW)
    assert release is not None
    return release


# Promotion and rollback


def test_the_first_revision_is_the_time_and_each_change_is_one_more() -> None:
    first = promoted(None, "a", by="ann", at=NOW)
    assert first.revision == NOW_MS
    assert promoted(first, "b", at=NOW).revision == NOW_MS + 1
    assert promoted(first, "b", at=NOW - timedelta(days=1)).revision == NOW_MS + 1
    assert promoted(first, "b", at=NOW + timedelta(seconds=2)).revision == NOW_MS + 2000
    assert (first.stable, first.by, first.at) == ("a", "ann", "2026-11-24T10:30:00+00:00")
    assert first.history == (Promotion("a", "2026-11-24T10:30:00+00:00", "ann"),)


def test_a_release_made_anew_is_newer_than_those_before_its_file_was_deleted() -> None:
    many = after(*"abababab")
    assert newer(many, promoted(None, "a", at=NOW + timedelta(seconds=1))) != many


def test_rolling_back_retraces_the_promotions_and_no_further() -> None:
    release = after("a", "b", "b", "c")
    served = []
    with pytest.raises(ReleaseRefusedError, match="no version was promoted before a"):
        while True:
            release = rolled_back(release, at=NOW)
            served.append(release.stable)
    assert served == ["b", "a"]
    assert rolled_back(release, "c", at=NOW).stable == "c"
    with pytest.raises(ReleaseRefusedError, match="not among the last 20"):
        rolled_back(release, "never", at=NOW)
    with pytest.raises(ReleaseRefusedError, match="a serves already"):
        rolled_back(release, "a", at=NOW)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9))
def test_as_many_rollbacks_as_promotions_lead_back_to_the_first(versions: list[str]) -> None:
    release = after(*versions)
    served = [versions[-1]]
    with suppress(ReleaseRefusedError):
        for _ in versions:
            release = rolled_back(release, at=NOW)
            served.append(release.stable)
    runs = [v for place, v in enumerate(versions) if place == 0 or versions[place - 1] != v]
    # Each version promoted, latest first; the history's bound is not reached.
    assert served == runs[::-1]


def test_what_was_left_is_quarantined_and_never_rolled_back_to() -> None:
    release = rolled_back(after("a", "b"), quarantine="clicks fell", at=NOW)
    assert (release.stable, release.quarantined) == ("a", {"b": "clicks fell"})
    assert release.history[-1].rollback
    again = promoted(release, "c", at=NOW)
    assert rolled_back(again, at=NOW).stable == "a"
    with pytest.raises(ReleaseRefusedError, match=r"b is quarantined \(clicks fell\).*unquarant"):
        rolled_back(again, "b", at=NOW)


def test_a_rollback_skips_what_was_quarantined_meanwhile() -> None:
    release = with_quarantined(after("a", "b", "c"), "b", "bad rows", at=NOW)
    assert rolled_back(release, at=NOW).stable == "a"


def test_a_quarantined_version_is_promoted_by_force_only_which_lifts_it() -> None:
    release = with_quarantined(after("a"), "b", "bad", at=NOW)
    with pytest.raises(ReleaseRefusedError, match="--force"):
        promoted(release, "b", at=NOW)
    forced = promoted(release, "b", force=True, at=NOW)
    assert (forced.stable, forced.quarantined) == ("b", {})
    assert promoted(unquarantined(release, "b", at=NOW), "b", at=NOW).stable == "b"


def test_the_version_that_serves_is_rolled_back_rather_than_quarantined() -> None:
    with pytest.raises(ReleaseRefusedError, match="models rollback NAME"):
        with_quarantined(after("a"), "a", "bad", at=NOW)


def test_lifting_a_quarantine_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(ReleaseRefusedError, match="c is not quarantined; b is"):
        unquarantined(with_quarantined(after("a"), "b", "bad", at=NOW), "c", at=NOW)


def test_the_history_is_bounded() -> None:
    release = after(*(str(number) for number in range(MAX_HISTORY + 5)))
    assert [entry.version for entry in release.history] == [
        str(number) for number in range(5, MAX_HISTORY + 5)
    ]


@pytest.mark.parametrize(
    "step",
    [
        lambda: rolled_back(None, at=NOW),
        lambda: with_canary(None, "b", 0.1, at=NOW),
        lambda: with_shadow(None, "b", at=NOW),
        lambda: with_quarantined(None, "b", "bad", at=NOW),
        lambda: unquarantined(None, "b", at=NOW),
        lambda: canary_ended(None, at=NOW),
    ],
)
def test_nothing_but_promoting_begins_a_release(step: Callable[[], Release]) -> None:
    with pytest.raises(ReleaseRefusedError, match="no version is promoted yet"):
        step()


# Canary and shadow


def test_a_canary_starts_a_trial_of_its_own_and_ends_it() -> None:
    release = with_canary(after("a"), "b", 0.1, auto=False, by="ann", at=NOW)
    assert release.canary == Canary("b", 0.1, NOW, "ann", False)
    assert (release.stable, release.period) == ("a", release.revision)
    wider = with_canary(release, "b", 0.5, at=NOW)
    assert wider.period == wider.revision > release.period
    ended = canary_ended(wider, at=NOW)
    assert (ended.canary, ended.period, ended.quarantined) == (None, 0, {})


def test_a_canary_that_ends_for_a_reason_is_not_tried_again() -> None:
    release = canary_ended(
        with_canary(after("a"), "b", 0.1, at=NOW), quarantine="clicks fell", at=NOW
    )
    assert (release.canary, release.quarantined) == (None, {"b": "clicks fell"})
    with pytest.raises(ReleaseRefusedError, match="clicks fell"):
        with_canary(release, "b", 0.1, at=NOW)


def test_a_promoted_canary_serves_and_can_be_rolled_back() -> None:
    release = canary_promoted(with_canary(after("a"), "b", 0.1, at=NOW), at=NOW)
    assert (release.stable, release.canary, release.period) == ("b", None, 0)
    assert rolled_back(release, at=NOW).stable == "a"


def test_another_stable_version_starts_the_trial_anew() -> None:
    release = with_canary(after("a"), "b", 0.1, at=NOW)
    moved = promoted(release, "c", at=NOW)
    assert moved.canary == release.canary
    assert moved.period == moved.revision


def test_a_rollback_ends_the_canary() -> None:
    assert rolled_back(with_canary(after("a", "b"), "c", 0.1, at=NOW), at=NOW).canary is None


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ReleaseRefusedError, match="above 0 and at most 100%"):
        with_canary(after("a"), "b", share, at=NOW)


def test_the_version_that_serves_is_no_canary_and_no_shadow() -> None:
    with pytest.raises(ReleaseRefusedError, match="a serves all users already"):
        with_canary(after("a"), "a", 0.1, at=NOW)
    with pytest.raises(ReleaseRefusedError, match="a serves users"):
        with_shadow(after("a"), "a", at=NOW)


def test_what_is_not_there_cannot_be_ended() -> None:
    with pytest.raises(ReleaseRefusedError, match="no canary runs"):
        canary_ended(after("a"), at=NOW)
    with pytest.raises(ReleaseRefusedError, match="no canary runs"):
        canary_promoted(after("a"), at=NOW)
    with pytest.raises(ReleaseRefusedError, match="no shadow runs"):
        with_shadow(after("a"), None, at=NOW)


def test_a_shadow_beside_a_canary_does_not_start_the_canarys_trial_anew() -> None:
    release = with_canary(after("a"), "b", 0.1, at=NOW)
    both = with_shadow(release, "c", at=NOW)
    assert (both.shadow, both.period) == ("c", release.period)
    alone = canary_ended(both, at=NOW)
    assert (alone.shadow, alone.period) == ("c", alone.revision)
    assert with_shadow(alone, None, at=NOW).period == 0


def test_a_shadow_that_becomes_the_canary_or_serves_is_a_shadow_no_more() -> None:
    release = with_shadow(after("a"), "b", at=NOW)
    assert with_canary(release, "b", 0.1, at=NOW).shadow is None
    assert promoted(release, "b", at=NOW).shadow is None
    assert with_quarantined(release, "b", "bad", at=NOW).shadow is None


# What holds of every sequence of changes

VERSIONS = st.sampled_from("abcd")


def at(function: Callable[..., Release], *arguments: object, **options: object) -> Step:
    return lambda old: function(old, *arguments, **options, at=NOW)


STEPS: st.SearchStrategy[Step] = st.one_of(
    st.builds(at, st.just(promoted), VERSIONS, force=st.booleans()),
    st.builds(at, st.just(rolled_back), st.none() | VERSIONS, quarantine=st.none() | st.just("x")),
    st.builds(at, st.just(with_canary), VERSIONS, st.sampled_from([0.1, 1.0])),
    st.builds(at, st.just(canary_ended), quarantine=st.none() | st.just("x")),
    st.builds(at, st.just(canary_promoted)),
    st.builds(at, st.just(with_shadow), st.none() | VERSIONS),
    st.builds(at, st.just(with_quarantined), VERSIONS, st.just("x")),
    st.builds(at, st.just(unquarantined), VERSIONS),
)


def applied(release: Release | None, steps: list[Step]) -> list[Release]:
    """The releases after each step that was not refused."""
    made: list[Release] = []
    for step in steps:
        with suppress(ReleaseRefusedError):
            release = step(release)
            made.append(release)
    return made


@given(st.lists(STEPS, max_size=25))
def test_no_sequence_of_changes_lets_a_quarantined_version_serve(steps: list[Step]) -> None:
    made = applied(after("a"), steps)
    for release in made:
        canary = release.canary.version if release.canary else None
        loaded = [release.stable, canary, release.shadow]
        assert not set(loaded) & set(release.quarantined)
        running = [version for version in loaded if version]
        assert len(running) == len(set(running))
        assert release.history[-1].version == release.stable
        assert bool(release.period) == bool(canary or release.shadow)
        assert release.period <= release.revision
    assert all(one.revision < two.revision for one, two in itertools.pairwise(made))


@given(st.lists(STEPS, max_size=25))
def test_a_release_is_read_as_it_was_written(steps: list[Step]) -> None:
    for release in applied(None, steps):
        assert decode_release(encode_release(release), "release.json") == release


@given(st.data(), st.lists(STEPS, max_size=8), st.lists(STEPS, max_size=8))
def test_copies_merged_in_any_order_and_repeatedly_agree(
    data: st.DataObject, one: list[Step], two: list[Step]
) -> None:
    # Two writers from the same start: some of their revisions are equal and differ in content.
    start = after("a")
    made: list[Release | None] = [start, None, *applied(start, one), *applied(start, two)]

    def merged(order: list[Release | None]) -> Release | None:
        held: Release | None = None
        for release in order:
            held = newer(held, release)
        return held

    shuffled = data.draw(st.permutations(made + made))
    assert merged(shuffled) == merged(made)
    assert newer(merged(made[::2]), merged(made[1::2])) == merged(made)


# Files


def test_a_release_file_of_an_earlier_release_reads_and_rolls_back() -> None:
    old = decode_release(b'{"stable":"a"}', "release.json")
    assert rolled_back(promoted(old, "b", at=NOW), at=NOW).stable == "a"
    text = b'{"stable":"b","history":[{"version":"a"},{"version":"b","at":"2026","by":"ann"}]}'
    assert rolled_back(decode_release(text, "release.json"), at=NOW).stable == "a"


def test_a_worker_of_an_earlier_release_reads_the_promoted_version() -> None:
    class Earlier(msgspec.Struct):
        stable: str
        history: list[Promotion] = []

    data = encode_release(with_canary(after("a", "b"), "c", 0.1, at=NOW))
    assert msgspec.json.decode(data, type=Earlier).stable == "b"


@settings(deadline=None)
@given(data=st.binary(max_size=100))
def test_no_bytes_as_release_file_crash_the_reader(data: bytes) -> None:
    with suppress(BundleError):
        decode_release(data, "release.json")


@pytest.mark.parametrize(
    "canary",
    [
        '{"version":"b","share":0,"since":"2026-11-24T10:00:00Z"}',
        '{"version":"b","share":0.1,"since":"2026-11-24T10:00:00"}',
    ],
)
def test_a_canary_out_of_range_or_of_no_known_time_is_damage(canary: str) -> None:
    with pytest.raises(BundleError, match="is damaged"):
        decode_release(f'{{"stable":"a","canary":{canary}}}'.encode(), "release.json")


# Plans


def planned(release: Release | None, *known: str, pinned: str | None = None) -> Plan:
    return plan(release, known, ModelChoice("posts", pinned), where="models")


def test_the_newest_serves_until_one_is_promoted() -> None:
    assert planned(None, "a", "b") == Plan("b")
    assert planned(after("a"), "a", "b") == Plan("a")


def test_a_pinned_version_serves_alone_whatever_the_release_says() -> None:
    release = with_shadow(with_canary(after("a"), "b", 0.1, at=NOW), "c", at=NOW)
    assert planned(release, "a", "b", "c", pinned="b") == Plan("b")


def test_canary_and_shadow_are_planned_beside_the_stable_version() -> None:
    release = with_shadow(with_canary(after("a"), "b", 0.1, at=NOW), "c", at=NOW)
    assert planned(release, "a", "b", "c") == Plan(
        "a", canary="b", share=0.1, period=release.period, shadow="c"
    )


def test_what_the_registry_does_not_have_yet_is_missing_and_not_planned() -> None:
    release = with_shadow(with_canary(after("a"), "b", 0.1, at=NOW), "../c", at=NOW)
    assert planned(release, "a") == Plan("a", period=release.period, missing=("b", "../c"))


@pytest.mark.parametrize(
    ("release", "known", "pinned", "message"),
    [
        (None, (), None, "no bundle models/posts/<version>"),
        (after("a"), ("b",), None, "models has no version 'a' of model 'posts'; it has b"),
        (None, ("b",), "a", "has no version 'a'"),
    ],
)
def test_a_stable_version_that_is_not_there_is_an_error(
    release: Release | None, known: tuple[str, ...], pinned: str | None, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        planned(release, *known, pinned=pinned)


# The command line


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    for version in "abc":
        tiny_bundle(tmp_path / "posts" / version)
    return tmp_path


def streamrec(registry: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["models", *arguments, "--registry", str(registry)])


def said(registry: Path, *arguments: str) -> str:
    done = streamrec(registry, *arguments)
    assert done.exit_code == 0, done.output
    return done.output


def test_commands_lead_from_promotion_through_a_canary_to_rollback(registry: Path) -> None:
    assert said(registry, "promote", "posts", "a") == "posts@a serves from now on\n"
    assert "serves 0.1 of the users" in said(registry, "canary", "posts", "b", "--share", "10%")
    assert "b  0.1 of the users for 0 s, the gate decides" in said(registry, "status", "posts")
    assert "a serves all" in said(registry, "canary", "posts", "--end")
    said(registry, "shadow", "posts", "c")
    assert "shadow   c" in said(registry, "status")
    said(registry, "shadow", "posts", "--off")
    said(registry, "promote", "posts", "b")
    assert said(registry, "rollback", "posts", "--reason", "slow") == "posts@a serves from now on\n"
    assert "quarantined  b  slow" in said(registry, "status")
    assert "b is quarantined (slow)" in streamrec(registry, "promote", "posts", "b").stderr
    said(registry, "unquarantine", "posts", "b")
    said(registry, "quarantine", "posts", "b", "--reason", "slow")
    said(registry, "promote", "posts", "b", "--force")
    assert LocalRegistry(registry).serving("posts") == "b"


def test_status_speaks_json(registry: Path) -> None:
    (before,) = json.loads(said(registry, "status", "--json"))["models"]
    assert (before["stable"], before["promoted"], before["canary"]) == ("c", False, None)
    said(registry, "promote", "posts", "a")
    said(registry, "canary", "posts", "b", "--share", "0.25", "--no-auto")
    (now,) = json.loads(said(registry, "status", "posts", "--json"))["models"]
    assert (now["stable"], now["promoted"], now["quarantined"]) == ("a", True, {})
    assert now["canary"].items() >= {"version": "b", "share": 0.25, "auto": False}.items()


def test_every_change_is_pushed_once_and_starts_from_what_was_pushed(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[str, Release]] = []
    topic: dict[str, Release] = {}

    async def push(settings: object, name: str, release: Release) -> None:
        pushed.append((name, release))
        topic[name] = release

    async def newest(settings: object, name: str) -> Release | None:
        return topic.get(name)

    monkeypatch.setattr(release_channel, "push_release", push)
    monkeypatch.setattr(release_channel, "newest_release", newest)
    for command in (
        ["promote", "posts", "a"],
        ["promote", "posts", "b"],
        ["canary", "posts", "c", "--share", "10%"],
        ["canary", "posts", "--end"],
        ["shadow", "posts", "c"],
        ["shadow", "posts", "--off"],
        ["quarantine", "posts", "c"],
        ["unquarantine", "posts", "c"],
        ["rollback", "posts"],
    ):
        release = json.loads(said(registry, *command, "--json", "--kafka", "broker:9092"))
        (name, sent), *others = pushed
        assert (name, sent.revision, others) == ("posts", release["revision"], [])
        pushed.clear()
        # Where the registry cannot be written by those who push, it lags behind.
        topic[name] = msgspec.structs.replace(sent, revision=sent.revision + 1_000_000, by="gate")
    streamrec(registry, "rollback", "posts", "--kafka", "broker:9092")  # refused
    assert pushed == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["canary", "posts", "z", "--share", "10%"], "has no version 'z'"),
        (["canary", "posts", "b", "--share", "10%"], "model.onnx has 9 bytes"),
        (["canary", "posts", "a", "--share", "10%"], "a serves all users already"),
        (["canary", "posts", "c", "--share", "0"], "above 0"),
        (["canary", "posts", "--end"], "no canary runs"),
        (["shadow", "posts", "b"], "model.onnx has 9 bytes"),
        (["shadow", "posts", "--off"], "no shadow runs"),
        (["rollback", "posts"], "no version was promoted before a"),
        (["quarantine", "posts", "z"], "has no version 'z'"),
        (["unquarantine", "posts", "b"], "b is not quarantined"),
        (["status", "feed"], "no bundle"),
    ],
)
def test_what_cannot_be_done_is_one_line(registry: Path, command: list[str], message: str) -> None:
    said(registry, "promote", "posts", "a")
    (registry / "posts" / "b" / MODEL_FILE).write_bytes(b"truncated")
    before = LocalRegistry(registry).release("posts")
    done = streamrec(registry, *command)
    assert done.exit_code not in (0, 1)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert LocalRegistry(registry).release("posts") == before


@pytest.mark.parametrize(
    "command",
    [
        ["canary", "posts", "b"],
        ["canary", "posts", "b", "--end"],
        ["shadow", "posts"],
        ["shadow", "posts", "b", "--off"],
    ],
)
def test_a_command_that_says_too_little_or_too_much_is_a_usage_error(
    registry: Path, command: list[str]
) -> None:
    assert streamrec(registry, *command).exit_code == 2


def test_the_commands_work_on_a_store_too(tmp_path: Path) -> None:
    there = ("--registry", "memory://streamrec-commands")
    try:
        for version in "ab":
            bundle = tiny_bundle(tmp_path / version)
            assert (
                CliRunner().invoke(main, ["models", "publish", str(bundle), *there]).exit_code == 0
            )
        for command in (
            ["promote", "posts", "a"],
            ["canary", "posts", "b", "--share", "10%"],
            ["diff", "posts@a", "posts@b"],
        ):
            done = CliRunner().invoke(main, ["models", *command, *there])
            assert done.exit_code == 0, done.output
        status = CliRunner().invoke(main, ["models", "status", "--json", *there])
        (row,) = json.loads(status.stdout)["models"]
        assert (row["stable"], row["canary"]["version"]) == ("a", "b")
    finally:
        MemoryFileSystem().rm("/streamrec-commands", recursive=True)
