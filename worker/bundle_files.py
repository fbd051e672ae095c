"""The files of a bundle, opened so that nothing outside it is read and nothing changes unseen.

Each file is opened once, relative to the bundle's directory, and never through a link. Whatever
reads it gets its bytes in chunks that are hashed on the way: what was checked is what is used.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from worker.errors import BundleError, Refusal
from worker.manifest import (
    ITEMS_FILE,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    MODEL_FILE,
    SIGNATURE_FILE,
    FileSpec,
    Manifest,
    decode_manifest,
)

#: Largest single file that is opened; protobuf, the form of ONNX, ends there anyway.
MAX_FILE_BYTES = (2 << 30) - 1
MAX_FILES = 64
_CHUNK = 1 << 20
#: A path component that is a link is not followed; a FIFO does not block.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class BundleFiles:
    """An open bundle directory; a context manager.

    Raises:
        BundleError: `path` is no directory.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{path} is not a directory that can be read; a bundle is one (docs/bundle.md):"
                f" {_why(error)}",
                Refusal.MISSING,
            ) from None
        self._closing = ExitStack()
        self._closing.callback(os.close, self._directory)
        self._open: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()

    def whole(self, name: str, limit: int) -> bytes:
        """A small file that the manifest does not list.

        Raises:
            BundleError: it is missing, no plain file, or has more than `limit` bytes.
        """
        file, _ = self._file(name)
        try:
            data = bytearray()
            while len(data) <= limit and (chunk := _read(file, len(data), name)):
                data += chunk
        finally:
            os.close(self._open.pop(name))
        if len(data) > limit:
            raise BundleError(f"{name} has more than {limit} bytes", Refusal.MEMORY)
        return bytes(data)

    def has(self, name: str) -> bool:
        """Whether there is anything of that name."""
        return name in self._names()

    def _names(self) -> set[str]:
        with os.scandir(self._directory) as entries:
            return {entry.name for entry in entries}

    def check_listing(self, manifest: Manifest) -> None:
        """Whether the directory has the files of `manifest`, of their sizes, and no others.

        Raises:
            BundleError: it has not; the first problem.
        """
        for required in (MODEL_FILE, ITEMS_FILE):
            if required not in manifest.files:
                raise BundleError(f"the manifest lists no {required}", Refusal.FILES)
        if len(manifest.files) > MAX_FILES:
            raise BundleError(
                f"the manifest lists {len(manifest.files)} files; a bundle has at most {MAX_FILES}",
                Refusal.FILES,
            )
        for name, spec in manifest.files.items():
            if not _is_plain(name):
                raise BundleError(
                    f"file name {name[:200]!r} is not a plain name inside the bundle", Refusal.PATH
                )
            self._check_size(name, spec)
        listed = {*manifest.files, MANIFEST_FILE, SIGNATURE_FILE}
        unlisted = sorted(self._names() - listed)
        if unlisted:
            raise BundleError(
                f"not listed in the manifest: {', '.join(map(ascii, unlisted[:5]))}", Refusal.FILES
            )

    def _check_size(self, name: str, spec: FileSpec) -> None:
        if not 0 <= spec.bytes <= MAX_FILE_BYTES:
            raise BundleError(
                f"{name} has {spec.bytes} bytes by the manifest; at most {MAX_FILE_BYTES} are"
                " opened: make the model smaller (streamrec models compress)",
                Refusal.MEMORY,
            )
        size = self._file(name)[1]
        if size != spec.bytes:
            raise BundleError(
                f"{name} has {size} bytes, the manifest says {spec.bytes}: it was cut short, or"
                " changed after publishing",
                Refusal.FILES,
            )

    def chunks(self, name: str, spec: FileSpec, *, verify: bool) -> Iterator[bytes]:
        """The bytes of a listed file, from its start.

        Args:
            verify: compare them with the checksum of `spec` after the last chunk.

        Raises:
            BundleError: the file cannot be read, or its bytes are not those that `spec` says.
        """
        file, _ = self._file(name)
        digest, offset = hashlib.sha256(), 0
        while offset <= spec.bytes and (chunk := _read(file, offset, name)):
            if verify:
                digest.update(chunk)
            offset += len(chunk)
            yield chunk
        if offset != spec.bytes:
            raise BundleError(f"{name} changed its size while it was read", Refusal.FILES)
        if verify and digest.hexdigest() != spec.sha256.lower():
            raise BundleError(
                f"{name} is not the file that was published (sha256 {digest.hexdigest()}): copy"
                " the bundle again",
                Refusal.CHECKSUM,
            )

    def _file(self, name: str) -> tuple[int, int]:
        """Descriptor and size of a plain file; opened once."""
        if name not in self._open:
            with _named(name):
                self._open[name] = os.open(name, _FLAGS, dir_fd=self._directory)
            self._closing.callback(self._close, name)
        found = os.fstat(self._open[name])
        if not stat.S_ISREG(found.st_mode):
            raise BundleError(
                f"{name} is no plain file; bundles hold nothing but those", Refusal.PATH
            )
        return self._open[name], found.st_size

    def _close(self, name: str) -> None:
        if name in self._open:
            os.close(self._open.pop(name))


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the bundle at `path`.

    Raises:
        BundleError: it is missing, too large, not JSON, or not of the manifest's form.
    """
    with BundleFiles(path) as files:
        return decode_manifest(read_manifest_bytes(files, path), path / MANIFEST_FILE)


def read_manifest_bytes(files: BundleFiles, path: Path) -> bytes:
    """The manifest as it lies in the bundle; `path` is for the message.

    Raises:
        BundleError: it is missing, no plain file, or too large.
    """
    try:
        return files.whole(MANIFEST_FILE, MAX_MANIFEST_BYTES)
    except BundleError as error:
        raise BundleError(f"{path}: {error}", error.reason) from None


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that outlives a power cut."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _is_plain(name: str) -> bool:
    reserved = {"", ".", "..", MANIFEST_FILE, SIGNATURE_FILE}
    return name not in reserved and not set(name) & {"/", "\\", "\0"} and name.isprintable()


def _read(file: int, offset: int, name: str) -> bytes:
    with _named(name):
        return os.pread(file, _CHUNK, offset)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of the system as `BundleError`s that name the file."""
    try:
        yield
    except FileNotFoundError:
        raise BundleError(
            f"{name} is missing: the directory is no bundle, or was not written to the end",
            Refusal.MISSING,
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BundleError(
                f"{name} is a link; bundles hold plain files, so copy what it leads to",
                Refusal.SYMLINK,
            ) from None
        raise BundleError(f"{name} cannot be read: {_why(error)}", Refusal.MISSING) from None


def _why(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
