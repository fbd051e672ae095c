"""`make bench` at its smallest: two systems, the embedded broker, a few seconds."""

import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from benchmarks.__main__ import main
from tests.conftest import tiny_bundle


def bench(*arguments: str) -> str:
    """A process of its own: it moves itself to other CPUs."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_systems_are_measured_side_by_side_and_nothing_they_were_sent_is_missing(
    tmp_path: Path,
) -> None:
    bundle = tiny_bundle(tmp_path / "registry" / "posts" / "20261124T1000Z-fp32")
    out = tmp_path / "bench-results.json"
    shown = bench(
        "--broker", "tansu", "--bundle", str(bundle), "--cases", "ours,plain-batch",
        "--rounds", "1", "--seconds", "0.3", "--latency-seconds", "0.5", "--common-rate", "200",
        "--users", "300", "--history", "8", "--out", str(out),
    )  # fmt: skip
    assert "whole path: ours / aiokafka + ONNX Runtime, batches" in shown

    found = json.loads(out.read_bytes())["compare"]
    assert found["broker"] == "tansu"
    assert found["machine"]["versions"]["onnxruntime"]
    assert {run["case"] for run in found["rounds"][0]["runs"]} == {"ours", "plain-batch"}
    for run in found["rounds"][0]["runs"]:
        assert run["done"] == run["sent"] > 500
        assert run["full"]["seconds"] > 0
        assert run["full"]["usage"]["cpu_s"]["sut"] > 0
        assert run["peak_pss"] > 20e6
        assert [steady["share"] for steady in run["steady"]] == [0.25, 0.5, 0.75, None]
        for steady in run["steady"]:
            made = steady["latency"]
            assert made["unanswered"] == 0 < made["probes"]
            assert 0 < made["p50"] <= made["p99"] <= made["max"]

    page = tmp_path / "page.md"
    page.write_text("<!-- bench:whole -->\n<!-- /bench -->\n")
    for arguments in (
        ["pages", "--results", str(out), str(page)],
        ["plots", "--results", str(out), "--out", str(tmp_path / "images")],
    ):
        assert CliRunner().invoke(main, arguments).exit_code == 0
    assert "streamrec worker" in page.read_text()
    assert (tmp_path / "images" / "bench-latency.svg").exists()
