"""Any text may be a user id. None reaches another's keys or slot, and none becomes a command."""

import hiredis
from hypothesis import example, given
from hypothesis import strategies as st
from redis.crc import key_slot

from worker.cache import (
    UserKey,
    _write_user,
    history_key,
    recommendation_key,
)
from worker.events import Surface

#: All of Unicode, lone surrogates as well: JSON may hold those.
IDS = st.text(st.characters(exclude_categories=()), min_size=1, max_size=40)
SURFACES = st.sampled_from(Surface)


def tag(key: bytes) -> bytes:
    """What Redis Cluster hashes: what is between the first brace and the next that closes."""
    start = key.find(b"{")
    end = key.find(b"}", start)
    return key[start + 1 : end] if start >= 0 and end > start + 1 else key


@example(("{", Surface.POSTS), ("%7B", Surface.POSTS))
@example(("a}:posts", Surface.POSTS), ("a", Surface.POSTS))
@example(("a\r\nDEL x", Surface.POSTS), ("a", Surface.POSTS))
@example(("a\0", Surface.POSTS), ("a", Surface.POSTS))
@example(("\u0430nn", Surface.POSTS), ("ann", Surface.POSTS))  # a Cyrillic letter
@example(("\u00e9", Surface.POSTS), ("e\u0301", Surface.POSTS))  # the same to the eye
@example(("\ud83d\ude00", Surface.POSTS), ("\U0001f600", Surface.POSTS))  # a pair, and what it is
@given(st.tuples(IDS, SURFACES), st.tuples(IDS, SURFACES))
def test_two_users_never_share_a_key(left: tuple[str, Surface], right: tuple[str, Surface]) -> None:
    keys = [
        {make(UserKey(*one)).encode("ascii") for make in (history_key, recommendation_key)}
        for one in (left, right)
    ]
    assert len(keys[0] | keys[1]) == (2 if left == right else 4)
    # Tags tell users apart, so that nobody chooses another's slot by a brace of their own.
    tags = [{tag(key) for key in own} for own in keys]
    assert len(tags[0]) == len(tags[1]) == 1
    assert (tags[0] == tags[1]) == (left[0] == right[0])
    # One script touches both keys of a user: a cluster wants them in one slot.
    assert len({key_slot(key) for key in keys[0]}) == 1


@given(IDS, SURFACES, st.binary(max_size=40))
def test_a_user_id_is_one_argument_and_never_a_command(
    user: str, surface: Surface, history: bytes
) -> None:
    key = UserKey(user, surface)
    command = _write_user(key, history, 7, (b"a list", 1))
    reader = hiredis.Reader()
    reader.feed(hiredis.pack_command(command))
    read = reader.gets()
    assert read == [
        part if isinstance(part, bytes) else str(part).encode("ascii") for part in command
    ]
    assert reader.gets() is False  # nothing follows
    assert all(part.isascii() and part.isprintable() for part in (command[3], command[4]))  # type: ignore[union-attr]


@given(IDS)
def test_a_key_is_at_most_so_much_longer_than_its_user_id(user: str) -> None:
    assert len(history_key(UserKey(user, Surface.FRIENDS))) <= 12 * len(user) + 32
