"""Find good recipes: sensitivity first, then search, not brute force.

1. Each option of each axis (layers, history, heads, neurons, width, pruning, quantization) is tried
   alone: what it saves and what it loses.
2. Combinations are predicted from these (losses add, costs multiply) and tried best first, as long
   as the prediction is within the loss that is allowed. What the trials show corrects the
   predictions.
3. Where combinations promise more than the loss allows, the most promising are fine-tuned, through
   the rounding that they plan.

Everything is judged on validation queries. The front that comes out is to be reported on the test
queries (`models report`): choosing among many favours the lucky.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models import sasrec
from models.compress import recipe
from models.compress.draft import CompressionError, Context, Draft
from models.compress.methods import METHODS
from models.compress.trial import cost, in_memory, ndcg, relative_loss
from models.dataset import Queries, sample
from models.export import read_params
from models.graph import ForeignGraphError
from worker.bundle import Bundle

OBJECTIVES = ("size", "latency")


@dataclass(frozen=True)
class Trial:
    """A recipe that was run. Ratios are to the float32 bundle: below 1 is better."""

    recipe: str
    bytes: int
    size_ratio: float
    latency_ratio: float
    batch_ms: float
    ndcg: float
    #: Relative loss of NDCG@10 on validation; negative is a gain.
    loss: float
    #: Seconds that making and measuring it took.
    seconds: float
    #: Which stage of the search tried it.
    stage: str

    def objective(self, name: str) -> float:
        """What is to be small."""
        return self.size_ratio if name == "size" else self.latency_ratio


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    trials: list[Trial]
    front: list[Trial]
    best: Trial
    #: Recipes that could not be run, and why.
    failed: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "best": asdict(self.best),
            "front": [asdict(trial) for trial in self.front],
            "trials": [asdict(trial) for trial in self.trials],
            "failed": self.failed,
        }


def search(
    draft: Draft,
    context: Context,
    *,
    max_loss: float = 0.01,
    objective: str = "size",
    trials: int = 12,
    finetunes: int = 2,
    finetune_epochs: int = 3,
    queries: int = 3000,
    progress: Callable[[str], None] = lambda line: None,
) -> Found:
    """Search recipes for a float32 draft.

    Args:
        max_loss: relative loss of validation NDCG@10 that is allowed, such as 0.01.
        objective: `size` or `latency`: what is to be small within it.
        trials: combinations to try after the single options.
        finetunes: recipes to fine-tune; the costly part.
        finetune_epochs: at most so many each.
        queries: validation queries to judge by.
        progress: told each trial as a line.
    """
    if objective not in OBJECTIVES:
        raise CompressionError(f"objective {objective!r} must be size or latency")
    judge = _Judge(draft, context, queries, progress)
    axes = _axes(draft)
    singles: list[list[Trial]] = []
    for options in axes:
        found = [judge.run(option, "single") for option in options]
        singles.append([trial for trial in found if trial is not None])
    judge.combine(singles, max_loss, objective, trials)
    if finetunes and len(context.train):
        judge.tune(singles, max_loss, objective, finetunes, finetune_epochs)
    return judge.found(max_loss, objective)


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other beats in size, latency and loss at once, smallest first."""

    def beaten(one: Trial) -> bool:
        mine = (one.size_ratio, one.latency_ratio, one.loss)
        return any(
            all(theirs <= ours for theirs, ours in zip(other, mine, strict=True)) and other != mine
            for other in ((t.size_ratio, t.latency_ratio, t.loss) for t in trials)
        )

    return sorted((t for t in trials if not beaten(t)), key=lambda t: t.size_ratio)


def _axes(draft: Draft) -> list[list[str]]:
    """Options by axis, in the order in which a recipe applies them."""
    structure: list[list[str]] = []
    try:
        params, shape = read_params(draft.model)
    except ForeignGraphError:
        pass  # another model's graph: only methods that any graph allows
    else:
        heads = 0
        lengths: tuple[int, ...] = ()
        if isinstance(shape, sasrec.Shape):
            heads = params["blocks"][0]["out"]["w"].shape[0] // shape.head_width
            # A recurrent model becomes no smaller by reading less.
            lengths = (shape.length // 2, shape.length // 4)
        structure = [
            [f"layers:{keep}" for keep in range(shape.blocks - 1, 0, -1)],
            [f"history:{length}" for length in lengths if length],
            ["heads:0.5"] if heads > 1 else [],
            ["neurons:0.5", "neurons:0.75"],
            [f"width:{shape.width * 3 // 4}"],
        ]
    return [
        *(options for options in structure if options),
        ["prune:0.3", "prune:0.5", "prune:0.7"],
        ["half", "int8", "int8:parts=table|ffn", "int4:parts=table + int8:parts=linear|other",
         "int4", "mixed", "mixed:objective=latency", "static + int8:parts=table", "blocks"],
    ]  # fmt: skip


class _Judge:
    """Runs recipes, each once, against one reference."""

    def __init__(
        self, draft: Draft, context: Context, queries: int, progress: Callable[[str], None]
    ) -> None:
        self._draft = draft
        self._context = context
        self._progress = progress
        self._queries: Queries = sample(context.need_validation("search"), queries, context.seed)
        self._reference: Bundle = in_memory(draft)
        self._ndcg = ndcg(self._reference, self._queries)
        size = cost(self._reference, self._reference, self._queries)
        self._bytes = size.bytes
        self.trials: dict[str, Trial] = {}
        self.failed: dict[str, str] = {}
        self._add(
            Trial("fp32", size.bytes, 1.0, 1.0, size.batch_ms, self._ndcg, 0.0, 0.0, "reference")
        )

    def _add(self, trial: Trial) -> Trial:
        self.trials[trial.recipe] = trial
        self._progress(line(trial))
        return trial

    def run(self, text: str, stage: str) -> Trial | None:
        """Try a recipe; None where it cannot be applied."""
        if text in self.trials:
            return self.trials[text]
        if text in self.failed:
            return None
        started = time.monotonic()
        try:
            made = recipe.apply(recipe.parse(text, METHODS), self._draft, self._context)
            return self._measure(made, text, stage, time.monotonic() - started)
        except CompressionError as error:
            self.failed[text] = str(error)
            self._progress(f"{text}: {error}")
            return None

    def _measure(self, made: Draft, text: str, stage: str, seconds: float) -> Trial:
        bundle = in_memory(made)
        measured = ndcg(bundle, self._queries)
        spent = cost(bundle, self._reference, self._queries)
        lost = relative_loss(measured, self._ndcg)
        ratio = spent.bytes / self._bytes
        return self._add(
            Trial(
                text, spent.bytes, ratio, spent.latency_ratio, spent.batch_ms, measured, lost,
                round(seconds, 1), stage,
            )
        )  # fmt: skip

    def combine(
        self, singles: list[list[Trial]], max_loss: float, objective: str, count: int
    ) -> None:
        """Try combinations, the most promising first."""
        optimism: list[float] = []
        tried = 0
        pending = sorted(_combinations(singles), key=lambda guess: guess.objective(objective))
        while pending and tried < count:
            # How much worse than predicted combinations turned out, so far.
            extra = float(np.median(optimism)) if optimism else 0.0
            guess = next((g for g in pending if g.loss + extra <= 1.5 * max_loss), None)
            if guess is None:
                return
            pending.remove(guess)
            trial = self.run(guess.recipe, "combination")
            tried += 1
            if trial is None:
                continue
            optimism.append(trial.loss - guess.loss)
            if trial.loss <= max_loss:
                # What promises less than what is in hand needs no trial.
                bound = trial.objective(objective)
                pending = [g for g in pending if g.objective(objective) < bound]

    def tune(
        self, singles: list[list[Trial]], max_loss: float, objective: str, count: int, epochs: int
    ) -> None:
        """Fine-tune the most promising recipes that lose too much as they are.

        Quantization is planned before the training, so that it learns to live with the rounding.
        """
        guesses = [g for g in _combinations(singles) if max_loss < g.loss <= 10 * max_loss]
        guesses.sort(key=lambda guess: guess.objective(objective) * (1.0 + 3.0 * guess.loss))
        chosen: list[Trial] = []
        for guess in guesses:
            # Another way to nearly the same teaches little for what training costs.
            if all(abs(guess.size_ratio / one.size_ratio - 1.0) > 0.02 for one in chosen):
                chosen.append(guess)
            if len(chosen) == count:
                break
        for guess in chosen:
            self.run(f"{guess.recipe} + finetune:{epochs}", "fine-tuned")

    def found(self, max_loss: float, objective: str) -> Found:
        """The outcome."""
        every = list(self.trials.values())
        best = min(
            (trial for trial in every if trial.loss <= max_loss),
            # Of equals, the one that is on the front.
            key=lambda trial: (
                trial.objective(objective), trial.size_ratio, trial.latency_ratio, trial.loss
            ),
        )  # fmt: skip
        return Found(every, pareto(every), best, self.failed)


def _combinations(singles: Sequence[Sequence[Trial]]) -> Iterator[Trial]:
    """Predicted trials of one option and more: losses add, costs multiply."""
    for chosen in itertools.product(*([None, *options] for options in singles)):
        parts = [trial for trial in chosen if trial is not None]
        if not parts:
            continue
        yield Trial(
            " + ".join(part.recipe for part in parts),
            0,
            float(np.prod([part.size_ratio for part in parts])),
            float(np.prod([part.latency_ratio for part in parts])),
            0.0,
            0.0,
            # A gain of one option is luck on these queries, or not to be had twice.
            sum(max(part.loss, 0.0) for part in parts),
            0.0,
            "prediction",
        )


def line(trial: Trial) -> str:
    """A trial as a row of text."""
    return (
        f"{trial.bytes / 1e6:8.3f} MB  {1 / trial.size_ratio:5.1f}x smaller"
        f"  {trial.batch_ms:7.2f} ms  {1 / trial.latency_ratio:5.2f}x faster"
        f"  NDCG@10 {trial.ndcg:.4f} ({-trial.loss:+.1%})  {trial.recipe}"
    )
