"""Mixed quantization: each weight gets the width that its measured sensitivity allows.

First the sensitivity of each weight at each width (how much likelier the model finds the wrong
items when this one weight is rounded), then moves in the order of loss for what they save, as many
as stay within the budget, found by bisection with the whole graph measured at each try.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.compress.draft import CompressionError, Context, Draft, Weight
from models.compress.rows import Rows
from models.compress.trial import cost, in_memory, ndcg, relative_loss, surprise
from models.dataset import sample
from worker.bundle import Bundle

_SENSITIVITY_QUERIES = 384
_QUERIES = 3000


@dataclass(frozen=True)
class Move:
    """Store one weight more tightly."""

    weight: Weight
    encoding: Rows
    #: Rise of the negative log-likelihood, nats.
    harm: float
    #: Bytes, or milliseconds a batch of 64.
    saved: float


def mixed(
    draft: Draft,
    context: Context,
    *,
    loss: float = 0.01,
    objective: str = "size",
    budget: float = 0.0,
) -> Draft:
    """Quantize each weight to 4, 8 or 32 bits.

    Args:
        loss: largest relative loss of validation NDCG@10 against the draft as it is.
        objective: `size` or `latency`: what a move must save.
        budget: stop at a graph of so many bytes, or a batch of so many milliseconds, although
            more loss were allowed; 0 saves as much as `loss` allows.
    """
    if objective not in {"size", "latency"}:
        raise CompressionError(f"mixed: objective {objective!r} must be size or latency")
    queries = sample(context.need_validation("mixed"), _QUERIES, context.seed)
    start = in_memory(draft)
    base = ndcg(start, queries)
    moves = _moves(draft, context, start, objective)

    def after(count: int) -> Draft:
        made = draft
        for move in moves[:count]:
            made = made.encoded([move.weight.name], move.encoding)
        return made

    def fits(count: int) -> bool:
        return relative_loss(ndcg(in_memory(after(count)), queries), base) <= loss

    low, high = 0, len(moves)
    if fits(high):
        low = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if budget > 0.0:
        while low > 0 and _value(after(low - 1), start, context, objective) <= budget:
            low -= 1
    return after(low)


def _moves(draft: Draft, context: Context, start: Bundle, objective: str) -> list[Move]:
    queries = sample(context.need_validation("mixed"), _SENSITIVITY_QUERIES, context.seed)
    calm = surprise(start, queries)
    found: list[Move] = []
    for weight in draft.weights():
        if weight.name in draft.encodings:
            continue  # chosen by an earlier step
        value = draft.value(weight.name)
        axis = 0 if weight.role == "linear" else 1
        previous, bits_before = 0.0, 32
        for bits in (8, 4) if objective == "size" else (8,):
            encoding = Rows(bits, axis, weight.role != "other")
            rounded = draft.with_values({weight.name: encoding.rounded(value, np)})
            harm = max(surprise(in_memory(rounded), queries) - calm, previous)
            if objective == "size":
                saved = value.size * (bits_before - bits) / 8
            else:
                tried = draft.encoded([weight.name], encoding)
                made = cost(in_memory(tried), start, queries)
                saved = made.batch_ms * (1.0 / max(made.latency_ratio, 1e-9) - 1.0)
            if saved > 0.0:
                found.append(Move(weight, encoding, harm - previous, saved))
            previous, bits_before = harm, bits
    # A weight's move to 4 bits never comes before its move to 8: it is put behind where it would.
    found.sort(key=lambda move: (move.harm / move.saved, -move.encoding.bits))
    ordered: list[Move] = []
    waiting: list[Move] = []
    done: set[str] = set()
    for move in found:
        if move.encoding.bits == 4 and move.weight.name not in done:
            waiting.append(move)
            continue
        ordered.append(move)
        done.add(move.weight.name)
        ordered += [late for late in waiting if late.weight.name == move.weight.name]
        waiting = [late for late in waiting if late.weight.name != move.weight.name]
    return ordered


def _value(draft: Draft, start: Bundle, context: Context, objective: str) -> float:
    queries = context.need_validation("mixed")
    made = cost(in_memory(draft), start, queries)
    return float(made.bytes) if objective == "size" else made.batch_ms
