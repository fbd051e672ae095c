"""`make audit`: licences, an SBOM and known vulnerabilities of what ships.

Needs the package index: for the tools, which have a virtual environment of their own, and for what
is known to be vulnerable. Exit codes: 0 all is well, 1 something is not allowed or vulnerable,
2 it could not be found out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.licences import LOCK, allowed, licence_of, locked

ROOT = Path(__file__).parents[1]
TOOLS = ("pip-audit==2.10.1", "cyclonedx-bom==7.5.0")
SBOM = ROOT / "build" / "sbom.cdx.json"
#: All that anybody installs from here, and what ships of it.
AUDITED = (ROOT / "requirements.lock", LOCK)


def verdict(report: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Exit code and lines for people, from what `pip-audit --format json` says."""
    lines = []
    unknown = []
    for one in report["dependencies"]:
        if "skip_reason" in one:
            unknown.append(one["name"])
        for found in one.get("vulns", ()):
            fixed = ", ".join(found["fix_versions"]) or "no version yet"
            lines.append(
                f"vulnerable: {one['name']} {one['version']}: {found['id']}; fixed in {fixed}"
            )
    if unknown:
        lines.append(
            f"not audited: the package index knows nothing of {len(unknown)} of"
            f" {len(report['dependencies'])} packages ({', '.join(unknown[:3])}, ...): it is a"
            " mirror without advisories; ask pypi.org"
        )
    if any(line.startswith("vulnerable") for line in lines):
        return 1, lines
    return (2 if unknown else 0), lines or ["no known vulnerability"]


def licences() -> tuple[int, list[str]]:
    """Whether every package that ships has a licence that is allowed; works offline."""
    found = {package: licence_of(package) for package in locked()}
    refused = [
        f"not allowed (deploy/licences.py): {package}: {licence}"
        for package, licence in found.items()
        if licence is not None and not allowed(licence)
    ]
    return int(bool(refused)), refused or [f"licences of {len(found)} packages are allowed"]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program and gather what it says."""
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def installed(name: str, *arguments: str) -> Path | None:
    """Python of a virtual environment `.cache/<name>` of these packages alone; None, with a
    message, where they cannot be installed."""
    directory = ROOT / ".cache" / name
    python = directory / "bin" / "python"
    # Afresh, so that it holds nothing else.
    venv.create(directory, clear=True, with_pip=False)
    pip = run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--retries=1",
        "--disable-pip-version-check", *arguments,
    )  # fmt: skip
    if pip.returncode == 0:
        return python
    said = (pip.stderr.strip().splitlines() or ["no message"])[-1]
    print(f"not done: packages cannot be installed, which needs a package index: {said}")
    return None


def bill_of_materials(tools: Path) -> int:
    """Write the SBOM of an environment that holds what ships, and nothing else."""
    python = installed("ship", "--require-hashes", "--requirement", str(LOCK))
    if python is None:
        return 2
    SBOM.parent.mkdir(parents=True, exist_ok=True)
    made = run(
        tools.with_name("cyclonedx-py"), "environment", "--output-reproducible", "--pyproject",
        ROOT / "pyproject.toml", "--output-file", SBOM, python,
    )  # fmt: skip
    if made.returncode:
        print(f"not done: the SBOM: {made.stderr.strip()[-500:]}")
        return 2
    count = len(json.loads(SBOM.read_text())["components"])
    print(f"{SBOM.relative_to(ROOT)}: {count} components, CycloneDX")
    return 0


def audit(tools: Path, locks: Sequence[Path]) -> int:
    """Ask the package index what is known of the packages in `locks`."""
    worst = 0
    for lock in locks:
        asked = run(
            tools.with_name("pip-audit"), "--requirement", lock, "--disable-pip", "--format",
            "json", "--progress-spinner", "off",
        )  # fmt: skip
        try:
            code, lines = verdict(json.loads(asked.stdout))
        except ValueError:
            said = (asked.stderr.strip().splitlines() or ["no message"])[-1]
            code, lines = 2, [f"not audited: the package index does not answer: {said}"]
        worst = max(worst, code) if 1 not in (worst, code) else 1
        for line in lines:
            print(f"{lock.relative_to(ROOT)}: {line}")
    return worst


def main() -> int:
    """The worst of what was found."""
    code, lines = licences()
    print("\n".join(lines))
    codes = [code]
    tools = installed("audit", *TOOLS)
    if tools is None:
        codes.append(2)
    else:
        codes += [bill_of_materials(tools), audit(tools, AUDITED)]
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main())
