"""Run one worker process from settings to exit code."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import signal
import threading

import faust

from worker.app import create_app
from worker.health import HealthServer, watch
from worker.logs import set_up_logging
from worker.memory import keep_large_blocks_apart
from worker.settings import Settings
from worker.startup import prepare
from worker.status import Status

log = logging.getLogger(__name__)


def run_worker(settings: Settings) -> int:
    """Serve until a signal; returns the exit code.

    Raises:
        StreamrecError: the worker cannot start; the message says why.
    """
    set_up_logging(settings.log_level, settings.log_salt.get_secret_value())
    faulthandler.register(signal.SIGUSR1)
    # Before anything large is allocated: what a swap lets go of must go back to the system.
    keep_large_blocks_apart()
    releases = asyncio.run(prepare(settings))
    # Faust's services take the current loop when they are made, so it must be there before them.
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    app = create_app(settings, releases)
    # What is there now stays: full collections need not look at it again and again.
    gc.collect()
    gc.freeze()
    status = Status(
        settings,
        health=app.health,
        metrics=app.metrics,
        models=app.models,
        decider=app.decider,
    )
    server = HealthServer(
        app.health,
        app.metrics.registry,
        app.models.describe,
        {"/": status.page, "/settings": status.settings},
        settings.http_host,
        settings.http_port,
    )
    server.start()
    stopping = threading.Event()
    status.watch(stopping)
    watch(app.health, stopping)
    log.info("started http=%s:%d kafka=%s", settings.http_host, server.port, settings.kafka)
    runner = faust.Worker(
        app,
        loop=loop,
        loglevel="warn",
        override_logging=False,
        redirect_stdouts=False,
        console_port=0,
    )
    try:
        runner.execute_from_commandline()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    else:
        code = 0
    finally:
        stopping.set()
        server.stop()
    log.info("stopped exit_code=%d", code)
    return code
