"""A Redis that speaks TLS: the `redis-server` on PATH, or Debian's, unpacked into the cache.

The servers in wheels from PyPI are built without TLS. Debian's needs no root: apt fetches the
package and checks its signature, and it is unpacked. Where neither is to be had, a plain Redis
stands behind a proxy that ends TLS: certificates and logins are the same to the worker.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.integration.certificates import Authority
from worker.local.kafka import cache_directory
from worker.local.process import free_port
from worker.local.redis_server import RedisServer

_PACKAGES = ("redis-server", "redis-tools", "libjemalloc2", "liblzf1")


@contextmanager
def tls_redis(
    directory: Path, authority: Authority, users: Sequence[str]
) -> Iterator[tuple[RedisServer, int]]:
    """A Redis, and its TLS port; it wants no client certificate, and takes one.

    Args:
        users: lines of an ACL file.
    """
    directory.mkdir(parents=True)
    certificate, key = authority.certify("redis", "127.0.0.1")
    (directory / "users.acl").write_text("".join(f"{line}\n" for line in users))
    arguments = ["--aclfile", str(directory / "users.acl")]
    port = free_port()
    found = _binary()
    if found is None:
        with RedisServer(directory, arguments=arguments) as server:
            assert isinstance(server, RedisServer)
            with _proxy(port, server.port, certificate, key, authority.file):
                yield server, port
        return
    binary, libraries = found
    arguments += [
        "--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key),
        "--tls-ca-cert-file", str(authority.file), "--tls-auth-clients", "optional",
    ]  # fmt: skip
    env = {} if libraries is None else {"LD_LIBRARY_PATH": str(libraries)}
    with RedisServer(directory, arguments=arguments, binary=binary, env=env) as server:
        assert isinstance(server, RedisServer)
        yield server, port


def _binary() -> tuple[Path, Path | None] | None:
    """A server with TLS, and where its libraries are; None where there is none."""
    on_path = shutil.which("redis-server")
    if on_path is not None and _speaks_tls(Path(on_path), None):
        return Path(on_path), None
    unpacked = cache_directory() / "redis-debian"
    if not unpacked.is_dir():
        _unpack(unpacked)
    binary = unpacked / "usr" / "bin" / "redis-server"
    for libraries in unpacked.glob("usr/lib/*-linux-gnu"):
        if _speaks_tls(binary, libraries):
            return binary, libraries
    return None


def _speaks_tls(binary: Path, libraries: Path | None) -> bool:
    """A server with TLS says that a certificate is missing; others know no such port."""
    env = None if libraries is None else {"LD_LIBRARY_PATH": str(libraries)}
    with suppress(OSError, subprocess.TimeoutExpired):
        tried = subprocess.run(
            [binary, "--port", "0", "--tls-port", "1"],
            capture_output=True, text=True, env=env, timeout=10, check=False,
        )  # fmt: skip
        return "tls-cert-file" in tried.stdout
    return False


def _unpack(target: Path) -> None:
    building = target.with_name(f".{target.name}.{free_port()}")
    building.mkdir(parents=True)

    def run(*command: str) -> None:
        subprocess.run(command, cwd=building, capture_output=True, check=True, timeout=60)

    try:
        run("apt-get", "download", *_PACKAGES)
        for package in building.glob("*.deb"):
            run("dpkg", "-x", package.name, ".")
            package.unlink()
        building.rename(target)
    except (OSError, subprocess.SubprocessError):
        shutil.rmtree(building, ignore_errors=True)  # no Debian, no network, or another was faster


@contextmanager
def _proxy(port: int, behind: int, certificate: Path, key: Path, authority: Path) -> Iterator[None]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority)
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_OPTIONAL

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def serve(plain: socket.socket) -> None:
        with (
            suppress(OSError),
            context.wrap_socket(plain, server_side=True) as client,
            socket.create_connection(("127.0.0.1", behind)) as server,
        ):
            back = threading.Thread(target=copy, args=(server, client), daemon=True)
            back.start()
            copy(client, server)
            back.join()

    with socket.create_server(("127.0.0.1", port)) as listening:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection = listening.accept()[0]
                    threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield
