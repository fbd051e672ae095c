"""Is the worker alive and ready; `/metrics`; `/model`: what serves; pages for people. Served by
threads of their own, so that they answer while the event loop is stuck, and can say so.

`/livez` watches progress, not existence: Faust's known way to die is to stop consuming while the
process looks well (faust-streaming/faust#175). With events waiting and none finished for
`stall_timeout_s`, `/livez` fails, and the watchdog ends the process for a restart.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from worker.errors import SettingsError
from worker.http_server import BoundedServer
from worker.status_page import CONTENT_SECURITY_POLICY

log = logging.getLogger(__name__)

#: EX_SOFTWARE: the supervisor (systemd, Kubernetes) starts the worker again.
STALLED_EXIT_CODE = 70


@dataclass(slots=True)
class Health:
    """What the worker last said about itself. Written by the event loop, read by the server.

    Times are `time.monotonic()`.
    """

    stall_timeout_s: float
    started: bool = False
    beat_at: float = field(default_factory=time.monotonic)
    progress_at: float = field(default_factory=time.monotonic)
    #: Events read and unfinished, or on the broker and unread.
    waiting_events: int = 0
    #: Why work waits on something outside, where a restart would not help (Redis is down).
    waiting_for: str | None = None
    #: When it was last so: what waited needs time once that is back.
    excused_at: float = float("-inf")
    #: Partitions that the group gave this worker: none where it has more workers than it can use,
    #: None while it has not said.
    assigned: int | None = None
    models_ready: bool = False
    redis_ready: bool = False
    kafka_answers: bool = False

    def wait_for(self, reason: str | None) -> None:
        """Say what work waits on; None for nothing outside."""
        self.waiting_for = reason
        if reason is not None:
            self.excused_at = time.monotonic()

    def stalled(self, now: float) -> str | None:
        """Why the worker counts as dead; None while it does not."""
        if not self.started:
            return None
        silent_s = now - self.beat_at
        if silent_s > self.stall_timeout_s:
            return f"the event loop has not run for {silent_s:.0f} s"
        idle_s = now - max(self.progress_at, self.excused_at)
        if self.waiting_events and self.waiting_for is None and idle_s > self.stall_timeout_s:
            return f"{self.waiting_events} events wait and none was finished for {idle_s:.0f} s"
        return None

    def not_ready(self) -> list[str]:
        """What is missing before events can be served; empty when ready."""
        missing = []
        # One without partitions stands by: were it not ready, no rollout would go on past it.
        if self.assigned is None:
            missing.append("the consumer group has not assigned partitions")
        if not self.models_ready:
            missing.append("a model is not loaded")
        if not self.redis_ready:
            missing.append("Redis does not answer, or takes no writes")
        return missing


class HealthServer:
    """Serves `/livez`, `/readyz`, `/metrics`, `/model` and pages, read-only.

    Args:
        describe: what `/model` answers, as builtins.
        pages: makes the HTML of a path from its query.

    Raises:
        SettingsError: the address cannot be bound.
    """

    def __init__(
        self,
        health: Health,
        registry: CollectorRegistry,
        describe: Callable[[], object],
        pages: Mapping[str, Callable[[str], str]],
        host: str,
        port: int,
    ) -> None:
        try:
            self._server = BoundedServer((host, port), _handler(health, registry, describe, pages))
        except OSError as error:
            raise SettingsError(
                f"STREAMREC_HTTP_HOST, STREAMREC_HTTP_PORT: cannot listen on {host}:{port}:"
                f" {error.strerror}; choose another port (0 takes a free one)"
            ) from None
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="streamrec-http", daemon=True
        )

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and free the port."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


def watch(health: Health, stopping: threading.Event) -> None:
    """Start the watchdog thread: it ends the process once the worker is stalled.

    `os._exit`, since a stuck event loop cannot be asked, and what is not committed is read again.
    """

    def run() -> None:
        while not stopping.wait(min(1.0, health.stall_timeout_s / 4)):
            reason = health.stalled(time.monotonic())
            if reason is not None:
                log.critical("stalled reason=%s; the process exits for a restart", reason)
                os._exit(STALLED_EXIT_CODE)

    threading.Thread(target=run, name="streamrec-watchdog", daemon=True).start()


def _handler(
    health: Health,
    registry: CollectorRegistry,
    describe: Callable[[], object],
    pages: Mapping[str, Callable[[str], str]],
) -> type[BaseHTTPRequestHandler]:
    known = ["/metrics", "/model", "/livez", "/readyz", *pages]

    class Handler(BaseHTTPRequestHandler):
        server_version = "streamrec"
        sys_version = ""
        timeout = 10

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            if path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
            elif path == "/model":
                self._answer(200, "application/json", json.dumps(describe()).encode() + b"\n")
            elif path == "/livez":
                reason = health.stalled(time.monotonic())
                self._status(200 if reason is None else 500, [] if reason is None else [reason])
            elif path == "/readyz":
                missing = health.not_ready()
                self._status(503 if missing else 200, missing)
            elif path in pages:
                self._answer(200, "text/html; charset=utf-8", pages[path](query).encode())
            else:
                self._status(404, [f"known paths: {', '.join(known)}"])

        def do_HEAD(self) -> None:
            self.do_GET()

        def _refuse(self) -> None:
            self._status(405, ["read-only: GET and HEAD"])

        do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse  # noqa: N815

        def _status(self, code: int, problems: list[str]) -> None:
            body = json.dumps({"ok": code == 200, "problems": problems}).encode() + b"\n"
            self._answer(code, "application/json", body)

        def _answer(self, code: int, content_type: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            # Of all answers: none may be more in a browser than what it shows.
            self.send_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("Cache-Control", "no-store")
            if code == 405:
                self.send_header("Allow", "GET, HEAD")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            log.debug("http %s", format % args)

    return Handler
