"""What follows from the figures, in words. Works on the report's dictionary (docs/report.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: Batch whose latency chooses.
LATENCY_BATCH = "64"
#: Ratios to the reference from which a variant is called slower or heavier; load times jitter.
_SLOWER, _HEAVIER, _LOADS_SLOWER = 1.02, 1.02, 1.1
#: What costs more of the reference than this is no improvement on it.
_WORTH = 0.98

Variant = Mapping[str, Any]


def verdicts(
    variants: Sequence[Variant], max_loss: float, baselines: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Which variant to ship, and which are best in something.

    Args:
        variants: the reference first.
        max_loss: largest relative loss of NDCG@10, such as 0.01.
        baselines: what is no bundle and may be better than the reference.
    """
    return {
        "max_loss": max_loss,
        "size": _choice(variants, max_loss, _size, "size", _size_words),
        "latency": _choice(variants, max_loss, _latency, "latency", _latency_words),
        "pareto": {"size": pareto(variants, _size), "latency": pareto(variants, _latency)},
        "cpu_share": cpu_share(variants),
        "notes": notes(variants, baselines),
    }


def pareto(variants: Sequence[Variant], cost: Callable[[Variant], float]) -> list[str]:
    """Labels of the variants that no other beats in both cost and NDCG@10, cheapest first."""
    front: list[str] = []
    best = float("-inf")
    for variant in sorted(variants, key=lambda v: (cost(v), -_ndcg(v))):
        if _ndcg(variant) > best:
            best = _ndcg(variant)
            front.append(variant["label"])
    return front


def findings(variant: Variant, reference: Variant) -> list[dict[str, str]]:
    """What to know about a variant; `kind` is `accuracy`, or `worse` where it falls behind."""
    found = [{"kind": "accuracy", "text": accuracy_words(variant)}]

    def worse(text: str) -> None:
        found.append({"kind": "worse", "text": text})

    for batch, cost in variant["latency"].items():
        if cost["ratio"]["median"] > _SLOWER:
            worse(f"slower at batch {batch} ({_ratio_words(cost['ratio'], 'rounds')})")
    for text, key, limit in (
        ("larger on disk", ("size", "bundle_bytes"), 1.0),
        ("needs more memory", ("memory", "resident_bytes"), _HEAVIER),
        ("needs more memory while loading", ("memory", "peak_loading_bytes"), _HEAVIER),
    ):
        own, theirs = variant[key[0]][key[1]], reference[key[0]][key[1]]
        if own > theirs * limit:
            worse(f"{text} ({own / max(theirs, 1):.2f}x)")
    if variant["memory"]["load_ratio"]["median"] > _LOADS_SLOWER:
        worse(f"loads slower ({_ratio_words(variant['memory']['load_ratio'], 'processes')})")
    for kind, title in (
        ("popularity", "by popularity of the target"),
        ("history", "by length of the history"),
    ):
        losing = [b for b in variant["buckets"][kind] if b["change"] and b["change"]["high"] < 0.0]
        losing.sort(key=lambda bucket: bucket["change"]["value"])
        if losing:
            words = (f"{bucket['label']} {percent(bucket['change'])}" for bucket in losing)
            worse(f"less accurate, {title}: {', '.join(words)}")
    return found


def notes(variants: Sequence[Variant], baselines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What puts the whole comparison into question."""
    reference = variants[0]
    better = [row for row in baselines if row.get("ndcg@10", 0.0) > _ndcg(reference)]
    if not better:
        return []
    named = ", ".join(
        f"{row['model']} {row['ndcg@10']:.4f}"
        for row in sorted(better, key=lambda row: -float(row["ndcg@10"]))
    )
    return [
        f"Baselines have a higher NDCG@10 than {reference['label']} ({_ndcg(reference):.4f}):"
        f" {named}. A better model may be worth more than a smaller one."
    ]


def cpu_share(variants: Sequence[Variant]) -> float:
    """How much of the time that runs took they had a core, 0..1: near 1 on a quiet machine."""
    costs = [cost for variant in variants for cost in variant["latency"].values()]
    return min(1.0, float(sum(c["cpu_ms"] for c in costs) / sum(c["p50_ms"] for c in costs)))


def accuracy_words(variant: Variant) -> str:
    """Whether a variant's accuracy can be told from the reference's."""
    change = variant["change"]["relative"]
    if change is None:
        return "the reference's NDCG@10 is zero: there is nothing to compare with"
    words = f"NDCG@10 {percent(change)}: "
    if change["high"] < 0.0:
        return words + "a loss beyond chance"
    if change["low"] > 0.0:
        return words + "a gain beyond chance"
    return words + "not distinguishable from no change"


def _ratio_words(ratio: Mapping[str, float], over: str) -> str:
    unsure = "; within the noise" if ratio["low"] < 1.0 else ""
    return f"{ratio['median']:.2f}x, {over} {ratio['low']:.2f}x to {ratio['high']:.2f}x{unsure}"


def percent(change: Mapping[str, float]) -> str:
    """A relative change with its interval."""
    low, high = (f"{100 * change[end]:+.1f}" for end in ("low", "high"))
    return f"{100 * change['value']:+.1f} % ({low} to {high})"


def _choice(
    variants: Sequence[Variant],
    max_loss: float,
    cost: Callable[[Variant], float],
    aim: str,
    words: Callable[[Variant, Variant], str],
) -> dict[str, Any]:
    reference, *others = variants
    kept = [v for v in others if _loss(v) <= max_loss and cost(v) < _WORTH * cost(reference)]
    if not kept:
        return {
            "label": reference["label"],
            "text": f"For {aim}: ship {reference['label']}. No variant improves on it within a loss"
            f" of {max_loss:.1%} of NDCG@10.",
        }
    best = min(kept, key=cost)
    change = best["change"]["relative"]
    text = f"For {aim}: ship {best['label']}: {words(best, reference)}, NDCG@10 {percent(change)}."
    if change["low"] < -max_loss:
        text += f" The data do not rule out a loss above {max_loss:.1%}: see its interval."
    return {"label": best["label"], "text": text}


def _size_words(variant: Variant, reference: Variant) -> str:
    return f"{_size(variant) / 1e6:.2f} MB, {_size(reference) / _size(variant):.1f}x smaller"


def _latency_words(variant: Variant, _: Variant) -> str:
    cost = variant["latency"][LATENCY_BATCH]
    fastest, slowest = 1 / cost["ratio"]["low"], 1 / cost["ratio"]["high"]
    return (
        f"{cost['cpu_ms']:.2f} ms a batch of {LATENCY_BATCH}, {1 / cost['ratio']['median']:.2f}x"
        f" as fast (rounds {slowest:.2f}x to {fastest:.2f}x)"
    )


def _size(variant: Variant) -> float:
    return float(variant["size"]["bundle_bytes"])


def _latency(variant: Variant) -> float:
    return float(variant["latency"][LATENCY_BATCH]["ratio"]["median"])


def _ndcg(variant: Variant) -> float:
    return float(variant["accuracy"]["ndcg@10"]["value"])


def _loss(variant: Variant) -> float:
    change = variant["change"]["relative"]
    return float("inf") if change is None else -float(change["value"])
