"""Large catalogues, at a small size."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from models.commands.scale import measure_scale
from models.scale import NOTE, Effort, item_table, measure_all, table, zipf_histories


def test_every_variant_is_measured_and_the_report_says_that_it_is_synthetic(tmp_path: Path) -> None:
    found = measure_all(
        [300], ["topk", "int8 + cells"], tmp_path, effort=Effort(batches=(1, 2), rounds=1, runs=2)
    )
    report = json.loads((tmp_path / "scale.json").read_bytes())
    (catalogue,) = report["catalogues"]
    assert report["note"] == NOTE
    assert [v["recipe"] for v in catalogue["variants"]] == ["fp32", "topk", "int8 + cells"]
    fp32, topk, cells = found[300]
    assert topk.recall == fp32.recall == 1.0
    assert 0.8 < cells.recall <= 1.0
    assert cells.bytes < fp32.bytes
    assert set(fp32.latency) == {1, 2}
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json"]  # nothing else is left
    text = table(found)
    assert text.startswith(NOTE)
    assert "int8 + cells: cells 75 of 5 items" in text


def test_popular_items_come_first_and_often() -> None:
    items = np.concatenate(zipf_histories(1000, 200, seed=1))
    counts = np.bincount(items, minlength=1001)
    assert counts[0] == 0
    assert counts[1:11].sum() > 5 * counts[500:510].sum()
    assert items.max() <= 1000


def test_the_same_seed_gives_the_same_vectors() -> None:
    first, second = item_table(200, 16, seed=3), item_table(200, 16, seed=3)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (201, 16)
    assert not first[0].any()


@pytest.mark.parametrize("items", ["many", "10", ""])
def test_sizes_that_are_none_are_refused(tmp_path: Path, items: str) -> None:
    result = CliRunner().invoke(measure_scale, ["--items", items, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "--items must be whole numbers" in result.output
    assert not (tmp_path / "out").exists()
