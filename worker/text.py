"""Text to a vector of the model's item space: hashed n-grams, then the bundle's `text.onnx`.

The n-grams of fastText (Bojanowski et al., TACL 2017), hashed into a fixed number of rows
(Weinberger et al., ICML 2009). No vocabulary is kept: a text of any language has grams.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, cast
from zlib import crc32

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

#: The way from text to grams that `grams` takes; a bundle names the one that it was trained with.
SCHEME = "ngrams-crc32-1"
#: What is read of a text, in characters; the rest says little and costs time and memory.
MAX_TEXT_CHARS = 512

_WORDS = re.compile(r"\w+").findall
#: Start values of the checksum: the same letters as word, as two words and as part of a word are
#: three grams.
_WORD, _PAIR, _PART = 1, 2, 3
_PART_SIZES = (3, 4, 5)

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class TextSpec(msgspec.Struct, frozen=True):
    """How a bundle's text encoder wants its input; the field `text` of the manifest."""

    #: Must be `SCHEME`.
    scheme: str
    #: Grams are numbered 1 to `buckets`.
    buckets: Count
    #: Grams of one text that are looked at.
    max_grams: Annotated[int, msgspec.Meta(ge=1, le=4096)]


def grams(text: str, *, buckets: int, limit: int) -> list[int]:
    """The first `limit` distinct grams of `text`, each in 1..`buckets`: words, pairs of adjacent
    words, then parts of 3 to 5 characters of `<word>`.

    A gram's number is `crc32(its UTF-8, kind) % buckets + 1`, kind 1 for words, 2 for pairs (with
    a space between), 3 for parts. Text is NFKC-normalized and case-folded first; a word is a run
    of letters, digits and underscores (`\\w+`).
    """
    words = [
        word.encode("utf-8", "surrogatepass")
        for word in _WORDS(unicodedata.normalize("NFKC", text[:MAX_TEXT_CHARS]).casefold())
    ]
    found = dict.fromkeys(crc32(word, _WORD) % buckets + 1 for word in words)
    found.update(
        dict.fromkeys(
            crc32(left + b" " + right, _PAIR) % buckets + 1 for left, right in pairwise(words)
        )
    )
    for word in dict.fromkeys(words):
        if len(found) >= limit:
            break
        found.update(dict.fromkeys([crc32(part, _PART) % buckets + 1 for part in _parts(word)]))
    return list(found)[:limit]


def _parts(word: bytes) -> list[bytes]:
    if word.isascii():
        # A character is a byte: slices need no encoding.
        framed = b"<" + word + b">"
        return [
            framed[at : at + size] for size in _PART_SIZES for at in range(len(framed) - size + 1)
        ]
    letters = f"<{word.decode('utf-8', 'surrogatepass')}>"
    return [
        letters[at : at + size].encode("utf-8", "surrogatepass")
        for size in _PART_SIZES
        for at in range(len(letters) - size + 1)
    ]


def padded_grams(texts: Sequence[str], spec: TextSpec) -> NDArray[np.int64]:
    """Grams int64 `[n, longest]` of `texts`, padded with 0 on the right; at least one column."""
    rows = [grams(text, buckets=spec.buckets, limit=spec.max_grams) for text in texts]
    tensor = np.zeros((len(rows), max(map(len, rows), default=0) or 1), dtype=np.int64)
    for number, row in enumerate(rows):
        tensor[number, : len(row)] = row
    return tensor


@dataclass(frozen=True)
class TextEncoder:
    """A bundle's text encoder: texts to vectors of its item space."""

    spec: TextSpec
    session: ort.InferenceSession

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors float32 `[n, width]`; a text's score for a user is `state . vector`."""
        (vectors,) = self.session.run(["vectors"], {"grams": padded_grams(texts, self.spec)})
        return cast(NDArray[np.float32], vectors)
