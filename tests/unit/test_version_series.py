"""However many versions come by, few of them have series in Prometheus."""

from worker.metrics import Metrics
from worker.version_series import KEPT_VERSIONS


def versions(metrics: Metrics) -> set[str]:
    return {
        sample.labels["model_version"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if "model_version" in sample.labels
    }


def judge(metrics: Metrics, version: str) -> None:
    metrics.judged.labels("posts", metrics.versions.label("posts", version)).inc()


def test_versions_that_were_replaced_long_ago_lose_their_series() -> None:
    metrics = Metrics()
    for number in range(100):
        metrics.versions.serve("posts", [f"posts@{number}"])
        metrics.recommendations.labels("posts", "model", f"posts@{number}").inc()
    assert versions(metrics) == {f"posts@{n}" for n in range(99 - KEPT_VERSIONS, 100)}


def test_what_serves_and_the_fallback_keep_theirs_whatever_redis_says() -> None:
    """A list that a user was served before names any version at all."""
    metrics = Metrics()
    metrics.versions.serve("posts", ["posts@a", "posts@b"])
    for served in ("posts@a", "posts@b", "popularity"):
        judge(metrics, served)
    for number in range(1000):
        judge(metrics, f"made-up@{number}")
    judge(metrics, "x" * 100_000)
    judge(metrics, "line\nbreak")
    assert versions(metrics) >= {"posts@a", "posts@b", "popularity", "other"}
    assert len(versions(metrics)) <= KEPT_VERSIONS + 4
    # What one surface sees takes nothing from another.
    metrics.judged.labels("ads", metrics.versions.label("ads", "ads@a")).inc()
    for number in range(100):
        judge(metrics, f"more@{number}")
    assert "ads@a" in versions(metrics)


def test_who_remembers_a_series_learns_that_it_is_gone() -> None:
    metrics = Metrics()
    before = metrics.versions.generation
    for number in range(KEPT_VERSIONS):
        judge(metrics, f"v@{number}")
    assert metrics.versions.generation == before
    judge(metrics, "v@new")
    assert metrics.versions.generation > before
