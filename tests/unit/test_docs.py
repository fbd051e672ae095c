"""The documentation says what the code does: tables made from it, links that lead somewhere."""

import re
from pathlib import Path

import pytest

from worker.reference import TABLES, metrics_table, renewed, settings_table

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*.md")])
#: A link or an image of Markdown: what it leads to.
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_reference_is_what_the_code_says(name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert f"<!-- reference:{name} -->" in page
    assert renewed(page) == page, "the code has changed: run make docs"


def test_tables_name_what_there_is() -> None:
    settings, metrics = settings_table(), metrics_table()
    assert "| `STREAMREC_TOP_K` | `--top-k` | `10` | Length of a recommendation list. |" in settings
    assert "| `streamrec_dead_letters_total` | counter | reason | " in metrics
    assert "| `streamrec_event_seconds` | histogram | - | " in metrics
    assert settings.count("\n") > 50 and metrics.count("\n") > 40


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"no heading #{anchor}"
