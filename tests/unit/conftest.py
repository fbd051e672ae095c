"""Stores of bundles for unit tests: a directory, and an object store in memory that can fail. The
two open bundles of a trial."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from models.stores import LocalStore, RemoteStore, Store
from tests.unit.faulty_store import FaultyFileSystem
from tests.unit.serving import V1, V2, opened, registry
from worker.bundle import Bundle


@pytest.fixture
def files() -> Iterator[FaultyFileSystem]:
    yield FaultyFileSystem()
    FaultyFileSystem.store.clear()
    FaultyFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def remote(files: FaultyFileSystem, tmp_path: Path) -> RemoteStore:
    return RemoteStore(files, "/models", "memory://models", tmp_path / "mirror")


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Both kinds in turn."""
    if request.param == "local":
        return LocalStore(tmp_path / "registry")
    found = request.getfixturevalue("remote")
    assert isinstance(found, Store)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of the bundles in tests/unit/serving.py."""
    return registry(tmp_path_factory.mktemp("registry")).root


@pytest.fixture(scope="module")
def stable(root: Path) -> Bundle:
    return opened(root, V1)


@pytest.fixture(scope="module")
def rival(root: Path) -> Bundle:
    return opened(root, V2)
