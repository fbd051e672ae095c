"""A real Prometheus with our rules on a real worker: every rule and every dashboard works."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.grafana.generate import DASHBOARDS
from tests.conftest import tiny_bundle
from tests.integration.support import WorkerProcess, World, event, eventually
from tests.integration.test_trials import Crowd, decisions, served, start_canary
from tests.prometheus import Prometheus, binary
from worker.bundle import open_bundle
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker
from worker.registry import LocalRegistry

RULES = Path(__file__).parents[2] / "deploy" / "prometheus"

#: Panels without data in this run, and why.
EMPTY = {
    "Short lists": "every list here is as long as asked for",
    "Cold items": "no model here has a text encoder",
}
#: What happened in this run, so that its alerts fire at once. All others wait longer than it lasts.
HAPPENED = {"StreamrecDeadLetters", "StreamrecSwapFailed", "StreamrecCanaryRolledBack"}

CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}, {alerts}]
scrape_configs:
  - job_name: streamrec
    static_configs: [{{targets: ["127.0.0.1:{port}"], labels: {{namespace: rec}}}}]
"""


def asked(expr: str) -> str:
    """A query as a dashboard asks it with everything chosen."""
    expr = expr.replace("[$__rate_interval]", "[2m]").replace("$stage", "score")
    return re.sub(r"\$(namespace|job|instance|surface|model_version)\b", ".*", expr)


def has_data(found: dict[str, Any]) -> bool:
    values = [
        float(value) for series in found["result"] for _, value in
        series.get("values", [series.get("value")])
    ]  # fmt: skip
    return any(not math.isnan(value) for value in values)


@pytest.mark.parametrize("name", ["tests.yml", "tests_days.yml"])
def test_alerts_fire_when_they_should_and_only_then(name: str) -> None:
    tested = subprocess.run(
        [binary("promtool"), "test", "rules", RULES / name],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_the_configuration_is_one() -> None:
    checked = subprocess.run(
        [binary("promtool"), "check", "config", RULES / "prometheus.yml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.fixture
def registry(tmp_path: Path) -> LocalRegistry:
    """`v1`, promoted; `v2` and `v3`, the same model; `v4-damaged`."""
    root = tmp_path / "registry"
    for version in ("v1", "v2", "v3", "v4-damaged"):
        tiny_bundle(root / "posts" / version, seed=1)
    with (root / "posts" / "v4-damaged" / "model.onnx").open("ab") as file:
        file.write(b"x")
    made = LocalRegistry(root)
    made.promote("posts", "v1")
    return made


@pytest.fixture
def world(
    tmp_path: Path, tansu: TansuBroker, redis_server: RedisServer, registry: LocalRegistry
) -> World:
    return World(
        tmp_path, tansu, redis_server, registry.root,
        # A loss of nothing is never sure: the trial goes on.
        gate_interval_s="0.3", gate_min_events="40", gate_max_loss="0",
        history_length="20", batch_max_events="16",
    )  # fmt: skip


@pytest.fixture
def worker(world: World) -> Iterator[WorkerProcess]:
    with world.worker() as started:
        yield started


@pytest.fixture
def prometheus(tmp_path: Path, worker: WorkerProcess) -> Iterator[Prometheus]:
    binary("prometheus")
    rules = tmp_path / "rules.yml"
    # All groups as often as the test looks.
    rules.write_text((RULES / "rules.yml").read_text().replace("    interval: 1m\n", ""))
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG.format(rules=rules, alerts=RULES / "alerts.yml", port=worker.port))
    with Prometheus(tmp_path / "prometheus", config) as server:
        assert isinstance(server, Prometheus)
        # What is counted before the first scrape, no increase shows.
        eventually(lambda: has_data(server.api("query", query="streamrec_ready")), "a scrape")
        yield server


def live_through(world: World, worker: WorkerProcess, registry: LocalRegistry) -> None:
    """A dead letter, a canary that cannot be loaded, a swap, and a trial that goes on."""
    crowd = Crowd(world, open_bundle(registry.path("posts", "v1")))
    crowd.act(worker)
    world.send([(b"ann", b"{")])
    start_canary(registry, "v4-damaged")
    eventually(lambda: len(decisions(world)) == 1, "the damaged canary is rolled back")
    registry.promote("posts", "v2")
    eventually(lambda: served(worker)["stable"]["version"] == "v2", "the swap")
    start_canary(registry, "v3")
    eventually(lambda: "canary" in served(worker), "the canary serves")
    for _ in range(3):
        crowd.sent = int(worker.metric("streamrec_event_seconds_count"))
        crowd.act(worker)
        # A scrape in between, so that rates see what is new.
        time.sleep(1.5)
    eventually(
        lambda: 'figure="excess"' in worker.get("/metrics")[1], "the gate has enough to look at"
    )


def test_rules_alerts_and_dashboards_work_on_a_real_worker(
    world: World, worker: WorkerProcess, registry: LocalRegistry, prometheus: Prometheus
) -> None:
    began = time.time()
    live_through(world, worker, registry)

    def firing() -> set[str]:
        found = prometheus.api("alerts")["alerts"]
        return {one["labels"]["alertname"] for one in found if one["state"] == "firing"}

    eventually(lambda: firing() >= HAPPENED, "alerts fire for what happened", 20.0)
    assert firing() == HAPPENED
    for group in prometheus.api("rules")["groups"]:
        for rule in group["rules"]:
            assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]
            for alert in rule.get("alerts", []):
                said = " ".join(alert["annotations"].values())
                assert "<" not in said and "  " not in said, said

    now = time.time()
    empty: set[str] = set()
    for board in DASHBOARDS:
        made = board.json()
        empty |= {
            panel["title"]
            for panel in made["panels"]
            for target in panel.get("targets", [])
            if not has_data(prometheus.api("query", query=asked(target["expr"])))
        }
        for mark in made["annotations"]["list"]:
            found = prometheus.api(
                "query_range", query=asked(mark["expr"]), start=began, end=now, step=1
            )
            assert has_data(found) != (mark["name"] == "Promoted"), mark
        for variable in made["templating"]["list"][1:]:
            parts = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
            assert parts is not None
            values = prometheus.api(f"label/{parts[2]}/values", **{"match[]": asked(parts[1])})
            assert values, variable["name"]
    assert empty == EMPTY.keys()


def test_what_waits_for_redis_is_seen_to_grow_old(
    world: World, worker: WorkerProcess, redis_server: RedisServer
) -> None:
    world.send([event("ann", "item-1", 1)])
    eventually(lambda: world.cached("ann") is not None, "served")
    assert redis_server.process is not None
    redis_server.process.signal(signal.SIGSTOP)
    world.send([event("ann", "item-2", 2)])
    eventually(lambda: worker.metric("streamrec_lag_seconds") > 3.0, "it is seen", 20.0)
    assert worker.metric('streamrec_dependency_up{dependency="redis"}') == 0
    assert worker.metric("streamrec_ready") == 0
    redis_server.process.signal(signal.SIGCONT)
    eventually(lambda: worker.metric("streamrec_lag_seconds") == 0.0, "all is well again", 20.0)
    eventually(lambda: worker.metric("streamrec_ready") == 1, "ready")
    assert worker.metric('streamrec_freshness_seconds_bucket{le="1.0"}') == 1
