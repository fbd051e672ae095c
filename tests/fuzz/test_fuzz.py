"""A short form of `make fuzz`, and every input that once was a finding."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.__main__ import ALL
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS, Target

FINDINGS = Path(__file__).parent / "findings"
#: Of a cheap target; dear ones get fewer.
INPUTS, DEAR_INPUTS = 15_000, {"bundle": 50, "onnx": 1500, "text": 3000, "tally": 5000}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Some targets log what they refuse."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", ALL)
def test_mutated_inputs_are_accepted_or_refused_as_documented(name: str) -> None:
    target, chance = TARGETS[name], random.Random(20261127)
    for _ in range(DEAR_INPUTS.get(name, INPUTS)):
        data = mutated(target.seeds, chance)
        try:
            target.check(data)
        except Exception as error:
            error.add_note(f"the input: {data!r}")
            raise


def test_seeds_are_good_inputs_so_that_mutations_get_far() -> None:
    assert set(TARGETS) == set(ALL)
    for target in TARGETS.values():
        if target.name != "signature":  # nobody has the key
            assert any(target.check(seed) for seed in target.seeds), target.name


@pytest.mark.parametrize("file", sorted(FINDINGS.glob("*/*")), ids=lambda file: file.name)
def test_what_was_found_once_is_refused_as_documented(file: Path) -> None:
    target: Target = TARGETS[file.parent.name]
    target.check(file.read_bytes())
