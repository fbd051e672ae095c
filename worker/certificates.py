"""TLS contexts from files that settings name."""

from __future__ import annotations

import ssl
from pathlib import Path

from worker.errors import SettingsError
from worker.settings import PREFIX, Settings


def tls_context(settings: Settings, service: str) -> ssl.SSLContext:
    """A context that wants a trusted certificate for the host name that is connected to.

    Args:
        service: `kafka`, `kafka_oauth` or `redis`, by which the settings begin.

    Raises:
        SettingsError: a file is missing, or not what it should be; names the setting.
    """
    context = ssl.create_default_context(cafile=_checked(settings, f"{service}_ca_file"))
    certificate = _checked(settings, f"{service}_cert_file")
    if certificate is not None:
        key = _checked(settings, f"{service}_key_file")
        try:
            # Without a password OpenSSL would ask for one, at the terminal.
            context.load_cert_chain(certificate, key, password=lambda: b"")
        except (ssl.SSLError, ValueError):
            raise SettingsError(
                f"{PREFIX}{service.upper()}_CERT_FILE, {PREFIX}{service.upper()}_KEY_FILE:"
                f" {certificate} and {key} are no certificate in PEM and its unencrypted key"
            ) from None
    return context


def _checked(settings: Settings, name: str) -> Path | None:
    """The file of a setting, which can be read; one of CAs holds some."""
    path: Path | None = getattr(settings, name, None)
    if path is None:
        return None
    variable = PREFIX + name.upper()
    try:
        path.open("rb").close()
        if name.endswith("_ca_file"):
            ssl.create_default_context(cafile=path)
    except ssl.SSLError:
        raise SettingsError(f"{variable}: {path} holds no certificates in PEM") from None
    except OSError as error:
        raise SettingsError(f"{variable}: cannot read {path}: {error.strerror}") from None
    return path
