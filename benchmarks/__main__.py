"""`make bench`: `python -m benchmarks [run|scale|soak|profile|...] ...` (docs/benchmarks.md)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import click

from benchmarks.bundles import default_bundle
from benchmarks.compare import compare
from benchmarks.errors import BenchmarkError
from benchmarks.measure import Effort, Setup
from benchmarks.pages import fill_file
from benchmarks.peers import CASES
from benchmarks.plots import plot_compare, plot_scale
from benchmarks.profiling import profile as record
from benchmarks.results import Results, as_text, load, report, save
from benchmarks.scale import Axes, ScaleResults, measure_scale, scale_report
from benchmarks.soak import soak as run_soak
from benchmarks.soak import soak_report, verdicts
from benchmarks.stage import Stage, default_broker
from benchmarks.swaps import (
    SwapMemoryResults,
    load_report,
    load_verdicts,
    make_pair,
    memory_report,
    memory_verdicts,
    swaps_and_memory,
    swaps_under_load,
)
from benchmarks.system import Cpus, describe, own_cpus, split_cpus
from benchmarks.trials import CASES as TRIALS
from benchmarks.trials import run_cases, trials_table
from benchmarks.workloads import Kind, WorkloadSpec
from worker.cli import Commands

RESULTS = Path("bench-results.json")
#: Of the histories that synthetic models read, in `swaps`.
_LENGTH = 50


class DefaultRun(Commands):
    """A group whose command is `run` where none is named; errors are one line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` in front of options that no command precedes."""
        if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Own commands only."""
        return sorted(self.commands)


@click.group(cls=DefaultRun, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure the worker beside other ways to do the same."""


def _numbers(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(",") if part)
    except ValueError:
        raise click.BadParameter("whole numbers, comma-separated") from None


def _flags(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    flags = {}
    for value in values:
        name, equals, setting = value.partition("=")
        if not equals:
            raise click.BadParameter(f"{value!r} is not name=value")
        flags[name] = setting
    return flags


def stage_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say on what is measured."""
    for option in (
        click.option(
            "--broker",
            type=click.Choice(["kafka", "tansu"]),
            help="Apache Kafka (where Java and Maven are found), or the embedded broker.",
        ),
        click.option(
            "--sut-cpus",
            callback=_numbers,
            metavar="N,N",
            help="CPUs of the system under test; all else runs on the others. [first half]",
        ),
        click.option(
            "--bundle",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Model bundle. [the shipped int8 one]",
        ),
        click.option("--partitions", default=4, show_default=True, type=click.IntRange(1)),
        click.option(
            "--flag",
            "flags",
            multiple=True,
            callback=_flags,
            metavar="NAME=VALUE",
            help="A flag of `streamrec worker`, as batch-max-events=256; can be repeated.",
        ),
        click.option("--keep", is_flag=True, help="Keep the directory with all logs."),
    ):
        command = option(command)
    return command


def workload_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say what is sent."""
    for option in (
        click.option(
            "--workload",
            default="social",
            show_default=True,
            type=click.Choice(["social", "ml-100k"]),
        ),
        click.option("--users", default=10_000, show_default=True, type=click.IntRange(1)),
        click.option(
            "--history",
            default=50,
            show_default=True,
            type=click.IntRange(1, 200),
            help="Items that a user has behind them.",
        ),
    ):
        command = option(command)
    return command


@contextmanager
def staged(broker: str | None, sut_cpus: tuple[int, ...] | None, keep: bool) -> Iterator[Stage]:
    """A stage in a directory of its own, gone afterwards unless `keep`."""
    cpus: Cpus = split_cpus(own_cpus(), sut_cpus)
    directory = Path(tempfile.mkdtemp(prefix="streamrec-bench-"))
    chosen = broker or default_broker()
    click.echo(
        f"system under test on CPU {','.join(map(str, cpus.sut))}, all else on"
        f" {','.join(map(str, cpus.rest))}; broker {chosen}; logs in {directory}"
    )
    try:
        with Stage(directory, chosen, cpus) as stage:
            yield stage
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)


def spec_of(bundle: Path, **options: Any) -> WorkloadSpec:
    """A workload on the items of `bundle`."""
    items = tuple((bundle / "items.txt").read_text(encoding="utf-8").splitlines())
    return WorkloadSpec(cast(Kind, options.pop("workload", "social")), items, **options)


@main.command()
@stage_options
@workload_options
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--cases", help=f"Comma-separated: {', '.join(CASES)}. [all]")
@click.option("--seconds", default=4.0, show_default=True, help="Of a backlog at full speed.")
@click.option("--latency-seconds", default=4.0, show_default=True, help="At each steady rate.")
@click.option("--common-rate", default=1000.0, show_default=True, help="Events/s; 0 for none.")
@click.option(
    "--out", default=RESULTS, show_default=True, type=click.Path(dir_okay=False, path_type=Path)
)
def run(
    broker: str | None,
    sut_cpus: tuple[int, ...] | None,
    bundle: Path | None,
    partitions: int,
    flags: dict[str, str],
    keep: bool,
    workload: str,
    users: int,
    history: int,
    rounds: int,
    cases: str | None,
    seconds: float,
    latency_seconds: float,
    common_rate: float,
    out: Path,
) -> None:
    """Compare all systems: a table, and bench-results.json (section `compare`)."""
    names = list(CASES) if cases is None else cases.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise click.BadParameter(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    path = (bundle or default_bundle()).resolve()
    spec = spec_of(path, workload=workload, users=users, history=history)
    effort = Effort(
        seconds=seconds,
        raw_seconds=min(seconds, 2.0),
        latency_seconds=latency_seconds,
        common_rate=common_rate or None,
    )
    with staged(broker, sut_cpus, keep) as stage:
        results = compare(
            [CASES[name] for name in names],
            Setup(spec, path, partitions=partitions, flags=flags),
            stage,
            effort,
            rounds,
            progress=click.echo,
            keep=lambda found: save(out, "compare", found),
        )
    click.echo("\n" + report(results))
    click.echo(f"\nwritten: {out}")


results_option = click.option(
    "--results",
    "path",
    default=RESULTS,
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
)


@main.command()
@results_option
def show(path: Path) -> None:
    """Print the table of the last run again."""
    click.echo(report(load(path, "compare", Results)))


@main.command()
@results_option
@click.option("--broker", type=click.Choice(["kafka", "tansu"]))
@click.option("--sut-cpus", callback=_numbers, metavar="N,N")
@click.option("--catalogues", default="10000,100000,1000000", callback=_numbers)
@click.option("--histories", default="10,50,200", callback=_numbers)
@click.option("--users", default="10000,1000000", callback=_numbers)
@click.option(
    "--groups", default="1x1,4x1,16x1,4x2,16x4", show_default=True, help="Partitions x workers."
)
@click.option("--known-users", default=200_000, show_default=True)
@click.option("--rounds", default=1, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=3.0, show_default=True)
@click.option("--keep", is_flag=True, help="Keep the directory with all logs.")
def scale(
    path: Path,
    broker: str | None,
    sut_cpus: tuple[int, ...] | None,
    catalogues: tuple[int, ...],
    histories: tuple[int, ...],
    users: tuple[int, ...],
    groups: str,
    known_users: int,
    rounds: int,
    seconds: float,
    keep: bool,
) -> None:
    """How the worker's cost grows (section `scale`); synthetic models, speed and memory only."""
    pairs = [group.split("x") for group in filter(None, groups.split(","))]
    axes = Axes(
        catalogues, histories, users, tuple((int(p), int(w)) for p, w in pairs), known_users
    )
    effort = Effort(seconds=seconds, latency_seconds=seconds, shares=(0.5,), common_rate=None)
    with staged(broker, sut_cpus, keep) as stage:
        results = measure_scale(
            axes,
            stage,
            effort,
            rounds,
            progress=click.echo,
            keep=lambda found: save(path, "scale", found),
        )
    click.echo("\n" + scale_report(results))


@main.command()
@stage_options
@workload_options
@results_option
@click.option("--minutes", default=20.0, show_default=True)
@click.option("--load", "share", default=0.7, show_default=True, help="Share of full speed.")
@click.option("--rate", type=float, help="Events/s instead of a share.")
def soak(
    broker: str | None,
    sut_cpus: tuple[int, ...] | None,
    bundle: Path | None,
    partitions: int,
    flags: dict[str, str],
    keep: bool,
    workload: str,
    users: int,
    history: int,
    path: Path,
    minutes: float,
    share: float,
    rate: float | None,
) -> None:
    """Watch a loaded worker for long, and account for every event (section `soak`)."""
    chosen = (bundle or default_bundle()).resolve()
    spec = spec_of(chosen, workload=workload, users=users, history=history)
    with staged(broker, sut_cpus, keep) as stage:
        results = run_soak(
            Setup(spec, chosen, partitions=partitions, flags=flags),
            stage,
            minutes=minutes,
            load=share,
            rate=rate,
            progress=click.echo,
        )
    save(path, "soak", results)
    click.echo("\n" + soak_report(results))
    if not all(good for good, _ in verdicts(results)):
        raise click.exceptions.Exit(1)


@main.command()
@results_option
@click.option("--rate", default=1500.0, show_default=True, help="Events/s.")
@click.option(
    "--case", "names", multiple=True, type=click.Choice(list(TRIALS)), help="Can be repeated. [all]"
)
@click.option(
    "--max-loss", "max_losses", multiple=True, type=float, default=(0.2, 0.05), show_default=True,
    help="Loss that the gate accepts; spoiled canaries are tried with the first.",
)  # fmt: skip
def trials(path: Path, rate: float, names: tuple[str, ...], max_losses: tuple[float, ...]) -> None:
    """Canaries good and bad on the MovieLens replay, and what the gate makes of them."""
    made = run_cases(names or list(TRIALS), rate=rate, max_losses=max_losses)
    save(path, "trials", made)
    click.echo("\n" + as_text(trials_table(made)))


@main.command()
@results_option
@click.option("--broker", type=click.Choice(["kafka", "tansu"]))
@click.option("--sut-cpus", callback=_numbers, metavar="N,N")
@click.option(
    "--items",
    "catalogues",
    callback=_numbers,
    metavar="N,N",
    help="Of synthetic models, 0 for the shipped one. [10000; with --swaps 0,100000]",
)
@click.option("--loads", default="0.25,0.5,0.7", show_default=True, help="Shares of full speed.")
@click.option("--quiet-seconds", default=20.0, show_default=True, help="Without swaps, at first.")
@click.option("--seconds", default=60.0, show_default=True, help="With swaps, at each load.")
@click.option("--every", "every_s", default=5.0, show_default=True, help="Seconds for one swap.")
@click.option(
    "--swaps", "count", type=click.IntRange(4), help="Memory over so many, without much load."
)
@click.option("--keep", is_flag=True, help="Keep the directory with all logs.")
def swaps(
    path: Path,
    broker: str | None,
    sut_cpus: tuple[int, ...] | None,
    catalogues: tuple[int, ...] | None,
    loads: str,
    quiet_seconds: float,
    seconds: float,
    every_s: float,
    count: int | None,
    keep: bool,
) -> None:
    """Swap models under load (section `swaps`), or many times (`--swaps`, `swap-memory`)."""
    with staged(broker, sut_cpus, keep) as stage:
        if count is None:
            catalogue, *more = catalogues or (10_000,)
            if more:
                raise click.BadParameter("one --items at a time without --swaps")
            pair = make_pair(catalogue, _LENGTH, stage.directory)
            bundle = pair.directory(pair.versions[0])
            results = swaps_under_load(
                Setup(spec_of(bundle), bundle),
                pair,
                stage,
                shares=[float(load) for load in loads.split(",")],
                quiet_s=quiet_seconds,
                seconds=seconds,
                every_s=every_s,
                progress=click.echo,
            )
            save(path, "swaps", results)
            told, judged = load_report(results), load_verdicts(results)
        else:
            about = describe(stage.cpus, stage.broker_name)
            memory = SwapMemoryResults(datetime.now(UTC).isoformat(timespec="seconds"), about)
            for catalogue in catalogues or (0, 100_000):
                pair = make_pair(catalogue, _LENGTH, stage.directory)
                bundle = pair.directory(pair.versions[0])
                click.echo(f"{bundle.parent.name}: {' and '.join(pair.versions)}")
                memory.pairs.append(
                    swaps_and_memory(
                        Setup(spec_of(bundle), bundle),
                        pair,
                        stage,
                        count=count,
                        progress=click.echo,
                    )
                )
                save(path, "swap-memory", memory)
            told, judged = memory_report(memory), memory_verdicts(memory)
    click.echo("\n" + told)
    if not all(good for good, _ in judged):
        raise click.exceptions.Exit(1)


@main.command()
@stage_options
@workload_options
@click.option("--seconds", default=15.0, show_default=True)
@click.option("--native", is_flag=True, help="C and C++ frames too.")
@click.option(
    "--out",
    default=Path("build/profile"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
)
def profile(
    broker: str | None,
    sut_cpus: tuple[int, ...] | None,
    bundle: Path | None,
    partitions: int,
    flags: dict[str, str],
    keep: bool,
    workload: str,
    users: int,
    history: int,
    seconds: float,
    native: bool,
    out: Path,
) -> None:
    """Flame graph of a worker at full speed (py-spy)."""
    chosen = (bundle or default_bundle()).resolve()
    spec = spec_of(chosen, workload=workload, users=users, history=history)
    with staged(broker, sut_cpus, keep) as stage:
        shares = record(
            Setup(spec, chosen, partitions=partitions, flags=flags),
            stage,
            out,
            seconds=seconds,
            native=native,
            progress=click.echo,
        )
    for name, share in shares[:20]:
        click.echo(f"{share:6.1%}  {name}")


@main.command()
@results_option
@click.option(
    "--out",
    default=Path("docs/images"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
)
def plots(path: Path, out: Path) -> None:
    """Draw what bench-results.json holds."""
    made: list[Path] = []
    for section, kind, draw in (
        ("compare", Results, plot_compare),
        ("scale", ScaleResults, plot_scale),
    ):
        try:
            found = load(path, section, kind)
        except BenchmarkError as error:
            click.echo(str(error))
            continue
        made += draw(found, out)
    for file in made:
        click.echo(f"written: {file}")


@main.command()
@results_option
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
def pages(path: Path, files: tuple[Path, ...]) -> None:
    """Put the figures into the marked places of Markdown files."""
    for file in files:
        changed = fill_file(file, path)
        click.echo(f"{file}: {'filled' if changed else 'unchanged'}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
