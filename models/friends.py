"""The friends surface: whom will this user follow next? Items are users, and events are follows.

The worker asks a model with the user's own follows alone, as on any surface. What else the graph
knows is brought in when training, by what helped when measured (docs/friends.md): sequences of
followers, and item vectors to start from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.linalg import svds

from models.dataset import Interactions, Queries, Split
from models.evaluate import Score
from models.events import Events, SourceError
from worker.events import EventType

Sequences = Sequence[NDArray[np.int64]]


def follows(events: Events) -> Events:
    """The follows among `events`, each pair's first, without users who follow themselves.

    Whom a user looked at or clicked on and did not follow counts for nothing: it is no answer to
    the question.

    Raises:
        SourceError: there is none.
    """
    wanted = np.flatnonzero((events.types == EventType.FOLLOW) & (events.users != events.items))
    if not len(wanted):
        raise SourceError(
            f"{events.name} holds no event of type follow, which is what the surface friends is"
            " trained on: send them (docs/friends.md), or give the surface that the events are of"
        )
    _, user = np.unique(events.users[wanted], return_inverse=True)
    _, item = np.unique(events.items[wanted], return_inverse=True)
    pairs = user.astype(np.int64) * len(wanted) + item
    kept = wanted[np.sort(np.unique(pairs, return_index=True)[1])]
    return events.only(kept)


def catalogue(events: Events, minimum: int = 1) -> list[str]:
    """Ids of all users with `minimum` follows or more, of or by them: most followed first.

    Who follows and is not followed yet can be recommended too, since the graph knows them.
    """
    names, inverse = np.unique(np.concatenate([events.users, events.items]), return_inverse=True)
    by, of = (np.bincount(part, minlength=len(names)) for part in np.split(inverse, 2))
    order = np.lexsort((names, -by, -of))
    return [str(names[place]) for place in order if by[place] + of[place] >= minimum]


@dataclass(frozen=True)
class Graph:
    """Who follows whom, in time order.

    `followers`, `followed`: int64 `[follows]`, model indexes; a follower who is no item is 0.
    """

    followers: NDArray[np.int64]
    followed: NDArray[np.int64]
    user_count: int

    def matrix(self) -> sp.csr_array:
        """float32 `[users, users]`: 1 where the row's user follows the column's."""
        real = self.followers > 0
        ones = np.ones(int(real.sum()), dtype=np.float32)
        places = (self.followers[real] - 1, self.followed[real] - 1)
        return sp.csr_array((ones, places), shape=(self.user_count, self.user_count))


def own_items(events: Events, data: Interactions) -> NDArray[np.int64]:
    """The model index of each user of `data`, int64 `[users]`; 0 for one who is no item.

    Args:
        data: `events` on the items of a catalogue, in time order (models.dataset.index_by).
    """
    place = {item: number for number, item in enumerate(data.item_ids, start=1)}
    known = np.array([item in place for item in events.items.tolist()], dtype=bool)
    names = np.unique(events.users[known]).tolist()
    return np.array([place.get(name, 0) for name in names], dtype=np.int64)


def without_self(parts: Split, own: NDArray[np.int64]) -> Split:
    """`parts`, in whose queries nobody is a candidate for themselves, as when serving.

    Args:
        own: the model index of each user.
    """
    return replace(parts, validation=_barred(parts.validation, own), test=_barred(parts.test, own))


def graph_of(data: Interactions, train: Sequences, own: NDArray[np.int64]) -> Graph:
    """The graph of the follows in `train`, and no later ones.

    Args:
        train: the first items of each user's sequence in `data`, by the users' numbers.
        own: the model index of each user.
    """
    learned = np.zeros(len(own), dtype=np.int64)
    learned[: len(train)] = [len(sequence) for sequence in train]
    order = np.argsort(data.users, kind="stable")
    starts = np.searchsorted(data.users[order], np.arange(len(own)))
    nth = np.empty(len(order), dtype=np.int64)
    nth[order] = np.arange(len(order)) - starts[data.users[order]]
    kept = nth < learned[data.users]
    return Graph(own[data.users[kept]], data.items[kept], data.item_count)


def followers(graph: Graph) -> list[NDArray[np.int64]]:
    """Each user with their followers after them, in time order: who follows this user may well
    follow those. So users whom nobody follows yet are learned too."""
    real = graph.followers > 0
    heads, members = graph.followed[real], graph.followers[real]
    order = np.argsort(heads, kind="stable")
    names, starts = np.unique(heads[order], return_index=True)
    return [
        np.concatenate([[name], group])
        for name, group in zip(names, np.split(members[order], starts[1:]), strict=True)
    ]


def spectral(graph: Graph, width: int, *, seed: int, scale: float = 0.02) -> NDArray[np.float32]:
    """Item vectors to start from, float32 `[1 + users, width]`, row 0 of zeros.

    A truncated singular value decomposition of the follows in both directions, each divided by the
    square roots of both users' degrees; singular vectors times the roots of their values, scaled
    to a standard deviation of `scale`. Users without a follow get random vectors.
    """
    rng = np.random.default_rng(seed)
    table = rng.normal(0.0, scale, (graph.user_count + 1, width)).astype(np.float32)
    matrix = graph.matrix()
    if not matrix.nnz:
        table[0] = 0.0
        return table
    both = (matrix + matrix.T).tocsr()
    degrees = np.asarray(both.sum(axis=1)).ravel()
    roots = sp.diags_array(1.0 / np.sqrt(np.maximum(degrees, 1.0)))
    rank = min(width, graph.user_count - 1)
    first = rng.normal(size=graph.user_count).astype(np.float32)
    left, values, _ = svds((roots @ both @ roots).astype(np.float32), k=rank, v0=first)
    vectors = left * np.sqrt(values)
    connected = np.flatnonzero(degrees)
    vectors = vectors[connected] / vectors[connected].std() * scale
    table[1 + connected, :rank] = vectors
    table[1 + connected, rank:] = 0.0
    table[0] = 0.0
    return table


def friends_of_friends(graph: Graph) -> Score:
    """How many of those whom the user follows are joined to a user by a follow, either way."""
    return _neighbours(graph, np.ones_like)


def adamic_adar(graph: Graph) -> Score:
    """The same, each common neighbour counting the less the more neighbours it has, by the
    logarithm (Liben-Nowell & Kleinberg, "The Link-Prediction Problem for Social Networks", JASIST
    2007, after Adamic & Adar)."""
    return _neighbours(graph, lambda degrees: 1.0 / np.log(np.maximum(degrees, 2.0)))


def _neighbours(graph: Graph, weigh: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Score:
    matrix = graph.matrix()
    joined = matrix.maximum(matrix.T).tocsr()
    weights = weigh(np.diff(joined.indptr).astype(np.float64))
    table = (sp.diags_array(weights) @ joined).tocsr().astype(np.float32)

    def score(history: NDArray[np.int64]) -> NDArray[np.float32]:
        rows, places = np.nonzero(history)
        seen = sp.csr_array(
            (np.ones(len(rows), dtype=np.float32), (rows, history[rows, places] - 1)),
            shape=(len(history), graph.user_count),
        )
        return np.asarray((seen @ table).toarray(), dtype=np.float32)

    return score


def _barred(queries: Queries, own: NDArray[np.int64]) -> Queries:
    return replace(queries, barred=own[queries.users]) if queries.users is not None else queries
