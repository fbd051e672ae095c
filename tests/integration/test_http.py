"""The HTTP port of a worker: read-only, and not worn out by slow, many or rude clients."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from worker.health import Health, HealthServer
from worker.http_server import MAX_CONNECTIONS, BoundedServer


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    pages = {"/": lambda query: f"<p>{len(query)}</p>"}
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(BoundedServer, "deadline_s", 1.0)
        server = HealthServer(Health(60.0), CollectorRegistry(), dict, pages, "127.0.0.1", 0)
        server.start()
        yield server.port
        server.stop()


def opened(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5.0)


def answer(port: int, request: bytes) -> bytes:
    """All that comes back for `request`."""
    with opened(port) as client:
        client.sendall(request)
        return rest(client)


def rest(client: socket.socket) -> bytes:
    parts = []
    try:
        while part := client.recv(65_536):
            parts.append(part)
    except ConnectionResetError:
        pass  # it ended while more was sent than it wanted
    return b"".join(parts)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/model", "/", "/nothing"])
def test_only_get_and_head_are_answered(port: int, method: str, path: str) -> None:
    said = answer(port, f"{method} {path} HTTP/1.1\r\nContent-Length: 0\r\n\r\n".encode())
    assert said.startswith(b"HTTP/1.0 405 ")
    assert b"\r\nAllow: GET, HEAD\r\n" in said


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "BREW"])
def test_other_methods_are_not_known(port: int, method: str) -> None:
    assert answer(port, f"{method} / HTTP/1.1\r\n\r\n".encode()).startswith(b"HTTP/1.0 501 ")


def test_head_is_get_without_its_body(port: int) -> None:
    head, _, body = answer(port, b"HEAD /model HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 ")
    assert body == b""


@pytest.mark.parametrize(
    "path",
    ["/../etc/passwd", "/%2e%2e/etc/passwd", "//etc/passwd", "/metrics/../../etc/passwd",
     "/model%00", "http://other.example/model"],
)  # fmt: skip
def test_a_path_is_one_of_a_few_names_and_no_file(port: int, path: str) -> None:
    said = answer(port, f"GET {path} HTTP/1.1\r\n\r\n".encode())
    assert b"root:" not in said
    assert said.startswith(b"HTTP/1.0 404 ")


def test_large_heads_are_refused(port: int) -> None:
    assert b" 414 " in answer(port, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")[:20]
    many = b"".join(b"X-%d: y\r\n" % number for number in range(200))
    assert b" 431 " in answer(port, b"GET / HTTP/1.1\r\n" + many + b"\r\n")[:20]
    long = b"X: " + b"y" * 70_000
    assert b" 431 " in answer(port, b"GET / HTTP/1.1\r\n" + long + b"\r\n\r\n")[:20]


def test_a_slow_client_is_cut_off(port: int) -> None:
    """One byte now and then keeps within every timeout of a read, and not within the deadline."""
    began = time.monotonic()
    with opened(port) as client:
        with pytest.raises(OSError):
            while time.monotonic() < began + 10.0:
                client.sendall(b"G")
                time.sleep(0.1)
        assert rest(client) == b""
    assert time.monotonic() - began < 5.0


def test_many_clients_leave_room_for_the_next(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedServer, "deadline_s", 60.0)
    idle = [opened(port) for _ in range(3 * MAX_CONNECTIONS)]
    try:
        assert answer(port, b"GET /livez HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.0 200 ")
        handling = [one for one in threading.enumerate() if "process_request" in one.name]
        assert len(handling) <= MAX_CONNECTIONS + 1
        assert rest(idle[0]) == b""  # the oldest made room
    finally:
        for client in idle:
            client.close()
