"""Publish a bundle: check it, copy it, read it back.

A version is never overwritten: the same content again is a no-op, other content an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from models.provenance import missing_provenance
from models.stores import Store, VersionExistsError
from worker.bundle_checks import Finding, check_bundle
from worker.errors import BundleError
from worker.manifest import MANIFEST_FILE, PART, SIGNATURE_FILE, Manifest, decode_manifest

#: Key of the provenance that says what a renamed bundle was called before.
RENAMED_FROM = "renamed_from"


class RefusedError(BundleError):
    """The bundle breaks the contract; `findings` has every reason."""

    def __init__(self, path: Path, findings: Sequence[Finding]) -> None:
        self.findings = findings
        errors = sum(finding.level == "error" for finding in findings)
        super().__init__(
            f"{path} is not published: {errors} error{'s' if errors > 1 else ''} (docs/bundle.md)"
        )


@dataclass(frozen=True)
class Published:
    """What came of publishing."""

    manifest: Manifest
    #: False where the store had the same version with the same content.
    written: bool
    #: What is not wrong and yet worth knowing.
    warnings: tuple[str, ...]


def publish(
    source: Path, store: Store, *, name: str | None = None, version: str | None = None
) -> Published:
    """Publish the bundle in directory `source`.

    Nothing is written before the bundle has passed every check. A reader of the store sees the
    version whole or not at all; an interrupted upload is simply done again.

    Args:
        name: publish under another model name than the manifest's.
        version: publish under another version; the manifest is rewritten, and its provenance says
            what it was called.

    Raises:
        RefusedError: the bundle breaks the contract.
        BundleError: its name or version cannot be published, or the stored copy is damaged.
        VersionExistsError: the store has this version with other content.
        StoreError: the store cannot be reached or written.
    """
    findings = check_bundle(source)
    if any(finding.level == "error" for finding in findings):
        raise RefusedError(source, findings)
    original = (source / MANIFEST_FILE).read_bytes()
    content = _renamed(original, name, version)
    manifest = decode_manifest(content, source / MANIFEST_FILE)
    for part, option in ((manifest.name, "--name"), (manifest.version, "--version")):
        if not PART.fullmatch(part):
            raise BundleError(
                f"{part!r} cannot be published: it must be 1 to 128 letters, digits and . _ + -;"
                f" choose another with {option}"
            )
    warnings = [finding.message for finding in findings]
    missing = missing_provenance(manifest)
    if missing:
        warnings.append(f"the manifest does not say its {', '.join(missing)} (docs/publish.md)")
    files = {file: source / file for file in manifest.files}
    if (source / SIGNATURE_FILE).exists():
        if content == original:
            files[SIGNATURE_FILE] = source / SIGNATURE_FILE
        else:
            warnings.append(f"{SIGNATURE_FILE} is left out: it signs the manifest as it was")

    if _is_stored(store, manifest, content):
        store.verify(manifest.name, manifest.version, manifest)
        return Published(manifest, False, tuple(warnings))
    store.write(manifest.name, manifest.version, files, content)
    return Published(manifest, True, tuple(warnings))


def _renamed(content: bytes, name: str | None, version: str | None) -> bytes:
    """The manifest under another name or version. Fields that this release does not know stay."""
    fields: dict[str, Any] = msgspec.json.decode(content)
    old = (fields["name"], fields["version"])
    new = (name or old[0], version or old[1])
    if new == old:
        return content
    provenance = fields.get("provenance", {})
    before = provenance.get(RENAMED_FROM)
    trail = "@".join(old) + (f", {before}" if before else "")
    fields |= {
        "name": new[0],
        "version": new[1],
        "provenance": {**provenance, RENAMED_FROM: trail},
    }
    return msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n"


def _is_stored(store: Store, manifest: Manifest, content: bytes) -> bool:
    """Whether the store has this very version.

    Raises:
        VersionExistsError: it has the version with other content.
    """
    stored = store.manifest_bytes(manifest.name, manifest.version)
    if stored is None:
        return False
    try:
        same = msgspec.json.decode(stored) == msgspec.json.decode(content)
    except msgspec.DecodeError:
        # Cut short by an interrupted upload: no reader can open it.
        return False
    if not same:
        raise VersionExistsError(
            f"{store.url} has {manifest.reference} with other content; versions are"
            " never overwritten: choose another with --version"
        )
    return True
