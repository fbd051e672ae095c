"""`streamrec models publish | list | show | diff`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from models.commands.output import age, json_option, megabytes, print_json, section, size, table
from models.commands.releases import promote as promote_version
from models.commands.releases import push_options
from models.commands.stores import opened, registry_option
from models.provenance import missing_provenance
from models.stores import Store
from worker.bundle_files import read_manifest
from worker.errors import BundleError
from worker.manifest import Manifest, metric_summary

if TYPE_CHECKING:
    from models.diff import Diff


@click.command("publish")
@click.argument("bundle", type=click.Path(path_type=Path))
@registry_option
@click.option("--name", default=None, help="Publish under this model name.")
@click.option("--version", default=None, help="Publish under this version.")
@click.option("--promote", is_flag=True, help="Make it the version that serves, too.")
@push_options
@json_option
def publish_bundle(
    bundle: Path, registry: str, name: str | None, version: str | None, promote: bool, as_json: bool
) -> None:
    """Check the bundle in directory BUNDLE and copy it to a registry.

    A reader sees the version whole or not at all. A version is never overwritten; publishing the
    same content again changes nothing.
    """
    from models.publish import RefusedError, publish  # noqa: PLC0415 - loads ONNX Runtime

    store = opened(registry)
    try:
        done = publish(bundle, store, name=name, version=version)
    except RefusedError as error:
        for finding in error.findings:
            click.echo(f"{finding.level}: {finding.check}: {finding.message}", err=True)
        raise
    manifest = done.manifest
    if promote:
        promote_version(store, manifest.name, manifest.version)
    warnings = [*done.warnings]
    serves = False
    with _noting(warnings):
        serves = store.serving(manifest.name) == manifest.version
    if as_json:
        print_json(
            {
                "name": manifest.name,
                "version": manifest.version,
                "registry": store.url,
                "written": done.written,
                "bytes": size(manifest),
                "serving": serves,
                "warnings": warnings,
            }
        )
        return
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    identity = manifest.reference
    if done.written:
        click.echo(
            f"published {identity} to {store.url}: {megabytes(manifest)}, read back and whole"
        )
    else:
        click.echo(f"{identity} is in {store.url} already, with the same content; nothing to do")
    if promote:
        click.echo(f"{identity} serves from now on")
    elif serves and store.release(manifest.name) is None:
        click.echo(f"{identity} serves from now on: it is the newest, and none is promoted")


@click.command("list")
@click.argument("name", required=False)
@registry_option
@json_option
def list_models(name: str | None, registry: str, as_json: bool) -> None:
    """List the versions in the registry, or those of model NAME; * marks the one that serves.

    Exit code 66 where one of them is damaged; the others are listed nevertheless.
    """
    store = opened(registry)
    known = store.names()
    if name is not None and name not in known:
        raise BundleError(
            f"{store.url} has no model {name!r}; it has {', '.join(known) or 'no model at all'}"
        )
    found: list[tuple[Manifest, bool]] = []
    problems: list[str] = []
    for model in [name] if name is not None else known:
        serving: str | None = None
        with _noting(problems):
            serving = store.serving(model)
        for version in store.versions(model):
            with _noting(problems):
                found.append((store.manifest(model, version), version == serving))
    if as_json:
        rows = [_row(manifest, serves) for manifest, serves in found]
        print_json({"registry": store.url, "versions": rows, "problems": problems})
    elif found:
        click.echo(
            table(
                [
                    (
                        "*" if serves else " ",
                        manifest.reference,
                        manifest.surface,
                        manifest.precision,
                        megabytes(manifest),
                        age(manifest.created()),
                        metric_summary(manifest.metrics),
                    )
                    for manifest, serves in found
                ]
            )
        )
    elif not problems:
        click.echo(f"{store.url} has no model yet: streamrec models publish BUNDLE")
    if problems:
        for problem in problems[:-1]:
            click.echo(f"streamrec: {problem}", err=True)
        raise BundleError(problems[-1])


@click.command("show")
@click.argument("bundle")
@registry_option
@json_option
def show_model(bundle: str, registry: str, as_json: bool) -> None:
    """Show BUNDLE: NAME@VERSION, NAME for the one that serves, or a directory.

    Its manifest, files, the bundles that it was made from, and its promotions.
    """
    store = opened(registry)
    if _is_directory(bundle):
        manifest = read_manifest(Path(bundle))
    else:
        manifest = store.manifest(*_identity(store, bundle))
    release = store.release(manifest.name)
    known = store.versions(manifest.name)
    serving = bool(known) and store.serving(manifest.name) == manifest.version
    lineage = list(_lineage(store, manifest))
    promotions = [
        entry
        for entry in (msgspec.to_builtins(release.history) if release is not None else ())
        if entry["version"] == manifest.version
    ]
    missing = missing_provenance(manifest)
    if as_json:
        print_json(
            {
                "manifest": msgspec.to_builtins(manifest),
                "serving": serving,
                "missing_provenance": missing,
                "lineage": lineage,
                "promotions": promotions,
            }
        )
        return
    mark = "  (serving)" if serving else ""
    click.echo(f"{manifest.reference}{mark}")
    facts = [
        ("surface", manifest.surface),
        ("precision", manifest.precision),
        ("recipe", manifest.recipe),
        ("created", f"{manifest.created_at} ({age(manifest.created())} old)"),
        ("items", f"{manifest.item_count:,}"),
        ("history", f"{manifest.min_length} to {manifest.max_length} items"),
        ("size", megabytes(manifest)),
        ("metrics", metric_summary(manifest.metrics) or "none recorded"),
        ("golden", f"{sum(len(g.history) for g in manifest.golden)} histories"),
    ]
    section("", facts)
    section(
        "files",
        [
            (name, f"{file.bytes:,} bytes", f"sha256 {file.sha256[:16]}...")
            for name, file in manifest.files.items()
        ],
    )
    section("provenance", [*manifest.provenance.items()])
    if missing:
        click.echo(f"  not recorded: {', '.join(missing)}")
    click.echo("made from" if len(lineage) > 1 else "made from no other bundle")
    for parent in lineage[1:]:
        click.echo("  " * parent["depth"] + _lineage_line(parent))
    section("promoted", [_promotion_line(entry) for entry in promotions])


@click.command("diff")
@click.argument("a")
@click.argument("b")
@registry_option
@click.option("--histories", default=256, show_default=True, help="Random histories to ask both.")
@click.option("--seed", default=0, show_default=True, help="Of the random histories.")
@json_option
def diff_models(a: str, b: str, registry: str, histories: int, seed: int, as_json: bool) -> None:
    """Show what differs from A to B, each NAME@VERSION, NAME, or a directory. Runs both models."""
    from models.diff import diff_bundles  # noqa: PLC0415 - loads ONNX Runtime

    store = opened(registry)
    one, two = _directory(store, a), _directory(store, b)
    found = diff_bundles(one, two, histories=histories, seed=seed)
    if as_json:
        print_json(msgspec.to_builtins(found))
    else:
        click.echo(diff_text(found))


COMMANDS: Sequence[click.Command] = (
    publish_bundle,
    list_models,
    show_model,
    diff_models,
)


def diff_text(diff: Diff) -> str:
    """A comparison, for people."""
    parts = [f"{diff.a} -> {diff.b}"]
    smaller = diff.times_smaller
    ratio = f"{smaller:.2f}x smaller" if smaller >= 1 else f"{1 / smaller:.2f}x larger"
    parts.append(f"size: {diff.bytes[0] / 1e6:.2f} MB -> {diff.bytes[1] / 1e6:.2f} MB ({ratio})")
    parts.append("manifest" if diff.fields else "manifest: the same but for files")
    parts += [
        f"  {name}: {_short(one)} -> {_short(two)}" for name, (one, two) in diff.fields.items()
    ]
    if diff.metrics:
        parts.append("metrics")
        parts.append(
            table(
                [
                    (
                        f"  {name}",
                        _figure(metric.a),
                        "->",
                        _figure(metric.b),
                        "" if metric.absolute is None else f"{metric.absolute:+.4f}",
                        "" if metric.relative is None else f"{metric.relative:+.2%}",
                    )
                    for name, metric in diff.metrics.items()
                ]
            )
        )
    parts += _graph_lines(diff)
    items = diff.items
    parts.append(
        f"items: {items.shared:,} in both ({items.moved:,} of them at another index),"
        f" {len(items.added):,} added{_examples(items.added)},"
        f" {len(items.removed):,} removed{_examples(items.removed)}"
    )
    for kind, drift in diff.drift.items():
        parts += [
            f"recommendations to {drift.histories} {kind} histories",
            f"  overlap@10 {drift.overlap:.3f}, same first item {drift.same_first:.3f}",
            f"  scores of shared items differ by {drift.mean_score_change:.4f} on average, at most"
            f" {drift.max_score_change:.4f} (first to tenth place: {drift.score_range:.4f})",
        ]
    if not diff.drift:
        parts.append("recommendations: not compared, the catalogues share no item")
    return "\n".join(parts)


def _graph_lines(diff: Diff) -> list[str]:
    graph = diff.graph
    if graph is None:
        return ["graph: not compared, onnx is missing: pip install 'streamrec[train]'"]
    lines = ["operators" if graph.ops else "operators: the same"]
    if graph.ops:
        lines.append(
            table([(f"  {op}", str(one), "->", str(two)) for op, (one, two) in graph.ops.items()])
        )
    lines.append("weights")
    lines.append(
        table(
            [
                (
                    f"  {kind}",
                    f"{one.count} of {one.bytes:,} bytes",
                    "->",
                    f"{two.count} of {two.bytes:,} bytes",
                )
                for kind, (one, two) in graph.weights.items()
            ]
        )
    )
    lines.append(
        f"  {graph.same} the same, {len(graph.changed)} changed{_examples(graph.changed)},"
        f" {len(graph.only_a)} only before{_examples(graph.only_a)},"
        f" {len(graph.only_b)} only after{_examples(graph.only_b)}"
    )
    return lines


def _row(manifest: Manifest, serving: bool) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "version": manifest.version,
        "serving": serving,
        "surface": manifest.surface,
        "precision": manifest.precision,
        "bytes": size(manifest),
        "created_at": manifest.created_at,
        "metrics": manifest.metrics,
    }


def _lineage(
    store: Store, manifest: Manifest, depth: int = 0, seen: frozenset[str] = frozenset()
) -> Iterator[dict[str, Any]]:
    """The bundle and those it was made from, depth first; `found` says whether they are here."""
    identity = manifest.reference
    yield {
        "bundle": identity,
        "depth": depth,
        "found": True,
        "precision": manifest.precision,
        "bytes": size(manifest),
        "metrics": manifest.metrics,
    }
    for parent in manifest.parents:
        name, at, version = parent.partition("@")
        if not at:
            name, version = manifest.name, parent
        known = f"{name}@{version}"
        try:
            if known in seen | {identity}:
                raise BundleError("a bundle is its own parent")
            found = store.manifest(name, version)
        except BundleError:
            yield {"bundle": known, "depth": depth + 1, "found": False}
        else:
            yield from _lineage(store, found, depth + 1, seen | {identity})


def _lineage_line(entry: dict[str, Any]) -> str:
    if not entry["found"]:
        return f"{entry['bundle']}  (not in this registry)"
    return (
        f"{entry['bundle']}  {entry['precision']}  {entry['bytes'] / 1e6:.2f} MB"
        f"  {metric_summary(entry['metrics'])}"
    )


def _promotion_line(entry: dict[str, Any]) -> tuple[str, ...]:
    by = f"by {entry['by']}" if entry.get("by") else ""
    return (
        entry.get("at") or "at an unknown time",
        by,
        "(rollback)" if "rollback" in entry else "",
    )


def _is_directory(bundle: str) -> bool:
    return "/" in bundle or Path(bundle).is_dir()


def _identity(store: Store, bundle: str) -> tuple[str, str]:
    """Name and version of `NAME@VERSION`, or of `NAME` for the version that serves."""
    name, at, version = bundle.partition("@")
    if at:
        return name, version
    if not store.versions(name):
        store.require(name, "any")
    return name, store.serving(name)


def _directory(store: Store, bundle: str) -> Path:
    return Path(bundle) if _is_directory(bundle) else store.path(*_identity(store, bundle))


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except BundleError as error:
        problems.append(str(error))


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _examples(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
