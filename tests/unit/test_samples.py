"""Samples of metrics: sums by label, and quantiles as Prometheus interpolates them."""

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram

from worker.recent import KEPT, STEP, Moment, Recent, rate
from worker.samples import Buckets, Samples


def test_counters_are_summed_over_the_labels_that_are_not_asked_for() -> None:
    registry = CollectorRegistry()
    counter = Counter("things", "Things.", ["kind", "size"], registry=registry)
    counter.labels("a", "small").inc(2)
    counter.labels("a", "large").inc(3)
    counter.labels("b", "small").inc(5)
    samples = Samples.of(registry.collect())
    assert samples.total("things") == 10
    assert samples.total("things", kind="a") == 5
    assert samples.by("size", "things") == {"small": 7, "large": 3}
    assert samples.total("nothing") == 0


def test_a_quantile_lies_within_its_bucket_where_its_rank_does() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("t", "T.", ["stage"], buckets=(1.0, 2.0, 4.0), registry=registry)
    for value in (0.5, 1.5, 1.5, 3.0):
        histogram.labels("x").observe(value)
    buckets = Samples.of(registry.collect()).buckets("t")
    assert buckets.count == 4
    assert buckets.quantile(0.25) == 1.0
    assert buckets.quantile(0.5) == 1.5
    assert buckets.quantile(1.0) == 4.0
    histogram.labels("x").observe(99.0)
    later = Samples.of(registry.collect()).buckets("t")
    assert later.quantile(1.0) == 4.0, "the last finite bound is all that is known"
    assert later.since(buckets).count == 1


def test_without_observations_there_is_no_quantile() -> None:
    assert Buckets().quantile(0.5) is None
    assert Buckets((1.0, float("inf")), (0.0, 0.0)).quantile(0.5) is None


def moments(count: int) -> Recent:
    recent = Recent()
    for number in range(count):
        recent.add(Moment(at=2.0 * number, events=200.0 * number))
    return recent


def test_the_last_minute_is_that_of_the_newest_moment() -> None:
    assert moments(1).span(60.0) is None
    span = moments(100).span(60.0)
    assert span is not None
    assert (span[0].at, span[1].at) == (138.0, 198.0)
    assert rate(*span) == pytest.approx(100.0)


def test_a_chart_has_a_point_for_each_ten_seconds_of_the_last_ten_minutes() -> None:
    values = moments(5 * KEPT).chart(rate)
    assert len(values) == (KEPT - 1) // STEP
    assert values == pytest.approx([100.0] * len(values))
    assert moments(STEP).chart(rate) == []
