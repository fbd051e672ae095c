"""A token endpoint on loopback that signs JWTs, and the key that a broker checks them by."""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote_plus

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

AUDIENCE, ISSUER, SCOPE = "kafka", "https://id.test", "events"


class TokenIssuer:
    """Gives tokens of `life_s` seconds to the one client that it knows, over TLS."""

    def __init__(self, certificate: tuple[Path, Path], client: str, secret: str) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._client = client, secret
        self.life_s = 300
        self.given = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*certificate)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_port}/oauth2/token"

    def write_keys(self, file: Path) -> None:
        """The public key as a JSON web key set."""
        numbers = self._key.public_key().public_numbers()
        key = {"kty": "RSA", "kid": "test", "use": "sig", "alg": "RS256"}
        for name, number in (("n", numbers.n), ("e", numbers.e)):
            key[name] = _encoded(number.to_bytes((number.bit_length() + 7) // 8, "big"))
        file.write_text(json.dumps({"keys": [key]}))

    def token(self, subject: str, life_s: float) -> str:
        """A signed token."""
        now = int(time.time())
        head = {"alg": "RS256", "kid": "test", "typ": "JWT"}
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": subject,
            "scope": SCOPE,
            "iat": now,
            "exp": int(now + life_s),
        }
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in (head, claims))
        signature = self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{signed}.{_encoded(signature)}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                login = base64.b64decode(self.headers["Authorization"].removeprefix("Basic "))
                client, _, secret = login.decode().partition(":")
                form = parse_qs(body)
                if (unquote_plus(client), unquote_plus(secret)) != issuer._client:
                    # An echo of what was sent must not reach a log.
                    self._answer(401, {"error": "invalid_client", "error_description": secret})
                elif form != {"grant_type": ["client_credentials"], "scope": [SCOPE]}:
                    self._answer(400, {"error": "invalid_scope"})
                else:
                    issuer.given += 1
                    token = issuer.token(client, issuer.life_s)
                    self._answer(200, {"access_token": token, "expires_in": issuer.life_s})

            def _answer(self, status: int, body: dict[str, object]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler

    def __enter__(self) -> TokenIssuer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
