"""What a runbook tells somebody who was woken to type is there."""

import re
from pathlib import Path

import click
import pytest

from tests.unit.test_alerts import exported, rules
from worker.cli import main
from worker.settings import PREFIX, Settings

TEXT = (Path(__file__).parents[2] / "docs" / "runbooks.md").read_text()


def test_settings_are_settings() -> None:
    named = set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", TEXT))
    assert len(named) > 10
    assert named <= {PREFIX + name.upper() for name in Settings.model_fields}


def test_queries_ask_for_what_is_exported_or_recorded() -> None:
    named = set(re.findall(r"\b(?:[a-z_]+:)?streamrec_[a-z_:0-9]+", TEXT))
    assert len(named) > 20
    assert named <= exported() | {rule["record"] for rule in rules() if "record" in rule}


@pytest.mark.parametrize(
    "line", sorted(set(re.findall(r"streamrec (?:models )?[a-z]+ .*?(?=`|$|\n)", TEXT)))
)
def test_commands_are_commands_with_such_options(line: str) -> None:
    command: click.Command = main
    context = click.Context(command)
    for word in line.split()[1:]:
        if not isinstance(command, click.Group):
            break
        found = command.get_command(context, word)
        assert found is not None, f"no command {word!r} in: {line}"
        command = found
    options = {name for parameter in command.params for name in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", line)) <= options


def test_links_lead_to_sections() -> None:
    sections = {name.lower() for name in re.findall(r"^### (\S+)$", TEXT, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([a-z0-9]+)\)", TEXT))
    assert links and links <= sections
