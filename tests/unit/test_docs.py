"""The reference tables in docs/ name every metric and every setting."""

from pathlib import Path

from worker.metrics import Metrics
from worker.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"


def test_every_metric_is_in_the_table() -> None:
    table = (DOCS / "metrics.md").read_text()
    declared = [
        family for family in Metrics().registry.collect() if family.name.startswith("streamrec_")
    ]
    assert len(declared) > 20
    for family in declared:
        name = family.name + ("_total" if family.type == "counter" else "")
        assert f"| `{name}` | {family.type} |" in table
        assert family.documentation in table


def test_every_setting_is_in_the_table() -> None:
    table = (DOCS / "settings.md").read_text()
    for name, field in Settings.model_fields.items():
        assert f"| `STREAMREC_{name.upper()}` |" in table
        assert field.description and field.description in table
