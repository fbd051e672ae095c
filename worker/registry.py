"""Find bundles: `<registry>/<model name>/<version>/`, and which version should serve.

A version is a directory with a manifest; since bundles appear by one rename, it is whole. Versions
sort by name, so names begin with the time (`20261124T1030Z-int8`). `release.json` beside them names
the promoted version and those promoted before it; without it the newest serves.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from worker.bundle import MANIFEST_FILE, write_durably
from worker.errors import BundleError

RELEASE_FILE = "release.json"
LOCK_FILE = ".release.lock"
#: Promotions that `release.json` remembers.
MAX_HISTORY = 20


class Promotion(msgspec.Struct, frozen=True, omit_defaults=True):
    """One change of the version that serves."""

    version: str
    #: RFC 3339; empty where a release without history did not say.
    at: str = ""
    #: Who did it, as `user@host`.
    by: str = ""
    #: Whether it went back to a version promoted before.
    rollback: bool = False


class Release(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which version should serve, and which did before, oldest first."""

    stable: str
    history: list[Promotion] = []


def names(registry: Path) -> list[str]:
    """Model names in the registry, sorted."""
    if not registry.is_dir():
        raise BundleError(
            f"the registry {registry} is not a directory; set STREAMREC_REGISTRY to the one that"
            " holds <model name>/<version>/"
        )
    return sorted(
        entry.name
        for entry in registry.iterdir()
        if not entry.name.startswith(".") and versions(registry, entry.name)
    )


def versions(registry: Path, name: str) -> list[str]:
    """Versions of a model, oldest first; empty where there is none."""
    check_part(name, "model name")
    try:
        entries = list((registry / name).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BundleError(f"{registry / name} cannot be read: {error.strerror}") from None
    return sorted(
        entry.name
        for entry in entries
        if not entry.name.startswith(".") and (entry / MANIFEST_FILE).is_file()
    )


def find(registry: Path, name: str, version: str) -> Path:
    """Directory of one version.

    Raises:
        BundleError: there is no such version; the message lists those that exist.
    """
    require_version(version, versions(registry, name), registry, name)
    return registry / name / version


def serving_version(registry: Path, name: str, pinned: str | None = None) -> str:
    """The version that should serve: the pinned one, else the promoted, else the newest.

    Raises:
        BundleError: there is none, or the release file is damaged.
    """
    if pinned is not None:
        return find(registry, name, pinned).name
    # The release first: a version published and promoted in between is then among the versions.
    release = read_release(registry, name)
    return choose_serving(release, versions(registry, name), registry, name)


def choose_serving(
    release: Release | None, known: Sequence[str], registry: Path | str, name: str
) -> str:
    """The promoted version, else the newest of `known`.

    Raises:
        BundleError: there is none, or the promoted one is not among `known`.
    """
    if release is not None:
        return require_version(release.stable, known, registry, name)
    if not known:
        raise BundleError(
            f"no bundle {registry}/{name}/<version>: set STREAMREC_REGISTRY and STREAMREC_MODELS,"
            " or publish one"
        )
    return known[-1]


def require_version(version: str, known: Sequence[str], registry: Path | str, name: str) -> str:
    """`version`, where it is among `known`.

    Raises:
        BundleError: it is not; the message lists those that are.
    """
    check_part(version, "version")
    if version not in known:
        listing = ", ".join(known) if known else "no version at all"
        raise BundleError(
            f"{registry} has no version {version!r} of model {name!r}; it has {listing}"
        )
    return version


def read_release(registry: Path, name: str) -> Release | None:
    """What `release.json` says; None where nothing was promoted yet.

    Raises:
        BundleError: it is damaged or cannot be read.
    """
    check_part(name, "model name")
    file = registry / name / RELEASE_FILE
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}") from None
    return decode_release(data, file)


def decode_release(data: bytes, where: Path | str) -> Release:
    """Parse a release file; `where` is for the message.

    Raises:
        BundleError: it is damaged.
    """
    try:
        return msgspec.json.decode(data, type=Release)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BundleError(f"{where} is damaged: {error}; promote a version again") from None


def encode_release(release: Release) -> bytes:
    """The release file's content."""
    return msgspec.json.format(msgspec.json.encode(release), indent=1) + b"\n"


def promote(registry: Path, name: str, version: str, *, by: str = "") -> Release:
    """Make `version` the one that serves; running workers swap to it at their next look.

    Atomic and durable. Safe against others doing so at once: each keeps the others' history. A
    damaged release file is replaced, and its history lost.

    Args:
        by: who does it, for the history.

    Raises:
        BundleError: there is no such version, or the registry cannot be written.
    """
    find(registry, name, version)
    return change_release(registry, name, lambda old: promoted(old, version, by), repair=True)


def rollback(registry: Path, name: str, to: str | None = None, *, by: str = "") -> Release:
    """Go back to the version promoted before the present one, or to `to`; see `rolled_back`.

    Raises:
        BundleError: there is none to go back to, or it is gone.
    """

    def change(old: Release | None) -> Release:
        new = rolled_back(old, name, to, by)
        find(registry, name, new.stable)
        return new

    return change_release(registry, name, change)


def change_release(
    registry: Path,
    name: str,
    change: Callable[[Release | None], Release],
    *,
    repair: bool = False,
) -> Release:
    """Replace the release file by what `change` makes of it, one process at a time.

    Args:
        repair: give `change` None where the file is damaged.

    Raises:
        BundleError: the file is damaged, or the registry cannot be written.
    """
    directory = registry / name
    try:
        if not directory.is_dir():
            raise BundleError(f"{registry} has no model {name!r}; publish one first")
        with _locked(directory):
            try:
                old = read_release(registry, name)
            except BundleError:
                if not repair:
                    raise
                old = None
            new = change(old)
            _replace_durably(directory / RELEASE_FILE, encode_release(new))
    except OSError as error:
        raise BundleError(
            f"{directory / RELEASE_FILE} cannot be written: {error.strerror}"
        ) from None
    return new


def promoted(old: Release | None, version: str, by: str = "") -> Release:
    """`old` with `version` promoted now."""
    return _append(old, Promotion(version, _now(), by))


def rolled_back(old: Release | None, name: str, to: str | None = None, by: str = "") -> Release:
    """`old`, gone back to the version promoted before the present one, or to `to`.

    Rolling back again goes further back, not forth again.

    Raises:
        BundleError: nothing was promoted before, or `to` was not.
    """
    trail = _trail(old)
    if to is not None and to not in {entry.version for entry in _history(old)}:
        raise BundleError(
            f"{name}@{to} is not among the last {MAX_HISTORY} promotions;"
            f" to serve it: streamrec models promote {name} {to}"
        )
    if to is None:
        if len(trail) < 2:
            raise BundleError(
                f"no version of {name} was promoted before"
                f" {trail[-1] if trail else 'now'}; choose one: streamrec models promote {name}"
                " VERSION"
            )
        to = trail[-2]
    return _append(old, Promotion(to, _now(), by, rollback=True))


def _trail(release: Release | None) -> list[str]:
    """Versions promoted and not rolled back, the present one last."""
    trail: list[str] = []
    for entry in _history(release):
        if entry.rollback and entry.version in trail[:-1]:
            while trail[-1] != entry.version:
                trail.pop()
        elif not trail or trail[-1] != entry.version:
            trail.append(entry.version)
    return trail


def _history(release: Release | None) -> list[Promotion]:
    """Promotions, oldest first; a release file of old has its one, without a time."""
    if release is None:
        return []
    return release.history or [Promotion(release.stable)]


def _append(old: Release | None, entry: Promotion) -> Release:
    return Release(entry.version, [*_history(old), entry][-MAX_HISTORY:])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time. The kernel frees the lock when its holder dies."""
    # Opened for writing, since NFS grants an exclusive lock on nothing else.
    with (directory / LOCK_FILE).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace_durably(file: Path, data: bytes) -> None:
    building = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write_durably(building, data)
        building.replace(file)
    finally:
        building.unlink(missing_ok=True)
    sync_directory(file.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` outlive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_part(part: str, what: str) -> None:
    """Refuse what is no plain directory name.

    Raises:
        BundleError: it is not; `what` says what it should have been.
    """
    if not part or part.startswith(".") or "/" in part or "\0" in part:
        raise BundleError(f"{part!r} is not a {what}: it must be a plain directory name")
