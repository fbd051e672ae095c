"""Tokens for OAUTHBEARER: asked for at an endpoint (client credentials, RFC 6749), or from a file.

A token is asked for when a connection is made, and kept for most of its life; no connection is
closed for a new one. A broker that wants new tokens at running connections
(`connections.max.reauth.ms`) closes them, and the client connects again.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import re
import ssl
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote_plus, urlencode, urlsplit

import msgspec
from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import KafkaError

#: Longest wait for the endpoint, and the largest answer that is read.
TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 65_536
#: A token is asked for anew when this share of its life is over.
USED_SHARE = 0.8
#: Life of a token whose endpoint says none.
DEFAULT_LIFE_S = 300.0
_ERROR_CODE = re.compile(r"[A-Za-z0-9_]{1,64}").fullmatch


class TokenError(KafkaError):  # type: ignore[misc]
    """There is no token. The message names the setting, and holds no secret.

    A `KafkaError`, so that Kafka's clients take it for a connection that failed, and try again.
    """


class Answer(msgspec.Struct):
    """What the endpoint says: a token, or the code of an error."""

    access_token: str = ""
    expires_in: float = DEFAULT_LIFE_S
    error: str = ""


class TokenProvider(AbstractTokenProvider):  # type: ignore[misc]
    """Base: reads tokens in a thread, since Kafka's clients ask from several event loops.

    Args:
        extensions: SASL extensions, sent with each token.
    """

    def __init__(self, extensions: Mapping[str, str]) -> None:
        self._extensions = dict(extensions)

    async def token(self) -> str:
        """A token that is valid now.

        Raises:
            TokenError: there is none.
        """
        return await asyncio.to_thread(self.read)

    def read(self) -> str:
        """The same; blocks."""
        raise NotImplementedError

    def extensions(self) -> dict[str, str]:
        """SASL extensions."""
        return self._extensions


class TokenFile(TokenProvider):
    """Reads a token from a file that something else renews, such as a Kubernetes volume."""

    def __init__(self, path: Path, extensions: Mapping[str, str]) -> None:
        super().__init__(extensions)
        self._path = path

    def read(self) -> str:
        """What is in the file now, without white space around it."""
        name = "STREAMREC_KAFKA_OAUTH_TOKEN_FILE"
        try:
            token = self._path.read_text(encoding="ascii").strip()
        except OSError as error:
            raise TokenError(f"{name}: cannot read {self._path}: {error.strerror}") from None
        except UnicodeDecodeError:
            token = ""
        if not token or not token.isprintable():
            raise TokenError(f"{name}: {self._path} holds no token")
        return token


class TokenEndpoint(TokenProvider):
    """Asks an endpoint for tokens, with a client's id and secret.

    Args:
        context: for an `https://` address.
    """

    def __init__(
        self,
        url: str,
        client_id: str,
        client_secret: str,
        *,
        scope: str,
        context: ssl.SSLContext,
        extensions: Mapping[str, str],
    ) -> None:
        super().__init__(extensions)
        self._url = url
        self._scope = scope
        self._context = context
        # RFC 6749, 2.3.1: both form-encoded, then as HTTP Basic.
        login = f"{quote_plus(client_id)}:{quote_plus(client_secret)}"
        self._authorization = "Basic " + base64.b64encode(login.encode()).decode()
        self._lock = threading.Lock()
        self._token = ""
        self._ask_at = 0.0

    def read(self) -> str:
        """The token kept, or a new one where most of its life is over."""
        with self._lock:
            if time.monotonic() >= self._ask_at:
                asked_at = time.monotonic()
                answer = self._ask()
                self._token = answer.access_token
                self._ask_at = asked_at + USED_SHARE * answer.expires_in
            return self._token

    def _ask(self) -> Answer:
        try:
            status, body = self._post()
        except ssl.SSLCertVerificationError as error:
            raise TokenError(
                f"{self._url} shows a certificate that is not trusted ({error.verify_message}):"
                " correct STREAMREC_KAFKA_OAUTH_CA_FILE"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise TokenError(
                f"STREAMREC_KAFKA_OAUTH_TOKEN_URL: {self._url} does not answer"
                f" ({type(error).__name__})"
            ) from None
        try:
            answer = msgspec.json.decode(body, type=Answer)
        except msgspec.MsgspecError:
            answer = Answer()
        if status != http.client.OK or not answer.access_token.isprintable():
            answer.access_token = ""
        if answer.access_token:
            return answer
        # Only what is a code: an answer may repeat what was sent.
        code = f", {answer.error}" if _ERROR_CODE(answer.error) else ""
        raise TokenError(
            f"{self._url} gives no token (HTTP {status}{code}): correct"
            " STREAMREC_KAFKA_OAUTH_CLIENT_ID and STREAMREC_KAFKA_OAUTH_CLIENT_SECRET, or the scope"
        )

    def _post(self) -> tuple[int, bytes]:
        """Never follows a redirect: the secret goes to the address that was set, and no other."""
        url = urlsplit(self._url)
        form = {"grant_type": "client_credentials"}
        if self._scope:
            form["scope"] = self._scope
        assert url.hostname is not None
        connection = (
            http.client.HTTPSConnection(
                url.hostname, url.port, timeout=TIMEOUT_S, context=self._context
            )
            if url.scheme == "https"
            else http.client.HTTPConnection(url.hostname, url.port, timeout=TIMEOUT_S)
        )
        try:
            connection.request(
                "POST",
                (url.path or "/") + (f"?{url.query}" if url.query else ""),
                urlencode(form),
                {
                    "Authorization": self._authorization,
                    "Content-Type": "application/x-www-form-urlencoded",
                    "Accept": "application/json",
                },
            )
            answer = connection.getresponse()
            return answer.status, answer.read(MAX_ANSWER_BYTES)
        finally:
            connection.close()
