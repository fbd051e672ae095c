"""Friends from follow events to served lists, through the commands and a real worker.

The follow graph is synthetic.
"""

from pathlib import Path

import pytest
from click.testing import CliRunner

from models.cli import models
from models.sources import write_jsonl
from models.synthetic import synthetic_follows
from tests.integration.support import World, event, eventually
from worker.bundle import open_bundle
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker

USERS = 40


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(models, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained for an epoch, and that one in int8, which is served."""
    folder = tmp_path_factory.mktemp("friends")
    write_jsonl(synthetic_follows(USERS, 150, 5), folder / "follows.jsonl", surface="friends")
    registry = folder / "registry"
    said = run(
        "train", folder / "follows.jsonl", "--surface", "friends", "--registry", registry,
        "--version", "1-fp32", "--epochs", "1", "--width", "8", "--heads", "1", "--blocks", "1",
        "--length", "8", "--work", folder / "work",
    )  # fmt: skip
    assert "Adamic-Adar" in said
    assert "friends of friends" in said
    run("compress", registry / "friends" / "1-fp32", "--recipe", "int8", "--registry", registry)
    return registry


def test_follows_lead_to_friends_who_are_neither_oneself_nor_followed(
    tmp_path: Path, tansu: TansuBroker, redis_server: RedisServer, registry: Path
) -> None:
    world = World(
        tmp_path, tansu, redis_server, registry,
        models="friends=friends", top_k="100", history_length="5",
    )  # fmt: skip
    newest = sorted(path.name for path in (registry / "friends").iterdir())[-1]
    bundle = open_bundle(registry / "friends" / newest)
    assert bundle.manifest.precision == "int8"
    user, *others = bundle.items
    # More than a history holds: the first ones are remembered all the same.
    whom = others[:9]
    with world.worker() as worker:
        world.send(
            event(user, item, number, surface="friends", event_type="follow")
            for number, item in enumerate(whom)
        )
        eventually(lambda: worker.metric("streamrec_event_seconds_count") == 9, "all processed")
        found = world.cached(user, "friends")
    assert found is not None
    assert found["source"] == "model"
    assert found["model_version"] == f"friends@{newest}"
    assert sorted(found["items"]) == sorted(set(others) - set(whom))
