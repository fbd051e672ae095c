"""Do the settings of TLS and logins fit together? Pure: opens no file, connects to nothing.

A login that would not be used, or certificates on a connection without TLS, are errors: whoever
set them believes that the connection is safer than it is.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from worker.settings import Settings

#: How a client says who it is, as Kafka names it.
OAUTHBEARER = "OAUTHBEARER"
_OAUTH_ENDPOINT = (
    "kafka_oauth_token_url", "kafka_oauth_client_id", "kafka_oauth_client_secret",
)  # fmt: skip
_OAUTH = (
    *_OAUTH_ENDPOINT, "kafka_oauth_token_file", "kafka_oauth_scope", "kafka_oauth_ca_file",
    "kafka_oauth_extensions",
)  # fmt: skip
_LOGIN = ("kafka_username", "kafka_password")


def problems(settings: Settings) -> Iterator[str]:
    """A sentence for each contradiction; each names the settings."""
    yield from _kafka_problems(settings)
    yield from _redis_problems(settings)


def cleartext(settings: Settings) -> Iterator[str]:
    """A sentence for each login that would cross a network unencrypted."""
    if settings.kafka_security == "sasl_plaintext":
        far = [one for one in settings.kafka.split(",") if not is_loopback(_host(one))]
        if far:
            yield (
                f"Kafka at {','.join(far)} is logged in to without TLS: set"
                " STREAMREC_KAFKA_SECURITY=sasl_ssl"
            )
    redis = urlsplit(settings.redis.get_secret_value())
    if (has_password(redis.geturl()) or settings.redis_password) and (
        redis.scheme == "redis" and not is_loopback(redis.hostname or "")
    ):
        yield (
            f"Redis at {redis.hostname} is sent its password without TLS: use rediss:// in"
            " STREAMREC_REDIS"
        )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def has_password(address: str) -> bool:
    """Whether a URL holds a password; what is no URL holds none."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return bool(parts.password) or "password" in parse_qs(parts.query)


def without_credentials(address: str) -> str:
    """A URL without user, password and query, which may hold them; other text as it is."""
    if "://" not in address:
        return address
    try:
        parts = urlsplit(address)
    except ValueError:
        return "hidden"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def parse_extensions(text: str) -> dict[str, str]:
    """SASL extensions of OAUTHBEARER: `name=value,...` (RFC 7628).

    Raises:
        ValueError: another form.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.isascii() or not name.isalpha() or not value.isprintable():
            raise ValueError(f"{part!r} is not name=value with a name of letters")
        found[name] = value
    return found


def _kafka_problems(settings: Settings) -> Iterator[str]:
    security, mechanism = settings.kafka_security, settings.kafka_sasl_mechanism
    chosen = f"STREAMREC_KAFKA_SECURITY={security}"
    if not security.startswith("sasl_"):
        yield from _unused(settings, ("kafka_sasl_mechanism", *_LOGIN, *_OAUTH), chosen)
    elif mechanism is None:
        yield f"STREAMREC_KAFKA_SASL_MECHANISM must be set with {chosen}"
    elif mechanism == OAUTHBEARER:
        yield from _unused(settings, _LOGIN, f"STREAMREC_KAFKA_SASL_MECHANISM={mechanism}")
        yield from _oauth_problems(settings)
    else:
        said = f"STREAMREC_KAFKA_SASL_MECHANISM={mechanism}"
        yield from _missing(settings, _LOGIN, said)
        yield from _unused(settings, _OAUTH, said)
    if not security.endswith("ssl"):
        files = ("kafka_ca_file", "kafka_cert_file", "kafka_key_file")
        yield from _unused(settings, files, chosen)
    yield from _pair_problems(settings, "kafka")


def _oauth_problems(settings: Settings) -> Iterator[str]:
    if _is_set(settings, "kafka_oauth_token_file"):
        others = (*_OAUTH_ENDPOINT, "kafka_oauth_scope", "kafka_oauth_ca_file")
        yield from _unused(settings, others, "STREAMREC_KAFKA_OAUTH_TOKEN_FILE")
        return
    said = "STREAMREC_KAFKA_SASL_MECHANISM=OAUTHBEARER without STREAMREC_KAFKA_OAUTH_TOKEN_FILE"
    yield from _missing(settings, _OAUTH_ENDPOINT, said)
    url = urlsplit(settings.kafka_oauth_token_url)
    if settings.kafka_oauth_token_url and not (
        url.hostname
        and (url.scheme == "https" or (url.scheme == "http" and is_loopback(url.hostname)))
    ):
        yield (
            "STREAMREC_KAFKA_OAUTH_TOKEN_URL must be an https:// address, since the client secret"
            " is sent there"
        )


def _redis_problems(settings: Settings) -> Iterator[str]:
    try:
        url = urlsplit(settings.redis.get_secret_value())
    except ValueError as error:
        yield f"STREAMREC_REDIS is not a URL: {error}"
        return
    if url.scheme != "rediss":
        files = ("redis_ca_file", "redis_cert_file", "redis_key_file")
        yield from _unused(settings, files, "STREAMREC_REDIS that does not begin with rediss://")
    yield from _pair_problems(settings, "redis")
    if has_password(url.geturl()) and _is_set(settings, "redis_password"):
        yield "STREAMREC_REDIS holds a password and STREAMREC_REDIS_PASSWORD is set: use one"
    if _is_set(settings, "redis_username") and not _is_set(settings, "redis_password"):
        yield "STREAMREC_REDIS_PASSWORD must be set with STREAMREC_REDIS_USERNAME"


def _pair_problems(settings: Settings, service: str) -> Iterator[str]:
    pair = (f"{service}_cert_file", f"{service}_key_file")
    for name, other in (pair, pair[::-1]):
        if _is_set(settings, name) and not _is_set(settings, other):
            yield f"{_variable(other)} must be set with {_variable(name)}"


def _unused(settings: Settings, names: tuple[str, ...], said: str) -> Iterator[str]:
    for name in names:
        if _is_set(settings, name):
            yield f"{_variable(name)} is set and is not used with {said}"


def _missing(settings: Settings, names: tuple[str, ...], said: str) -> Iterator[str]:
    for name in names:
        if not _is_set(settings, name):
            yield f"{_variable(name)} must be set with {said}"


def _is_set(settings: Settings, name: str) -> bool:
    # An empty secret has the length 0.
    return bool(getattr(settings, name))


def _variable(name: str) -> str:
    return "STREAMREC_" + name.upper()


def _host(address: str) -> str:
    """Host of `host`, `host:port` or `[address]:port`."""
    host, colon, port = address.strip().rpartition(":")
    return (host if colon and port.isdecimal() else address.strip()).strip("[]")
