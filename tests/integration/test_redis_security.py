"""A worker over TLS, as a Redis user who may do exactly what docs/security.md says."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from tests.conftest import ITEMS, tiny_bundle
from tests.integration.certificates import Authority
from tests.integration.redis_tls import tls_redis
from tests.integration.support import World, event, eventually
from worker.cache import Cache, PartitionKey, Position, UserKey
from worker.errors import CacheError
from worker.events import Surface
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker
from worker.popularity import PopularityTable
from worker.settings import load_settings
from worker.startup import prepare
from worker.versions import mark

SECRET = "s3cr3t-of-%7E-the-test"
ADMIN = "admin"
#: The line of docs/security.md, without the password.
DOCS = Path(__file__).parents[2] / "docs" / "security.md"
RIGHTS = re.search(r"^ACL SETUSER streamrec on >PASSWORD (.*)$", DOCS.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "ca")


@pytest.fixture(scope="module")
def redis(
    tmp_path_factory: pytest.TempPathFactory, authority: Authority
) -> Iterator[tuple[RedisServer, int]]:
    assert RIGHTS is not None
    users = [
        "user default off",
        f"user streamrec on >{SECRET} {RIGHTS[1]}",
        f"user readonly on >{SECRET} ~* +ping +get",
        f"user {ADMIN} on >{ADMIN} ~* &* +@all",
    ]
    with tls_redis(tmp_path_factory.mktemp("tls") / "redis", authority, users) as found:
        yield found


@pytest.fixture
def admin(redis: tuple[RedisServer, int]) -> Iterator[Redis]:
    """A connection that may all, with nothing denied or counted yet."""
    with Redis(port=redis[0].port, username=ADMIN, password=ADMIN) as client:
        client.acl_log_reset()
        client.config_resetstat()
        yield client


@pytest.fixture
def login(authority: Authority, redis: tuple[RedisServer, int]) -> dict[str, str]:
    """Settings of the worker's connection, with a client's certificate."""
    certificate, key = authority.certify("worker")
    return {
        "redis": f"rediss://127.0.0.1:{redis[1]}/0",
        "redis_username": "streamrec",
        "redis_password": SECRET,
        "redis_ca_file": str(authority.file),
        "redis_cert_file": str(certificate),
        "redis_key_file": str(key),
    }


def test_an_event_becomes_a_list_over_it(
    tmp_path: Path,
    tansu: TansuBroker,
    redis: tuple[RedisServer, int],
    admin: Redis,
    login: dict[str, str],
) -> None:
    tiny_bundle(tmp_path / "registry" / "posts" / "v1", seed=1)
    world = World(tmp_path, tansu, redis[0], tmp_path / "registry")
    with world.worker(log_level="debug", **login) as worker:
        world.send([event("ann", ITEMS[0])])
        eventually(lambda: admin.exists("rec:{ann}:posts") == 1, "served")
        world.send([(b"ann", None)])  # ann asks to be forgotten
        eventually(lambda: admin.exists("rec:{ann}:posts") == 0, "forgotten")
        shown = worker.get("/model")[1] + worker.get("/metrics")[1]
    assert SECRET not in worker.log + shown
    assert denied(admin) == []


def test_the_rights_in_the_docs_are_those_that_are_used_and_no_others(
    admin: Redis, login: dict[str, str]
) -> None:
    assert RIGHTS is not None
    cache = Cache.from_settings(load_settings(**login))
    try:
        use_all(cache)
    finally:
        cache.close()
    assert denied(admin) == []
    # Without subcommands, which older servers do not tell; of `script` only one is granted.
    used = {
        str(name).removeprefix("cmdstat_").partition("|")[0] for name in admin.info("commandstats")
    }
    granted = {right[1:] for right in RIGHTS[1].split() if right.startswith("+")}
    assert "script|load" in granted
    # The first are of a connection, which Redis allows everybody; the others are this test's.
    own = {"auth", "hello", "client", "acl", "config", "info"}
    assert used - own == {right.partition("|")[0] for right in granted}
    assert "-@all" in RIGHTS[1].split()


def denied(admin: Redis) -> list[str]:
    """Commands and keys that Redis refused, but for what redis-py tries at each connection, to say
    its name (CLIENT SETINFO), and does without."""
    return [entry["object"] for entry in admin.acl_log() if "client" not in entry["object"]]


def use_all(cache: Cache) -> None:
    """Whatever the worker asks of Redis."""
    key, place = UserKey("ann", Surface.POSTS), PartitionKey(Surface.POSTS, "events", 0)
    # Each place as far as the record of its number.
    first, second = (mark([("events", 0, number, number)]) for number in (1, 2))
    table = PopularityTable(half_life_ms=1000, max_items=10)
    table.offset, table.weights = 1, {"liked": 1.0}
    table.changed, table.removed = {"liked"}, {"gone"}
    cache.check()
    cache.write_batch(
        histories={key: first},
        recommendations={key: b"{}"},
        popularity={place: table},
        cold_items={Surface.POSTS: {"new": "a text"}},
        tallies={place: first},
        positions={("events", 0): Position(0, 1)},
    )
    cache.write_batch(histories={}, recommendations={}, popularity={}, forgotten={key: second})
    cache.read_users([key])
    cache.read_popularity(place, PopularityTable(half_life_ms=1000, max_items=10))
    cache.read_tallies([place])
    cache.read_cold_items(Surface.POSTS, 0.0)
    cache.delete_histories([key])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"redis_password": SECRET + "-wrong"},
            "refuses the login: correct STREAMREC_REDIS_USERNAME and STREAMREC_REDIS_PASSWORD",
        ),
        (
            {"redis_ca_file": "other"},
            "): set STREAMREC_REDIS_CA_FILE to the CAs that signed it",
        ),
        ({"redis": "rediss://localhost:{tls}/0"}, "shows a certificate for another host"),
        ({"redis_username": "readonly"}, "refuses a command: grant what docs/security.md lists"),
    ],
)
def test_whatever_is_refused_names_the_setting(
    changes: dict[str, str],
    said: str,
    redis: tuple[RedisServer, int],
    login: dict[str, str],
    tmp_path: Path,
    tansu: TansuBroker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changed = {name: value.format(tls=redis[1]) for name, value in changes.items()}
    if "redis_ca_file" in changed:
        changed["redis_ca_file"] = str(Authority(tmp_path, "other").file)
    for name, value in (login | changed).items():
        monkeypatch.setenv(f"STREAMREC_{name.upper()}", value)
    settings = load_settings(kafka=tansu.bootstrap, create_topics=True, releases_topic="")
    with pytest.raises(CacheError) as caught:
        asyncio.run(prepare(settings))
    assert said in str(caught.value)
    assert SECRET not in str(caught.value) + caplog.text
