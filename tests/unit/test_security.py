"""Settings of TLS and logins: what does not fit together is said, and no secret is ever shown."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from worker.cli import main
from worker.errors import SettingsError
from worker.security import cleartext
from worker.settings import Settings, is_secret, load_settings

SECRET = "s3cr3t-never-shown"
LOGIN = {"kafka_username": "worker", "kafka_password": SECRET}
TOKENS = {
    "kafka_oauth_token_url": "https://id.example/token",
    "kafka_oauth_client_id": "worker",
    "kafka_oauth_client_secret": SECRET,
}
SECRETS = [name for name in Settings.model_fields if is_secret(name)]


def bearer(**more: str) -> dict[str, str]:
    return {"kafka_security": "sasl_ssl", "kafka_sasl_mechanism": "OAUTHBEARER", **more}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"kafka_security": "ssl"},
        {"kafka_security": "ssl", "kafka_cert_file": "a", "kafka_key_file": "b"},
        {"kafka_security": "sasl_ssl", "kafka_sasl_mechanism": "SCRAM-SHA-512", **LOGIN},
        bearer(**TOKENS, kafka_oauth_scope="kafka"),
        bearer(**TOKENS | {"kafka_oauth_token_url": "http://127.0.0.1:8/token"}),
        bearer(kafka_oauth_token_file="token"),
        {"redis": "rediss://r:6380", "redis_password": SECRET, "redis_ca_file": "ca.pem"},
    ],
)
def test_what_fits_together_is_taken(flags: dict[str, str]) -> None:
    load_settings(**flags)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        # Believed to be in use, and not.
        (LOGIN, "KAFKA_USERNAME is set and is not used"),
        ({"kafka_ca_file": "ca.pem"}, "KAFKA_CA_FILE is set and is not used"),
        ({"kafka_sasl_mechanism": "PLAIN"}, "KAFKA_SASL_MECHANISM is set and is not used"),
        ({"redis_ca_file": "ca.pem"}, "REDIS_CA_FILE is set and is not used"),
        (bearer(**TOKENS, kafka_username="me"), "KAFKA_USERNAME is set and is not used"),
        (bearer(**TOKENS, kafka_oauth_token_file="t"), "KAFKA_OAUTH_TOKEN_URL is set and is not"),
        # Half of a pair.
        ({"kafka_security": "ssl", "kafka_cert_file": "a"}, "KAFKA_KEY_FILE must be set"),
        ({"redis": "rediss://r", "redis_key_file": "a"}, "REDIS_CERT_FILE must be set"),
        ({"redis_username": "worker"}, "REDIS_PASSWORD must be set"),
        ({"kafka_security": "sasl_ssl"}, "KAFKA_SASL_MECHANISM must be set"),
        (
            {"kafka_security": "sasl_ssl", "kafka_sasl_mechanism": "PLAIN"},
            "KAFKA_PASSWORD must be set",
        ),
        (bearer(), "KAFKA_OAUTH_CLIENT_SECRET must be set"),
        (
            {"redis": f"redis://:{SECRET}@r", "redis_password": SECRET},
            "STREAMREC_REDIS holds a password and STREAMREC_REDIS_PASSWORD is set",
        ),
        # The client secret would cross a network in the clear.
        (
            bearer(**TOKENS | {"kafka_oauth_token_url": "http://id.example/token"}),
            "KAFKA_OAUTH_TOKEN_URL must be an https://",
        ),
        ({"redis": "redis://[cache"}, "STREAMREC_REDIS is not a URL"),
        (bearer(**TOKENS, kafka_oauth_extensions="a=\x01b"), "KAFKA_OAUTH_EXTENSIONS"),
    ],
)
def test_what_contradicts_itself_is_named(flags: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(**flags)
    assert named in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"kafka": "k:9092", "kafka_security": "sasl_plaintext"}, "Kafka at k:9092 is logged in"),
        ({"redis": "redis://cache:6379", "redis_password": SECRET}, "Redis at cache is sent"),
        ({"redis": f"redis://:{SECRET}@cache"}, "Redis at cache is sent"),
        ({"redis": f"redis://cache?password={SECRET}"}, "Redis at cache is sent"),
        ({"kafka_security": "sasl_plaintext"}, None),  # this machine
        ({"kafka": "localhost", "kafka_security": "sasl_plaintext"}, None),
        ({"kafka": "k", "kafka_security": "sasl_plaintext"}, "Kafka at k is logged in"),
        ({"kafka": "[::1]:9092", "kafka_security": "sasl_plaintext"}, None),
        ({"redis": "rediss://cache:6379", "redis_password": SECRET}, None),
        ({"redis": "redis://cache:6379"}, None),  # nothing to hide
    ],
)
def test_a_login_that_crosses_a_network_unencrypted_is_warned_of(
    flags: dict[str, str], said: str | None
) -> None:
    login = LOGIN | {"kafka_sasl_mechanism": "PLAIN"} if "kafka_security" in flags else {}
    sentences = list(cleartext(load_settings(**flags, **login)))
    assert len(sentences) == (said is not None)
    assert said is None or said in sentences[0]
    assert SECRET not in "".join(sentences)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_read_from_a_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = f"redis://:{SECRET}@127.0.0.1" if name == "redis" else SECRET
    (tmp_path / "secret").write_text(secret + "\n")
    monkeypatch.setenv(f"STREAMREC_{name.upper()}_FILE", str(tmp_path / "secret"))
    others = {
        "kafka_password": {
            "kafka_security": "sasl_ssl",
            "kafka_sasl_mechanism": "PLAIN",
            "kafka_username": "worker",
        },
        "kafka_oauth_client_secret": bearer(
            **{name: value for name, value in TOKENS.items() if value != SECRET}
        ),
    }
    settings = load_settings(**others.get(name, {}))
    assert getattr(settings, name).get_secret_value() == secret
    assert SECRET not in repr(settings)
    assert SECRET not in settings.model_dump_json()

    monkeypatch.setenv(f"STREAMREC_{name.upper()}", secret)
    with pytest.raises(SettingsError, match=f"{name.upper()}_FILE and .* are set") as caught:
        load_settings()
    assert SECRET not in str(caught.value)


def test_a_secret_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMREC_REDIS_PASSWORD_FILE", "/nowhere/secret")
    with pytest.raises(SettingsError, match="REDIS_PASSWORD_FILE: cannot read /nowhere/secret"):
        load_settings()


def test_no_secret_is_a_flag_and_a_password_in_a_url_is_refused_as_one() -> None:
    shown = CliRunner().invoke(main, ["worker", "--help"]).output
    assert "--kafka-username" in shown
    for name in SECRETS:
        assert name == "redis" or f"--{name.replace('_', '-')} " not in shown
    for url in (f"redis://:{SECRET}@cache", f"redis://cache?password={SECRET}"):
        refused = CliRunner().invoke(main, ["worker", "--redis", url])
        assert refused.exit_code == 78
        assert "STREAMREC_REDIS_PASSWORD_FILE" in refused.output
        assert SECRET not in refused.output


def test_nothing_gives_onnx_runtime_operators_from_outside() -> None:
    """A bundle is data; a library of operators would be code."""
    root = Path(__file__).parents[2]
    sources = [file for part in ("worker", "models") for file in (root / part).rglob("*.py")]
    assert root / "worker" / "session.py" in sources
    for file in sources:
        assert "register_custom_ops" not in file.read_text(), file
