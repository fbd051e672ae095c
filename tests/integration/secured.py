"""An Apache Kafka that wants TLS or a login, and grants users what docs/security.md lists."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)

from tests.integration.certificates import Authority
from tests.integration.support import PARTITIONS, World
from tests.integration.tokens import AUDIENCE, ISSUER, TokenIssuer
from worker.local.kafka import KafkaBroker
from worker.local.process import free_port

#: Password or secret of every user; searched for in every log.
SECRET = "s3cr3t-of-%7E-the-test"
#: The last may see the worker's topics, and do nothing with them.
WORKER, OPERATOR, ONLOOKER = "worker", "operator", "onlooker"
_MODULES = "org.apache.kafka.common.security"


class SecuredKafka:
    """Kafka with four listeners: plain (all is allowed there, for the test itself), mutual TLS,
    logins with TLS and logins without."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.authority = Authority(directory, "ca")
        self.certificate, key = self.authority.certify("broker", "127.0.0.1")
        chain = directory / "broker.pem"
        chain.write_bytes(key.read_bytes() + self.certificate.read_bytes())
        self.issuer = TokenIssuer((self.certificate, key), WORKER, SECRET)
        keys = directory / "keys.json"
        self.issuer.write_keys(keys)
        self.ports = {"MTLS": free_port(), "LOGIN": free_port(), "CLEAR": free_port()}
        scram = [
            f"{mechanism}=[name={user},password={SECRET}]"
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
            for user in (WORKER, OPERATOR)
        ]
        allowed = "org.apache.kafka.sasl.oauthbearer.allowed"
        self.broker = KafkaBroker(
            directory / "kafka",
            properties=_properties(chain, self.authority.file, keys),
            listeners=self.ports,
            java=[f"-D{allowed}.urls={keys.as_uri()}", f"-D{allowed}.files={keys}"],
            format=[part for user in scram for part in ("--add-scram", user)],
        )

    def __enter__(self) -> SecuredKafka:
        self.issuer.__enter__()
        self.broker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.broker.stop()
        self.issuer.__exit__()

    def address(self, listener: str, host: str = "127.0.0.1") -> str:
        """Bootstrap servers of a listener."""
        return f"{host}:{self.ports[listener]}"

    def prepare(self, world: World) -> None:
        """Make the topics of a world, and grant the rights that docs/security.md lists."""
        admin = AdminClient({"bootstrap.servers": self.broker.bootstrap})
        releases, decisions = f"{world.name}.releases", f"{world.name}.decisions"
        topics = [
            *(NewTopic(t, PARTITIONS, 1) for t in
              (world.events, world.recommendations, world.dead_letters)),
            NewTopic(releases, 1, 1, config={"cleanup.policy": "compact"}),
            NewTopic(decisions, 1, 1),
        ]  # fmt: skip
        read, write = AclOperation.READ, AclOperation.WRITE
        granted = [
            _topic(WORKER, world.events, read),
            _topic(WORKER, world.recommendations, write),
            _topic(WORKER, world.dead_letters, write),
            _topic(WORKER, releases, read),
            _topic(WORKER, releases, write),
            _topic(WORKER, decisions, write),
            _acl(ResourceType.GROUP, WORKER, world.name, read),
            _topic(OPERATOR, releases, read),
            _topic(OPERATOR, releases, write),
            _topic(OPERATOR, world.events, write),  # streamrec forget
        ]
        granted += [_topic(ONLOOKER, topic.topic, AclOperation.DESCRIBE) for topic in topics] + [
            _acl(ResourceType.GROUP, ONLOOKER, world.name, read)
        ]
        _wait(admin.create_topics(topics).values())
        _wait(admin.create_acls(granted).values())


def _properties(chain: Path, authority: Path, keys: Path) -> dict[str, str]:
    login = "listener.name.login."
    common = {
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,MTLS:SSL,"
        "LOGIN:SASL_SSL,CLEAR:SASL_PLAINTEXT",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(chain),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(authority),
        "listener.name.mtls.ssl.client.auth": "required",
        "ssl.principal.mapping.rules": "RULE:^CN=(.*)$/$1/",
        f"{login}oauthbearer.sasl.server.callback.handler.class": f"{_MODULES}.oauthbearer"
        ".OAuthBearerValidatorCallbackHandler",
        f"{login}oauthbearer.sasl.jaas.config": f"{_MODULES}.oauthbearer.OAuthBearerLoginModule"
        " required;",
        f"{login}oauthbearer.sasl.oauthbearer.jwks.endpoint.url": keys.as_uri(),
        f"{login}oauthbearer.sasl.oauthbearer.expected.audience": AUDIENCE,
        f"{login}oauthbearer.sasl.oauthbearer.expected.issuer": ISSUER,
        # A broker that wants new tokens closes connections that never bring any.
        f"{login}oauthbearer.connections.max.reauth.ms": "2000",
    }
    for listener in ("login", "clear"):
        place = f"listener.name.{listener}."
        common[f"{place}plain.sasl.jaas.config"] = (
            f"{_MODULES}.plain.PlainLoginModule required"
            f' user_{WORKER}="{SECRET}" user_{OPERATOR}="{SECRET}"'
            f' user_{ONLOOKER}="{SECRET}";'
        )
        for mechanism in ("scram-sha-256", "scram-sha-512"):
            common[f"{place}{mechanism}.sasl.jaas.config"] = (
                f"{_MODULES}.scram.ScramLoginModule required;"
            )
    common[f"{login}sasl.enabled.mechanisms"] = "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER"
    common["listener.name.clear.sasl.enabled.mechanisms"] = "PLAIN,SCRAM-SHA-512"
    return common


def _topic(user: str, name: str, operation: AclOperation) -> AclBinding:
    return _acl(ResourceType.TOPIC, user, name, operation)


def _acl(kind: ResourceType, user: str, name: str, operation: AclOperation) -> AclBinding:
    return AclBinding(
        kind, name, ResourcePatternType.LITERAL, f"User:{user}", "*", operation,
        AclPermissionType.ALLOW,
    )  # fmt: skip


def _wait(futures: Iterable[object]) -> None:
    for future in futures:
        future.result()  # type: ignore[attr-defined]
