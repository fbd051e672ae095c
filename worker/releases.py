"""Which versions of a model should serve: promoted, canary, shadow, quarantined. No I/O.

A `Release` changes by the functions here alone, each from one release to the next. Copies of it
reach a worker by several ways, in any order; `newer` tells which one holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec.structs import replace

from worker.errors import BundleError, ReleaseRefusedError
from worker.settings import ModelChoice

#: Largest share of users that a canary may have for the gate to judge it.
MAX_JUDGED_SHARE = 0.5
#: Largest release that is read; one of a thousand quarantined versions has a tenth of it.
MAX_RELEASE_BYTES = 1 << 20
#: Promotions that a release remembers.
MAX_HISTORY = 20


#: What JSON and MessagePack hold exactly: anybody may push a release.
Revision = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Promotion(msgspec.Struct, frozen=True, omit_defaults=True):
    """One change of the version that serves."""

    version: str
    #: RFC 3339; empty where a release without history did not say.
    at: str = ""
    #: Who did it, as `user@host`.
    by: str = ""
    #: Whether it went back to a version promoted before.
    rollback: bool = False


class Canary(msgspec.Struct, frozen=True, omit_defaults=True):
    """A version on trial with a share of the users."""

    version: str
    #: Of the users, above 0 and at most 1.
    share: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]
    since: Annotated[datetime, msgspec.Meta(tz=True)]
    by: str = ""
    #: Whether the workers' gate promotes it or rolls it back; else a person does.
    auto: bool = True


class Decided(msgspec.Struct, frozen=True):
    """What the workers' gate decided about a canary, as it is published."""

    surface: str
    model: str
    action: str
    reason: str
    #: Versions before the decision.
    stable: str
    canary: str
    share: float
    since: Annotated[datetime, msgspec.Meta(tz=True)]
    decided_at: Annotated[datetime, msgspec.Meta(tz=True)]
    decided_by: str
    #: None where one is not a number.
    figures: dict[str, float | None]


class Release(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which version serves, which are on trial, which must not serve."""

    stable: str
    #: Oldest first; the last is that of `stable`.
    history: tuple[Promotion, ...] = ()
    #: Grows with each change. At least the time of the change in ms, so that a release made anew
    #: after its file was deleted is newer than those made before.
    revision: Revision = 0
    #: Revision at which the present trial began; 0 where none runs.
    period: Revision = 0
    canary: Canary | None = None
    #: A version that is asked beside the stable one, and whose answers nobody sees.
    shadow: str | None = None
    #: Reason by version.
    quarantined: dict[str, str] = {}
    #: When (RFC 3339) and by whom the last change was made.
    at: str = ""
    by: str = ""
    #: The decision that was the last change; None where a person made it. Here, so that it is
    #: published by another worker where the one that decided crashed before it could.
    decided: Decided | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker should load for one surface."""

    stable: str
    canary: str | None = None
    #: Share of the users whom the canary serves, 0 without one.
    share: float = 0.0
    #: Names the trial: which users are the canary's, and what is counted of it, starts anew with
    #: each. 0 where there is none.
    period: int = 0
    shadow: str | None = None
    #: Canary and shadow that the registry does not have (yet).
    missing: tuple[str, ...] = ()


def plan(
    release: Release | None, known: Sequence[str], choice: ModelChoice, *, where: Path | str
) -> Plan:
    """What should serve: the pinned version alone, else what the release says, else the newest.

    Args:
        known: versions in the registry, oldest first.
        where: the registry, for messages.

    Raises:
        BundleError: the version that should serve is not among `known`.
    """
    if choice.version is not None:
        return Plan(require_version(choice.version, known, where, choice.name))
    if release is None:
        if not known:
            raise BundleError(
                f"no bundle {where}/{choice.name}/<version>: set STREAMREC_REGISTRY and"
                " STREAMREC_MODELS, or publish one"
            )
        return Plan(known[-1])
    stable = require_version(release.stable, known, where, choice.name)
    canary, shadow = release.canary, release.shadow
    # What the transitions rule out may be pushed by anybody, or edited by hand.
    untried = {stable, *release.quarantined}
    if canary is not None and canary.version in untried:
        canary = None
    if shadow in untried:
        shadow = None
    missing: list[str] = []
    if canary is not None and canary.version not in known:
        missing.append(canary.version)
        canary = None
    if shadow is not None and shadow not in known:
        missing.append(shadow)
        shadow = None
    return Plan(
        stable,
        canary=canary.version if canary else None,
        share=canary.share if canary else 0.0,
        # Of the release, so that workers agree whatever each of them has found so far.
        period=release.period,
        shadow=shadow,
        missing=tuple(missing),
    )


def require_version(version: str, known: Sequence[str], where: Path | str, name: str) -> str:
    """`version`, where it is among `known`.

    Raises:
        BundleError: it is not; the message lists those that are.
    """
    if version not in known:
        listing = ", ".join(known) if known else "no version at all"
        raise BundleError(f"{where} has no version {version!r} of model {name!r}; it has {listing}")
    return version


def newer(a: Release | None, b: Release | None) -> Release | None:
    """The one of the higher revision. Of equal ones, which two writers at once may leave in a store
    without locks, everyone takes the same."""
    found = [release for release in (a, b) if release is not None]
    return max(found, key=lambda one: (one.revision, msgspec.json.encode(one)), default=None)


def promoted(
    old: Release | None, version: str, *, force: bool = False, by: str = "", at: datetime
) -> Release:
    """`version` serves. Its own canary or shadow ends; a canary of another goes on.

    Args:
        force: promote it even if it is quarantined, and lift that.
        by: who does it, as `user@host`; so everywhere here.
        at: when, with a time zone; so everywhere here.

    Raises:
        ReleaseRefusedError: it is quarantined.
    """
    if old is None:
        old = Release(version)
        history: tuple[Promotion, ...] = ()
    else:
        history = _history(old)
    if not force:
        _refuse_quarantined(old, version, " or promote with --force")
    return _next(
        old, by, at,
        stable=version,
        history=_appended(history, Promotion(version, _rfc3339(at), by)),
        quarantined=_without(old.quarantined, version),
    )  # fmt: skip


def rolled_back(
    old: Release | None,
    to: str | None = None,
    *,
    quarantine: str | None = None,
    by: str = "",
    at: datetime,
) -> Release:
    """Back to the version promoted before the present one and not quarantined, or to `to`.

    A running canary ends. Rolling back again goes further back, not forth again.

    Args:
        quarantine: why the version that served must not serve again; None where it may.

    Raises:
        ReleaseRefusedError: nothing was promoted before, or `to` was not, is quarantined, or
            serves already.
    """
    current = _require(old)
    trail = [version for version in _trail(current) if version not in current.quarantined]
    if to is None:
        earlier = [version for version in trail if version != current.stable]
        if not earlier:
            raise ReleaseRefusedError(
                f"no version was promoted before {current.stable} that is not quarantined;"
                " choose one: streamrec models promote NAME VERSION"
            )
        to = earlier[-1]
    elif to == current.stable:
        raise ReleaseRefusedError(f"{to} serves already; choose an earlier version with --to")
    elif to not in {entry.version for entry in _history(current)}:
        raise ReleaseRefusedError(
            f"{to} is not among the last {MAX_HISTORY} promotions;"
            f" to serve it: streamrec models promote NAME {to}"
        )
    _refuse_quarantined(current, to)
    quarantined = current.quarantined
    if quarantine is not None:
        quarantined = {**quarantined, current.stable: quarantine}
    return _next(
        current, by, at,
        stable=to,
        history=_appended(_history(current), Promotion(to, _rfc3339(at), by, rollback=True)),
        canary=None,
        quarantined=quarantined,
    )  # fmt: skip


def with_canary(
    old: Release | None,
    version: str,
    share: float,
    *,
    auto: bool = True,
    by: str = "",
    at: datetime,
) -> Release:
    """A share of the users, above 0 and at most 1, is served by `version`, from now on.

    It takes the place of a running canary; a new share begins a new trial.

    Args:
        auto: whether the workers' gate decides about it.

    Raises:
        ReleaseRefusedError: `version` is quarantined or serves, or the share is out of range.
    """
    current = _require(old)
    _refuse_quarantined(current, version)
    if version == current.stable:
        raise ReleaseRefusedError(f"{version} serves all users already; a canary must be another")
    if not 0.0 < share <= 1.0:
        raise ReleaseRefusedError(f"a canary's share is above 0 and at most 100%, not {share:.4g}")
    if auto and share > MAX_JUDGED_SHARE:
        raise ReleaseRefusedError(
            f"a canary for {share:.4g} of the users leaves no equal number to compare it with: take"
            f" {MAX_JUDGED_SHARE:.4g} or less, or decide yourself with --no-auto"
        )
    return _next(current, by, at, canary=Canary(version, share, at.astimezone(UTC), by, auto))


def canary_ended(
    old: Release | None, *, quarantine: str | None = None, by: str = "", at: datetime
) -> Release:
    """The canary serves nobody any more.

    Args:
        quarantine: why its version must not serve again; None where it may.

    Raises:
        ReleaseRefusedError: no canary runs.
    """
    current, canary = _require_canary(old)
    if quarantine is None:
        return _next(current, by, at, canary=None)
    return with_quarantined(current, canary.version, quarantine, by=by, at=at)


def canary_promoted(old: Release | None, *, by: str = "", at: datetime) -> Release:
    """The canary serves all users.

    Raises:
        ReleaseRefusedError: no canary runs.
    """
    current, canary = _require_canary(old)
    return promoted(current, canary.version, by=by, at=at)


def with_shadow(old: Release | None, version: str | None, *, by: str = "", at: datetime) -> Release:
    """`version` is asked beside the stable one, and nobody sees its answers; None ends that.

    Raises:
        ReleaseRefusedError: `version` is quarantined, or serves users.
    """
    current = _require(old)
    if version is not None:
        _refuse_quarantined(current, version)
        if version in {current.stable, current.canary.version if current.canary else None}:
            raise ReleaseRefusedError(f"{version} serves users; a shadow must be another version")
    elif current.shadow is None:
        raise ReleaseRefusedError("no shadow runs, so there is none to end")
    return _next(current, by, at, shadow=version)


def with_quarantined(
    old: Release | None, version: str, reason: str, *, by: str = "", at: datetime
) -> Release:
    """`version` must not serve, for `reason`; its canary or shadow ends.

    Raises:
        ReleaseRefusedError: it serves all users.
    """
    current = _require(old)
    if version == current.stable:
        raise ReleaseRefusedError(
            f"{version} serves: go back to an earlier version, which quarantines this one, with"
            " streamrec models rollback NAME"
        )
    return _next(current, by, at, quarantined={**current.quarantined, version: reason})


def unquarantined(old: Release | None, version: str, *, by: str = "", at: datetime) -> Release:
    """`version` may serve again.

    Raises:
        ReleaseRefusedError: it is not quarantined.
    """
    current = _require(old)
    if version not in current.quarantined:
        listing = ", ".join(current.quarantined) or "no version"
        raise ReleaseRefusedError(f"{version} is not quarantined; {listing} is")
    return _next(current, by, at, quarantined=_without(current.quarantined, version))


def decided_by_gate(release: Release, decided: Decided) -> Release:
    """`release`, with the decision that made it."""
    return replace(release, decided=decided)


def encode_release(release: Release) -> bytes:
    """The release file's content, for people too."""
    return msgspec.json.format(msgspec.json.encode(release), indent=1) + b"\n"


def decode_release(data: bytes, where: Path | str) -> Release:
    """Parse a release; `where` is for the message.

    Raises:
        BundleError: it is damaged.
    """
    if len(data) > MAX_RELEASE_BYTES:
        raise BundleError(
            f"{where} is damaged: it has more than {MAX_RELEASE_BYTES} bytes; promote a version"
            " again"
        )
    try:
        return msgspec.json.decode(data, type=Release)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BundleError(f"{where} is damaged: {error}; promote a version again") from None


def _next(old: Release, by: str, at: datetime, **changes: Any) -> Release:
    """`old` after one change. The one place that keeps what holds of every release: canary, shadow
    and stable version are three, and none is quarantined."""
    revision = max(old.revision + 1, int(at.timestamp() * 1000))
    new = replace(old, **changes, revision=revision, at=_rfc3339(at), by=by, decided=None)
    canary, shadow = new.canary, new.shadow
    if canary is not None and canary.version in {new.stable, *new.quarantined}:
        canary = None
    if shadow in {new.stable, *new.quarantined, canary.version if canary else None}:
        shadow = None
    new = replace(new, canary=canary, shadow=shadow)
    trial = _trial(new)
    if trial is None:
        return replace(new, period=0)
    return new if trial == _trial(old) else replace(new, period=revision)


def _trial(release: Release) -> tuple[str, Canary | str] | None:
    """What is compared with what: a shadow set while a canary runs does not start the canary's
    trial anew, another stable version does."""
    tried = release.canary or release.shadow
    return None if tried is None else (release.stable, tried)


def _require(old: Release | None) -> Release:
    if old is None:
        raise ReleaseRefusedError(
            "no version is promoted yet, so the newest serves; first promote the one that should:"
            " streamrec models promote NAME VERSION"
        )
    return old


def _require_canary(old: Release | None) -> tuple[Release, Canary]:
    current = _require(old)
    if current.canary is None:
        raise ReleaseRefusedError(
            "no canary runs; start one: streamrec models canary NAME VERSION --share 10%"
        )
    return current, current.canary


def _refuse_quarantined(release: Release, version: str, otherwise: str = "") -> None:
    reason = release.quarantined.get(version)
    if reason is not None:
        raise ReleaseRefusedError(
            f"{version} is quarantined ({reason}): lift that with"
            f" streamrec models unquarantine NAME {version}{otherwise}"
        )


def _history(release: Release) -> tuple[Promotion, ...]:
    """Promotions, oldest first; a release file of old has its one, without a time."""
    return release.history or (Promotion(release.stable),)


def _appended(history: tuple[Promotion, ...], entry: Promotion) -> tuple[Promotion, ...]:
    return (*history, entry)[-MAX_HISTORY:]


def _trail(release: Release) -> list[str]:
    """Versions promoted and not rolled back, the present one last."""
    trail: list[str] = []
    for entry in _history(release):
        if entry.rollback and entry.version in trail[:-1]:
            while trail[-1] != entry.version:
                trail.pop()
        elif not trail or trail[-1] != entry.version:
            trail.append(entry.version)
    return trail


def _without(quarantined: dict[str, str], version: str) -> dict[str, str]:
    return {key: reason for key, reason in quarantined.items() if key != version}


def _rfc3339(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="seconds")
