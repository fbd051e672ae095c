"""Cells about Redis: away, empty, behind, full, slow."""

from __future__ import annotations

import time
from typing import Any

from redis import Redis

from tests.faults.harness import Cell, Scene
from tests.integration.support import eventually

#: All keys with what they hold, of one moment.
_DUMP_ALL = """
local all = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  all[#all + 1] = key
  all[#all + 1] = redis.call('DUMP', key)
end
return all
"""
#: Seconds that Redis is away, or slow.
AWAY_S = 6.0


def _degraded(scene: Scene) -> bool:
    worker = scene.workers[0]
    assert worker.process.running, "the worker has ended"
    return worker.metric('streamrec_degraded{reason="redis"}') == 1


def _published(scene: Scene) -> float:
    return scene.workers[0].metric("streamrec_recommendations_total")


def _stop(scene: Scene) -> None:
    """Lists go on to the output topic for users in memory; nothing is committed meanwhile."""
    scene.redis.stop()
    scene.began()
    eventually(lambda: _degraded(scene), "the worker says so")
    before = _published(scene)
    eventually(lambda: _published(scene) > before, "lists are published meanwhile")
    # What it had finished before is committed within an interval.
    time.sleep(1.5)
    committed = scene.committed()
    time.sleep(AWAY_S - 1.5)
    scene.require(scene.committed() == committed, "offsets were committed while Redis was away")
    scene.redis.start()
    scene.ended()
    eventually(lambda: not _degraded(scene), "it has caught up")


def _lose(scene: Scene) -> None:
    """It comes back with nothing."""
    _wipe(scene)
    eventually(
        lambda: scene.workers[0].metric("streamrec_redis_losses_total") > 0, "the loss is noticed"
    )
    scene.wait_for_commits(500)


def _wipe(scene: Scene) -> None:
    with Redis.from_url(scene.redis.url) as client:
        client.flushall()
        client.script_flush()
        client.client_kill_filter(_type="normal", skipme=True)


def _fail_over(scene: Scene) -> None:
    """A replica that lags takes over: what was written since a moment is gone, and connections
    break."""
    with Redis.from_url(scene.redis.url) as client:
        kept: Any = client.eval(_DUMP_ALL, 0)
        scene.wait_for_commits(800)
        scene.began()
        pipeline = client.pipeline(transaction=True)
        pipeline.flushall()
        for key, data in zip(kept[::2], kept[1::2], strict=True):
            pipeline.restore(key, 0, data)
        pipeline.execute()
        client.client_kill_filter(_type="normal", skipme=True)
    scene.ended()
    eventually(
        lambda: scene.workers[0].metric("streamrec_redis_losses_total") > 0, "the loss is noticed"
    )
    scene.wait_for_commits(500)


def _fill(scene: Scene) -> None:
    """`maxmemory` is reached, and nothing may be evicted: writes are refused, reads go on."""
    with Redis.from_url(scene.redis.url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1mb")
        scene.began()
        eventually(lambda: _degraded(scene), "the worker says so")
        eventually(lambda: scene.workers[0].get("/readyz")[0] == 503, "it is not ready", 5.0)
        time.sleep(AWAY_S)
        scene.require(scene.workers[0].get("/livez")[0] == 200, "it counts as stalled")
        client.config_set("maxmemory", "0")
    scene.ended()
    scene.wait_for_commits(500)


def _slow(scene: Scene) -> None:
    """Each write takes some hundred milliseconds."""
    until = time.monotonic() + AWAY_S
    with Redis.from_url(scene.redis.url) as client:
        while time.monotonic() < until:
            client.execute_command("CLIENT", "PAUSE", "400", "ALL")
            time.sleep(0.45)
    scene.ended()
    scene.wait_for_commits(500, timeout_s=20.0)


FAILOVER = "failover to a replica that lags by some hundred events"

CELLS: tuple[Cell, ...] = (
    Cell("redis-stop", f"Redis stopped for {AWAY_S:.0f} s", _stop, "commit_at_start"),
    Cell("redis-lost", "Redis restarted with all data lost", _lose, "ignore_losses"),
    Cell("redis-failover", FAILOVER, _fail_over, "ignore_losses"),
    Cell(
        "redis-full",
        f"Redis refuses writes (out of memory) for {AWAY_S:.0f} s",
        _fill,
        "redis_failure_is_fatal",
    ),
    Cell(
        "redis-slow",
        f"Redis answers 0.4 s late, twice the timeout, for {AWAY_S:.0f} s",
        _slow,
        "redis_failure_is_fatal",
        settings={"redis_timeout_ms": "200"},
    ),
)
