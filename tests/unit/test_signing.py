"""With public keys given, only bundles that one of them signed are opened."""

import base64
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from models.commands.sign import make_key, sign_bundle
from tests.conftest import tiny_bundle
from worker.bundle import open_bundle
from worker.errors import BundleError, Refusal, SettingsError
from worker.manifest import MANIFEST_FILE, SIGNATURE_FILE
from worker.signing import generate_key, parse_public_key, read_private_key

pytest.importorskip("cryptography", reason="signatures need the extra `signed`")


def run(command: object, *arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(one) for one in arguments])  # type: ignore[arg-type]
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def signed_by(bundle: Path, *names: str) -> list[bytes]:
    """Sign with a key of each name; their public keys."""
    keys = []
    for name in names:
        file = bundle.parent / f"{name}.pem"
        keys.append(parse_public_key(run(make_key, file).output))
        assert str(bundle) in run(sign_bundle, bundle, "--key", file).output
    return keys


def refused(bundle: Path, keys: list[bytes], message: str) -> None:
    with pytest.raises(BundleError, match=message) as error:
        open_bundle(bundle, public_keys=keys)
    assert error.value.reason is Refusal.SIGNATURE


def test_a_signed_bundle_is_opened_by_its_key(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "v1")
    keys = signed_by(bundle, "ours")
    assert open_bundle(bundle, public_keys=keys).index["item-1"] == 1


def test_while_one_key_replaces_another_either_is_enough(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "v1")
    old, new = signed_by(bundle, "old", "new")
    (stranger,) = signed_by(tiny_bundle(tmp_path / "v2"), "stranger")
    for keys in ([old], [new], [stranger, new]):
        open_bundle(bundle, public_keys=keys)
    refused(bundle, [stranger], "by a trusted key")


def test_signing_again_by_the_same_key_changes_nothing(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "v1")
    signed_by(bundle, "ours")
    before = (bundle / SIGNATURE_FILE).read_bytes()
    run(sign_bundle, bundle, "--key", tmp_path / "ours.pem")
    assert (bundle / SIGNATURE_FILE).read_bytes() == before


def test_an_unsigned_bundle_is_refused_where_keys_are_set_and_opened_where_not(
    tmp_path: Path,
) -> None:
    keys = signed_by(tiny_bundle(tmp_path / "v1"), "ours")
    unsigned = tiny_bundle(tmp_path / "v2")
    refused(unsigned, keys, "it is not signed")
    open_bundle(unsigned)


def test_a_manifest_that_was_changed_after_signing_is_refused_before_it_is_parsed(
    tmp_path: Path,
) -> None:
    bundle = tiny_bundle(tmp_path / "v1")
    keys = signed_by(bundle, "ours")
    (bundle / MANIFEST_FILE).write_bytes(b"{")
    refused(bundle, keys, "changed after signing")


@pytest.mark.parametrize("forged", [b"", b"\xff\xfe", b"!!", base64.b64encode(bytes(64)), b"AAAA"])
def test_what_is_no_signature_is_refused(tmp_path: Path, forged: bytes) -> None:
    bundle = tiny_bundle(tmp_path / "v1")
    keys = signed_by(bundle, "ours")
    (bundle / SIGNATURE_FILE).write_bytes(forged)
    refused(bundle, keys, "no signature of this manifest")


def test_a_signature_of_one_version_does_not_serve_for_another(tmp_path: Path) -> None:
    one, other = tiny_bundle(tmp_path / "v1"), tiny_bundle(tmp_path / "v2")
    keys = signed_by(one, "ours")
    (other / SIGNATURE_FILE).write_bytes((one / SIGNATURE_FILE).read_bytes())
    refused(other, keys, "by a trusted key")


def test_a_private_key_is_its_owner_s_alone_and_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    generate_key(file)
    before = file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(SettingsError, match="never overwritten"):
        generate_key(file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["", "key", base64.b64encode(bytes(31)).decode(), "ä"])
def test_what_is_no_key_is_refused_with_words_on_where_keys_come_from(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(SettingsError, match="models keygen"):
        parse_public_key(text)
    (tmp_path / "key.pem").write_text(text)
    with pytest.raises(SettingsError, match="models keygen"):
        read_private_key(tmp_path / "key.pem")
