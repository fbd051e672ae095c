"""Why Kafka or Redis refuses a connection, and which setting to look at.

Kafka's client says only that it found no broker, and logs the reason. So after a failure each
broker is connected to once more, to hear it.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress

from aiokafka.conn import AIOKafkaConnection, collect_hosts, create_conn
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.metadata import MetadataRequest
from redis.exceptions import AuthenticationError, NoPermissionError

from worker.kafka_security import kafka_login
from worker.kafka_tokens import TokenError
from worker.security import OAUTHBEARER
from worker.settings import Settings

#: Longest wait for one broker.
PROBE_TIMEOUT_MS = 5000
#: What OpenSSL calls a certificate for another host, or for another address.
_OTHER_HOST = (62, 64)
_DENIED = (
    TopicAuthorizationFailedError, GroupAuthorizationFailedError, ClusterAuthorizationFailedError,
)  # fmt: skip


async def kafka_refusal(settings: Settings, error: BaseException) -> str | None:
    """What to do about a failure that waiting will not cure; None where it may.

    Args:
        error: what Kafka's client raised. Brokers are asked only where it does not say enough.
    """
    if isinstance(error, _DENIED):
        return (
            f"Kafka refuses the worker a topic or group ({error}): grant what docs/security.md"
            " lists"
        )
    if not isinstance(error, KafkaError | OSError):
        return None
    return await _probe(settings)


async def _probe(settings: Settings) -> str | None:
    """Connect to the bootstrap servers, then to each broker that one of them names."""
    found = None
    for host, port, _ in collect_hosts(settings.kafka, randomize=False):
        brokers, reason = await _connect(settings, host, port)
        found = found or reason
        for broker_host, broker_port in brokers:
            _, reason = await _connect(settings, broker_host, broker_port)
            if reason is not None:
                return reason
        if brokers:
            # A client takes the first server that answers.
            return None
    return found


async def _connect(
    settings: Settings, host: str, port: int
) -> tuple[list[tuple[str, int]], str | None]:
    """Brokers known to this one, or why it refuses."""
    try:
        connection: AIOKafkaConnection = await create_conn(
            host,
            port,
            client_id="streamrec-probe",
            request_timeout_ms=PROBE_TIMEOUT_MS,
            **kafka_login(settings),
        )
    except (KafkaError, OSError, TimeoutError) as error:
        return [], _kafka_reason(settings, f"{host}:{port}", error)
    try:
        answer = await connection.send(MetadataRequest([]))
        brokers = [(broker[1], broker[2]) for broker in answer.brokers]
        if not brokers and settings.kafka_sasl_mechanism == OAUTHBEARER:
            # The client does not look at the refusal of a token; what it sends next is answered so.
            return [], _login_refused(settings, f"{host}:{port}")
        return brokers, None
    except (KafkaError, OSError, TimeoutError) as error:
        return [], _kafka_reason(settings, f"{host}:{port}", error)
    finally:
        closed = connection.close()
        if closed is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(closed, 1.0)


def _kafka_reason(settings: Settings, place: str, error: BaseException) -> str | None:
    if isinstance(error, KafkaConnectionError) and isinstance(error.__cause__, ssl.SSLError):
        error = error.__cause__  # TLS 1.3 refuses a client's certificate after the handshake
    if isinstance(error, ssl.SSLError):
        return _tls_reason("Kafka", place, error)
    if isinstance(error, SaslAuthenticationFailed):
        return _login_refused(settings, place)
    if isinstance(error, UnsupportedSaslMechanismError | IllegalSaslStateError):
        return (
            f"Kafka at {place} does not take this kind of login: correct"
            " STREAMREC_KAFKA_SASL_MECHANISM or STREAMREC_KAFKA_SECURITY"
        )
    return str(error) if isinstance(error, TokenError) else None


def _login_refused(settings: Settings, place: str) -> str:
    bearer = settings.kafka_sasl_mechanism == OAUTHBEARER
    look = (
        "the token, that is STREAMREC_KAFKA_OAUTH_..."
        if bearer
        else "STREAMREC_KAFKA_USERNAME and STREAMREC_KAFKA_PASSWORD"
    )
    return f"Kafka at {place} refuses the login: correct {look}"


def redis_refusal(place: str, error: BaseException) -> str | None:
    """What to do about a failure of Redis that waiting will not cure; None where it may.

    Args:
        place: the URL, without user and password.
    """
    # redis-py raises its own errors from the socket's.
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, ssl.SSLError):
            return _tls_reason("Redis", place, cause)
    if isinstance(error, AuthenticationError):
        return (
            f"Redis at {place} refuses the login: correct STREAMREC_REDIS_USERNAME and"
            " STREAMREC_REDIS_PASSWORD"
        )
    if isinstance(error, NoPermissionError):
        return f"Redis at {place} refuses a command: grant what docs/security.md lists"
    return None


def _tls_reason(service: str, place: str, error: ssl.SSLError) -> str | None:
    prefix = f"STREAMREC_{service.upper()}"
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _OTHER_HOST:
            return (
                f"{service} at {place} shows a certificate for another host"
                f" ({error.verify_message}): connect by a name that is in the certificate,"
                f" {prefix}"
            )
        return (
            f"{service} at {place} shows a certificate that is not trusted"
            f" ({error.verify_message}): set {prefix}_CA_FILE to the CAs that signed it"
        )
    if "ALERT" in (error.reason or ""):
        return (
            f"{service} at {place} refuses the client's certificate ({error.reason}): correct"
            f" {prefix}_CERT_FILE and {prefix}_KEY_FILE"
        )
    return None
