"""The report's arithmetic on cases worked out by hand, and what it says in words."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.dataset import Queries, index_interactions, next_events, sample
from models.report.buckets import history_buckets, percentiles, popularity_buckets
from models.report.build import labels
from models.report.plots import plots
from models.report.published import published
from models.report.statistics import Bootstrap, estimate, gini, relative
from models.report.verdicts import accuracy_words, findings, notes, verdicts


def test_a_model_compared_with_itself_has_not_changed_in_any_resample() -> None:
    values = np.random.default_rng(0).random(50)
    bootstrap = Bootstrap(np.arange(50))
    found = estimate(relative(bootstrap.means(values), bootstrap.means(values)))
    assert found is not None
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert not found.distinguishable


def test_a_constant_gain_is_paired_away_from_the_spread_of_the_queries() -> None:
    values = np.random.default_rng(0).random(200)
    bootstrap = Bootstrap(np.arange(200))
    found = estimate(bootstrap.means(values + 0.01) - bootstrap.means(values))
    assert found is not None and found.distinguishable
    assert found.high - found.low < 1e-6


def test_queries_of_one_user_count_as_one_observation() -> None:
    # Each value five times: knows no more than each once.
    values = np.random.default_rng(0).random(40)
    by_user = estimate(Bootstrap(np.repeat(np.arange(40), 5)).means(np.repeat(values, 5)))
    by_query = estimate(Bootstrap(np.arange(200)).means(np.repeat(values, 5)))
    assert by_user is not None and by_query is not None
    assert (by_user.high - by_user.low) > 1.8 * (by_query.high - by_query.low)


def test_queries_by_time_say_whose_they_are_after_sampling_too() -> None:
    data = index_interactions(list("uvuvuv"), list("abcdef"))
    asked = next_events(data, 0.5, 1.0)
    assert asked.users is not None
    assert asked.users.tolist() == [1, 0, 1]
    few = sample(asked, 2)
    assert few.users is not None and len(few.users) == 2


def test_the_bootstrap_interval_of_a_mean_is_that_of_the_textbook() -> None:
    values = np.random.default_rng(1).normal(size=2000)
    found = estimate(Bootstrap(np.arange(2000)).means(values))
    assert found is not None
    error = values.std() / math.sqrt(2000)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_means_over_a_bucket_leave_the_others_out() -> None:
    means = Bootstrap(np.arange(4)).means(
        np.array([1.0, 1.0, 9.0, 9.0]), np.array([True, True, False, False])
    )
    assert means[0] == 1.0
    assert estimate(means) is not None
    assert np.nanmax(means) == 1.0


def test_where_the_reference_finds_nothing_there_is_no_relative_change() -> None:
    nothing = Bootstrap(np.arange(3)).means(np.zeros(3))
    assert estimate(relative(nothing, nothing)) is None


def test_gini_is_zero_for_equal_shares_and_nearly_one_for_one_taker() -> None:
    assert gini(np.array([3, 3, 3])) == 0.0
    assert gini(np.array([0, 0, 0, 8])) == 0.75
    assert gini(np.array([1, 3])) == 0.25


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30))
def test_gini_and_percentiles_stay_in_bounds(counts: list[int]) -> None:
    assert -1e-9 <= gini(np.array(counts)) < 1.0
    found = percentiles(np.array(counts))
    assert ((found > 0) & (found < 1)).all()
    assert found.mean() == pytest.approx(0.5)


def test_head_and_tail_are_shares_of_interactions_not_of_items() -> None:
    # Item 1 has the first 20 % of 100 interactions; items 5 to 24 the last; 25 has none.
    counts = np.array([20, 20, 20, 20, *([1] * 20), 0])
    buckets = popularity_buckets(counts, np.array([1, 2, 4, 5, 24, 25]))
    assert [bucket.label for bucket in buckets] == ["head", "middle", "tail", "new"]
    assert [bucket.items for bucket in buckets] == [1, 3, 20, 1]
    assert [bucket.members.sum() for bucket in buckets] == [1, 2, 2, 1]


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=30).flatmap(
        lambda counts: st.tuples(
            st.just(counts), st.lists(st.integers(1, len(counts)), min_size=1, max_size=20)
        )
    )
)
def test_each_query_is_in_one_bucket_of_each_kind(case: tuple[list[int], list[int]]) -> None:
    counts, targets = case
    histories = [np.arange(1, 1 + target * 13) for target in targets]
    for buckets in (
        popularity_buckets(np.array(counts), np.array(targets)),
        history_buckets(Queries(histories, np.array(targets))),
    ):
        assert (np.sum([bucket.members for bucket in buckets], axis=0) == 1).all()


def test_labels_leave_out_what_all_versions_begin_with() -> None:
    def made(*versions: str) -> list[Any]:
        return [type("M", (), {"name": "posts", "version": version}) for version in versions]

    assert labels(made("20261124T1349Z-fp32", "20261124T1349Z-int8")) == ["fp32", "int8"]
    assert labels(made("a-b", "a-b-int8")) == ["b", "b-int8"]
    assert labels(made("a-fp32")) == ["a-fp32"]
    assert labels(made("x", "x")) == ["1: posts@x", "2: posts@x"]


def variant(label: str, *, ndcg: float = 0.1, change: float = 0.0, **costs: float) -> Any:
    """A variant of a report; `costs` are multiples of the reference's."""

    def around(value: float, width: float) -> dict[str, float]:
        return {"value": value, "low": value - width, "high": value + width}

    def ratio(name: str) -> dict[str, float]:
        value = costs.get(name, 1.0)
        return {"median": value, "low": value * 0.95, "high": value * 1.05}

    bucket = {"queries": 10, "ndcg@10": around(ndcg, 0.01)}
    return {
        "label": label,
        "size": {
            "bundle_bytes": int(1e6 * costs.get("size", 1.0)),
            "parts": {"item table": int(1e6 * costs.get("size", 1.0))},
        },
        "memory": {
            "resident_bytes": int(3e7 * costs.get("memory", 1.0)),
            "peak_loading_bytes": int(2e7 * costs.get("peak", 1.0)),
            "load_ratio": ratio("load"),
        },
        "latency": {
            batch: {
                "cpu_ms": costs.get(f"at_{batch}", 1.0),
                "p50_ms": costs.get(f"at_{batch}", 1.0),
                "ratio": ratio(f"at_{batch}"),
            }
            for batch in ("1", "64")
        },
        "accuracy": {"ndcg@10": around(ndcg, 0.01)},
        "change": {"relative": around(change, 0.005)},
        "buckets": {
            "popularity": [
                {"label": "head", "change": around(0.0, 0.01), **bucket},
                {"label": "tail", "change": around(costs.get("tail", 0.0), 0.01), **bucket},
            ],
            "history": [],
        },
    }


def words(other: Any) -> str:
    return "\n".join(found["text"] for found in findings(other, variant("fp32")))


def test_whatever_is_worse_is_said() -> None:
    found = words(variant("bad", at_1=1.2, size=1.1, memory=1.2, peak=1.5, load=2.0, tail=-0.2))
    assert "slower at batch 1 (1.20x, rounds 1.14x to 1.26x)" in found
    assert "slower at batch 64" not in found
    assert "larger on disk (1.10x)" in found
    assert "needs more memory (1.20x)" in found
    assert "needs more memory while loading (1.50x)" in found
    assert "loads slower (2.00x" in found
    assert "by popularity of the target: tail -20.0 % (-21.0 to -19.0)" in found
    assert "head" not in found


def test_a_slowdown_that_some_rounds_do_not_show_is_named_noise() -> None:
    assert "within the noise" in words(variant("even", at_64=1.03))
    assert "within the noise" not in words(variant("slow", at_64=1.3))


def test_only_a_change_whose_interval_leaves_out_zero_is_beyond_chance() -> None:
    assert "not distinguishable" in accuracy_words(variant("a", change=-0.004))
    assert "loss beyond chance" in accuracy_words(variant("a", change=-0.006))
    assert "gain beyond chance" in accuracy_words(variant("a", change=0.006))


def test_the_smallest_and_the_fastest_within_the_loss_are_to_be_shipped() -> None:
    found = verdicts(
        [
            variant("fp32"),
            variant("small", size=0.2, at_64=1.5, ndcg=0.0999, change=-0.001),
            variant("fast", size=0.5, at_64=0.4, ndcg=0.0994, change=-0.006),
            variant("lossy", size=0.1, at_64=0.1, ndcg=0.09, change=-0.1),
        ],
        max_loss=0.01,
    )
    assert (found["size"]["label"], found["latency"]["label"]) == ("small", "fast")
    assert "5.0x smaller" in found["size"]["text"]
    assert "2.50x as fast" in found["latency"]["text"]
    assert "do not rule out" not in found["size"]["text"]
    assert "do not rule out a loss above 1.0%" in found["latency"]["text"]
    assert found["pareto"]["size"] == ["lossy", "small", "fp32"]
    assert found["pareto"]["latency"] == ["lossy", "fast", "fp32"]


def test_where_nothing_is_good_enough_the_reference_is_to_be_shipped() -> None:
    found = verdicts([variant("fp32"), variant("lossy", size=0.1, change=-0.1)], max_loss=0.01)
    assert found["size"]["label"] == "fp32"
    assert "No variant improves" in found["size"]["text"]


def test_baselines_that_beat_the_reference_are_not_passed_over() -> None:
    rows = [{"model": "EASE", "ndcg@10": 0.2}, {"model": "popularity", "ndcg@10": 0.01}]
    assert "EASE 0.2000" in notes([variant("fp32")], rows)[0]
    assert "popularity" not in notes([variant("fp32")], rows)[0]
    assert notes([variant("fp32")], [{"model": "EASE", "note": "too many items"}]) == []


@pytest.mark.parametrize("count", [1, 9])
def test_plots_take_any_number_of_variants_and_any_names(count: int) -> None:
    variants = [
        variant(rf"$\frac{{$ <&> {number}", size=1 / (number + 1)) for number in range(count)
    ]
    drawn = plots({"variants": variants, "verdicts": verdicts(variants, 0.01)})
    assert ("popularity" in drawn) == (count > 1)
    assert all(svg.rstrip().endswith("</svg>") for svg in drawn.values())


def test_published_figures_are_quoted_for_their_data_and_split_only() -> None:
    assert published("MovieLens 1M", "leave-one-out")[0]["ndcg@10"] == 0.134
    assert published("MovieLens 1M", "time") == []
    assert published("MovieLens 100K", "leave-one-out") == []
