"""Where bundles are published: a registry that versions can be added to.

What each kind guarantees is in docs/publish.md.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

from worker.bundle_files import write_durably
from worker.checksums import verify
from worker.errors import StoreError, StreamrecError
from worker.manifest import MANIFEST_FILE, decode_manifest
from worker.registry import LocalRegistry, Registry, local_directory, sync_directory
from worker.remote import RemoteRegistry, connect


class Store(Registry):
    """A registry that versions can be added to."""

    @abstractmethod
    def write(self, name: str, version: str, files: Mapping[str, Path], manifest: bytes) -> None:
        """Add a version: copy `files` there, check them against `manifest`, then show it.

        Raises:
            BundleError: the copies are not what the manifest says.
            VersionExistsError: another publisher was faster.
        """


class VersionExistsError(StreamrecError):
    """A version is there already; versions are never overwritten."""

    exit_code = 73  # EX_CANTCREAT


class LocalStore(LocalRegistry, Store):
    """A directory of this machine. A version appears by one rename."""

    def write(self, name: str, version: str, files: Mapping[str, Path], manifest: bytes) -> None:
        """Add a version by one rename."""
        parent = self.root / name
        try:
            parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=f".{version}.", dir=parent))
            try:
                for file, source in files.items():
                    write_durably(building / file, source.read_bytes())
                write_durably(building / MANIFEST_FILE, manifest)
                verify(
                    decode_manifest(manifest, MANIFEST_FILE),
                    lambda file: (building / file).open("rb"),
                    str(building),
                )
                building.chmod(0o755)
                sync_directory(building)
                _rename(building, parent / version)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            sync_directory(parent)
        except OSError as error:
            raise StoreError(f"{parent / version} cannot be written: {error}") from None


class RemoteStore(RemoteRegistry, Store):
    """Any fsspec file system. Files go first, the manifest last."""

    def write(self, name: str, version: str, files: Mapping[str, Path], manifest: bytes) -> None:
        """Add a version: its manifest, written last, is what makes it one.

        What an interrupted upload left is replaced.
        """
        listed = {self._path(name, version, file): source for file, source in files.items()}
        final = self._path(name, version, MANIFEST_FILE)
        with self._reaching():
            for path, source in listed.items():
                self._files.put_file(str(source), path)
            for stray in self._find(final.rpartition("/")[0]):
                if stray not in listed and stray != final:
                    self._files.rm_file(stray)
        expected = decode_manifest(manifest, MANIFEST_FILE)
        self.verify(name, version, expected)
        # An unreadable manifest is what a store without atomic writes keeps of an interrupted one.
        mode = "create" if self.manifest_bytes(name, version) is None else "overwrite"
        try:
            with self._reaching(FileExistsError):
                self._files.pipe_file(final, manifest, mode=mode)
        except FileExistsError:
            raise VersionExistsError(
                f"{self.url}/{name}/{version} was published by another at the same time;"
                " choose another with --version"
            ) from None
        # Once more: another publisher may have replaced files meanwhile.
        self.verify(name, version, expected)


def open_store(url: str, mirror_dir: Path) -> Store:
    """The store at a directory or fsspec URL; see `worker.registry.open_registry`.

    Raises:
        ExtraMissingError: fsspec, or the driver that the URL needs, is not installed.
        StoreError: the URL names no known kind of store.
    """
    directory = local_directory(url)
    if directory is not None:
        return LocalStore(directory)
    return RemoteStore(*connect(url), url, mirror_dir)


def _rename(building: Path, target: Path) -> None:
    try:
        # Replaces an empty directory, and nothing else.
        building.rename(target)
    except OSError:
        if not target.exists():
            raise
        raise VersionExistsError(
            f"{target} exists; versions are never overwritten: choose another with --version,"
            " or remove it where it is the rest of a copy"
        ) from None
