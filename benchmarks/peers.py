"""Which cases there are, and with which Python each runs."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from benchmarks.errors import BenchmarkError

Level = Literal["intake", "scoring", "whole"]

_ROOT = Path(__file__).parent.parent
_QUIX_LOCK = Path(__file__).with_name("quix.lock")


@dataclass(frozen=True)
class Case:
    """One system under test.

    Args:
        level: `intake` reads and counts, `scoring` scores without I/O, `whole` does all.
        about: one line for the table.
        module: below `benchmarks.cases`; empty for the worker itself.
        quix: whether it runs in the environment of Quix Streams.
        needs: a package without which it cannot run.
    """

    name: str
    level: Level
    about: str
    module: str = ""
    quix: bool = False
    needs: str = ""


OURS, OUR_INTAKE = "ours", "ours-intake"
CASES = {
    case.name: case
    for case in (
        Case(OUR_INTAKE, "intake", "streamrec's intake, batches finished at once", "ours_intake"),
        Case("faust-empty", "intake", "stock Faust, empty agent", "faust_empty"),
        Case("faust-take", "intake", "stock Faust, empty agent with take(512)", "faust_take"),
        Case("aiokafka-raw", "intake", "aiokafka getmany, counted", "aiokafka_raw"),
        Case("confluent-raw", "intake", "confluent-kafka consume(512), counted", "confluent_raw"),
        Case("score-raw", "scoring", "the model alone, no I/O", "score_raw"),
        Case(OURS, "whole", "streamrec worker"),
        Case("plain-one", "whole", "aiokafka + ONNX Runtime, one at a time", "plain_one"),
        Case("plain-batch", "whole", "aiokafka + ONNX Runtime, batches", "plain_batch"),
        Case("faust-stock", "whole", "stock Faust, take(512)", "faust_stock"),
        Case("quix", "whole", "Quix Streams, per message", "quix", quix=True),
        Case("quix-batch", "whole", "Quix Streams, BatchingSink", "quix_batch", quix=True),
        Case("bytewax", "whole", "Bytewax, source batches", "bytewax", needs="bytewax"),
    )
}


class NotInstallableError(BenchmarkError):
    """A peer cannot be had on this machine; the table says so."""


def python_of(case: Case) -> str:
    """The interpreter that runs `case`; makes its environment where it has one of its own.

    Raises:
        NotInstallableError: the peer cannot be installed here; the message is the reason.
    """
    if case.needs and find_spec(case.needs) is None:
        raise NotInstallableError(
            f"{case.needs} is not installed: it has no wheel for Python"
            f" {sys.version_info.major}.{sys.version_info.minor} on this machine"
        )
    return str(_quix_environment()) if case.quix else sys.executable


def _quix_environment() -> Path:
    """Python of the environment of Quix Streams, below .cache; made once for each lock."""
    tag = hashlib.sha256(_QUIX_LOCK.read_bytes() + sys.version.encode()).hexdigest()[:12]
    directory = _ROOT / ".cache" / f"quix-{tag}"
    python = directory / "bin" / "python"
    if (directory / ".installed").exists():
        return python
    shutil.rmtree(directory, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(directory)],
        [
            str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--require-hashes", "-r", str(_QUIX_LOCK),
        ],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            shutil.rmtree(directory, ignore_errors=True)
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise NotInstallableError(f"Quix Streams cannot be installed: {last}")
    (directory / ".installed").touch()
    return python
