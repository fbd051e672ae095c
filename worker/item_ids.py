"""`items.txt`: one item id a line; line i is model index i, from 1.

Worked on piece by piece: a million ids must neither hold the interpreter for long, since the
event loop shares it, nor be in memory twice.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from worker.errors import BundleError, Refusal
from worker.events import MAX_ID_LENGTH
from worker.manifest import ITEMS_FILE

#: Ids are taken in at most so much text at a time.
_PIECE_BYTES = 1 << 16


def read_item_ids(chunks: Iterable[bytes], item_count: int) -> dict[str, int]:
    """Model index by item id, in the order of the lines.

    Args:
        chunks: the file's bytes, cut anywhere.
        item_count: what the manifest says; reading stops at the first line beyond.

    Raises:
        BundleError: not UTF-8, an id is malformed or comes twice, or there are more or fewer.
    """
    index: dict[str, int] = {}
    for number, item in enumerate(_lines(chunks), start=1):
        if number > item_count:
            raise BundleError(
                f"{ITEMS_FILE} has more than {item_count} lines, item_count is {item_count}",
                Refusal.ITEMS,
            )
        problem = _problem(item)
        if problem:
            raise BundleError(f"{ITEMS_FILE} line {number}: {problem}", Refusal.ITEMS)
        if index.setdefault(item, number) != number:
            raise BundleError(
                f"{ITEMS_FILE} line {number}: {item!r} comes twice, first on line {index[item]}",
                Refusal.ITEMS,
            )
    if len(index) != item_count:
        raise BundleError(
            f"{ITEMS_FILE} has {len(index)} lines, item_count is {item_count}", Refusal.ITEMS
        )
    return index


def _problem(item: str) -> str | None:
    if not 0 < len(item) <= MAX_ID_LENGTH:
        return f"an item id has 1 to {MAX_ID_LENGTH} characters, this one {len(item)}"
    if item.endswith("\r"):
        return f"{item!r} ends in a carriage return: end lines with \\n alone"
    if "\0" in item:
        return f"{item!r} has a NUL character"
    return None


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    # Not splitlines(): an item id may hold other separators, such as U+2028.
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    done = 0
    for chunk in chunks:
        for start in range(0, len(chunk), _PIECE_BYTES):
            piece = chunk[start : start + _PIECE_BYTES]
            try:
                *lines, rest = (rest + decoder.decode(piece)).split("\n")
            except UnicodeDecodeError as error:
                raise _not_text(done + error.start) from None
            done += len(piece)
            if len(rest) > _PIECE_BYTES:
                # One endless line: the whole of it is not wanted.
                lines.append(rest)
            yield from lines
    try:
        rest += decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _not_text(done) from None
    if rest:
        yield rest


def _not_text(near: int) -> BundleError:
    return BundleError(f"{ITEMS_FILE} is not UTF-8, near byte {near}", Refusal.ITEMS)
