"""Every command of the documentation, page by page, on a real broker, Redis and real workers.

A page begins in a fresh copy of the repository with a broker and a Redis of its own; `blocks.py`
says how a page is read, `prelude.sh` what is done on less. `make docs-check` runs it all in full.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.docs.blocks import RUN, Block, blocks_of, script
from worker.local.process import free_port
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker

ROOT = Path(__file__).parents[2]
PRELUDE = Path(__file__).with_name("prelude.sh")
LONG = os.environ.get("STREAMREC_DOCS_LONG", "")
ALL = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md")])
PAGES = [
    page for page in ALL if any(block.language in RUN for block in blocks_of(page.read_text()))
]
#: Blocks that may say that they are not run.
NOT_RUN_AT_MOST = 12
#: What a fresh clone has none of, at its top and anywhere.
MADE_HERE = {".git", ".venv", "build", "report", "dist", "shared", "bench-results"}
LEFT_OUT = shutil.ignore_patterns(".*_cache", ".cache", ".hypothesis", "__pycache__", "*.egg-info")


def fresh(directory: str, names: list[str]) -> set[str]:
    """The names that a fresh clone does not have."""
    here = MADE_HERE.intersection(names) if Path(directory) == ROOT else set()
    return here | LEFT_OUT(directory, names)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks() -> list[tuple[Path, Block]]:
    return [(page, block) for page in ALL for block in blocks_of(page.read_text())]


def test_what_is_not_run_is_little_and_says_why() -> None:
    reasons = [block.reason_not_run for _, block in blocks() if block.reason_not_run is not None]
    assert all(len(reason.split()) >= 3 for reason in reasons), reasons
    assert len(reasons) <= NOT_RUN_AT_MOST, reasons


def test_commands_are_labelled_as_such() -> None:
    unlabelled = [
        f"{name_of(page)}:{block.line}" for page, block in blocks() if block.has_unrun_command
    ]
    assert not unlabelled, "write ```sh, so that they are run"


def sample(path: Path, *, kind: str, surface: str) -> None:
    """Events of 40 users who take what lies near to what they took, in place of real ones."""
    draw = random.Random(7)
    with path.open("w") as file:
        for step in range(30):
            for user in range(40):
                item = (user * 7 + step + draw.randrange(3)) % 200 + 1
                event = {
                    "user_id": str(user),
                    "item_id": str(item),
                    "event_type": kind,
                    "timestamp": 1_764_000_000_000 + step * 40_000 + user,
                    "surface": surface,
                    "text": f"a story of {item % 13} and {item % 17}",
                }
                file.write(json.dumps(event) + "\n")


@pytest.mark.timeout(7200 if LONG else 300)
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_work(page: Path, tmp_path: Path) -> None:
    copy = tmp_path / "streamrec"
    shutil.copytree(ROOT, copy, ignore=fresh)
    (tmp_path / "tmp").mkdir()
    sample(copy / "sample.jsonl", kind="like", surface="posts")
    sample(copy / "follows.jsonl", kind="follow", surface="friends")
    with TansuBroker(tmp_path / "broker") as broker, RedisServer(tmp_path / "redis") as redis:
        port = str(free_port())
        places = {
            "broker-1:9092,broker-2:9092": broker.bootstrap,
            "broker-1:9092": broker.bootstrap,
            "redis://cache:6379/0": redis.url,
            "localhost:8080": f"localhost:{port}",
            "/srv/models": str(tmp_path / "models"),
            "s3://bucket/models": str(tmp_path / "bucket"),
            "HOST:8080": f"localhost:{port}",
            "POD": "streamrec-0",
            "NAME": "posts",
            "USER": "259",  # the first of MovieLens
        }
        if not LONG:
            places |= {"ml-100k": "sample.jsonl", "ml-1m": "sample.jsonl"}
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("STREAMREC_")},
            "STREAMREC_KAFKA": broker.bootstrap,
            "STREAMREC_REDIS": redis.url,
            "STREAMREC_HTTP_PORT": port,
            "STREAMREC_CREATE_TOPICS": "true",
            "STREAMREC_SESSION_TIMEOUT_S": "6",
            "STREAMREC_REBALANCE_TIMEOUT_S": "2",
            "STREAMREC_REGISTRY_POLL_S": "0.3",
            "TMPDIR": str(tmp_path / "tmp"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VENV": str(Path(sys.executable).parent.parent),
            "LONG": LONG,
            # Of the runbooks.
            "KAFKA": broker.bootstrap,
            "REGISTRY": str(copy / "models" / "shipped"),
        }
        commands = script(blocks_of(page.read_text()), places=places, long=bool(LONG))
        page_run = subprocess.Popen(
            ["bash", "-c", f"source {PRELUDE}\n{commands}"],
            cwd=copy, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            said, _ = page_run.communicate()
        finally:
            # What it left behind, too, where the time ran out.
            with suppress(ProcessLookupError):
                os.killpg(page_run.pid, signal.SIGKILL)
    log = tmp_path / "tmp" / "worker.log"
    told = log.read_text()[-2000:] if log.exists() else ""
    assert page_run.returncode == 0, f"{commands}\n{said[-4000:]}\n{told}"
    if not LONG:
        shutil.rmtree(copy)
