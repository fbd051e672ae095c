"""Copies of a store's versions on this machine."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import BinaryIO

from worker.bundle_files import MAX_FILE_BYTES
from worker.checksums import Reading, check_file, verify
from worker.errors import BundleError, Refusal, StoreError
from worker.manifest import Manifest
from worker.registry import check_part, place

log = logging.getLogger(__name__)

#: What a killed process left half-made is cleared away after this; a download takes less.
_ABANDONED_S = 3600.0


class Mirror:
    """A directory `<name>/<version>/` of whole versions; several processes may share it.

    A copy appears by one rename, after every file was compared with the manifest. Whole copies are
    used again, also by the next process.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def add(
        self, manifest: Manifest, unlisted: Mapping[str, bytes], reading: Reading, where: str
    ) -> Path:
        """The directory of a version, copied unless it is there and whole.

        Args:
            manifest: of the version.
            unlisted: content of the files that it does not list: itself, and its signature.
            reading: opens the listed files by name.
            where: the version's address, for messages.

        Raises:
            BundleError: a file is missing, not what the manifest says, too large, or of a name that
                leads elsewhere.
            StoreError: the copy cannot be written.
        """
        target = self._directory / place(manifest.name, manifest.version)
        for file in manifest.files:
            check_part(file, "file name")
        size = sum(spec.bytes for spec in manifest.files.values())
        if size > MAX_FILE_BYTES:
            raise BundleError(
                f"{where} has {size} bytes; a bundle of more than {MAX_FILE_BYTES} is not copied:"
                " publish a smaller one",
                Refusal.MEMORY,
            )
        if _is_whole(target, manifest, unlisted):
            return target
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
            try:
                for file, spec in manifest.files.items():
                    with (building / file).open("wb") as sink:
                        check_file(file, spec, reading, where, _writing(sink, where, target))
                for file, content in unlisted.items():
                    (building / file).write_bytes(content)
                building.chmod(0o755)
                _put(building, target, manifest, unlisted)
            finally:
                shutil.rmtree(building, ignore_errors=True)
        except OSError as error:
            raise _cannot_copy(where, target, error) from None
        log.info("version_mirrored model=%s bytes=%d", manifest.reference, size)
        return target

    def keep(self, name: str, versions: Collection[str]) -> None:
        """Drop the copies of a model's other versions.

        Raises:
            StoreError: they cannot be removed.
        """
        check_part(name, "model name")
        try:
            for entry in [*(self._directory / name).iterdir()]:
                if entry.name.startswith("."):
                    if time.time() - entry.stat().st_mtime > _ABANDONED_S:
                        shutil.rmtree(entry)
                elif entry.name not in versions:
                    _drop(entry)
        except FileNotFoundError:
            return  # nothing was copied yet, or another process was faster
        except OSError as error:
            raise StoreError(f"{self._directory / name} cannot be cleared: {error}") from None


def _cannot_copy(where: str, target: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{where} cannot be copied to {target}: {error}; free space there, or set"
        " STREAMREC_REGISTRY_MIRROR_DIR to a directory that can be written"
    )


def _writing(sink: BinaryIO, where: str, target: Path) -> Callable[[bytes], object]:
    """Writes to `sink`; a full disk is not taken for a fault of the store that is read meanwhile.

    The function that is returned raises StoreError.
    """

    def write(chunk: bytes) -> None:
        try:
            sink.write(chunk)
        except OSError as error:
            raise _cannot_copy(where, target, error) from None

    return write


def _is_whole(directory: Path, manifest: Manifest, unlisted: Mapping[str, bytes]) -> bool:
    try:
        if {entry.name for entry in directory.iterdir()} != {*manifest.files, *unlisted}:
            return False
        if any((directory / file).read_bytes() != content for file, content in unlisted.items()):
            return False
        verify(manifest, lambda file: (directory / file).open("rb"), str(directory))
    except (OSError, BundleError):
        return False
    return True


def _drop(directory: Path) -> None:
    """Remove a version, out of sight first: half of it must not be found."""
    hidden = directory.with_name(f".dropped-{directory.name}-{time.time_ns()}")
    try:
        directory.rename(hidden)
    except FileNotFoundError:
        return
    shutil.rmtree(hidden, ignore_errors=True)


def _put(building: Path, target: Path, manifest: Manifest, unlisted: Mapping[str, bytes]) -> None:
    try:
        building.rename(target)
    except OSError:
        # What is there is of a process that was faster, and in use, or else is no good.
        if not _is_whole(target, manifest, unlisted):
            _drop(target)
            building.rename(target)
