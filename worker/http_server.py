"""A small HTTP server that neither slow nor many clients can wear out.

Each connection has a thread, one answer and a deadline. Where there are too many, the oldest is
closed: a probe of Kubernetes must get through, whoever else holds connections.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import ThreadingHTTPServer
from typing import Any

log = logging.getLogger(__name__)

#: Connections at once. Prometheus, two probes and some people need few.
MAX_CONNECTIONS = 32
#: Longest life of a connection, whatever it does.
DEADLINE_S = 15.0


class BoundedServer(ThreadingHTTPServer):
    """`ThreadingHTTPServer` with bounds on connections and on their lives."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS
    deadline_s = DEADLINE_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: Since when each connection is open, in `time.monotonic()`; the oldest first.
        self._open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread, and make room for it."""
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                _end(oldest)
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """A connection is over."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called twice a second: end what is too old."""
        oldest = time.monotonic() - self.deadline_s
        with self._lock:
            for request in [one for one, since in self._open.items() if since < oldest]:
                del self._open[request]
                _end(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what failed here, but for a client that went away."""
        if not isinstance(sys.exception(), OSError):
            log.exception("http_failed")


def _end(request: socket.socket) -> None:
    """Its thread, reading or writing, sees the end and leaves."""
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)
