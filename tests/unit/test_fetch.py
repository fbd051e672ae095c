"""`streamrec models fetch`: a bundle out of a registry."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from models.publish import publish
from models.stores import open_store
from worker.cli import main

SHIPPED = Path(__file__).parents[2] / "models" / "shipped"


def fetch(*arguments: str) -> Result:
    return CliRunner().invoke(
        main, ["models", "fetch", *arguments, "--registry", str(SHIPPED)], catch_exceptions=False
    )


@pytest.mark.parametrize(
    ("arguments", "version"),
    [
        (["posts@20261124T2352Z-int8"], "20261124T2352Z-int8"),
        (["posts", "--precision", "fp32"], "20261124T2351Z-fp32"),
        (["posts"], "20261124T2352Z-layers-1-neurons-0.75-prune-0.5-int4-finetune-3"),
    ],
)
def test_a_version_is_copied_whole(tmp_path: Path, arguments: list[str], version: str) -> None:
    done = fetch(*arguments, "--out", str(tmp_path))
    assert done.exit_code == 0
    copy = tmp_path / "posts" / version
    assert done.output.strip() == str(copy)
    original = SHIPPED / "posts" / version
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
        file.name: file.read_bytes() for file in original.iterdir()
    }


def test_of_a_precision_the_newest_is_copied(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "registry"), tmp_path / "mirror")
    for version in ("20261201T0000Z-a", "20261202T0000Z-b"):
        publish(SHIPPED / "posts" / "20261124T2352Z-int8", store, version=version)
    publish(SHIPPED / "posts" / "20261124T2351Z-fp32", store, version="20261203T0000Z-c")
    done = CliRunner().invoke(
        main,
        [
            "models", "fetch", "posts", "--precision", "int8", "--out", str(tmp_path / "out"),
            "--registry", str(tmp_path / "registry"),
        ],
    )  # fmt: skip
    assert done.exit_code == 0
    assert [path.name for path in (tmp_path / "out" / "posts").iterdir()] == ["20261202T0000Z-b"]


def test_a_copy_that_is_there_is_made_anew(tmp_path: Path) -> None:
    stale = tmp_path / "posts" / "20261124T2352Z-int8" / "stale"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert fetch("posts@20261124T2352Z-int8", "--out", str(tmp_path)).exit_code == 0
    assert not stale.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["posts", "--precision", "int3"], 66, "has no int3 version of posts"),
        (["posts@nothing"], 66, "nothing"),
        (["posts@v1", "--precision", "fp32"], 2, "not both"),
    ],
)
def test_what_is_not_there_is_said(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    done = fetch(*arguments, "--out", str(tmp_path))
    assert done.exit_code == code
    assert message in done.output
    assert not list(tmp_path.iterdir())
