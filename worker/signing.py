"""Signatures of bundles: `manifest.sig` signs the bytes of `manifest.json` by Ed25519 (RFC 8032).

The manifest has the checksums of all files, so this signs the whole bundle. The signature file
holds one signature a line, base64, so that two keys may sign while one replaces the other.

Needs the `signed` extra (the package `cryptography`); nothing is imported before a key is used.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from worker.errors import BundleError, ExtraMissingError, Refusal, SettingsError
from worker.manifest import SIGNATURE_FILE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_SIGNATURE_BYTES = 4096
_KEY_BYTES = 32
_SIGNATURE_BYTES = 64


def parse_public_key(text: str) -> bytes:
    """The 32 bytes of a public key, from the base64 of them that `streamrec models keygen` prints.

    Raises:
        SettingsError: it is none.
    """
    key = _from_base64(text)
    if len(key) != _KEY_BYTES:
        raise SettingsError(
            f"{text[:100]!r} is not a public key: give the line that `streamrec models keygen`"
            " printed, 32 bytes in base64"
        )
    return key


def check_signature(
    manifest: bytes, signatures: bytes | None, public_keys: Sequence[bytes]
) -> None:
    """Whether one of `public_keys` signed `manifest`.

    Args:
        manifest: the bytes of `manifest.json`.
        signatures: those of `manifest.sig`; None where there is no such file.
        public_keys: of 32 bytes each; a bundle signed by any of them is trusted.

    Raises:
        BundleError: none did.
        ExtraMissingError: the extra `signed` is not installed.
    """
    ed25519 = _ed25519()
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415

    if signatures is None:
        raise BundleError(
            f"it is not signed (no {SIGNATURE_FILE}), and only signed bundles are trusted here:"
            " sign it (streamrec models sign)",
            Refusal.SIGNATURE,
        )
    lines = [_from_base64(line) for line in signatures.decode("ascii", "replace").split()]
    for key in public_keys:
        for signature in lines:
            try:
                ed25519.Ed25519PublicKey.from_public_bytes(key).verify(signature, manifest)
            except InvalidSignature:
                continue
            return
    raise BundleError(
        f"{SIGNATURE_FILE} holds no signature of this manifest by a trusted key: the bundle was"
        " changed after signing, or signed by a key that is not trusted here",
        Refusal.SIGNATURE,
    )


def sign(manifest: bytes, private_key: Ed25519PrivateKey) -> str:
    """A line of `manifest.sig`: base64 of the 64 bytes of the signature."""
    return base64.b64encode(private_key.sign(manifest)).decode("ascii")


def generate_key(path: Path) -> str:
    """Make a key pair; write the private key to `path`, PEM, readable by its owner only.

    Returns:
        The public key, as `parse_public_key` reads it.

    Raises:
        SettingsError: `path` exists, or cannot be written.
        ExtraMissingError: the extra `signed` is not installed.
    """
    ed25519 = _ed25519()
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(file, "wb") as writing:
            writing.write(pem)
    except FileExistsError:
        raise SettingsError(f"{path} exists; keys are never overwritten") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from None
    return public_key_of(key)


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Read what `generate_key` wrote.

    Raises:
        SettingsError: it is missing, or not such a key.
        ExtraMissingError: the extra `signed` is not installed.
    """
    ed25519 = _ed25519()
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise SettingsError(f"{path} is not a private key made by `streamrec models keygen`")
    return cast("Ed25519PrivateKey", key)


def public_key_of(key: Ed25519PrivateKey) -> str:
    """The public key in base64."""
    return base64.b64encode(key.public_key().public_bytes_raw()).decode("ascii")


def _from_base64(text: str) -> bytes:
    """Empty where it is none."""
    try:
        return base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        return b""


def _ed25519() -> ModuleType:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
    except ImportError:
        raise ExtraMissingError(
            "signatures need the package cryptography: pip install 'streamrec[signed]'"
        ) from None
    return ed25519
