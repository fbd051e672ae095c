"""The status page: what it says, and that nothing on it is more than text."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import pytest
from pydantic import SecretStr

from worker.gate import Decision, GateSettings, Verdict
from worker.metrics import Metrics
from worker.recent import Moment, Recent
from worker.releases import Promotion, Release
from worker.samples import Buckets, Samples
from worker.security import without_credentials
from worker.settings import Settings
from worker.status import shown_settings
from worker.status_page import (
    CONTENT_SECURITY_POLICY,
    Setting,
    Snapshot,
    Trial,
    Version,
    settings_page,
    status_page,
)

NOW = datetime(2026, 11, 27, 9, 0, tzinfo=UTC)
HOSTILE = "<script>alert('x')</script>\"&"


def version(role: str, name: str, share: float) -> Version:
    return Version("posts", role, "posts", name, "int8", NOW - timedelta(hours=3), share)


STABLE, CANARY = version("stable", "v1", 0.9), version("canary", "v2", 0.1)


def snapshot(metrics: Metrics | None = None, **changes: Any) -> Snapshot:
    metrics = metrics or Metrics()
    return replace(
        Snapshot(
            at=NOW, worker="streamrec-0", group="streamrec", release="0.1.0", uptime_s=7300.0,
            stalled=None, missing=[], kafka_answers=True, redis_answers=True,
            available_bytes=2_000_000_000, samples=Samples.of(metrics.registry.collect()),
            recent=Recent(), gate=GateSettings(), versions=[STABLE],
        ),
        **changes,
    )  # fmt: skip


class Words(HTMLParser):
    """The page as it is read: its text, one space between words, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._parts: list[str] = []
        self._skipping = False
        self.feed(page)
        self.text = " ".join(" ".join(self._parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skipping = tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._parts.append(data)


def read(page: str) -> str:
    return Words(page).text


def test_it_says_what_is_missing_before_the_worker_is_ready() -> None:
    fine = read(status_page(snapshot()))
    assert "live ready" in fine and "not ready" not in fine
    text = read(
        status_page(
            snapshot(
                missing=["Redis does not answer"], redis_answers=False, stalled="9 events wait"
            )
        )
    )
    assert "stalled not ready 9 events wait Redis does not answer" in text
    assert "Kafka answers" in text and "Redis does not answer" in text


def test_rates_and_latencies_are_those_of_the_last_minute() -> None:
    recent = Recent()
    bounds = (0.01, 0.02, float("inf"))
    for number in range(60):
        # Slow for a minute, then fast: only the fast minute shows.
        fast = max(0, number - 29) * 100.0
        counts = Buckets(bounds, (fast, fast + min(number, 29), fast + min(number, 29)))
        recent.add(
            Moment(
                at=2.0 * number, events=fast, cached=counts, published=counts,
                stages={"score": counts},
            )
        )  # fmt: skip
    text = read(status_page(snapshot(recent=recent)))
    assert "Events a second 50 " in text
    assert "score 5.0 9.5 9.9" in text and "read to Redis 5.0 9.5 9.9" in text


def test_figures_of_the_stream_are_there() -> None:
    metrics = Metrics()
    metrics.consumer_lag.labels("user-events", "3").set(1234)
    metrics.commit_age_seconds.labels("user-events", "3").set(2.5)
    metrics.lag_seconds.labels("user-events", "3").set(7.25)
    metrics.dead_letters.labels("not_json").inc(7)
    metrics.recommendations.labels("posts", "model", "posts@v1").inc(4321)
    metrics.judged.labels("posts", "posts@v1").inc(200)
    metrics.hits.labels("posts", "posts@v1").inc(30)
    metrics.reciprocal_ranks.labels("posts", "posts@v1").inc(10)
    metrics.model_file_bytes.labels("posts", "v1").set(240_000)
    metrics.model_memory_bytes.labels("posts", "v1").set(12_700_000)
    text = read(status_page(snapshot(metrics)))
    assert "3 1,234 7.2 s 2.5 s" in text
    assert "not_json 7" in text
    row = "posts stable posts@v1 int8 90 % 0.24 MB 12.7 MB 3 h 4,321 200 0.1500 0.0500"
    assert row in text


def decision(action: Any, reason: Verdict, **figures: float) -> Decision:
    shown = {"events": 640.0, "stable_users": 31.0, "canary_users": 29.0, "latencies": 40.0,
             "latency_ratio": 0.9, "error_rate": 0.0}  # fmt: skip
    return Decision(action, reason, shown | figures)


@pytest.mark.parametrize(
    ("decided", "said"),
    [
        (decision("wait", Verdict.TOO_LITTLE), "Undecided: too few users or events so far."),
        (decision("wait", Verdict.UNCERTAIN), "Undecided: the difference is not certain yet."),
        (decision("promote", Verdict.NOT_WORSE), "Promoted: not_worse."),
        (decision("rollback", Verdict.QUALITY), "Rolled back: quality."),
        (None, "The worker of partition 0 decides"),
    ],
)
def test_a_canary_is_shown_with_what_the_gate_says_of_it(
    decided: Decision | None, said: str
) -> None:
    metrics = Metrics()
    for bound, value in (("low", 0.01), ("estimate", 0.02), ("high", 0.03)):
        metrics.live_quality.labels("posts", "canary", "posts@v2", "mrr", bound).set(value)
    trial = Trial("posts", STABLE, CANARY, NOW - timedelta(minutes=4), True, decided)
    text = read(status_page(snapshot(metrics, versions=[STABLE, CANARY], trials=[trial])))
    assert "Canary on posts v2 against v1: 10 % of users are served it, for 4 min so far." in text
    assert said in text
    if decided is not None:
        assert "events judged 640 at least 100" in text
        assert "MRR, canary 0.0200 0.0100 to 0.0300" in text


def test_the_row_that_is_decided_by_has_its_bounds() -> None:
    excess = {"excess": 0.001, "excess_low": -0.002, "excess_high": 0.004}
    trial = Trial("posts", STABLE, CANARY, NOW, True, decision("wait", Verdict.UNCERTAIN, **excess))
    assert "canary MRR - 0.95 x stable +0.0010 -0.0020 to +0.0040" in read(
        status_page(snapshot(trials=[trial]))
    )


def test_a_shadow_is_compared_only() -> None:
    shadow = version("shadow", "v2", 0.1)
    text = read(status_page(snapshot(trials=[Trial("posts", STABLE, shadow)])))
    assert "Shadow on posts v2 against v1: 10 % of users, seen by nobody." in text
    assert "nothing is decided" in text


def test_promotions_and_quarantine_are_listed() -> None:
    release = Release(
        "v1",
        history=(
            Promotion("v1", "2026-11-27T07:00:00+00:00", by="ann@laptop"),
            Promotion("v3", "2026-11-27T08:00:00+00:00"),
            Promotion("v1", "2026-11-27T08:05:00+00:00", rollback=True),
        ),
        quarantined={"v3": "gate: quality"},
    )
    text = read(status_page(snapshot(releases={"posts": release})))
    assert (
        "2026-11-27 08:05:00 rolled back to v1 2026-11-27 08:00:00 promoted v3"
        " 2026-11-27 07:00:00 promoted v1 Quarantined: v3 gate: quality" in text
    )
    assert "ann" not in text, "who did it stays in the registry"


def test_whatever_a_name_holds_is_text() -> None:
    metrics = Metrics()
    metrics.consumer_lag.labels(HOSTILE, HOSTILE).set(1)
    metrics.commits.labels(HOSTILE).inc()
    metrics.dead_letters.labels(HOSTILE).inc()
    metrics.redis_errors.labels(HOSTILE).inc()
    metrics.events.labels(HOSTILE, HOSTILE, HOSTILE).inc()
    metrics.recommendations.labels(HOSTILE, HOSTILE, HOSTILE).inc()
    release = Release("v", (Promotion(HOSTILE, HOSTILE),), quarantined={HOSTILE: HOSTILE})
    evil = replace(CANARY, version=HOSTILE, name=HOSTILE, precision=HOSTILE, surface=HOSTILE)
    page = status_page(
        snapshot(
            metrics, worker=HOSTILE, group=HOSTILE, missing=[HOSTILE], stalled=HOSTILE,
            versions=[evil], trials=[Trial(HOSTILE, evil, evil)], refused={HOSTILE: HOSTILE},
            releases={HOSTILE: release},
            settings=[Setting(HOSTILE, HOSTILE, False)],
        )
    )  # fmt: skip
    assert "<script" not in page
    assert read(page).count("alert('x')") > 15
    assert all(
        not name.startswith("on") and name != "style"
        for _, attributes in Words(page).tags
        for name in attributes
    )


def test_a_browser_may_use_nothing_but_the_style_sheet_in_the_page() -> None:
    page = status_page(snapshot())
    (style,) = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert CONTENT_SECURITY_POLICY.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
    tags = Words(page).tags
    assert {"script", "img", "link", "iframe"}.isdisjoint(tag for tag, _ in tags)
    assert "url(" not in style and "@import" not in style
    assert all(attributes["href"].startswith("/") for tag, attributes in tags if tag == "a")  # type: ignore[union-attr]


def test_it_renews_itself_until_it_is_held() -> None:
    assert 'http-equiv="refresh"' in status_page(snapshot())
    assert 'http-equiv="refresh"' not in status_page(snapshot(), refresh=False)


def test_settings_are_shown_without_what_is_secret() -> None:
    settings = Settings(
        redis=SecretStr("rediss://worker:hunter2@cache:6379/0?password=hunter2"),
        registry="s3://key:hunter2@bucket/models",
        group="mine",
    )
    shown = {one.variable: one for one in shown_settings(settings)}
    assert shown.keys() == {f"STREAMREC_{name.upper()}" for name in Settings.model_fields}
    assert shown["STREAMREC_REDIS"].value == "rediss://cache:6379/0"
    assert shown["STREAMREC_REGISTRY"].value == "s3://bucket/models"
    assert not shown["STREAMREC_GROUP"].is_default and shown["STREAMREC_TOP_K"].is_default
    page = settings_page(snapshot(settings=list(shown.values())))
    assert "hunter2" not in page and "STREAMREC_<wbr>TOP_<wbr>K" in page


def test_no_secret_of_any_setting_is_shown() -> None:
    secrets = {
        name: SecretStr("hunter2")
        for name, field in Settings.model_fields.items()
        if "SecretStr" in str(field.annotation) and name != "redis"
    }
    assert secrets, "a login has one"
    shown = {one.variable: one.value for one in shown_settings(Settings.model_construct(**secrets))}
    assert {shown[f"STREAMREC_{name.upper()}"] for name in secrets} == {"hidden"}


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("redis://:p%40ss@host:1/0", "redis://host:1/0"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock"),
        ("broker-1:9092,broker-2:9092", "broker-1:9092,broker-2:9092"),
        ("redis://user:pass@[::1", "hidden"),
    ],
)
def test_an_address_is_shown_without_its_credentials(address: str, shown: str) -> None:
    assert without_credentials(address) == shown
