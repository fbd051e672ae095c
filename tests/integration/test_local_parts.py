"""What demo, tests and bench start is really started, and really gone afterwards."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.support import World, event, eventually
from worker.errors import LocalPartError
from worker.local.kafka import KafkaBroker
from worker.local.process import ManagedProcess
from worker.local.redis_server import RedisServer
from worker.startup import prepare


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stopped_server_frees_its_port_and_starts_again_on_it(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    assert server.process is not None and server.process.pid is not None
    pid = server.process.pid
    server.stop()
    assert not alive(pid)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", server.port))
    server.start()
    server.stop()


def test_a_server_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib\n"
        "from worker.local.redis_server import RedisServer\n"
        "server = RedisServer(pathlib.Path(sys.argv[1])); server.start()\n"
        "print(server.process.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    eventually(lambda: not alive(pid), "the server is gone", 15.0)


def test_a_part_that_does_not_come_up_says_where_its_log_is(tmp_path: Path) -> None:
    process = ManagedProcess(
        "the part",
        [sys.executable, "-c", "print('no such luck')"],
        log_path=tmp_path / "part.log",
        ready=lambda: False,
    )
    with pytest.raises(LocalPartError, match=r"(?s)the part exited .*part.log.*no such luck"):
        process.start()
    process.stop()


@pytest.mark.kafka
def test_kafka_keeps_its_data_over_a_kill(
    tmp_path: Path, kafka: KafkaBroker, redis_server: RedisServer
) -> None:
    import asyncio

    from worker.settings import load_settings

    with KafkaBroker(tmp_path / "own") as own:
        assert isinstance(own, KafkaBroker)
        world = World(tmp_path, own, redis_server, tmp_path)
        asyncio.run(
            prepare(
                load_settings(
                    kafka=own.bootstrap,
                    redis=redis_server.url,
                    events_topic=world.events,
                    recommendations_topic=world.recommendations,
                    dead_letter_topic=world.dead_letters,
                    create_topics=True,
                )
            )
        )
        world.send([event("ann", "a"), event("bob", "b")])
        own.kill()
        own.start()
        assert len(world.read(world.events)) == 2
