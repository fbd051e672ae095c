"""How Redis is connected to: TLS, and a user that is not in the URL."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from worker.certificates import tls_context
from worker.security import without_credentials
from worker.settings import Settings


def redis_login(settings: Settings) -> dict[str, Any]:
    """Further arguments of `Redis.from_url`.

    Raises:
        SettingsError: a file of certificates is missing or broken.
    """
    arguments: dict[str, Any] = {}
    if settings.redis_username:
        arguments["username"] = settings.redis_username
    if password := settings.redis_password.get_secret_value():
        arguments["password"] = password
    if urlsplit(settings.redis.get_secret_value()).scheme == "rediss":
        tls_context(settings, "redis")  # says what is wrong with the files
        arguments |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
        for argument, path in (
            ("ssl_ca_certs", settings.redis_ca_file),
            ("ssl_certfile", settings.redis_cert_file),
            ("ssl_keyfile", settings.redis_key_file),
        ):
            if path is not None:
                arguments[argument] = str(path)
    return arguments


def shown_url(settings: Settings) -> str:
    """The Redis URL without user, password and options."""
    return without_credentials(settings.redis.get_secret_value())
