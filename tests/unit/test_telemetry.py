"""ONNX Runtime reports nothing to anybody, and so leaves no device id behind."""

import os
import subprocess
import sys
from pathlib import Path

BUNDLE = Path(__file__).parents[2] / "models/shipped/posts/20261124T2352Z-int8"


def test_a_bundle_is_opened_and_run_without_a_trace_in_the_home_directory(tmp_path: Path) -> None:
    env = {
        name: value
        for name, value in os.environ.items()
        if name != "ORT_DISABLE_TELEMETRY" and not name.startswith("XDG_")
    }
    subprocess.run(
        [sys.executable, "-m", "worker.cli", "validate", str(BUNDLE)],
        env={**env, "HOME": str(tmp_path)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert not list(tmp_path.rglob("*"))
