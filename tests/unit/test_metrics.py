"""What an alert watches is there before it happens."""

from worker.events import Surface
from worker.gate import Verdict
from worker.metrics import Metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_counters_that_alerts_watch_start_at_zero() -> None:
    metrics = Metrics()
    metrics.start_at_zero([Surface.POSTS])
    posts = {"surface": "posts"}
    rollback = {**posts, "action": "rollback"}
    assert value(metrics, "streamrec_dead_letters_total", reason="not_json") == 0.0
    assert value(metrics, "streamrec_commits_total", result="failed") == 0.0
    assert value(metrics, "streamrec_model_swaps_total", **posts) == 0.0
    assert value(metrics, "streamrec_refused_bundles_total", **posts, reason="memory") == 0.0
    for verdict in ("refused", "errors", "latency", "quality", "undecided"):
        assert value(metrics, "streamrec_decisions_total", **rollback, reason=verdict) == 0.0
    # Neither surfaces without a model, nor what the gate never does.
    assert value(metrics, "streamrec_model_swaps_total", surface="ads") is None
    waits = {**rollback, "reason": Verdict.UNCERTAIN.value}
    assert value(metrics, "streamrec_decisions_total", **waits) is None
