"""`streamrec models keygen` and `sign`: bundles that workers can tell from forged ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from worker.bundle_files import BundleFiles, read_manifest_bytes, write_durably
from worker.errors import BundleError
from worker.manifest import MANIFEST_FILE, SIGNATURE_FILE, decode_manifest
from worker.signing import (
    MAX_SIGNATURE_BYTES,
    check_signature,
    generate_key,
    parse_public_key,
    public_key_of,
    read_private_key,
    sign,
)


@click.command("keygen")
@click.argument("private_key", type=click.Path(path_type=Path))
def make_key(private_key: Path) -> None:
    """Make a key pair: the private key goes to file PRIVATE_KEY, the public one is printed.

    Keep the file where bundles are made, and only there; workers get the public key.
    """
    click.echo(generate_key(private_key))


@click.command("sign")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key",
    "private_key",
    type=click.Path(path_type=Path),
    required=True,
    help="The file that `streamrec models keygen` wrote.",
)
def sign_bundle(bundle: Path, private_key: Path) -> None:
    """Sign the bundle in directory BUNDLE: write its manifest.sig.

    Where it is signed by another key already, the signatures stand beside each other.
    """
    key = read_private_key(private_key)
    public_key = public_key_of(key)
    with BundleFiles(bundle) as files:
        manifest = read_manifest_bytes(files, bundle)
        decode_manifest(manifest, bundle / MANIFEST_FILE)
        before = b""
        if files.has(SIGNATURE_FILE):
            before = files.whole(SIGNATURE_FILE, MAX_SIGNATURE_BYTES)
    try:
        check_signature(manifest, before, [parse_public_key(public_key)])
    except BundleError:
        lines = [*before.decode("ascii", "replace").split(), sign(manifest, key)]
        write_durably(bundle / SIGNATURE_FILE, "".join(f"{line}\n" for line in lines).encode())
    click.echo(f"{bundle / SIGNATURE_FILE} signs the bundle for public key {public_key}")


COMMANDS: Sequence[click.Command] = (make_key, sign_bundle)
