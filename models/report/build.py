"""Measure bundles side by side: everything that the report says, as one dictionary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tqdm import tqdm

from models.baselines import BaselineError, ease, item_knn, popularity_score, sequential_rules
from models.dataset import Split
from models.evaluate import Ranked, Score, accuracy, bundle_ranked, ranks, translated, translation
from models.explanations import MIN_HISTORY, agreement
from models.measure import BATCHES, MEMORY_BATCH, ROUNDS, K, Progress, footprints, latencies
from models.report.accuracy import Judge
from models.report.errors import ReportError
from models.report.machine import machine
from models.report.parts import size_parts
from models.report.published import published
from models.report.statistics import RESAMPLES
from models.report.verdicts import findings, verdicts
from models.stepping import restart, steps
from worker.bundle import Bundle, open_bundle
from worker.manifest import Manifest

FORMAT_VERSION = 1
#: Histories whose explanations are compared.
EXPLAINED = 40


@dataclass(frozen=True)
class DataInfo:
    """What the queries come from."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    #: Fresh processes for memory and load time, of which the median counts.
    repeats: int = 3
    #: Rounds of latency, and runs of one batch size in each.
    rounds: int = ROUNDS
    runs: int = 15


def open_bundles(paths: Sequence[Path], reference: Path | None = None) -> list[Bundle]:
    """Open and check bundles, the reference first: the one given, else the first.

    Raises:
        BundleError: one is broken.
        ReportError: two have no item in common.
    """
    wanted = ([reference] if reference is not None else []) + list(paths)
    by_place = {path.resolve(): path for path in reversed(wanted)}
    distinct = list(dict.fromkeys(path.resolve() for path in wanted))
    bundles = [open_bundle(by_place[place]) for place in distinct]
    for other in bundles[1:]:
        if not set(bundles[0].items) & set(other.items):
            raise ReportError(
                f"{other.path} and the reference {bundles[0].path} have no item in common: compare"
                " bundles of one catalogue"
            )
    return bundles


def build_report(
    bundles: Sequence[Bundle],
    split: Split,
    data: DataInfo,
    *,
    max_loss: float = 0.01,
    baselines: bool = False,
    rankers: Mapping[str, Any] | None = None,
    seed: int = 0,
    command: Sequence[str] = (),
    effort: Effort | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare `bundles` on the test queries of `split`.

    Args:
        bundles: of `open_bundles`, the reference first.
        split: in the numbering of the reference (`models.dataset.index_by`).
        max_loss: relative loss of NDCG@10 up to which a variant may be shipped.
        baselines: also fit and judge models that are no bundles.
        rankers: report of `streamrec models compress-ranker`, passed through.
        command: what was run, for the report.
        progress: show a bar on stderr, where that is a terminal.

    Returns:
        The report, ready for JSON (docs/report.md).

    Raises:
        ReportError: there are no test queries.
        MeasureError: a bundle could not be measured.
    """
    effort = effort or Effort()
    reference, test = bundles[0], split.test
    if not len(test):
        raise ReportError(
            "the split leaves no test queries with items that the reference knows: give the events"
            " that it was made for, or more of them"
        )
    names = labels([bundle.manifest for bundle in bundles])
    recurrent = any(bundle.manifest.carry_width is not None for bundle in bundles)
    count = len(bundles) * (effort.repeats + 2) - 1 + effort.rounds + int(baselines)
    with _bar(count + effort.rounds * recurrent, progress) as step:
        histories = [
            translated(test.histories, translation(reference.items, bundle)) for bundle in bundles
        ]
        usable = np.flatnonzero([all(len(own[n]) for own in histories) for n in range(len(test))])
        if not len(usable):
            raise ReportError("no history holds an item of every bundle: compare other bundles")
        asked = [[own[place] for place in usable] for own in histories]
        costs = footprints(bundles, asked, repeats=effort.repeats, progress=step)
        speeds = latencies(
            bundles, asked, rounds=effort.rounds, runs=effort.runs, seed=seed, progress=step
        )
        by_event = (
            steps(bundles, asked, rounds=effort.rounds, runs=effort.runs, seed=seed, progress=step)
            if recurrent
            else None
        )
        answers = []
        for bundle, name in zip(bundles, names, strict=True):
            answers.append(bundle_ranked(bundle, test, reference.items))
            step(f"accuracy of {name}")
        judge = Judge(split, len(reference.items), answers[0], seed=seed)
        variants: list[dict[str, Any]] = []
        for number, bundle in enumerate(bundles):
            variant = _variant(bundle, names[number], judge, answers[number])
            variant["memory"] = msgspec.to_builtins(costs[number])
            variant["latency"] = {str(size): asdict(at) for size, at in speeds[number].items()}
            variant["steps"] = variant["restart"] = None
            if by_event is not None:
                variant["steps"] = {str(size): asdict(at) for size, at in by_event[number].items()}
            if bundle.manifest.carry_width is not None:
                variant["restart"] = asdict(restart(bundle, test, reference.items, seed=seed))
            variant["explanations"] = None
            if number:
                variant["explanations"] = _explanations(reference, bundle, split, seed)
                step("explanations")
            variants.append(variant)
        for variant in variants[1:]:
            variant["findings"] = findings(variant, variants[0])
        found = _baselines(split, reference, step) if baselines else []
    return {
        "format_version": FORMAT_VERSION,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "seed": seed,
        "data": asdict(data),
        "split": split.name,
        "queries": len(test),
        "users": len(test) if test.users is None else len(np.unique(test.users)),
        "item_count": len(reference.items),
        "protocol": _protocol(effort),
        "machine": machine(),
        "reference": names[0],
        "variants": variants,
        "verdicts": verdicts(variants, max_loss, found),
        "baselines": found,
        "published": published(data.name, split.name),
        "rankers": rankers,
    }


def labels(manifests: Sequence[Manifest]) -> list[str]:
    """Short distinct names: versions less the parts between `-` that all of them begin with."""
    split_up = [manifest.version.split("-") for manifest in manifests]
    common = 0
    if len(manifests) > 1:
        shared = [len(set(parts)) == 1 for parts in zip(*split_up, strict=False)]
        shortest = min(len(parts) for parts in split_up)
        common = min([*shared, False].index(False), shortest - 1)
    short = ["-".join(parts[common:]) for parts in split_up]
    if len(set(short)) < len(short):
        short = [f"{manifest.name}@{manifest.version}" for manifest in manifests]
    if len(set(short)) < len(short):
        short = [f"{number}: {name}" for number, name in enumerate(short, start=1)]
    return short


def _variant(bundle: Bundle, label: str, judge: Judge, answers: Ranked) -> dict[str, Any]:
    manifest = bundle.manifest
    parts = size_parts(bundle.path, manifest)
    return {
        "label": label,
        "path": str(bundle.path),
        "name": manifest.name,
        "version": manifest.version,
        "precision": manifest.precision,
        "recipe": manifest.recipe,
        "size": {
            "bundle_bytes": sum(parts.values()),
            "model_bytes": manifest.files["model.onnx"].bytes,
            "parts": parts,
        },
        **judge.accuracy(answers.ranks),
        "lists": judge.lists(answers),
        "buckets": judge.buckets(answers.ranks),
        "findings": [],
    }


def _explanations(
    reference: Bundle, bundle: Bundle, split: Split, seed: int
) -> dict[str, Any] | None:
    long = [history for history in split.test.histories if len(history) >= MIN_HISTORY]
    if not long:
        return None
    chosen = np.random.default_rng(seed).permutation(len(long))[:EXPLAINED]
    try:
        return agreement(reference, bundle, [long[place] for place in chosen], seed=seed).as_dict()
    except ValueError:  # no history that both explain
        return None


def _baselines(split: Split, reference: Bundle, step: Progress) -> list[dict[str, Any]]:
    train, count = split.train, len(reference.items)
    length = reference.manifest.max_length

    def fitted() -> Iterator[tuple[str, Any]]:
        yield "popularity", lambda: popularity_score(np.concatenate(train), count)
        yield "EASE", lambda: ease(train, count, l2=500.0, recency=0.9)
        yield (
            "item-kNN",
            lambda: item_knn(train, count, neighbours=200, shrink=10.0, recency=0.9),
        )
        yield "sequential rules", lambda: sequential_rules(train, count)

    rows: list[dict[str, Any]] = []
    for name, fit in fitted():
        try:
            score: Score = fit()
        except BaselineError as error:
            rows.append({"model": name, "note": str(error)})
            continue
        found = accuracy(ranks(score, split.test, length=length))
        rows.append({"model": name} | found.as_metrics())
    step("baselines")
    return rows


def _protocol(effort: Effort) -> dict[str, Any]:
    return {
        "accuracy": "Every item of the catalogue is ranked for every test query; items in the"
        " user's history are filtered. Intervals are 95 % percentiles of"
        f" {RESAMPLES} bootstrap resamples of users, the same for all variants, so that changes"
        " against the reference are paired.",
        "cost": f"Latency: one thread, {K} items asked for, histories of the test queries, in"
        f" {effort.rounds} rounds in which each variant runs in random order; ratios are of"
        " medians of processor time within a round. Memory and load time: medians of"
        f" {effort.repeats} fresh processes with files in the page cache; memory after one run of"
        f" {MEMORY_BATCH}.",
        "batches": list(BATCHES),
    }


@contextmanager
def _bar(steps: int, shown: bool) -> Iterator[Progress]:
    with tqdm(total=steps, disable=None if shown else True, unit="step") as bar:

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        yield step
