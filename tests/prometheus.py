"""A real Prometheus and its promtool: from PATH, else out of Debian's package, unpacked into the
cache without installing anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from io import BytesIO
from pathlib import Path
from platform import machine
from typing import Any

import pytest

from worker.local.kafka import cache_directory
from worker.local.process import LocalServer, ManagedProcess

_DEB = "prometheus_2.42.0+ds-5+deb12u1_amd64.deb"
_URL = "https://deb.debian.org/debian/pool/main/p/prometheus/" + urllib.parse.quote(_DEB)
_SHA256 = "81d59a24fce84f7fbe97a45a4f2914b6a5881b5cd1db2a6a0e129e515e1a5f55"


def binary(name: str) -> Path:
    """Where `prometheus` or `promtool` is; skips the test where it cannot be had.

    With STREAMREC_REQUIRE_PROMETHEUS set, fails it instead.
    """
    on_path = shutil.which(name)
    if on_path is not None:
        return Path(on_path)
    try:
        return _unpacked() / name
    except OSError as error:
        said = f"no {name} on PATH, and {_URL} could not be had: {error}"
    if os.environ.get("STREAMREC_REQUIRE_PROMETHEUS"):
        pytest.fail(f"a real Prometheus is required here: {said}")
    pytest.skip(said)


def _unpacked() -> Path:
    """Directory with both programs."""
    if machine() != "x86_64":
        raise OSError(f"its programs are not for {machine()}")
    directory = cache_directory() / f"prometheus-{_SHA256[:12]}"
    if directory.is_dir():
        return directory
    with urllib.request.urlopen(_URL, timeout=60) as answer:
        package = answer.read()
    if hashlib.sha256(package).hexdigest() != _SHA256:
        raise OSError("its checksum is another")
    building = directory.with_name(f".{directory.name}.{os.getpid()}")
    building.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=BytesIO(_member(package, "data.tar.xz"))) as archive:
        for name in ("prometheus", "promtool"):
            program = archive.extractfile(f"./usr/bin/{name}")
            assert program is not None
            (building / name).write_bytes(program.read())
            (building / name).chmod(0o755)
    try:
        building.rename(directory)
    except OSError:
        # Somebody else was faster.
        shutil.rmtree(building, ignore_errors=True)
    return directory


def _member(package: bytes, name: str) -> bytes:
    """A file of an `ar` archive, which a Debian package is."""
    at = len(b"!<arch>\n")
    while at < len(package):
        header = package[at : at + 60]
        size = int(header[48:58])
        if header[:16].rstrip().rstrip(b"/") == name.encode():
            return package[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise OSError(f"it holds no {name}")


class Prometheus(LocalServer):
    """Prometheus on a port of 127.0.0.1; its log is `<directory>/prometheus.log`.

    Args:
        config: its configuration file.
    """

    def __init__(self, directory: Path, config: Path) -> None:
        super().__init__(directory, None)
        self._config = config

    def _new_process(self) -> ManagedProcess:
        return ManagedProcess(
            "Prometheus",
            [
                str(binary("prometheus")),
                f"--config.file={self._config}",
                f"--storage.tsdb.path={self.directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            log_path=self.directory / "prometheus.log",
            ready=self._answers,
        )

    def _answers(self) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)

    def api(self, path: str, **parameters: object) -> Any:
        """`data` of an answer of its HTTP API.

        Raises:
            AssertionError: it refused; says why.
        """
        query = urllib.parse.urlencode(parameters)
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{query}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from None
        assert found["status"] == "success", found
        return found["data"]
