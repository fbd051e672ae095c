"""`streamrec models report` on real bundles and events, from the command line to the page."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from models.commands.report import report_bundles as report_command
from models.dataset import Queries, Split
from models.evaluate import bundle_ranked, bundle_score, ranks
from models.events import Events
from models.report import DataInfo, build_report, render_html, write_report
from models.report.build import Effort, open_bundles
from models.report.errors import ReportError
from models.sources import write_jsonl
from tests.conftest import ITEMS, tiny_bundle, tiny_model
from worker.bundle import Bundle, open_bundle
from worker.errors import BundleError

QUICK = Effort(repeats=1, rounds=2, runs=3)


def renumbered_model(order: np.ndarray[Any, np.dtype[np.int64]]) -> bytes:
    """`tiny_model` with its items in another order."""
    model = onnx.load_from_string(tiny_model())
    for weight in model.graph.initializer:
        value = numpy_helper.to_array(weight)
        if weight.name == "table":
            value = np.concatenate([value[:1], value[1:][order]])
        elif weight.name == "scorer":
            value = value[:, order]
        weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), weight.name))
    return bytes(model.SerializeToString())


def queries(count: int = 60) -> Queries:
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(len(ITEMS))[: rng.integers(6, 15)] + 1 for _ in range(count)]
    return Queries(
        [one[:-1] for one in drawn],
        np.array([one[-1] for one in drawn]),
        np.arange(count) // 2,
    )


def some_split() -> Split:
    test = queries()
    return Split("leave-one-out", list(test.histories), Queries([], np.empty(0, np.int64)), test)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """A reference, the same model with other item numbers, and another model."""
    root = tmp_path_factory.mktemp("bundles")
    order = np.random.default_rng(3).permutation(len(ITEMS))
    tiny_bundle(root / "v-fp32")
    tiny_bundle(
        root / "v-moved",
        model=renumbered_model(order),
        items=tuple(ITEMS[place] for place in order),
    )
    tiny_bundle(root / "v-<b>other", seed=5, recipe="<script>alert(1)</script>")
    return open_bundles([root / "v-fp32", root / "v-moved", root / "v-<b>other"])


@pytest.fixture(scope="module")
def made(bundles: list[Bundle]) -> dict[str, Any]:
    return build_report(
        bundles, some_split(), DataInfo("MovieLens 1M", "ab" * 32), baselines=True,
        command=["streamrec", "a b"], effort=QUICK,
    )  # fmt: skip


def test_ranks_and_lists_of_one_pass_are_those_of_the_full_scores(bundles: list[Bundle]) -> None:
    found = bundle_ranked(bundles[0], queries(), bundles[0].items, batch=7)
    expected = ranks(bundle_score(bundles[0]), queries(), length=8)
    assert found.ranks.tolist() == expected.tolist()
    for history, target, rank, top in zip(
        queries().histories, queries().targets, found.ranks, found.top, strict=True
    ):
        assert not set(top) & set(history)
        assert (target in top) == (rank < 10)
        if rank < 10:
            assert top[rank] == target


def test_item_numbers_of_a_bundle_do_not_matter(bundles: list[Bundle]) -> None:
    one, two = (bundle_ranked(b, queries(), bundles[0].items) for b in bundles[:2])
    assert one.ranks.tolist() == two.ranks.tolist()
    assert one.top.tolist() == two.top.tolist()


def test_a_target_that_a_bundle_does_not_know_is_not_found(tmp_path: Path) -> None:
    small = open_bundle(tiny_bundle(tmp_path / "small", model=tiny_model(items=5), items=ITEMS[:5]))
    asked = Queries(
        [np.array([1]), np.array([1]), np.array([40])], np.array([2, 40, 3], dtype=np.int64)
    )
    found = bundle_ranked(small, asked, ITEMS)
    # Known; unknown target; nothing known before it.
    assert (found.ranks < 10).tolist() == [True, False, False]
    assert found.top[2].tolist() == [0] * 10
    assert set(found.top[0]) <= {0, 2, 3, 4, 5}


def test_targets_beyond_the_candidates_of_a_graph_are_not_found(bundles: list[Bundle]) -> None:
    reference = bundles[0]
    manifest = msgspec.structs.replace(reference.manifest, max_k=3)
    few = dataclasses.replace(reference, manifest=manifest)
    full = bundle_ranked(reference, queries(), reference.items)
    cut = bundle_ranked(few, queries(), reference.items)
    assert ((cut.top > 0).sum(axis=1) <= 3).all()
    hit = cut.ranks < 10
    assert hit.any() and not hit.all()
    assert (cut.ranks[hit] == full.ranks[hit]).all()


def test_the_same_model_shows_no_change_and_another_one_does(made: dict[str, Any]) -> None:
    fp32, moved, other = made["variants"]
    assert made["reference"] == "fp32"
    assert moved["change"]["relative"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert moved["lists"]["overlap@10"] == 1.0
    assert other["lists"]["overlap@10"] < 0.9
    assert other["change"]["relative"]["value"] != 0.0
    assert other["change"]["relative"]["low"] < other["change"]["relative"]["value"]
    assert fp32["findings"] == [] and moved["findings"]


def test_parts_add_up_to_the_bytes_on_disk(made: dict[str, Any]) -> None:
    for variant in made["variants"]:
        on_disk = sum(file.stat().st_size for file in Path(variant["path"]).iterdir())
        assert sum(variant["size"]["parts"].values()) == variant["size"]["bundle_bytes"] == on_disk


def test_memory_of_a_fresh_process_and_latency_are_measured(made: dict[str, Any]) -> None:
    for variant in made["variants"]:
        memory = variant["memory"]
        assert 1e5 < memory["private_bytes"] <= memory["resident_bytes"] < 1e9
        assert memory["peak_loading_bytes"] > 1e5 and memory["load_s"] > 0
        assert list(variant["latency"]) == ["1", "16", "64", "256"]
        assert all(cost["cpu_ms"] > 0 for cost in variant["latency"].values())


class Page(HTMLParser):
    """What a page would fetch or run, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report in a directory."""
    directory = tmp_path_factory.mktemp("report")
    write_report(made, directory)
    return directory


def test_the_page_stands_alone_and_takes_names_for_text(
    made: dict[str, Any], written: Path
) -> None:
    page = Page((written / "report.html").read_text())
    assert all(one.startswith("data:image/svg+xml;base64,") for one in page.fetched)
    assert len(page.fetched) == 6
    for one in page.fetched:
        svg = base64.b64decode(one.partition(",")[2]).decode()
        assert not re.search(r'(?:href|src)="(?!#)', svg)
    assert not page.tags & {"script", "b", "link", "iframe"}
    assert "<script>alert(1)</script>" in page.text and "<b>other" in page.text
    assert "streamrec 'a b'" in page.text
    assert "published: gSASRec" in page.text and "baseline: EASE" in page.text
    assert made["verdicts"]["size"]["text"] in page.text
    for finding in made["variants"][2]["findings"]:
        assert finding["text"] in page.text


def test_the_page_can_be_rendered_again_from_the_json_file(written: Path) -> None:
    report = json.loads((written / "report.json").read_bytes())
    assert render_html(report) == (written / "report.html").read_text()


def test_a_report_that_fails_leaves_the_old_one(written: Path) -> None:
    before = {file.name: file.read_bytes() for file in written.iterdir()}
    assert set(before) == {"report.html", "report.json"}
    with pytest.raises(KeyError):
        write_report({"variants": []}, written)
    assert {file.name: file.read_bytes() for file in written.iterdir()} == before


def test_a_full_disk_leaves_the_old_report(
    made: dict[str, Any], written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in written.iterdir()}
    write = Path.write_bytes

    def fill(path: Path, content: bytes) -> int:
        if path.name == "report.json":
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill)
    monkeypatch.setattr("models.report.writing.render_html", lambda report: "new")
    with pytest.raises(ReportError, match="No space left"):
        write_report(made, written)
    assert {file.name: file.read_bytes() for file in written.iterdir()} == before


def test_a_directory_that_cannot_be_written_to_is_named(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("models.report.writing.render_html", lambda report: "")
    with pytest.raises(ReportError, match=r"file/below cannot be written to.*give another --out"):
        write_report(made, tmp_path / "file" / "below")


def test_bundles_of_another_catalogue_are_refused(bundles: list[Bundle], tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "foreign", items=tuple(f"other-{n}" for n in range(len(ITEMS))))
    with pytest.raises(ReportError, match="no item in common"):
        open_bundles([bundles[0].path, tmp_path / "foreign"])


def test_a_bundle_given_twice_counts_once_and_the_reference_comes_first(
    bundles: list[Bundle],
) -> None:
    one, two = bundles[0].path, bundles[1].path
    assert [b.path for b in open_bundles([one, two, one], two)] == [two, one]


def test_a_split_without_queries_is_refused(bundles: list[Bundle]) -> None:
    none = Queries([], np.empty(0, np.int64))
    with pytest.raises(ReportError, match="no test queries"):
        build_report(bundles, Split("time", [], none, none), DataInfo("none", ""))


@pytest.fixture
def events(tmp_path: Path) -> Path:
    """Events of ten users with 12 items each."""
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.permutation(len(ITEMS))[:12] for _ in range(10)])
    events = Events(
        users=np.repeat([f"u{user}" for user in range(10)], 12),
        items=np.array(ITEMS)[items],
        types=np.repeat(["view"], 120),
        timestamps_ms=1_700_000_000_000 + np.arange(120),
        texts={},
        name="",
        sha256="",
    )
    write_jsonl(events, tmp_path / "events.jsonl")
    return tmp_path / "events.jsonl"


def test_the_command_writes_both_files_and_prints_the_verdicts(
    bundles: list[Bundle], events: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.report.build.Effort", lambda: QUICK)
    rankers = tmp_path / "rankers.json"
    rankers.write_text(
        json.dumps({"variants": [{"name": "forest-8", "bytes": 1234, "latency": {"p50_ms": 0.5}}]})
    )
    done = CliRunner().invoke(
        report_command,
        [str(bundles[0].path), str(bundles[1].path), "--events", str(events), "--split",
         "leave-one-out", "--out", str(tmp_path / "out"), "--rankers", str(rankers)],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0
    found = json.loads((tmp_path / "out/report.json").read_bytes())
    assert found["verdicts"]["size"]["text"] in done.output
    assert found["queries"] == found["users"] == 10
    assert len(found["data"]["sha256"]) == 64
    page = Page((tmp_path / "out/report.html").read_text())
    assert "forest-8" in page.text and "latency p50_ms" in page.text
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "report.html",
        "report.json",
    ]


def test_a_corrupt_bundle_is_named_before_anything_is_read_or_written(
    bundles: list[Bundle], tmp_path: Path
) -> None:
    broken = tiny_bundle(tmp_path / "broken")
    model = broken / "model.onnx"
    model.write_bytes(model.read_bytes()[:-10])
    with pytest.raises(BundleError, match=r"broken.*model\.onnx"):
        CliRunner().invoke(
            report_command,
            [str(bundles[0].path), str(broken), "--events", str(tmp_path / "no-such.jsonl"),
             "--split", "time", "--out", str(tmp_path / "out")],
            catch_exceptions=False,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"variants": 3}', "{"])
def test_what_is_no_report_of_rankers_is_refused(
    text: str, bundles: list[Bundle], tmp_path: Path
) -> None:
    (tmp_path / "rankers.json").write_text(text)
    with pytest.raises(ReportError, match="is no report of"):
        CliRunner().invoke(
            report_command,
            [str(bundles[0].path), "--events", "none.jsonl", "--split", "time", "--out",
             str(tmp_path / "out"), "--rankers", str(tmp_path / "rankers.json")],
            catch_exceptions=False,
        )  # fmt: skip
