"""The reference tables in docs/ name every metric and every setting."""

from pathlib import Path

from prometheus_client import Counter

from worker.metrics import Metrics
from worker.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"


def test_every_metric_is_in_the_table() -> None:
    table = (DOCS / "metrics.md").read_text()
    declared = {name: value for name, value in vars(Metrics()).items() if name != "registry"}
    assert len(declared) > 20
    for metric in declared.values():
        name = metric._name + ("_total" if isinstance(metric, Counter) else "")
        assert f"| `{name}` | {metric._type} |" in table
        assert metric._documentation in table


def test_every_setting_is_in_the_table() -> None:
    table = (DOCS / "settings.md").read_text()
    for name, field in Settings.model_fields.items():
        assert f"| `STREAMREC_{name.upper()}` |" in table
        assert field.description and field.description in table
