"""The status page of a real worker in a real stream with a running canary."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime
from html import unescape
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.conftest import ITEMS, tiny_bundle
from tests.integration.support import WorkerProcess, World, event, eventually
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker
from worker.registry import LocalRegistry
from worker.releases import with_canary

USERS = 40


def words(page: str) -> str:
    """The text of a page, one space between words."""
    body = page.partition("</style>")[2]
    text = "".join(part.partition(">")[2] + " " for part in body.split("<"))
    return " ".join(unescape(text).split())


def look(worker: WorkerProcess, directory: Path) -> None:
    """Open the page in Chromium, narrow and wide: its style sheet must be let through."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("all but a look at the page in a browser: no Chromium is on PATH")
    for width in (500, 1440):
        picture = directory / f"{width}.png"
        done = subprocess.run(
            [
                browser, "--headless=new", "--no-sandbox", "--disable-gpu",
                "--enable-logging=stderr", f"--user-data-dir={directory / 'profile'}",
                f"--window-size={width},1200", f"--screenshot={picture}",
                f"http://127.0.0.1:{worker.port}/?hold",
            ],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert "Content Security Policy" not in done.stderr
        # A page without its style sheet, or an error page, has few colours and packs smaller.
        assert picture.stat().st_size > 40_000


def test_it_shows_the_figures_of_a_stream_with_a_canary(
    tmp_path: Path, tansu: TansuBroker, redis_server: RedisServer
) -> None:
    root = tmp_path / "registry"
    tiny_bundle(root / "posts" / "v1", seed=1)
    tiny_bundle(root / "posts" / "v2", seed=1)
    registry = LocalRegistry(root)
    registry.promote("posts", "v1")
    registry.change("posts", lambda old: with_canary(old, "v2", 0.5, at=datetime.now(UTC)))
    world = World(
        tmp_path, tansu, redis_server, root, gate_interval_s="0.3", gate_min_events="100000",
        gate_max_events="200000",
    )  # fmt: skip
    with world.worker() as worker:
        for number, kind in enumerate(("view", "like", "like"), start=1):
            world.send(
                event(
                    f"user-{user}", ITEMS[(user + 5 * number) % len(ITEMS)], number, event_type=kind
                )
                for user in range(USERS)
            )
            eventually(
                lambda number=number: (
                    worker.metric("streamrec_event_seconds_count") >= number * USERS
                ),
                "the events are served",
            )
        world.send([(b"x", b"{"), (b"x", b"{}")])
        eventually(
            lambda: (
                "events judged" in words(worker.get("/")[1])
                and worker.metric("streamrec_dead_letters_total{") == 2
                and worker.metric("streamrec_consumer_lag_events{") == 0
            ),
            "all is counted, and the gate has looked",
        )
        with urlopen(f"http://127.0.0.1:{worker.port}/", timeout=5) as answer:
            headers, text = answer.headers, words(answer.read().decode())
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "live ready" in text
        assert f"{3 * USERS + 2:,} since the start" in text
        assert "not_json 1" in text and "missing_field 1" in text
        for partition in range(4):
            assert f" {partition} 0 " in text
        for role, version in (("stable", "v1"), ("canary", "v2")):
            assert f"posts {role} posts@{version} fp32 50 %" in text
            lists = worker.metric('streamrec_recommendations_total{model_version="posts@' + version)
            judged = worker.metric('streamrec_judged_events_total{model_version="posts@' + version)
            assert lists > 0 and f" {lists:,.0f} {judged:,.0f} " in text
        assert "Canary on posts v2 against v1" in text and "Undecided: too few" in text
        evidence = worker.metric('streamrec_trial_evidence{figure="events"')
        assert evidence > 0 and f"events judged {evidence:,.0f} at least 100,000" in text
        estimate = worker.metric(
            'streamrec_live_quality{bound="estimate",figure="mrr",model_version="posts@v2"'
        )
        assert f"MRR, canary {estimate:.4f}" in text
        assert f"STREAMREC_ GROUP {world.name}" in text
        assert not any(f"user-{user} " in text for user in range(USERS)), "no user is named"
        status, page = worker.get("/settings")
        assert status == 200 and "redis://127.0.0.1" in page
        assert worker.get("/nothing")[0] == 404
        look(worker, tmp_path)
