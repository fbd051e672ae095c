"""The status page `/` and the list of settings `/settings`, from one reading of the worker. No I/O.

No scripts and nothing from elsewhere: the pages work wherever the port can be reached, and
`CONTENT_SECURITY_POLICY` lets a browser do no more than show them. Nothing on them is about a user.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import isnan
from pathlib import Path

from worker.gate import Decision, GateSettings, Verdict
from worker.markup import Markup, interval, sparkline, table, tag
from worker.recent import Moment, Recent, rate
from worker.releases import Release
from worker.samples import Samples

_STYLE = Path(__file__).with_name("status_page.css").read_text(encoding="utf-8")
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
#: Of both pages: the one stylesheet in them, nothing else.
CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)
#: Seconds until the page asks for itself again.
REFRESH_S = 5
#: Latencies are those of the last minute, in seconds.
_LATELY_S = 60.0
_STAGES = ("decode", "history", "score", "filter", "cache", "publish")
_WAITING = {
    Verdict.TOO_LITTLE: "too few users or events so far",
    Verdict.UNCERTAIN: "the difference is not certain yet",
    Verdict.UNHEALTHY: "quality would do; latency or errors do not yet",
}


@dataclass(frozen=True, slots=True)
class Version:
    """One bundle in memory."""

    surface: str
    role: str
    name: str
    version: str
    precision: str
    created: datetime
    #: Of the users, that it serves or (a shadow) makes lists for.
    share: float


@dataclass(frozen=True, slots=True)
class Trial:
    """What is compared on one surface."""

    surface: str
    stable: Version
    rival: Version
    #: None for a shadow.
    since: datetime | None = None
    #: Whether the gate decides.
    auto: bool = False
    #: The gate's last look; None where another worker looks.
    decision: Decision | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, without secrets."""

    variable: str
    value: str
    is_default: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the page shows, at one moment."""

    at: datetime
    #: Instance id or host name.
    worker: str
    group: str
    release: str
    uptime_s: float
    #: Why the process counts as dead; None while it does not.
    stalled: str | None
    #: What is missing before events can be served.
    missing: Sequence[str]
    kafka_answers: bool
    redis_answers: bool
    #: What the container or machine has left, in bytes.
    available_bytes: float | None
    samples: Samples
    recent: Recent
    gate: GateSettings
    versions: Sequence[Version] = ()
    trials: Sequence[Trial] = ()
    releases: Mapping[str, Release] = field(default_factory=dict)
    #: Why a version could not be loaded.
    refused: Mapping[str, str] = field(default_factory=dict)
    settings: Sequence[Setting] = ()


def status_page(shown: Snapshot, *, refresh: bool = True) -> str:
    """The page at `/`.

    Args:
        refresh: whether it asks for itself again every `REFRESH_S` seconds.
    """
    again = (
        (f"New every {REFRESH_S} s. ", tag("a", "Hold still", href="/?hold"))
        if refresh
        else ("Held still. ", tag("a", "Go on", href="/"))
    )
    return _document(
        shown,
        again,
        _tiles(shown),
        _versions(shown),
        *(_trial(shown, trial) for trial in shown.trials),
        tag(
            "div",
            _latencies(shown),
            _partitions(shown),
            _services(shown),
            _events(shown),
            _dead_letters(shown),
            _releases(shown),
            _changed_settings(shown),
            class_="columns",
        ),
        refresh=refresh,
    )


def settings_page(shown: Snapshot) -> str:
    """The page at `/settings`: all of them, without secrets."""
    rows = [
        (_variable(one), tag("code", one.value), "" if one.is_default else "yes")
        for one in shown.settings
    ]
    return _document(
        shown,
        (tag("a", "Back to the status", href="/"),),
        _section("Settings", table("Settings", ("variable", "value", "changed"), rows)),
        refresh=False,
    )


def _document(shown: Snapshot, aside: Sequence[object], *content: Markup, refresh: bool) -> str:
    title = f"streamrec {shown.worker}"
    head = [
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
    ]
    if refresh:
        head.append(Markup(f'<meta http-equiv="refresh" content="{REFRESH_S}">'))
    header = tag(
        "header",
        tag(
            "div",
            tag("h1", "streamrec ", tag("span", shown.worker)),
            tag(
                "p",
                f"group {shown.group}, version {shown.release}, up {_duration(shown.uptime_s)}",
            ),
        ),
        _state(shown),
    )
    footer = tag(
        "footer",
        tag("p", f"As of {shown.at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC. ", *aside),
        tag(
            "p",
            *(
                part
                for path in ("/metrics", "/model", "/livez", "/readyz", "/settings")
                for part in (tag("a", path, href=path), " ")
            ),
        ),
    )
    document = tag(
        "html",
        tag("head", *head, tag("title", title), Markup(f"<style>{_STYLE}</style>")),
        tag("body", header, tag("main", *content), footer),
        lang="en",
    )
    return f"<!doctype html>\n{document}\n"


def _state(shown: Snapshot) -> Markup:
    live = ("good", "live") if shown.stalled is None else ("bad", "stalled")
    ready = ("bad", "not ready") if shown.missing else ("good", "ready")
    problems = [*([shown.stalled] if shown.stalled else ()), *shown.missing]
    return tag(
        "div",
        tag("p", *(tag("span", name, class_=f"pill {kind}") for kind, name in (live, ready))),
        *(tag("p", problem, class_="problem") for problem in problems),
        class_="state",
    )


def _tiles(shown: Snapshot) -> Markup:
    samples, recent = shown.samples, shown.recent
    span = recent.span(_LATELY_S)
    speed = None if span is None else rate(*span)
    lately = None if span is None else span[1].cached.since(span[0].cached)
    p99 = None if lately is None else lately.quantile(0.99)
    median = None if lately is None else lately.quantile(0.5)
    lag = samples.total("streamrec_consumer_lag_events")
    dead = samples.total("streamrec_dead_letters")
    resident = samples.total("process_resident_memory_bytes")
    models = samples.total("streamrec_model_memory_bytes")
    available = shown.available_bytes
    free = "" if available is None else f", {_megabytes(available)} free"
    tiles: list[
        tuple[str, str, str, Callable[[Moment, Moment], float | None], str]
    ] = [
        (
            "Events a second", "-" if speed is None else _number(speed),
            f"{_count(samples.total('streamrec_event_seconds_count'))} since the start",
            rate, "Events a second, last ten minutes",
        ),
        (
            "Read to Redis, p99", _milliseconds(p99), f"median {_milliseconds(median)}",
            lambda before, after: after.cached.since(before.cached).quantile(0.99),
            "99th percentile of the time from read to Redis, last ten minutes",
        ),
        (
            "Lag, events", _count(lag),
            f"{_count(samples.total('streamrec_assigned_partitions'))} partitions",
            lambda _, after: after.lag, "Lag in events, last ten minutes",
        ),
        (
            "Memory", _megabytes(resident),
            f"models {_megabytes(models)}{free}",
            lambda _, after: after.resident_bytes, "Resident memory, last ten minutes",
        ),
        (
            "Dead letters", _count(dead), "since the start",
            lambda before, after: after.dead_letters - before.dead_letters,
            "New dead letters, last ten minutes",
        ),
    ]  # fmt: skip
    return tag(
        "section",
        tag("h2", "Now", class_="unseen"),
        *(
            tag(
                "div",
                tag("h3", title),
                tag("p", value, class_="value"),
                sparkline(recent.chart(chart), label),
                tag("p", note, class_="note"),
                class_="tile",
            )
            for title, value, note, chart, label in tiles
        ),
        class_="tiles",
    )


def _versions(shown: Snapshot) -> Markup:
    samples, rows = shown.samples, []
    for one in shown.versions:
        labels = {"surface": one.surface, "model_version": f"{one.name}@{one.version}"}
        stored = {"surface": one.surface, "version": one.version}
        judged = samples.total("streamrec_judged_events", **labels)
        hits = samples.total("streamrec_hits", **labels)
        gain = samples.total("streamrec_reciprocal_ranks", **labels)
        rows.append((
            one.surface,
            tag("span", one.role, class_=f"role {one.role}"),
            tag("code", f"{one.name}@{one.version}"),
            one.precision,
            _percent(one.share),
            _megabytes(samples.total("streamrec_model_file_bytes", **stored), 2),
            _megabytes(samples.total("streamrec_model_memory_bytes", **stored), 1),
            _duration((shown.at - one.created).total_seconds()),
            _count(samples.total("streamrec_recommendations", **labels)),
            _count(judged),
            _ratio(hits / judged) if judged else "-",
            _ratio(gain / judged) if judged else "-",
        ))  # fmt: skip
    fallback = samples.total("streamrec_recommendations", source="fallback")
    notes = [tag("p", f"Lists by the popularity fallback: {_count(fallback)}.", class_="note")]
    notes += [
        tag("p", f"Refused: {version}: {reason}", class_="problem")
        for version, reason in shown.refused.items()
    ]
    head = (
        "surface", "role", "version", "precision", "users", "on disk", "in memory", "age",
        "lists", "judged", "hit rate", "MRR",
    )  # fmt: skip
    return _section("Models in memory", table("Models in memory", head, rows, numbers=8), *notes)


def _trial(shown: Snapshot, trial: Trial) -> Markup:
    rival, samples = trial.rival, shown.samples
    what = "Canary" if rival.role == "canary" else "Shadow"
    served = "of users are served it" if rival.role == "canary" else "of users, seen by nobody"
    begun = ""
    if trial.since is not None:
        begun = f", for {_duration((shown.at - trial.since).total_seconds())} so far"
    heading = tag(
        "p",
        tag("code", rival.version), f" against {trial.stable.version}: ",
        f"{_percent(rival.share)} {served}{begun}.",
    )  # fmt: skip
    rows: list[Sequence[object]] = []
    for figure, name in (("hit_rate", "hit rate"), ("mrr", "MRR")):
        both = [_bounds(samples, trial.surface, figure, one) for one in (trial.stable, rival)]
        known = [bounds for bounds in both if bounds is not None]
        if not known:
            continue
        # Bounds of few events reach far; the axis shows what can be told apart.
        top = max(middle for _, middle, _ in known) * 3.0 or 1.0
        right = min(top, max(high for _, _, high in known))
        left = min(low for low, _, _ in known)
        margin = 0.1 * (right - left)
        for version, bounds in zip((trial.stable, rival), both, strict=True):
            if bounds is not None:
                low, middle, high = bounds
                told = f"{_ratio(middle)}, {_ratio(low)} to {_ratio(high)}"
                rows.append((
                    f"{name}, {version.role}",
                    interval(
                        low, middle, high, axis=(max(0.0, left - margin), right + margin),
                        kind=version.role,
                        label=f"{name} of the {version.role} version: {told}",
                    ),
                    _ratio(middle), f"{_ratio(low)} to {_ratio(high)}",
                ))  # fmt: skip
    decision = trial.decision
    if decision is None:
        outcome = (
            tag("p", "A person decides about it.", class_="verdict")
            if rival.role == "canary" and not trial.auto
            else tag("p", "Compared only; nothing is decided.", class_="verdict")
            if rival.role == "shadow"
            else tag("p", "The worker of partition 0 decides; figures are there.", class_="verdict")
        )
        evidence = Markup("")
    else:
        outcome = _verdict(decision)
        rows += _excess(decision.figures, shown.gate)
        evidence = _evidence(decision.figures, shown.gate)
    quality = (
        table("Live quality", ("figure", "", "estimate", "bounds"), rows, numbers=2)
        if rows
        else Markup("")
    )
    judged = (
        (
            tag(
                "p",
                "Promoted once the last row lies above 0, rolled back once below.",
                class_="note",
            ),
        )
        if decision is not None
        else ()
    )
    return _section(
        f"{what} on {trial.surface}",
        heading,
        outcome,
        tag("div", tag("div", quality, *judged), evidence, class_="halves"),
    )


def _bounds(
    samples: Samples, surface: str, figure: str, version: Version
) -> tuple[float, float, float] | None:
    found = samples.by(
        "bound",
        "streamrec_live_quality",
        surface=surface,
        role=version.role,
        figure=figure,
        model_version=f"{version.name}@{version.version}",
    )
    return (found["low"], found["estimate"], found["high"]) if len(found) == 3 else None


def _verdict(decision: Decision) -> Markup:
    if decision.action == "wait":
        why = _WAITING.get(decision.reason, decision.reason.value)
        return tag("p", tag("strong", "Undecided: "), f"{why}.", class_="verdict")
    done = "Promoted" if decision.action == "promote" else "Rolled back"
    return tag("p", tag("strong", f"{done}: "), f"{decision.reason.value}.", class_="verdict")


def _excess(figures: Mapping[str, float], gate: GateSettings) -> list[Sequence[object]]:
    """The row that the gate decides by."""
    if "excess" not in figures:
        return []
    low, middle, high = (figures[name] for name in ("excess_low", "excess", "excess_high"))
    reach = max(abs(low), abs(high), 1e-9)
    told = f"{middle:+.4f}, {low:+.4f} to {high:+.4f}"
    name = f"canary MRR - {1.0 - gate.max_loss:.3g} x stable"
    return [(
        name,
        interval(
            low, middle, high, axis=(-reach, reach), kind="excess",
            label=f"{name}: {told}; promoted once all of it is above 0, rolled back once below",
        ),
        f"{middle:+.4f}", f"{low:+.4f} to {high:+.4f}",
    )]  # fmt: skip


def _evidence(figures: Mapping[str, float], gate: GateSettings) -> Markup:
    def part(name: str) -> float:
        return figures.get(name, 0.0)

    ratio = part("latency_ratio") if part("latencies") else float("nan")
    rows = [
        ("events judged", _count(part("events")), f"at least {gate.min_events:,}"),
        ("users, stable side", _count(part("stable_users")), f"at least {gate.min_users:,}"),
        ("users, canary side", _count(part("canary_users")), f"at least {gate.min_users:,}"),
        (
            "scoring time, canary / stable",
            "-" if isnan(ratio) else f"{ratio:.2f}",
            f"at most {gate.max_latency_ratio:g}",
        ),
        (
            "scorings failed",
            _percent(part("error_rate")),
            f"at most {_percent(gate.max_error_rate)}",
        ),
    ]
    return table("Evidence", ("evidence", "so far", "limit"), rows, numbers=2)


def _latencies(shown: Snapshot) -> Markup:
    span = shown.recent.span(_LATELY_S)
    if span is None:
        return _section("Latency", tag("p", "Not known yet.", class_="note"))
    before, after = span
    rows = []
    for stage in sorted(after.stages, key=lambda name: (*_STAGES, name).index(name)):
        found = after.stages[stage]
        if stage in before.stages:
            found = found.since(before.stages[stage])
        rows.append((stage, *_quantiles(found.quantile)))
    rows.append(("read to Redis", *_quantiles(after.cached.since(before.cached).quantile)))
    rows.append(("read to topic", *_quantiles(after.published.since(before.published).quantile)))
    note = f"Milliseconds, last {_duration(after.at - before.at)}; interpolated within buckets."
    return _section(
        "Latency",
        table("Latency by stage", ("batches in", "p50", "p95", "p99"), rows, numbers=3),
        tag("p", note, class_="note"),
    )


def _quantiles(quantile: Callable[[float], float | None]) -> tuple[str, ...]:
    return tuple(
        "-" if (found := quantile(share)) is None else f"{found * 1000.0:,.1f}"
        for share in (0.5, 0.95, 0.99)
    )


def _partitions(shown: Snapshot) -> Markup:
    samples = shown.samples
    ages = samples.by("partition", "streamrec_commit_age_seconds")
    behind = samples.by("partition", "streamrec_lag_seconds")
    lags = samples.by("partition", "streamrec_consumer_lag_events")
    rows = [
        (
            partition,
            _count(lags[partition]),
            f"{behind.get(partition, 0.0):.1f} s",
            f"{ages.get(partition, 0.0):.1f} s",
        )
        for partition in sorted(lags, key=lambda name: (len(name), name))
    ]
    none = () if rows else (tag("p", "No partition is assigned.", class_="note"),)
    in_flight = _count(samples.total("streamrec_in_flight_events"))
    return _section(
        "Partitions",
        table("Partitions", ("partition", "lag", "behind", "uncommitted"), rows, numbers=3),
        *none,
        tag("p", f"{in_flight} events in flight.", class_="note"),
    )


def _services(shown: Snapshot) -> Markup:
    samples = shown.samples
    commits = samples.by("result", "streamrec_commits")
    redis_errors = samples.by("operation", "streamrec_redis_errors")
    rows: list[Sequence[object]] = [
        ("Kafka", _answers(shown.kafka_answers)),
        ("failed writes to Kafka", _count(samples.total("streamrec_produce_errors"))),
        *((f"commits, {result}", _count(value)) for result, value in sorted(commits.items())),
        ("rebalances", _count(samples.total("streamrec_rebalances"))),
        ("Redis", _answers(shown.redis_answers)),
        ("failed round trips", _count(sum(redis_errors.values()))),
        *(
            (f"failed: {name}", _count(value))
            for name, value in sorted(redis_errors.items())
            if value
        ),
    ]
    reads = samples.by("found", "streamrec_history_reads")
    if reads:
        cached = reads.get("cache", 0.0) / (sum(reads.values()) or 1.0)
        rows.append(("histories found in memory", _percent(cached)))
    rows.append(("history cache", _megabytes(samples.total("streamrec_history_cache_bytes"), 1)))
    return _section("Kafka and Redis", table("Kafka and Redis", ("", "state"), rows, numbers=1))


def _answers(there: bool) -> Markup:
    kind, name = ("good", "answers") if there else ("bad", "does not answer")
    return tag("span", name, class_=f"pill {kind}")


def _events(shown: Snapshot) -> Markup:
    samples, rows = shown.samples, []
    for surface in sorted(samples.by("surface", "streamrec_events")):
        outcomes = samples.by("outcome", "streamrec_events", surface=surface)
        types = samples.by("event_type", "streamrec_events", surface=surface)
        rows += [(f"{surface}, {kind}", _count(value)) for kind, value in sorted(types.items())]
        rows += [
            (f"{surface}, of these {outcome}", _count(value))
            for outcome, value in sorted(outcomes.items())
            if outcome != "applied" and value
        ]
    for (surface, source), value in sorted(_lists(samples).items()):
        rows.append((f"lists for {surface}, {source}", _count(value)))
    short = samples.total("streamrec_short_recommendations")
    rows.append(("lists shorter than asked", _count(short)))
    return _section("Events and lists", table("Events and lists", ("", "count"), rows, numbers=1))


def _lists(samples: Samples) -> dict[tuple[str, str], float]:
    sums: dict[tuple[str, str], float] = {}
    for labels, value in samples.series("streamrec_recommendations"):
        key = labels["surface"], labels["source"]
        sums[key] = sums.get(key, 0.0) + value
    return sums


def _dead_letters(shown: Snapshot) -> Markup:
    found = shown.samples.by("reason", "streamrec_dead_letters")
    rows = [(reason, _count(value)) for reason, value in sorted(found.items()) if value]
    if not rows:
        return _section("Dead letters", tag("p", "None since the start.", class_="note"))
    return _section("Dead letters", table("Dead letters", ("reason", "count"), rows, numbers=1))


def _releases(shown: Snapshot) -> Markup:
    parts: list[Markup] = []
    for surface, release in sorted(shown.releases.items()):
        rows = [
            (
                one.at.replace("T", " ").replace("+00:00", "") or "-",
                "rolled back to" if one.rollback else "promoted",
                tag("code", one.version),
            )
            for one in reversed(release.history[-5:])
        ]
        parts.append(table(f"Last promotions on {surface}", (surface, "", "version"), rows))
        parts += [
            tag("p", "Quarantined: ", tag("code", version), f" {reason}", class_="note")
            for version, reason in release.quarantined.items()
        ]
        parts.append(tag("p", f"Revision {release.revision}.", class_="note"))
    samples = shown.samples
    swaps = _count(samples.total("streamrec_model_swaps"))
    load = samples.buckets("streamrec_model_swap_seconds", phase="load").quantile(0.5)
    timing = "" if load is None else f" A load took {_milliseconds(load)} (median)."
    parts.append(tag("p", f"Swaps in this process: {swaps}.{timing}", class_="note"))
    if not shown.releases:
        parts.insert(0, tag("p", "No version is promoted: the newest serves.", class_="note"))
    return _section("Releases and swaps", *parts)


def _changed_settings(shown: Snapshot) -> Markup:
    rows = [
        (_variable(one), tag("code", one.value)) for one in shown.settings if not one.is_default
    ]
    rest = tag(
        "p", tag("a", "All settings", href="/settings"), " (those not shown are as shipped).",
        class_="note",
    )  # fmt: skip
    return _section(
        "Changed settings", table("Changed settings", ("variable", "value"), rows), rest
    )


def _variable(setting: Setting) -> Markup:
    """The name, which may break at its underscores."""
    parts = [part for word in setting.variable.split("_") for part in (word, Markup("_<wbr>"))]
    return tag("code", *parts[:-1])


def _section(title: str, *content: Markup) -> Markup:
    return tag("section", tag("h2", title), *content, class_="card")


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10.0 else f"{value:.1f}"


def _ratio(value: float) -> str:
    return f"{value:.4f}"


def _percent(share: float) -> str:
    return f"{share * 100.0:.3g} %"


def _megabytes(size: float, digits: int = 0) -> str:
    return f"{size / 1e6:,.{digits}f} MB"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    value = seconds * 1000.0
    return f"{value:,.0f} ms" if value >= 100.0 else f"{value:.1f} ms"


def _duration(seconds: float) -> str:
    if seconds < 120.0:
        return f"{max(seconds, 0.0):.0f} s"
    for unit, size in (("min", 60.0), ("h", 3600.0)):
        if seconds < 120.0 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400.0:.0f} days"
