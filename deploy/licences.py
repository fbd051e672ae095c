"""Licences of what ships: of every package in `container/worker.lock`, from its own metadata.

python -m deploy.licences      the table of docs/supply-chain.md; exit code 1 where one is not
                               allowed
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

LOCK = Path(__file__).parent / "container" / "worker.lock"
#: SPDX names of licences that ask for no more than to be named.
ALLOWED = frozenset(
    {
        "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ISC", "MIT", "MIT-0",
        "PSF-2.0", "Unlicense", "Zlib", "LicenseRef-Repoze",
    }
)  # fmt: skip
#: What packages without an SPDX expression call theirs: in the field `License`, or a classifier.
NAMES = {
    "Apache 2": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "BSD 3-Clause License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF-2.0",
    "Repoze Public License": "LicenseRef-Repoze",
}
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==", re.MULTILINE)


def locked(lock: Path = LOCK) -> list[str]:
    """Names of the packages in a lock file, sorted."""
    return sorted(set(_PIN.findall(lock.read_text())), key=str.lower)


def licence_of(package: str) -> str | None:
    """The SPDX expression of an installed package's licence, or what it calls it; None where the
    package is not installed (another platform's)."""
    try:
        fields = metadata(package)
    except PackageNotFoundError:
        return None
    expression = fields.get("License-Expression")
    if expression:
        return str(expression)
    own = str(fields.get("License") or "").strip()
    if own in ALLOWED or own in NAMES:
        return NAMES.get(own, own)
    classified = [
        line.rpartition(" :: ")[2]
        for line in fields.get_all("Classifier") or []
        if line.startswith("License :: ") and line != "License :: OSI Approved"
    ]
    # Several mean a choice.
    return " OR ".join(NAMES.get(one, one) for one in classified) or own or "none is named"


def allowed(expression: str) -> bool:
    """Whether an SPDX expression without parentheses asks for no more than `ALLOWED`."""
    return any(
        all(part.strip() in ALLOWED for part in choice.split(" AND "))
        for choice in expression.split(" OR ")
    )


def table() -> str:
    """Package and licence, as Markdown."""
    rows = ["| package | licence |", "|---|---|"]
    for package in locked():
        licence = licence_of(package)
        if licence is not None:
            rows.append(f"| {package} | {licence} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
