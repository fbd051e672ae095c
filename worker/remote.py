"""A registry in any store that fsspec reaches: S3, Google Cloud Storage, Azure, sftp, ..."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from worker.errors import ExtraMissingError, StoreError, StreamrecError
from worker.manifest import MANIFEST_FILE, SIGNATURE_FILE
from worker.mirror import Mirror
from worker.registry import RELEASE_FILE, Registry, check_part, place
from worker.releases import Release, decode_release
from worker.signing import MAX_SIGNATURE_BYTES


class RemoteRegistry(Registry):
    """Any fsspec file system. A version's manifest is written last, and makes it one.

    Args:
        filesystem: an `fsspec.AbstractFileSystem`.
        root: path of the registry in it.
        url: what people call it.
        mirror_dir: where versions that are used are copied to.
    """

    def __init__(self, filesystem: Any, root: str, url: str, mirror_dir: Path) -> None:
        super().__init__(url.rstrip("/"))
        self._files = filesystem
        self._root = root.rstrip("/")
        self._mirror = Mirror(mirror_dir)

    def names(self) -> list[str]:
        """Model names, sorted."""
        return sorted({name for name, _ in self._manifests(self._root, 3)})

    def versions(self, name: str) -> list[str]:
        """Versions of a model, oldest first."""
        check_part(name, "model name")
        return sorted(version for _, version in self._manifests(f"{self._root}/{name}", 2))

    def release(self, name: str) -> Release | None:
        """What the release file says."""
        check_part(name, "model name")
        with self._reaching():
            try:
                data = self._files.cat_file(f"{self._root}/{name}/{RELEASE_FILE}")
            except FileNotFoundError:
                return None
        return decode_release(data, f"{self.url}/{name}/{RELEASE_FILE}")

    @contextmanager
    def open(self, name: str, version: str, file: str) -> Iterator[BinaryIO]:
        """Read one file of a version."""
        path = self._path(name, version, file)
        with self._reaching(FileNotFoundError), self._files.open(path, "rb") as stream:
            yield cast(BinaryIO, stream)

    def path(self, name: str, version: str) -> Path:
        """A copy of the files that the manifest lists, of itself and its signature."""
        self.require(name, version)
        content = self.manifest_bytes(name, version) or b""
        manifest = self._parsed(name, version, content)
        unlisted = {MANIFEST_FILE: content}
        with suppress(FileNotFoundError), self.open(name, version, SIGNATURE_FILE) as stream:
            # One byte more than there may be, so that who opens the copy refuses it.
            unlisted[SIGNATURE_FILE] = stream.read(MAX_SIGNATURE_BYTES + 1)
        return self._mirror.add(
            manifest,
            unlisted,
            lambda file: self.open(name, version, file),
            f"{self.url}/{name}/{version}",
        )

    def keep(self, name: str, versions: Collection[str]) -> None:
        """Drop the copies of other versions."""
        self._mirror.keep(name, versions)

    def _locked(self, name: str) -> AbstractContextManager[None]:
        """Stores have no locks."""
        return nullcontext()

    def _write_release(self, name: str, content: bytes) -> None:
        with self._reaching():
            self._files.pipe_file(f"{self._root}/{name}/{RELEASE_FILE}", content)

    def _path(self, name: str, version: str, file: str) -> str:
        return f"{self._root}/{place(name, version, file)}"

    def _manifests(self, under: str, depth: int) -> Iterator[tuple[str, str]]:
        """Name and version of each manifest, `depth` levels below `under`."""
        for path in self._find(under, depth):
            parts = path.removeprefix(self._root).strip("/").split("/")
            hidden = any(part.startswith(".") for part in parts)
            if len(parts) == 3 and parts[2] == MANIFEST_FILE and not hidden:
                yield parts[0], parts[1]

    def _find(self, under: str, depth: int | None = None) -> list[str]:
        with self._reaching():
            self._files.invalidate_cache()
            try:
                return list(self._files.find(under, maxdepth=depth))
            except FileNotFoundError:
                return []

    @contextmanager
    def _reaching(self, *expected: type[Exception]) -> Iterator[None]:
        """Turn what a driver raises into one line, but for what is `expected`. Each driver has
        errors of its own."""
        try:
            yield
        except Exception as error:
            if isinstance(error, (StreamrecError, *expected)):
                raise
            text = (str(error).strip().splitlines() or [""])[0]
            raise StoreError(
                f"{self.url} cannot be used: {type(error).__name__}: {text};"
                " check the address, the network and your credentials"
            ) from error


def connect(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        ExtraMissingError: fsspec, or the driver that the URL needs, is not installed.
        StoreError: the URL names no known kind of store.
    """
    try:
        # Of the remote extra; comes without types.
        from fsspec.core import url_to_fs  # noqa: PLC0415
    except ImportError:
        raise ExtraMissingError(f"{url} needs fsspec: pip install 'streamrec[remote]'") from None
    scheme = url.partition("://")[0]
    try:
        filesystem, root = url_to_fs(url)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or getattr(error, "name", None)
        hint = f"pip install {package}" if package else str(error)
        raise ExtraMissingError(f"{url} needs the driver for {scheme}://: {hint}") from None
    except ValueError as error:
        raise StoreError(
            f"{url} is no store: {error}; use a directory, or a URL such as s3://bucket/models"
        ) from None
    return filesystem, root
