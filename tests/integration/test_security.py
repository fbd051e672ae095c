"""A whole worker over TLS and logins, on a real Kafka and a real Redis; what is refused is said in
one line that names the setting; and no secret is in any log."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.conftest import ITEMS, real_kafka, tiny_bundle
from tests.integration.certificates import Authority
from tests.integration.secured import ONLOOKER, OPERATOR, SECRET, WORKER, SecuredKafka
from tests.integration.support import World, event, eventually
from tests.integration.tokens import SCOPE
from worker.cli import main
from worker.errors import BrokerError
from worker.local.redis_server import RedisServer
from worker.settings import load_settings
from worker.startup import ensure_topics, prepare

pytestmark = pytest.mark.kafka


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    real_kafka()
    with SecuredKafka(tmp_path_factory.mktemp("secured") / "kafka") as kafka:
        yield kafka


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, secured: SecuredKafka) -> Iterator[World]:
    """Topics, rights and a Redis for all cases."""
    directory = tmp_path_factory.mktemp("world")
    tiny_bundle(directory / "registry" / "posts" / "v1", seed=1)
    with RedisServer(directory / "redis") as redis:
        assert isinstance(redis, RedisServer)
        made = World(
            directory, secured.broker, redis, directory / "registry", create_topics="false"
        )
        secured.prepare(made)
        yield made


def login(secured: SecuredKafka, mechanism: str, listener: str = "LOGIN") -> dict[str, str]:
    """Settings of the worker's login; secrets are set by the test."""
    found = {
        "kafka": secured.address(listener),
        "kafka_security": "sasl_plaintext" if listener == "CLEAR" else "sasl_ssl",
        "kafka_sasl_mechanism": mechanism,
    }
    if listener != "CLEAR":
        found["kafka_ca_file"] = str(secured.authority.file)
    if mechanism == "OAUTHBEARER":
        return found | {
            "kafka_oauth_token_url": secured.issuer.url,
            "kafka_oauth_client_id": WORKER,
            "kafka_oauth_client_secret": SECRET,
            "kafka_oauth_scope": SCOPE,
            "kafka_oauth_ca_file": str(secured.authority.file),
            "kafka_oauth_extensions": "logicalCluster=lkc-1",
        }
    return found | {"kafka_username": WORKER, "kafka_password": SECRET}


def mutual(secured: SecuredKafka, authority: Authority | None = None) -> dict[str, str]:
    """Settings of mutual TLS, with a certificate for the worker."""
    certificate, key = (authority or secured.authority).certify(WORKER)
    return {
        "kafka": secured.address("MTLS"),
        "kafka_security": "ssl",
        "kafka_ca_file": str(secured.authority.file),
        "kafka_cert_file": str(certificate),
        "kafka_key_file": str(key),
    }


@pytest.mark.parametrize("case", ["mutual TLS", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512 clear"])
def test_an_event_becomes_a_list_over_it(case: str, secured: SecuredKafka, world: World) -> None:
    if case == "mutual TLS":
        settings = mutual(secured)
    else:
        mechanism, _, clear = case.partition(" ")
        settings = login(secured, mechanism, "CLEAR" if clear else "LOGIN")
    user = f"user of {case}".replace(" ", "-")
    with world.worker(log_level="debug", **settings) as worker:
        world.send([event(user, ITEMS[0])])
        eventually(lambda: world.cached(user) is not None, "served")
        eventually(lambda: worker.metric("streamrec_event_seconds_count") >= 1, "published")
        shown = worker.get("/model")[1] + worker.get("/metrics")[1] + worker.get("/settings")[1]
    assert SECRET not in worker.log + shown


def test_tokens_are_renewed_where_the_broker_ends_connections(
    secured: SecuredKafka, world: World
) -> None:
    """Every two seconds: the broker takes no request on a connection whose token is that old."""
    secured.issuer.life_s = 2
    given = secured.issuer.given
    with world.worker(log_level="debug", **login(secured, "OAUTHBEARER")) as worker:
        for number in range(6):
            world.send([event(f"bearer-{number}", ITEMS[number])])
            eventually(lambda n=number: world.cached(f"bearer-{n}") is not None, "served")  # type: ignore[misc]
            eventually(
                lambda n=number: worker.metric("streamrec_event_seconds_count") > n,  # type: ignore[misc]
                "published",
            )
        assert secured.issuer.given >= given + 3
    assert SECRET not in worker.log


def test_every_other_client_logs_in_alike(
    secured: SecuredKafka, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the command line: pushed releases, `forget`, events read from a topic."""
    settings = login(secured, "SCRAM-SHA-512") | {"kafka_username": OPERATOR}
    for name, value in (world.environment | variables(settings)).items():
        monkeypatch.setenv(name, value)
    registry = world.environment["STREAMREC_REGISTRY"]
    promoted = CliRunner().invoke(main, ["models", "promote", "posts", "v1"])
    assert promoted.output == "posts@v1 serves from now on\n"
    (record,) = world.read(f"{world.name}.releases", partitions=1)
    assert record.value == (Path(registry) / "posts" / "release.json").read_bytes()
    assert "tombstone" in CliRunner().invoke(main, ["forget", "somebody"]).output
    # The operator may not read events: that is said, too.
    source = f"kafka://{secured.address('LOGIN')}/{world.events}"
    refused = CliRunner().invoke(main, ["models", "train", source, "--registry", registry])
    assert refused.exit_code != 0
    assert "docs/security.md" in refused.output, refused.output


#: What is wrong; the settings; what is said of it.
Case = tuple[Callable[[SecuredKafka, Authority], dict[str, str]], str]
WRONG = SECRET + "-wrong"
REFUSED: dict[str, Case] = {
    "a password": (
        lambda kafka, _: login(kafka, "PLAIN") | {"kafka_password": WRONG},
        "refuses the login: correct STREAMREC_KAFKA_USERNAME and STREAMREC_KAFKA_PASSWORD",
    ),
    "a password, SCRAM": (
        lambda kafka, _: login(kafka, "SCRAM-SHA-512") | {"kafka_password": WRONG},
        "refuses the login: correct STREAMREC_KAFKA_USERNAME and STREAMREC_KAFKA_PASSWORD",
    ),
    "a client secret": (
        lambda kafka, _: login(kafka, "OAUTHBEARER") | {"kafka_oauth_client_secret": WRONG},
        "gives no token (HTTP 401, invalid_client): correct STREAMREC_KAFKA_OAUTH_CLIENT_ID",
    ),
    "a token": (
        lambda kafka, other: bearer_file(kafka, other.directory, "not.a.token"),
        "refuses the login: correct the token",
    ),
    "the CA": (
        lambda kafka, other: login(kafka, "PLAIN") | {"kafka_ca_file": str(other.file)},
        "not trusted (unable to get local issuer certificate): set STREAMREC_KAFKA_CA_FILE",
    ),
    "the host name": (
        lambda kafka, _: login(kafka, "PLAIN") | {"kafka": kafka.address("LOGIN", "localhost")},
        "shows a certificate for another host",
    ),
    "the client's certificate": (
        mutual,
        "correct STREAMREC_KAFKA_CERT_FILE and STREAMREC_KAFKA_KEY_FILE",
    ),
    "the kind of login": (
        lambda kafka, _: login(kafka, "SCRAM-SHA-256", "CLEAR"),
        "does not take this kind of login: correct STREAMREC_KAFKA_SASL_MECHANISM",
    ),
    "the group": (
        lambda kafka, _: login(kafka, "PLAIN") | {"group": "another"},
        "refuses the worker a topic or group ([Error 30] GroupAuthorizationFailedError: another)",
    ),
    "reading": (
        lambda kafka, _: login(kafka, "PLAIN") | {"kafka_username": ONLOOKER},
        "refuses the worker a topic or group ([Error 29] TopicAuthorizationFailedError",
    ),
    "the topic": (
        lambda kafka, _: login(kafka, "PLAIN") | {"events_topic": "of somebody else"},
        "has no topic of somebody else that this login may see",
    ),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_whatever_is_refused_names_the_setting(
    wrong: str,
    secured: SecuredKafka,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make, said = REFUSED[wrong]
    settings = make(secured, Authority(tmp_path, "other"))
    for name, value in (world.environment | variables(settings)).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BrokerError) as caught:
        asyncio.run(prepare(load_settings()))
    assert said in str(caught.value)
    assert SECRET not in str(caught.value) + caplog.text


def test_a_worker_that_is_refused_says_so_in_one_line_and_exits(
    secured: SecuredKafka, world: World
) -> None:
    settings = login(secured, "SCRAM-SHA-512") | {"kafka_password": WRONG, "log_level": "debug"}
    ended = subprocess.run(
        [sys.executable, "-m", "worker.cli", "worker"],
        env=os.environ | world.environment | variables(settings),
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == BrokerError.exit_code
    (line,) = ended.stderr.splitlines()
    assert line.startswith("streamrec: Kafka at 127.0.0.1:")
    assert SECRET not in line


def variables(settings: dict[str, str]) -> dict[str, str]:
    """Settings as the environment has them."""
    return {f"STREAMREC_{name.upper()}": value for name, value in settings.items()}


def bearer_file(secured: SecuredKafka, directory: Path, token: str) -> dict[str, str]:
    """Settings of a token from a file."""
    (directory / "token").write_text(token + "\n")
    kept = ("kafka", "kafka_security", "kafka_sasl_mechanism", "kafka_ca_file")
    settings = {name: login(secured, "OAUTHBEARER")[name] for name in kept}
    return settings | {"kafka_oauth_token_file": str(directory / "token")}


def test_a_token_may_come_from_a_file(
    secured: SecuredKafka, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = bearer_file(secured, tmp_path, secured.issuer.token(WORKER, 60))
    for name, value in (world.environment | variables(settings)).items():
        monkeypatch.setenv(name, value)
    asyncio.run(ensure_topics(load_settings()))
