"""The Pareto front of a search as a picture: what each recipe saves, and what it loses."""

from __future__ import annotations

import textwrap
from pathlib import Path

from models.search import Found, Trial

#: Okabe and Ito's palette, which colour-blind readers tell apart.
_COLOURS = {
    "reference": "#000000",
    "single": "#56B4E9",
    "combination": "#E69F00",
    "fine-tuned": "#009E73",
}


def draw_front(found: Found, max_loss: float, file: Path) -> None:
    """Two panels, size and latency against the change of NDCG@10; the front is joined and named."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, title in (
        (panels[0], "size", "times smaller than fp32"),
        (panels[1], "latency", "times faster than fp32 (batch 64, one thread)"),
    ):
        for stage, colour in _COLOURS.items():
            points = [trial for trial in found.trials if trial.stage == stage]
            axes.scatter(
                [1.0 / trial.objective(name) for trial in points],
                [-100.0 * trial.loss for trial in points],
                color=colour, label=stage, s=36, zorder=3, edgecolor="white", linewidth=0.5,
            )  # fmt: skip
        right = max(1.0 / t.objective(name) for t in found.trials)
        edge, best = [], -1e9
        for trial in sorted(found.trials, key=lambda t: t.objective(name)):
            if -trial.loss > best:
                best = -trial.loss
                edge.append(trial)
        axes.plot(
            [1.0 / trial.objective(name) for trial in edge],
            [-100.0 * trial.loss for trial in edge],
            color="#999999", linewidth=1, zorder=2,
        )  # fmt: skip
        bottom = -100.0 * max(5 * max_loss, 0.05)
        named: list[Trial] = []
        for trial in (t for t in edge if -100.0 * t.loss > bottom):
            near = [t for t in named if abs(t.loss - trial.loss) < max_loss]
            if any(1.0 / t.objective(name) < 1.0 / trial.objective(name) + right / 4 for t in near):
                continue  # their words would cover each other
            named.append(trial)
            axes.annotate(
                textwrap.fill(trial.recipe, 30),
                (1.0 / trial.objective(name), -100.0 * trial.loss),
                textcoords="offset points", xytext=(0, -6), fontsize=7,
                va="top",
                ha="right" if 1.0 / trial.objective(name) > right * 0.7 else "left",
            )  # fmt: skip
        axes.axhline(-100.0 * max_loss, color="#D55E00", linestyle="--", linewidth=1)
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=bottom, top=max(2.0, max(-100 * t.loss for t in found.trials) + 0.7))
        axes.set_xlim(0, right * 1.1)
    panels[0].set_ylabel("change of validation NDCG@10, %")
    panels[0].legend(loc="lower left", frameon=False)
    figure.suptitle(f"{len(found.trials)} recipes; dashed: the loss that is allowed")
    figure.savefig(file, dpi=120)
