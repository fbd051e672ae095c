"""Whether a bundle's files are the ones that its manifest lists."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import BinaryIO

from worker.errors import BundleError, Refusal
from worker.manifest import FileSpec, Manifest

#: Opens a file of a bundle by its name; FileNotFoundError where it is missing.
Reading = Callable[[str], AbstractContextManager[BinaryIO]]
_CHUNK = 1 << 20


def verify(manifest: Manifest, reading: Reading, where: str) -> None:
    """Read every file and compare it with `manifest`.

    Raises:
        BundleError: one is missing, or not what the manifest says.
    """
    for file, spec in manifest.files.items():
        check_file(file, spec, reading, where)


def check_file(
    file: str,
    spec: FileSpec,
    reading: Reading,
    where: str,
    write: Callable[[bytes], object] | None = None,
) -> None:
    """Read one file, hand it to `write` on the way, and compare it with `spec`.

    A file that is too large is read, and copied, up to a little more than it should have.

    Raises:
        BundleError: it is missing, or not what `spec` says.
    """
    try:
        with reading(file) as stream:
            found = _difference(stream, spec, write)
    except FileNotFoundError:
        found = ("is missing", Refusal.FILES)
    if found is not None:
        problem, reason = found
        raise BundleError(
            f"{where} is damaged: {file} {problem}; publish it again under another version", reason
        )


def _difference(
    stream: BinaryIO, spec: FileSpec, write: Callable[[bytes], object] | None
) -> tuple[str, Refusal] | None:
    digest, size = hashlib.sha256(), 0
    while size <= spec.bytes and (chunk := stream.read(_CHUNK)):
        digest.update(chunk)
        size += len(chunk)
        if write is not None:
            write(chunk)
    if size > spec.bytes:
        return f"has more than the {spec.bytes} bytes that the manifest says", Refusal.FILES
    if size < spec.bytes:
        return f"has {size} bytes, the manifest says {spec.bytes}", Refusal.FILES
    if digest.hexdigest() != spec.sha256.lower():
        return f"is not the file that was published (sha256 {digest.hexdigest()})", Refusal.CHECKSUM
    return None
