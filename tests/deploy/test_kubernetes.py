"""The manifests against Kubernetes' own schemas, and against what the service and the proxy expect."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.kubernetes.haproxy import render
from service.gateway.settings import STAGE_VARIABLES, Settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
VERSION = "1.34.0"
CUSTOM = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS = [
    manifest
    for name in KUSTOMIZATION["resources"]
    for manifest in yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))
]
BUILT_IN = [manifest for manifest in MANIFESTS if manifest["apiVersion"] not in CUSTOM]
WORKLOADS = [manifest for manifest in MANIFESTS if manifest["kind"] in ("Deployment", "StatefulSet")]
SETTINGS = next(manifest for manifest in MANIFESTS if manifest["kind"] == "ConfigMap")["data"]


def called(manifest: dict[str, Any]) -> str:
    return f"{manifest['kind']}-{manifest['metadata']['name']}"


def find(kind: str, name: str) -> dict[str, Any]:
    return next(m for m in MANIFESTS if m["kind"] == kind and m["metadata"]["name"] == name)


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    return workload["spec"]["template"]["spec"]


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(workload)["containers"]
    return only


@pytest.mark.parametrize("manifest", BUILT_IN, ids=called)
def test_manifest_is_valid(manifest):
    kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_every_file_is_in_the_kustomization_and_every_manifest_in_the_namespace():
    assert {path.name for path in FOLDER.glob("*.yaml")} == {"kustomization.yaml", *KUSTOMIZATION["resources"]}
    for manifest in MANIFESTS:
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == KUSTOMIZATION["namespace"], called(manifest)
    assert {image["name"] for image in KUSTOMIZATION["images"]} == {container(w)["image"] for w in WORKLOADS}
    assert all((FOLDER / name).is_file() for one in KUSTOMIZATION["configMapGenerator"] for name in one["files"])


@pytest.mark.parametrize("workload", WORKLOADS, ids=called)
def test_pods_are_locked_down_probed_and_drained(workload):
    spec, only = pod(workload), container(workload)
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"readinessProbe", "livenessProbe"} <= only.keys()
    assert "memory" in only["resources"]["limits"]
    assert find("PodDisruptionBudget", workload["metadata"]["name"])["spec"]["maxUnavailable"] == 1


def test_grace_periods_outlast_what_they_wait_for():
    config = (FOLDER / "haproxy.cfg").read_text()
    hard_stop_s = int(re.search(r"hard-stop-after (\d+)s", config)[1])
    drain_s = int(SETTINGS["CROSSGATE_DRAIN_TIMEOUT_S"])
    pause_s = int(container(find("Deployment", "gateway"))["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod(find("Deployment", "gateway"))["terminationGracePeriodSeconds"] > drain_s + pause_s
    assert pod(find("Deployment", "haproxy"))["terminationGracePeriodSeconds"] > hard_stop_s + pause_s
    assert hard_stop_s > drain_s
    entrypoint = (ROOT / "deploy" / "docker" / "serve_triton.py").read_text()
    exit_s = int(re.search(r"EXIT_TIMEOUT_S = (\d+)", entrypoint)[1])
    assert pod(find("StatefulSet", "triton"))["terminationGracePeriodSeconds"] > exit_s


def test_settings_are_settings():
    known = {f"CROSSGATE_{field.upper()}" for field in Settings.model_fields} | STAGE_VARIABLES
    assert not SETTINGS.keys() - known


@pytest.mark.parametrize("manifest", [m for m in MANIFESTS if m["kind"] == "Service"], ids=called)
def test_services_find_their_pods_and_ports(manifest):
    selector = manifest["spec"]["selector"]
    (workload,) = [w for w in WORKLOADS if selector.items() <= w["spec"]["template"]["metadata"]["labels"].items()]
    ports = {port["name"]: port["containerPort"] for port in container(workload)["ports"]}
    for port in manifest["spec"]["ports"]:
        target = port.get("targetPort", port["port"])
        assert target in ports or target in ports.values(), called(manifest)


def test_policies_open_the_ports_on_the_request_s_way_and_no_other():
    opened = {}
    for policy in (m for m in MANIFESTS if m["kind"] == "NetworkPolicy"):
        ports = [port["port"] for rule in policy["spec"].get("ingress", ()) for port in rule["ports"]]
        opened[policy["metadata"]["name"]] = sorted(ports)
    assert opened == {"nothing-but": [], "gateway": [8000], "haproxy": [8001, 8404], "triton": [8000, 8001, 8002]}


def test_haproxy_is_compose_s_but_for_its_servers():
    assert (FOLDER / "haproxy.cfg").read_text() == render(), "run: python -m deploy.kubernetes.haproxy"


def test_haproxy_lists_every_replica_by_name_with_its_own_place_on_the_ring():
    scaled = find("ScaledObject", "triton")["spec"]
    stateful = find("StatefulSet", "triton")
    suffix = f"{stateful['spec']['serviceName']}.{stateful['metadata']['namespace']}.svc.cluster.local"
    backends = (FOLDER / "haproxy.cfg").read_text().split("\nbackend ")[1:]
    assert [backend.split()[0] for backend in backends] == ["pictures", "others"]
    for backend in backends:
        servers = re.findall(r"^ +server (\S+) (\S+):8001 id (\d+) ", backend, re.MULTILINE)
        assert [name for name, _, _ in servers] == [f"triton-{n}" for n in range(scaled["maxReplicaCount"])]
        assert len({place for _, _, place in servers}) == len(servers)
        assert all(address == f"{name}.{suffix}" for name, address, _ in servers)


def test_keda_scales_the_replicas_on_metrics_that_the_decoder_has():
    scaled = find("ScaledObject", "triton")["spec"]
    target = scaled["scaleTargetRef"]
    assert find(target["kind"], target["name"])["apiVersion"] == target["apiVersion"]
    assert 0 < scaled["minReplicaCount"] < scaled["maxReplicaCount"]
    (trigger,) = scaled["triggers"]
    assert trigger.keys() == {"type", "metricType", "metadata"}
    assert trigger["metadata"].keys() == {"serverAddress", "query", "threshold"}
    assert float(trigger["metadata"]["threshold"]) < float(SETTINGS["CROSSGATE_MAX_RUNNING"])
    exported = (ROOT / "model_repo/fused_decoder/1/decoder_metrics.py").read_text()
    metrics = re.findall(r"crossgate_(\w+)", trigger["metadata"]["query"])
    assert metrics
    for metric in metrics:
        assert f'"{metric}"' in exported
    behaviour = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    as_autoscaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "triton"},
        "spec": {"scaleTargetRef": target, "maxReplicas": scaled["maxReplicaCount"], "behavior": behaviour},
    }
    kubernetes_validate.validate(as_autoscaler, VERSION, strict=True)


def test_gateways_let_in_more_than_the_decoders_run():
    replicas = find("ScaledObject", "triton")["spec"]["minReplicaCount"]
    gateways = find("HorizontalPodAutoscaler", "gateway")["spec"]["minReplicas"]
    let_in = gateways * int(SETTINGS["CROSSGATE_MAX_CONCURRENT_REQUESTS"])
    assert let_in > 2 * replicas * int(SETTINGS["CROSSGATE_MAX_RUNNING"])


@pytest.mark.parametrize(
    ("gateways", "replicas"), [("minReplicas", "minReplicaCount"), ("maxReplicas", "maxReplicaCount")]
)
def test_keys_share_no_more_places_than_the_decoders_run(gateways: str, replicas: str):
    num_gateways = find("HorizontalPodAutoscaler", "gateway")["spec"][gateways]
    num_replicas = find("ScaledObject", "triton")["spec"][replicas]
    places = num_gateways * int(SETTINGS["CROSSGATE_MAX_SHARED_REQUESTS"])
    assert places <= num_replicas * int(SETTINGS["CROSSGATE_MAX_RUNNING"])


@pytest.mark.parametrize("settings", [SETTINGS, {}], ids=["kubernetes", "defaults"])
def test_what_a_gateway_lets_in_fits_the_streams_of_its_connection(settings):
    """Heartbeats have a connection of their own; each request has a stream, and so has each picture under way."""
    config = (FOLDER / "haproxy.cfg").read_text()
    streams = int(re.search(r"tune\.h2\.max-concurrent-streams (\d+)", config)[1])
    assert number("MAX_CONCURRENT_REQUESTS", settings) + number("MAX_CONCURRENT_ENCODES", settings) < streams


@pytest.mark.parametrize("settings", [SETTINGS, {}], ids=["kubernetes", "defaults"])
def test_a_gateway_has_a_connection_for_all_who_run_or_wait_and_more(settings):
    """Else its queue is never full, and who comes too late finds the door shut instead of hearing when to come back."""
    let_in = number("MAX_CONCURRENT_REQUESTS", settings) + number("MAX_QUEUE", settings)
    assert number("MAX_CONNECTIONS", settings) > let_in


def test_all_gateways_together_do_not_fill_the_encoders_queues():
    config = (ROOT / "model_repo/vision_encoder/config.pbtxt").read_text()
    queue = int(re.search(r"max_queue_size: (\d+)", config)[1])
    gateways = find("HorizontalPodAutoscaler", "gateway")["spec"]["maxReplicas"]
    replicas = find("ScaledObject", "triton")["spec"]["minReplicaCount"]
    assert gateways * number("MAX_CONCURRENT_ENCODES", SETTINGS) <= replicas * queue
    assert number("MAX_CONCURRENT_ENCODES", {}) <= queue, "one gateway, one Triton"


def number(setting: str, settings: dict[str, str]) -> int:
    return int(settings.get(f"CROSSGATE_{setting}", Settings.model_fields[setting.lower()].default))


def test_triton_bears_the_gateways_pings():
    """Else it ends connections that ask too often whether they still stand."""
    for file in ("deploy/docker/serve_triton.py", "service/launch/triton.py"):
        assert '"grpc-http2-max-ping-strikes": 0' in (ROOT / file).read_text(), file


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
def test_haproxy_accepts_its_configuration():
    environment = {**os.environ, "LOAD_FACTOR": "150"}
    command = ["haproxy", "-c", "-f", str(FOLDER / "haproxy.cfg")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
