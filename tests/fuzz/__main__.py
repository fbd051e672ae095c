"""`make fuzz`: many inputs for each target, coverage-guided by atheris or made by `mutate`.

    python -m tests.fuzz --inputs 10000000 --target event --engine atheris

Each target runs in a process of its own, so that a crash of native code is a finding like any
other. Prints a line a target and writes build/fuzz.json; the input of a finding goes to build/fuzz.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build" / "fuzz"
#: Memory that a target may grow by between its first tenth of inputs and its end, in bytes.
GROWTH_BYTES = 16 << 20
#: Inputs that share a look at the clock and a deadline, which cost as much as one of them.
STRIDE = 64
ALL = (
    "event", "history", "list", "tally", "release", "push", "manifest", "items", "onnx", "bundle",
    "signature", "rules", "text",
)  # fmt: skip
#: Inputs of dear targets, beside those of cheap ones.
SHARE = {"bundle": 1000, "onnx": 20, "tally": 4, "text": 10, "signature": 10}


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run_mutations(name: str, inputs: int, seed: int) -> dict[str, Any]:
    """Give a target `inputs` mutations of its seeds; returns figures. Raises what it finds."""
    from tests.fuzz.mutate import mutated
    from tests.fuzz.targets import TARGETS

    target, chance = TARGETS[name], random.Random(seed)
    accepted, slowest, early = 0, 0.0, 0
    begun = time.perf_counter()
    data = b""
    for left in range(inputs, 0, -STRIDE):
        started = time.perf_counter()
        # A hang ends the process with a traceback.
        faulthandler.dump_traceback_later(target.time_s * STRIDE, exit=True)
        count = min(STRIDE, left)
        try:
            for _ in range(count):
                data = mutated(target.seeds, chance)
                accepted += target.check(data)
        except BaseException:
            keep(name, data)
            raise
        slowest = max(slowest, (time.perf_counter() - started) / count)
        if not early and left <= inputs * 0.9:
            early = resident_bytes()
    faulthandler.cancel_dump_traceback_later()
    late = resident_bytes()
    early = early or late
    return {
        "target": name,
        "engine": "mutations",
        "inputs": inputs,
        "accepted": accepted,
        "seconds": round(time.perf_counter() - begun, 1),
        "slowest_ms": round(slowest * 1000, 2),
        "memory_before_mb": round(early / 1e6, 1),
        "memory_after_mb": round(late / 1e6, 1),
        "finding": f"grew by {(late - early) / 1e6:.0f} MB" if late - early > GROWTH_BYTES else "",
    }


def keep(name: str, data: bytes) -> None:
    """Write the input of a finding to a file."""
    (OUT / name).mkdir(parents=True, exist_ok=True)
    (OUT / name / f"finding-{time.time_ns()}").write_bytes(data)


def run_atheris(name: str, inputs: int, seed: int) -> None:
    """Hand a target to libFuzzer, which ends this process."""
    try:
        import atheris
    except ImportError:
        sys.exit("--engine atheris needs atheris (Linux): pip install atheris==3.0.0")

    with atheris.instrument_imports(include=["worker"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    corpus = OUT / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(data)
    options = [
        f"-runs={inputs}", f"-seed={seed}", f"-timeout={int(target.time_s * 10)}",
        "-rss_limit_mb=2048", f"-max_len={max(4096, 2 * max(map(len, target.seeds)))}",
        "-print_final_stats=1", f"-artifact_prefix={OUT / name}/finding-", str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], target.check)
    atheris.Fuzz()


def in_own_process(name: str, inputs: int, seed: int, engine: str) -> dict[str, Any]:
    """Figures of one target, or what ended its process."""
    command = [
        sys.executable, "-m", "tests.fuzz", "--child", "--target", name, "--inputs", str(inputs),
        "--seed", str(seed), "--engine", engine,
    ]  # fmt: skip
    started = time.perf_counter()
    ended = subprocess.run(
        command, capture_output=True, text=True, errors="replace", cwd=ROOT, check=False
    )
    if engine == "mutations" and ended.returncode == 0:
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return found
    said = ended.stdout + ended.stderr
    seconds = time.perf_counter() - started
    return {
        "target": name,
        "engine": engine,
        "inputs": int((re.findall(r"number_of_executed_units: (\d+)", said) or [0])[-1]),
        "seconds": round(seconds, 1),
        "coverage": int((re.findall(r" cov: (\d+)", said) or [0])[-1]),
        "corpus": (re.findall(r"corp: (\d+)", said) or [""])[-1],
        "memory_before_mb": int((re.findall(r"rss: (\d+)Mb", said) or [0])[0]),
        "memory_after_mb": int((re.findall(r"rss: (\d+)Mb", said) or [0])[-1]),
        "slowest_ms": 1000 * int((re.findall(r"slowest_unit_time_sec: (\d+)", said) or [0])[-1]),
        "finding": "" if ended.returncode == 0 else f"exit {ended.returncode}: {said[-1500:]}",
    }


def main() -> int:
    """Exit code 1 where there is a finding."""
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs of a cheap target")
    parser.add_argument("--target", action="append", choices=ALL, help="all where none is given")
    parser.add_argument("--engine", choices=("mutations", "atheris"), default="mutations")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    names = asked.target or list(ALL)
    if asked.child:
        # Some targets log what they refuse.
        logging.disable()
        if asked.engine == "atheris":
            run_atheris(names[0], asked.inputs, asked.seed)
        print(json.dumps(run_mutations(names[0], asked.inputs, asked.seed)))
        return 0
    OUT.mkdir(parents=True, exist_ok=True)
    results = []
    for name in names:
        inputs = max(1, asked.inputs // SHARE.get(name, 1))
        result = in_own_process(name, inputs, asked.seed, asked.engine)
        rate = result["inputs"] / max(result["seconds"], 0.1)
        finding = result["finding"]
        print(
            f"{name:10}{result['inputs']:>12,} inputs {rate:>10,.0f}/s  memory"
            f" {result['memory_before_mb']} -> {result['memory_after_mb']} MB"
            f"{'  coverage ' + str(result['coverage']) if 'coverage' in result else ''}"
            f"  {finding or 'nothing found'}",
            flush=True,
        )
        results.append(result)
    (ROOT / "build" / f"fuzz-{asked.engine}.json").write_text(json.dumps(results, indent=1))
    return int(any(result["finding"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
