"""Logs name users by a keyed hash, and quote nothing that an event holds."""

import logging

import pytest
from redis.exceptions import ResponseError

from worker.logs import hashed_user, message_of, place_of, set_up_logging

ANN = "ann@example.com"


@pytest.fixture(autouse=True)
def logging_as_before() -> object:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_user_has_one_hash_for_one_key_and_another_for_another() -> None:
    set_up_logging("info", "a salt")
    first = hashed_user(ANN)
    assert len(first) == 16
    assert first != hashed_user("bob")
    set_up_logging("info", "a salt")
    assert hashed_user(ANN) == first
    set_up_logging("info", "another")
    assert hashed_user(ANN) != first
    # Without one nobody can try ids until a hash fits, not even from one process to the next.
    set_up_logging("info")
    without = hashed_user(ANN)
    set_up_logging("info")
    assert hashed_user(ANN) != without
    assert hashed_user("\ud800") != hashed_user("\ud801")


def test_an_error_is_told_by_its_place_and_not_by_its_message() -> None:
    def fails() -> None:
        {}[ANN]

    with pytest.raises(KeyError) as caught:
        fails()
    said = place_of(caught.value)
    assert said.startswith("KeyError at test_logs.py:")
    assert "fails" in said
    assert ANN not in said


def test_keys_in_what_redis_says_are_left_out() -> None:
    said = f"unknown command 'EVALSHA', with args beginning with: 'abc' '2' 'hist:{{{ANN}}}:posts' "
    assert message_of(ResponseError(said)) == "unknown command 'EVALSHA'"
