"""Every setting of the worker: one typed object, read from `STREAMREC_...` and command-line flags.

A name ends in its unit (`_s`, `_ms`, `_mb`, `_bytes`); what has none is a count or a name.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from worker.errors import SettingsError
from worker.events import Surface, parse_surface
from worker.gate import GateSettings
from worker.security import parse_extensions, problems

PREFIX = "STREAMREC_"


class Settings(BaseSettings):
    """Settings of one worker process. Immutable."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    # Kafka
    kafka: str = Field(
        "127.0.0.1:9092", description="Kafka bootstrap servers, host:port, comma-separated."
    )
    kafka_security: Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"] = Field(
        "plaintext",
        description="How Kafka is connected to: with TLS (ssl), with a login (sasl), or both.",
    )
    kafka_ca_file: Path | None = Field(
        None,
        description="PEM file of the CAs that sign Kafka's certificates; none: those that the"
        " system trusts.",
    )
    kafka_cert_file: Path | None = Field(
        None, description="PEM file of the client's own certificate, for mutual TLS with Kafka."
    )
    kafka_key_file: Path | None = Field(
        None, description="PEM file of its private key, unencrypted."
    )
    kafka_sasl_mechanism: (
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None
    ) = Field(
        None, description="How the login to Kafka works: PLAIN, SCRAM-SHA-256 or -512, OAUTHBEARER."
    )
    kafka_username: str = Field("", description="User at Kafka, for PLAIN and SCRAM.")
    kafka_password: SecretStr = Field(SecretStr(""), description="Password of that user.")
    kafka_oauth_token_url: str = Field(
        "",
        description="Where OAUTHBEARER tokens are asked for (client credentials, RFC 6749).",
    )
    kafka_oauth_client_id: str = Field("", description="Client that asks for them.")
    kafka_oauth_client_secret: SecretStr = Field(
        SecretStr(""), description="Secret of that client."
    )
    kafka_oauth_scope: str = Field("", description="Scope that is asked for, where one is needed.")
    kafka_oauth_ca_file: Path | None = Field(
        None, description="PEM file of the CAs that sign the certificate of the token's address."
    )
    kafka_oauth_token_file: Path | None = Field(
        None,
        description="File with a token, instead of asking for one; read anew at each connection.",
    )
    kafka_oauth_extensions: str = Field(
        "",
        description="SASL extensions sent with a token, name=value, comma-separated"
        " (logicalCluster and identityPoolId of Confluent Cloud).",
    )
    group: str = Field("streamrec", min_length=1, description="Consumer group of the workers.")
    events_topic: str = Field("user-events", description="Topic that events are read from.")
    recommendations_topic: str = Field(
        "recommendations", description="Topic that recommendations are published to."
    )
    dead_letter_topic: str = Field(
        "user-events.dead-letter", description="Topic for records that cannot be used."
    )
    releases_topic: str = Field(
        "model-releases",
        description="Compacted topic that releases are pushed by; empty: the registry alone.",
    )
    decisions_topic: str = Field(
        "model-decisions",
        description="Topic that the gate's decisions are published to; empty: none.",
    )
    create_topics: bool = Field(
        False, description="Make missing topics at start (partitions and replication as below)."
    )
    topic_partitions: int = Field(4, ge=1, description="Partitions of a topic that is made.")
    topic_replication: int = Field(1, ge=1, description="Replication of a topic that is made.")
    instance_id: str | None = Field(
        None, description="Static group membership id (pod name), so that a restart moves nothing."
    )
    session_timeout_s: float = Field(
        30.0, ge=1.0, description="Kafka gives a silent worker's partitions away after this."
    )
    rebalance_timeout_s: float = Field(
        30.0, ge=1.0, description="Longest that Kafka waits for workers to rejoin the group."
    )
    commit_interval_s: float = Field(
        1.0, gt=0.0, description="Time between commits of finished offsets."
    )

    # Redis
    redis: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="Redis URL (redis://, rediss:// for TLS, or unix://); a password in it is"
        " taken from the environment or a file, not from a flag.",
    )
    redis_username: str = Field("", description="Redis user (ACL); empty: the default user.")
    redis_password: SecretStr = Field(SecretStr(""), description="Password of that user.")
    redis_ca_file: Path | None = Field(
        None,
        description="PEM file of the CAs that sign Redis's certificate; none: those that the"
        " system trusts.",
    )
    redis_cert_file: Path | None = Field(
        None, description="PEM file of the client's own certificate, for mutual TLS with Redis."
    )
    redis_key_file: Path | None = Field(
        None, description="PEM file of its private key, unencrypted."
    )
    redis_timeout_ms: int = Field(
        2000, ge=1, description="Longest that one Redis round trip may take."
    )
    recommendations_ttl_s: int = Field(
        7 * 86400, ge=1, description="Recommendations expire after this, give or take 10 %."
    )
    history_ttl_s: int = Field(
        90 * 86400, ge=1, description="Histories expire this long after the user's last event."
    )

    redis_repair: bool = Field(
        True,
        description="Where Redis has lost data, events are read again from where it has them.",
    )
    forget_ttl_s: int = Field(
        86400,
        ge=1,
        description="An erased user's empty history, which refuses late writes, expires then.",
    )

    # Model
    registry: str = Field(
        "models/shipped",
        min_length=1,
        description="Where <name>/<version>/ of bundles lie: a directory, or a URL such as"
        " s3://bucket/models.",
    )
    registry_mirror_dir: Path = Field(
        Path(tempfile.gettempdir()) / "streamrec-mirror",
        description="Directory that bundles of a URL are copied to.",
    )
    models: str = Field(
        "posts=posts",
        description="Which model serves which surface: surface=name[@version], comma-separated."
        " Without a version: the promoted one, else the newest.",
    )
    registry_poll_s: float = Field(
        2.0, gt=0.0, description="How often the registry is looked at for a new version."
    )
    public_keys: str = Field(
        "",
        description="Public keys (streamrec models keygen) of those who sign bundles,"
        " comma-separated; empty: signatures are not looked at.",
    )
    model_memory_mb: float | None = Field(
        None,
        gt=0.0,
        description="A bundle that would take more memory is refused; none: what the container or"
        " machine has left.",
    )
    inference_threads: int = Field(
        1, ge=1, le=64, description="Threads of one ONNX Runtime session."
    )
    top_k: int = Field(10, ge=1, le=1000, description="Length of a recommendation list.")
    rules: Path | None = Field(None, description="JSON file of rules: block, allow, author caps.")

    # Trials of new versions
    shadow_share: float = Field(
        0.1,
        gt=0.0,
        le=1.0,
        description="Share of users for whom a shadow makes lists that nobody sees.",
    )
    gate_interval_s: float = Field(
        2.0, gt=0.0, description="How often the gate looks at a canary's figures."
    )
    gate_alpha: float = Field(
        0.05,
        gt=0.0,
        lt=0.5,
        description="Chance that a canary as good as the stable version is rolled back.",
    )
    gate_max_loss: float = Field(
        0.05,
        ge=0.0,
        lt=1.0,
        description="Largest relative loss of mean reciprocal rank that is accepted.",
    )
    gate_max_latency_ratio: float = Field(
        2.0,
        ge=1.0,
        description="Largest accepted ratio of the canary's scoring time to the stable version's.",
    )
    gate_max_error_rate: float = Field(
        0.01,
        gt=0.0,
        lt=0.5,
        description="Largest accepted share of lists that the canary fails to make.",
    )
    gate_min_users: int = Field(
        10, ge=2, description="Users with positive events, on each side, before quality counts."
    )
    gate_min_events: int = Field(100, ge=1, description="Positive events before quality counts.")
    gate_max_events: int = Field(
        1_000_000,
        ge=1,
        description="Positive events after which an undecided canary is rolled back.",
    )

    # Events and histories
    event_max_bytes: int = Field(65536, ge=64, description="Larger events are dead letters.")
    event_max_future_s: float = Field(
        300.0, ge=0.0, description="Events further ahead of the clock are dead letters."
    )
    require_user_key: bool = Field(
        True, description="Events whose record key is not the user id are dead letters."
    )
    history_length: int = Field(
        200, ge=1, le=10000, description="Items kept per user and surface; none is shown again."
    )
    history_cache_mb: float = Field(
        256.0, gt=0.0, description="Bound on the memory for histories cached in the worker."
    )
    popularity_half_life_s: float = Field(
        7 * 86400.0, gt=0.0, description="Event time in which popularity halves."
    )
    popularity_max_items: int = Field(
        10000, ge=10, description="Items counted per surface and partition."
    )

    # Items that the model has not seen
    cold_items_max: int = Field(
        4096,
        ge=0,
        description="Items without a row in the model, known by their text, per surface;"
        " 0 recommends none.",
    )
    cold_items_ttl_s: int = Field(
        3 * 86400, ge=1, description="Such items are let go this long after they were first seen."
    )
    cold_items_poll_s: float = Field(
        5.0, gt=0.0, description="How often those that other workers saw are read from Redis."
    )

    # Batching
    batch_max_events: int = Field(
        2048,
        ge=1,
        description="Largest micro-batch. It holds what came in while the one before was worked"
        " on, so it is small while there is little to do.",
    )
    batch_interval_ms: float = Field(
        5.0,
        ge=0.0,
        description="Shortest time from one read that brought events to the next: later lists for"
        " less work where there is little to do.",
    )
    fetch_wait_ms: int = Field(
        100,
        ge=1,
        description="Longest that the broker holds a fetch that finds no event. Kafka answers as"
        " soon as there is one; the embedded broker waits this long all the same.",
    )
    publish_linger_ms: float = Field(
        10.0,
        ge=0.0,
        description="Lists and dead letters wait this long to be published together; Redis has"
        " them before.",
    )
    shed_lag_s: float | None = Field(
        None,
        gt=0.0,
        description="Once the oldest event of a micro-batch is older than this, views make no list"
        " until it is half as old; histories take all. None: every event makes a list.",
    )
    max_in_flight_events: int = Field(
        8192, ge=1, description="Events read and not yet finished; beyond it, reading pauses."
    )

    # Operation
    http_host: str = Field(
        "127.0.0.1",
        description="Address for /metrics, /livez, /readyz, the status page / (0.0.0.0 in a pod).",
    )
    http_port: int = Field(8080, ge=0, le=65535, description="Port for it; 0 takes a free one.")
    stall_timeout_s: float = Field(
        60.0,
        gt=0.0,
        description="With events waiting and none finished for this long, the process exits.",
    )
    startup_timeout_s: float = Field(
        60.0, ge=0.0, description="Longest wait for Kafka and Redis at start."
    )
    shutdown_timeout_s: float = Field(
        20.0, gt=0.0, description="Longest wait for batches in flight at a stop or rebalance."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is logged."
    )
    log_salt: SecretStr = Field(
        SecretStr(""),
        description="Key of the hashes that stand for users in logs, the same for all workers;"
        " empty: each process has one of its own.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then files that the environment names."""
        return init_settings, env_settings, SecretFiles(settings_cls)

    @field_validator("kafka_oauth_extensions")
    @classmethod
    def _extensions_parse(cls, value: str) -> str:
        parse_extensions(value)
        return value

    @field_validator("models")
    @classmethod
    def _models_parse(cls, value: str) -> str:
        parse_models(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_in_flight_events < self.batch_max_events:
            raise ValueError(
                f"{PREFIX}MAX_IN_FLIGHT_EVENTS ({self.max_in_flight_events}) must not be less than"
                f" {PREFIX}BATCH_MAX_EVENTS ({self.batch_max_events})"
            )
        if self.gate_max_events < self.gate_min_events:
            raise ValueError(
                f"{PREFIX}GATE_MAX_EVENTS ({self.gate_max_events}) must not be less than"
                f" {PREFIX}GATE_MIN_EVENTS ({self.gate_min_events})"
            )
        if found := list(problems(self)):
            raise ValueError("; ".join(found))
        return self

    @property
    def gate(self) -> GateSettings:
        """How canaries are judged."""
        return GateSettings(
            alpha=self.gate_alpha,
            max_loss=self.gate_max_loss,
            max_latency_ratio=self.gate_max_latency_ratio,
            max_error_rate=self.gate_max_error_rate,
            min_users=self.gate_min_users,
            min_events=self.gate_min_events,
            max_events=self.gate_max_events,
        )

    @property
    def models_by_surface(self) -> dict[Surface, ModelChoice]:
        """The `models` setting, parsed."""
        return parse_models(self.models)


class SecretFiles(PydanticBaseSettingsSource):
    """Secrets from files, as Docker and Kubernetes mount them: `STREAMREC_<NAME>_FILE` says where.

    A line end after the secret is not part of it.

    Raises:
        SettingsError: when called, if a file cannot be read, or the secret is set besides.
    """

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """The secret in the file that the environment names for a field; None without one."""
        variable = f"{PREFIX}{field_name.upper()}_FILE"
        name = os.environ.get(variable)
        if not name or field.annotation is not SecretStr:
            return None, field_name, False
        if os.environ.get(variable.removesuffix("_FILE")):
            raise SettingsError(f"{variable} and {variable.removesuffix('_FILE')} are set: use one")
        try:
            secret = Path(name).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise SettingsError(f"{variable}: cannot read {name}: {reason}") from None
        return secret, field_name, False

    def __call__(self) -> dict[str, Any]:
        """All that are set."""
        found = {
            name: self.get_field_value(field, name)[0]
            for name, field in self.settings_cls.model_fields.items()
        }
        return {name: secret for name, secret in found.items() if secret is not None}


def is_secret(name: str) -> bool:
    """Whether a setting may hold a secret: never shown, and read from a file where one is named."""
    return Settings.model_fields[name].annotation is SecretStr


def is_flag(name: str) -> bool:
    """Whether a setting is a command-line flag: others on the machine read those. The Redis URL is
    one, as long as it holds no password."""
    return name == "redis" or not is_secret(name)


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model's name in the registry and, where pinned, its version."""

    name: str
    version: str | None


def parse_models(value: str) -> dict[Surface, ModelChoice]:
    """Parse `surface=name[@version],...`.

    Raises:
        ValueError: a part has another form, an unknown surface, or a surface comes twice.
    """
    choices: dict[Surface, ModelChoice] = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        surface_name, equals, reference = part.partition("=")
        name, _, version = reference.partition("@")
        if not equals or not name:
            raise ValueError(f"{part!r} is not surface=name[@version]")
        surface = parse_surface(surface_name)
        if surface in choices:
            raise ValueError(f"surface {surface_name!r} is named twice")
        choices[surface] = ModelChoice(name, version or None)
    return choices


def load_settings(**flags: Any) -> Settings:
    """Settings from the environment, overridden by those `flags` that are not None.

    Raises:
        SettingsError: a value is missing or out of range; the message names every such setting.
    """
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        problems = []
        for item in error.errors():
            place = PREFIX + str(item["loc"][0]).upper() + ": " if item["loc"] else ""
            message = str(item["msg"]).removeprefix("Value error, ")
            hidden = not item["loc"] or is_secret(str(item["loc"][0]))
            shown = "" if hidden else f" (got {item['input']!r})"
            problems.append(f"{place}{message}{shown}")
        raise SettingsError("; ".join(problems)) from None
