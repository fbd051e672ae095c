"""How Kafka is connected to: the one place that knows TLS and logins, for each of its clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiokafka.abc import AbstractTokenProvider

from worker.certificates import tls_context
from worker.kafka_tokens import TokenEndpoint, TokenFile
from worker.security import OAUTHBEARER, parse_extensions
from worker.settings import Settings

if TYPE_CHECKING:
    from faust.auth import Credentials


def kafka_client(settings: Settings) -> dict[str, Any]:
    """Arguments of an aiokafka client: where Kafka is, TLS, and the login.

    Raises:
        SettingsError: a file of certificates is missing or broken.
    """
    return {"bootstrap_servers": settings.kafka, **kafka_login(settings)}


def kafka_login(settings: Settings) -> dict[str, Any]:
    """The same without where Kafka is, as `aiokafka.conn.create_conn` takes it.

    Raises:
        SettingsError: a file of certificates is missing or broken.
    """
    arguments: dict[str, Any] = {"security_protocol": settings.kafka_security.upper()}
    if settings.kafka_security.endswith("ssl"):
        arguments["ssl_context"] = tls_context(settings, "kafka")
    if not settings.kafka_security.startswith("sasl_"):
        return arguments
    arguments["sasl_mechanism"] = settings.kafka_sasl_mechanism
    if settings.kafka_sasl_mechanism == OAUTHBEARER:
        arguments["sasl_oauth_token_provider"] = _tokens(settings)
    else:
        arguments["sasl_plain_username"] = settings.kafka_username
        arguments["sasl_plain_password"] = settings.kafka_password.get_secret_value()
    return arguments


def faust_credentials(settings: Settings) -> Credentials | None:
    """The same as Faust takes it; None for a plain connection.

    Raises:
        SettingsError: a file of certificates is missing or broken.
    """
    from faust.auth import OAuthCredentials, SASLCredentials, SSLCredentials  # noqa: PLC0415 - slow

    login = kafka_login(settings)
    context = login.get("ssl_context")
    if "sasl_oauth_token_provider" in login:
        return OAuthCredentials(oauth_cb=login["sasl_oauth_token_provider"], ssl_context=context)
    if "sasl_mechanism" in login:
        return SASLCredentials(
            username=login["sasl_plain_username"],
            password=login["sasl_plain_password"],
            mechanism=login["sasl_mechanism"],
            ssl_context=context,
        )
    return None if context is None else SSLCredentials(context)


def _tokens(settings: Settings) -> AbstractTokenProvider:
    extensions = parse_extensions(settings.kafka_oauth_extensions)
    if settings.kafka_oauth_token_file is not None:
        return TokenFile(settings.kafka_oauth_token_file, extensions)
    return TokenEndpoint(
        settings.kafka_oauth_token_url,
        settings.kafka_oauth_client_id,
        settings.kafka_oauth_client_secret.get_secret_value(),
        scope=settings.kafka_oauth_scope,
        context=tls_context(settings, "kafka_oauth"),
        extensions=extensions,
    )
