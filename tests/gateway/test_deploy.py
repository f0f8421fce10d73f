from __future__ import annotations

import asyncio
import importlib.resources
import re
from typing import Any

import pytest
from fake_engine import FakeEngine
from http_client import serving

from octavo.gateway.api.auth import OPEN_PATHS
from octavo.gateway.cli import build_parser
from octavo.kernels.cpu_build import cache_dir

yaml = pytest.importorskip("yaml")
FOLDER = importlib.resources.files("octavo.gateway") / "deploy" / "kubernetes"
FILES = sorted(file.name for file in FOLDER.iterdir() if file.name.endswith(".yaml"))


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod templates, wherever they stand."""
    spec = document["spec"]
    group = spec.get("leaderWorkerTemplate", {})
    return [
        entry for entry in (spec.get("template"), group.get("leaderTemplate"), group.get("workerTemplate")) if entry
    ]


def containers() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    return [
        (name, pod, container)
        for name in FILES
        for document in documents(name)
        for pod in pods(document)
        for container in pod["spec"]["containers"]
    ]


def test_there_are_manifests_for_one_host_and_for_several() -> None:
    kinds = {document["kind"] for name in FILES for document in documents(name)}
    assert kinds >= {
        "Deployment",
        "LeaderWorkerSet",
        "Service",
        "PodMonitor",
        "ScaledObject",
        "HorizontalPodAutoscaler",
    }


@pytest.mark.parametrize("name", FILES)
def test_each_document_says_what_it_is(name: str) -> None:
    for document in documents(name):
        assert document["apiVersion"] and document["kind"] and document["metadata"]["name"] and document["spec"]


def test_commands_are_ones_that_octavo_takes() -> None:
    parser = build_parser()
    for _, _, container in containers():
        program, *words = [*container["command"], *container["args"]]
        assert program == "octavo"
        assert hasattr(parser.parse_args(words), "run")


def test_probes_ask_paths_that_answer_without_a_key_and_the_metrics_exist() -> None:
    async def scrape() -> str:
        async with serving(FakeEngine(), api_keys=("secret",)) as client:
            return (await client.get("/metrics")).body.decode()

    metrics = asyncio.run(scrape())
    probes = 0
    for _, _, container in containers():
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if kind in container:
                probes += 1
                assert container[kind]["httpGet"]["path"] in OPEN_PATHS
                assert container[kind]["httpGet"]["path"] == ("/live" if kind == "livenessProbe" else "/ready")
    assert probes >= 6
    for name in FILES:
        for metric in re.findall(r"\b(?:vllm|octavo):[a-z]+_[a-z_]+", (FOLDER / name).read_text(encoding="utf-8")):
            assert f"# TYPE {metric.removesuffix('_total')}" in metrics, f"{name} names {metric}"


def test_a_pod_is_killed_only_after_its_drain_is_over() -> None:
    for _, pod, container in containers():
        words = " ".join(container["args"]).replace("=", " ").split()
        if "--shutdown-timeout" in words:
            timeout_s = int(words[words.index("--shutdown-timeout") + 1])
            assert pod["spec"]["terminationGracePeriodSeconds"] > timeout_s + 5


def test_every_volume_that_is_mounted_exists_and_services_find_their_pods() -> None:
    for _, pod, container in containers():
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    for name in FILES:
        labels = [pod["metadata"]["labels"] for document in documents(name) for pod in pods(document)]
        for document in documents(name):
            if document["kind"] == "Service":
                selector = document["spec"]["selector"].items()
                assert any(selector <= each.items() for each in labels)


def test_no_service_has_the_name_of_the_one_that_a_set_s_controller_makes() -> None:
    every = [document for name in FILES for document in documents(name)]
    sets = {document["metadata"]["name"] for document in every if document["kind"] == "LeaderWorkerSet"}
    services = [document["metadata"]["name"] for document in every if document["kind"] == "Service"]
    assert sets and not sets.intersection(services)
    assert len(set(services)) == len(services)


def test_a_container_that_can_write_to_few_places_has_one_for_the_kernels_that_it_builds() -> None:
    num_read_only = 0
    for _, _, container in containers():
        if container.get("securityContext", {}).get("readOnlyRootFilesystem"):
            num_read_only += 1
            told = {variable["name"]: variable["value"] for variable in container["env"]}
            folder = cache_dir(told)
            mounts = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
            assert any(folder.is_relative_to(mount) for mount in mounts)
    assert num_read_only
