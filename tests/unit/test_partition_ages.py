"""How long a partition has been behind, and how long what is finished has waited for a commit."""

from worker.partition_ages import PartitionAges


def test_a_partition_is_behind_since_the_first_look_that_saw_lag() -> None:
    ages: PartitionAges[str] = PartitionAges()
    assert ages.behind_s("p", 0, 10.0) == 0.0
    assert ages.behind_s("p", 3, 11.0) == 0.0
    assert ages.behind_s("p", 2, 14.0) == 3.0
    assert ages.behind_s("p", 0, 15.0) == 0.0
    assert ages.behind_s("p", 1, 16.0) == 0.0


def test_commits_that_follow_keep_the_age_low_though_something_always_waits() -> None:
    ages: PartitionAges[str] = PartitionAges()
    seen = [
        ages.uncommitted_s("p", finished, committed, now)
        for finished, committed, now in [(5, 0, 0.0), (9, 5, 1.0), (14, 9, 2.0), (20, 14, 3.0)]
    ]
    assert seen == [0.0, 0.0, 0.0, 0.0]


def test_without_commits_the_age_grows_whatever_else_is_finished() -> None:
    ages: PartitionAges[str] = PartitionAges()
    assert ages.uncommitted_s("p", 5, 0, 0.0) == 0.0
    assert ages.uncommitted_s("p", 9, 0, 30.0) == 30.0
    # A commit of less than what was finished first does not help it.
    assert ages.uncommitted_s("p", 9, 4, 40.0) == 40.0
    assert ages.uncommitted_s("p", 9, 5, 50.0) == 0.0
    assert ages.uncommitted_s("p", 9, 9, 60.0) == 0.0


def test_a_partition_that_comes_back_starts_anew() -> None:
    ages: PartitionAges[str] = PartitionAges()
    for partition in ("p", "q"):
        ages.behind_s(partition, 1, 0.0)
        ages.uncommitted_s(partition, 5, 0, 0.0)
    ages.keep(["q"])
    assert ages.behind_s("p", 1, 100.0) == 0.0
    assert ages.uncommitted_s("p", 5, 0, 100.0) == 0.0
    assert ages.behind_s("q", 1, 100.0) == 100.0
    assert ages.uncommitted_s("q", 5, 0, 100.0) == 100.0
