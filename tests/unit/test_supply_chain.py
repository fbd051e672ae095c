"""What ships: its licences, and what an audit says."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.audit import licences, verdict
from deploy.licences import allowed, licence_of, locked, table

DOCS = Path(__file__).parents[2] / "docs"


def test_every_package_that_ships_has_an_allowed_licence() -> None:
    assert len(locked()) > 30
    known = [name for name in locked() if licence_of(name) is not None]
    assert len(known) > 30, "licences are read from the packages that `make setup` installs"
    code, lines = licences()
    assert code == 0, lines


def test_the_table_of_licences_is_the_one_in_force() -> None:
    page = (DOCS / "supply-chain.md").read_text()
    # Some are for other platforms or Pythons, so that here there may be fewer.
    missing = [row for row in table().splitlines() if row not in page]
    assert not missing, "python -m deploy.licences prints the table"


@pytest.mark.parametrize(
    ("expression", "fine"),
    [
        ("MIT", True),
        ("Apache-2.0 AND MIT", True),
        ("GPL-3.0-only OR MIT", True),
        ("GPL-3.0-only AND MIT", False),
        ("AGPL-3.0-only", False),
        ("none is named", False),
    ],
)
def test_one_of_a_choice_must_be_allowed_and_all_of_a_sum(expression: str, fine: bool) -> None:
    assert allowed(expression) is fine


def test_a_vulnerable_package_fails_an_audit_and_an_unknown_one_leaves_it_open() -> None:
    sound = {"name": "good", "version": "1", "vulns": []}
    bad = {"name": "bad", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
    unknown = {"name": "odd", "skip_reason": "not found"}
    assert verdict({"dependencies": [sound]}) == (0, ["no known vulnerability"])
    assert verdict({"dependencies": [sound, bad]}) == (
        1,
        ["vulnerable: bad 2: CVE-1; fixed in 2.1"],
    )
    code, (line,) = verdict({"dependencies": [sound, unknown]})
    assert code == 2
    assert "nothing of 1 of 2 packages (odd" in line
    assert verdict({"dependencies": [bad, unknown]})[0] == 1
