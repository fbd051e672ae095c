"""Real parts for tests: brokers, Redis, a tiny model bundle. Each starts once, when first asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from worker.local.kafka import KafkaBroker, kafka_missing
from worker.local.redis_server import RedisServer
from worker.local.tansu import TansuBroker

ITEMS = tuple(f"item-{number}" for number in range(1, 41))


@pytest.fixture(scope="session")
def tansu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TansuBroker]:
    with TansuBroker(tmp_path_factory.mktemp("tansu")) as broker:
        assert isinstance(broker, TansuBroker)
        yield broker


def real_kafka() -> None:
    """Skip the test where no Apache Kafka can run, or fail it where one must."""
    missing = kafka_missing()
    if missing is not None:
        if os.environ.get("STREAMREC_REQUIRE_KAFKA"):
            pytest.fail(f"tests on a real Kafka are required here, and {missing} is missing")
        pytest.skip(f"not run on a real Kafka: {missing} is missing")


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    real_kafka()
    with KafkaBroker(tmp_path_factory.mktemp("kafka")) as broker:
        assert isinstance(broker, KafkaBroker)
        yield broker


@pytest.fixture(params=["tansu", pytest.param("kafka", marks=pytest.mark.kafka)])
def broker(request: pytest.FixtureRequest) -> TansuBroker | KafkaBroker:
    """Both brokers in turn."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, TansuBroker | KafkaBroker)
    return found


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis", persistent=True) as server:
        assert isinstance(server, RedisServer)
        yield server


def tiny_model(seed: int = 0, items: int = len(ITEMS), length: int = 8) -> bytes:
    """A graph that keeps the contract: the mean of the history's item vectors scores all items."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    table = rng.normal(size=(items + 1, 4)).astype(np.float32)
    table[0] = 0.0
    weights = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.ascontiguousarray(table[1:].T), "scorer"),
        numpy_helper.from_array(np.array([1]), "one"),
    ]
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "history"], ["rows"], axis=0),
        node("ReduceMean", ["rows", "one"], ["state"], keepdims=0),
        node("MatMul", ["state", "scorer"], ["logits"]),
        node("TopK", ["logits", "k"], ["scores", "places"], axis=1),
        node("Add", ["places", "one"], ["items"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            value("history", TensorProto.INT64, ["batch", length]),
            value("k", TensorProto.INT64, [1]),
        ],
        [
            value("items", TensorProto.INT64, ["batch", "n"]),
            value("scores", TensorProto.FLOAT, ["batch", "n"]),
        ],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def tiny_bundle(directory: Path, *, seed: int = 0, **changes: object) -> Path:
    """Write a bundle around `tiny_model`."""
    from worker.bundle import write_bundle

    fields: dict[str, object] = {
        "model": tiny_model(seed),
        "items": ITEMS,
        "golden_histories": np.array([[0, 0, 0, 0, 0, 1, 2, 3]]),
        "golden_k": 5,
        "name": "posts",
        "version": directory.name,
        "surface": "posts",
        "created_at": "2026-11-24T10:00:00+00:00",
        "precision": "fp32",
        "recipe": "mean of random vectors",
        "max_length": 8,
        "metrics": {"ndcg@10": 0.1},
    } | changes
    return write_bundle(directory, **fields)  # type: ignore[arg-type]
