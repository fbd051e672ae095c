"""A stock Faust app, as both Faust cases use it."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import faust

from benchmarks.cases.common import CaseConfig


def stock_app(config: CaseConfig, **settings: Any) -> tuple[faust.App, Any]:
    """Faust as it comes, and its topic of raw bytes.

    Only what keeps it from serving HTTP, making topics of its own and leaving a directory where it
    runs is set, and the session; and `settings`.
    """
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    app = faust.App(
        config.group,
        broker=f"kafka://{config.bootstrap}",
        broker_session_timeout=config.session_s,
        broker_request_timeout=config.session_s + 30,
        autodiscover=False,
        consumer_auto_offset_reset="earliest",
        topic_disable_leader=True,
        topic_allow_declare=False,
        web_enabled=False,
        datadir=Path(tempfile.gettempdir()) / "streamrec-faust",
        worker_redirect_stdouts=False,
        **settings,
    )
    topic = app.topic(config.topic, key_type=bytes, value_type=bytes, value_serializer="raw")
    return app, topic


def run(app: faust.App) -> None:
    """Serve until a signal."""
    faust.Worker(
        app,
        loop=asyncio.get_event_loop(),
        loglevel="warn",
        redirect_stdouts=False,
        console_port=0,
    ).execute_from_commandline()
