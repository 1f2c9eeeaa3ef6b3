"""The manifests for Kubernetes, as kustomize renders them: by the schemas, by what refers to what, and by the daemons.

kubectl and the schemas come from PyPI, so that neither a cluster nor a network is needed.
"""

import asyncio
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from cryptography import x509

from coordinator import config as coordinator_config
from hostd import config as hostd_config
from hostd.topology import load
from vfleet.certificates import ETCD, _own_names
from vfleet.etcd.server import find_binary

ROOT = Path(__file__).parents[2] / "deploy" / "kubernetes"
KUBERNETES_VERSIONS = ("1.29", "1.33")
HOSTS = ("h1", "h2", "h3")
UID = 65532  # of the image (deploy/docker)
KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent))
CERT_MANAGER = "cert-manager.io/v1"


@cache
def rendered() -> tuple[dict, ...]:
    assert KUBECTL is not None
    out = subprocess.run([KUBECTL, "kustomize", str(ROOT)], capture_output=True, text=True, check=False)
    assert (out.returncode, out.stderr) == (0, "")
    return tuple(yaml.safe_load_all(out.stdout))


def of_kind(*kinds: str) -> dict[str, dict]:
    return {each["metadata"]["name"]: each for each in rendered() if each["kind"] in kinds}


def workloads() -> dict[str, dict]:
    return of_kind("Deployment", "StatefulSet", "DaemonSet")


def pod_of(workload: dict) -> dict:
    return workload["spec"]["template"]["spec"]


def container_of(workload: dict) -> dict:
    (container,) = pod_of(workload)["containers"]
    return container


def environment(workload: dict) -> dict[str, str]:
    """Return what the container's processes see, with values that stand for what the cluster puts in."""
    (config_map,) = [name for name in of_kind("ConfigMap") if name.startswith("fleet-")]
    found = dict(of_kind("ConfigMap")[config_map]["data"]) if container_of(workload).get("envFrom") else {}
    stand_ins = {"status.podIP": "10.0.0.7", "metadata.name": f"{workload['metadata']['name']}-7d9f8b6c5-x2x4k"}
    for entry in container_of(workload)["env"]:
        field = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        value = stand_ins[field] if field else entry["value"]
        found[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
    return found


def arguments(workload: dict) -> list[str]:
    seen = environment(workload)
    return [re.sub(r"\$\((\w+)\)", lambda match: seen[match[1]], each) for each in container_of(workload)["args"]]


# --- schemas ---


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_everything_is_as_the_schemas_of_kubernetes_have_it(version):
    checked = [each for each in rendered() if each["apiVersion"] != CERT_MANAGER]
    assert len(checked) > 15
    for each in checked:
        kubernetes_validate.validate(each, version, strict=True)


ISSUER_REF = {"name": str, "kind": str, "group": str}
CERTIFICATE = {
    "secretName": str,
    "duration": str,
    "renewBefore": str,
    "commonName": str,
    "isCA": bool,
    "uris": list,
    "dnsNames": list,
    "usages": list,
    "privateKey": dict,
    "issuerRef": dict,
}
# Those of cert-manager's API that these certificates may have.
USAGES = {"digital signature", "server auth", "client auth"}


def test_what_is_cert_managers_is_as_its_api_has_it():
    for issuer in of_kind("Issuer").values():
        assert issuer["apiVersion"] == CERT_MANAGER
        assert issuer["spec"] in ({"selfSigned": {}}, {"ca": {"secretName": "ca"}})
    certificates = of_kind("Certificate")
    assert set(certificates) == {"ca", "operator", "coordinator", "etcd", *(f"host-{name}" for name in HOSTS)}
    for name, certificate in certificates.items():
        spec = certificate["spec"]
        assert certificate["apiVersion"] == CERT_MANAGER
        assert set(certificate) == {"apiVersion", "kind", "metadata", "spec"}
        assert all(isinstance(value, CERTIFICATE[field]) for field, value in spec.items()), name
        assert {field: type(value) for field, value in spec["issuerRef"].items()} == ISSUER_REF
        assert (spec["issuerRef"]["kind"], spec["issuerRef"]["group"]) == ("Issuer", "cert-manager.io")
        assert spec["issuerRef"]["name"] in of_kind("Issuer")
        assert set(spec.get("usages", ())) <= USAGES
        assert set(spec["privateKey"]) == {"algorithm", "size", "rotationPolicy"}
        assert (spec["privateKey"]["algorithm"], spec["privateKey"]["size"]) == ("ECDSA", 256)
        assert spec["privateKey"]["rotationPolicy"] in ("Always", "Never")
        hours = [re.fullmatch(r"(\d+)h", spec[field]) for field in ("duration", "renewBefore")]
        assert int(hours[0][1]) > int(hours[1][1]) >= 1
        assert spec["secretName"] == name
    secrets = [certificate["spec"]["secretName"] for certificate in certificates.values()]
    assert len(set(secrets)) == len(secrets)


# --- certificates are those that the daemons expect ---


def names(spec: dict) -> tuple[set[str], set[str]]:
    return set(spec.get("uris", ())), set(spec.get("dnsNames", ()))


def issued(kind: str, name: str) -> tuple[set[str], set[str]]:
    """Return the URIs and DNS names that `vfleet certs issue` would put into a certificate."""
    own = _own_names(kind, name)
    uris = {each.value for each in own if isinstance(each, x509.UniformResourceIdentifier)}
    return uris, {each.value for each in own if isinstance(each, x509.DNSName)}


@pytest.mark.parametrize(
    ("certificate", "role", "name"),
    [
        ("operator", "operator", "admin"),
        ("coordinator", "coordinator", "kubernetes"),
        *((f"host-{name}", "host", name) for name in HOSTS),
    ],
)
def test_a_certificate_has_the_names_that_the_command_would_issue(certificate, role, name):
    assert names(of_kind("Certificate")[certificate]["spec"]) == issued(role, name)


def test_etcds_certificate_has_its_own_names_and_those_under_which_it_is_found():
    uris, found = names(of_kind("Certificate")["etcd"]["spec"])
    assert (uris, found) >= (set(), issued(ETCD, "etcd")[1])
    for endpoint in environment(workloads()["vfleet-coordinator"])["VFLEET_ETCD"].split(","):
        host = endpoint.partition(":")[0]
        assert f"*.{host.partition('.')[2]}" in found
        assert host.partition(".")[0] in {f"etcd-{number}" for number in range(3)}


# --- the daemons take what they are given ---


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("VFLEET_LOG_FORMAT", "VFLEET_TLS"):
        monkeypatch.delenv(variable, raising=False)


def test_a_coordinator_takes_its_arguments(monkeypatch, no_environment):
    coordinator = workloads()["vfleet-coordinator"]
    for variable, value in environment(coordinator).items():
        monkeypatch.setenv(variable, value)
    assert container_of(coordinator)["command"] == ["vfleet-coordinator"]
    config = coordinator_config.parse(arguments(coordinator))
    assert (config.name, config.listen, config.advertise, config.metrics, config.log_format) == (
        "vfleet-coordinator-7d9f8b6c5-x2x4k",
        "0.0.0.0:7000",
        "10.0.0.7:7000",
        "10.0.0.7:9464",
        "json",
    )
    assert (config.security.tls, config.security.insecure) == (Path("/tls"), False)
    assert len(config.etcd) == 3


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_takes_its_arguments_and_is_in_the_topology(monkeypatch, no_environment, name):
    host = workloads()[f"host-{name}"]
    for variable, value in environment(host).items():
        monkeypatch.setenv(variable, value)
    assert container_of(host)["command"] == ["vfleet-hostd"]
    config = hostd_config.parse(arguments(host))
    assert (config.host, config.listen, config.metrics) == (name, "0.0.0.0:7000", "10.0.0.7:9464")
    assert config.advertise == "10.0.0.7:7000"
    assert config.security.tls == Path("/tls")
    mounts = {mount["mountPath"] for mount in container_of(host)["volumeMounts"]}
    assert {str(config.data_dir), str(config.topology.parent), "/tls"} == mounts
    (topology,) = [each["data"] for each in of_kind("ConfigMap").values() if "topology.yaml" in each["data"]]
    assert topology["topology.yaml"] == (ROOT / "topology.yaml").read_text()
    assert load(ROOT / "topology.yaml", name).name == name


def test_etcd_takes_its_settings():
    etcd = asyncio.run(find_binary())
    known = subprocess.run([etcd, "--help"], capture_output=True, text=True, check=False)
    flags = set(re.findall(r"--([a-z-]+)", known.stdout + known.stderr))
    for variable in environment(workloads()["etcd"]):
        assert variable.removeprefix("ETCD_").lower().replace("_", "-") in flags, variable


# --- what refers to what ---


def test_volumes_are_of_what_there_is():
    claims, maps = of_kind("PersistentVolumeClaim"), of_kind("ConfigMap")
    secrets = {each["spec"]["secretName"] for each in of_kind("Certificate").values()}
    for name, workload in workloads().items():
        volumes = {volume["name"]: volume for volume in pod_of(workload).get("volumes", ())}
        for volume in volumes.values():
            assert volume.get("secret", {}).get("secretName", "ca") in secrets, name
            assert volume.get("configMap", {"name": next(iter(maps))})["name"] in maps, name
            assert volume.get("persistentVolumeClaim", {"claimName": "host-h1"})["claimName"] in claims, name
        templates = {each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", ())}
        assert {mount["name"] for mount in container_of(workload)["volumeMounts"]} == volumes.keys() | templates
        for source in container_of(workload).get("envFrom", ()):
            assert source["configMapRef"]["name"] in maps


def test_nobody_has_the_keys_of_another():
    used = [
        volume["secret"]["secretName"]
        for workload in workloads().values()
        for volume in pod_of(workload)["volumes"]
        if "secret" in volume
    ]
    assert sorted(used) == sorted({"coordinator", "etcd", *(f"host-{name}" for name in HOSTS)})


def pods_with(labels: dict[str, str]) -> list[str]:
    return [
        name
        for name, workload in workloads().items()
        if labels.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
    ]


def test_selectors_find_pods():
    for name, workload in workloads().items():
        assert pods_with(workload["spec"]["selector"]["matchLabels"]) == [name]
    for name, service in of_kind("Service").items():
        (found,) = pods_with(service["spec"]["selector"])
        ports = {port["name"] for port in container_of(workloads()[found])["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports, name
    for name, budget in of_kind("PodDisruptionBudget").items():
        assert pods_with(budget["spec"]["selector"]["matchLabels"]) == [name]
    assert workloads()["etcd"]["spec"]["serviceName"] in of_kind("Service")


def test_each_host_is_on_a_node_of_its_own():
    for name in HOSTS:
        host = workloads()[f"host-{name}"]
        assert host["kind"] == "DaemonSet"
        assert pod_of(host)["nodeSelector"] == {"vfleet/host": name}
        assert environment(host)["HOST_NAME"] == name


def test_hosts_differ_by_their_names_alone():
    folders = {name: (ROOT / "hosts" / name / "kustomization.yaml").read_text() for name in HOSTS}
    assert {text.replace(name, "NAME") for name, text in folders.items()} == {folders["h1"].replace("h1", "NAME")}
    assert "HOST" not in yaml.safe_dump_all(
        [each for each in rendered() if "host-" in each["metadata"]["name"]]
    ).replace("HOST_NAME", "")


# --- who may talk to whom ---


def rules(policy: dict, direction: str, side: str) -> Iterator[tuple[dict, int]]:
    for rule in policy["spec"].get(direction, ()):
        for peer in rule[side]:
            for port in rule["ports"]:
                yield peer, port["port"]


def test_everything_is_closed_but_for_what_is_said():
    closed = of_kind("NetworkPolicy")["nothing-else"]["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_what_one_may_send_the_other_may_receive():
    policies = [each for name, each in of_kind("NetworkPolicy").items() if name not in ("nothing-else", "names")]
    sent, received = set(), set()
    for policy in policies:
        own = pods_with(policy["spec"]["podSelector"]["matchLabels"])
        for peer, port in rules(policy, "egress", "to"):
            sent |= {(a, b, port) for a in own for b in pods_with(peer["podSelector"]["matchLabels"])}
        for peer, port in rules(policy, "ingress", "from"):
            if "namespaceSelector" not in peer:
                received |= {(a, b, port) for a in pods_with(peer["podSelector"]["matchLabels"]) for b in own}
    assert sent == received
    hosts = [f"host-{name}" for name in HOSTS]
    assert {(a, b) for a, b, port in sent if port == 7000} == {
        *((("vfleet-coordinator"), host) for host in hosts),
        *((a, b) for a in hosts for b in hosts),
    }
    assert {a for a, b, port in sent if (b, port) == ("etcd", 2379)} == {"etcd", "vfleet-coordinator", *hosts}


def test_ports_that_are_let_in_are_there():
    for name, policy in of_kind("NetworkPolicy").items():
        for pod in pods_with(policy["spec"]["podSelector"].get("matchLabels", {"no": "pod"})):
            there = {port["containerPort"] for port in container_of(workloads()[pod])["ports"]}
            let_in = {port for _, port in rules(policy, "ingress", "from")}
            assert let_in == there, name


# --- hardening, and health ---


@pytest.mark.parametrize("name", ["vfleet-coordinator", "etcd", *(f"host-{name}" for name in HOSTS)])
def test_a_pod_may_do_no_more_than_it_must(name):
    pod, container = pod_of(workloads()[name]), container_of(workloads()[name])
    security = pod["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"], security["fsGroup"]) == (True, UID, UID)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"hostNetwork", "hostPID", "hostIPC"}.isdisjoint(pod)
    assert all(
        volume.keys() - {"name"} <= {"secret", "configMap", "persistentVolumeClaim"} for volume in pod["volumes"]
    )
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert "memory" in container["resources"]["limits"]


def test_the_namespace_lets_in_no_pod_that_may_do_more():
    (namespace,) = of_kind("Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {each["metadata"].get("namespace") for each in rendered() if each is not namespace} == {"vfleet"}


def test_images_have_names_and_versions():
    images = {name: container_of(workload)["image"] for name, workload in workloads().items()}
    assert all(re.fullmatch(r"registry\.example/vfleet(-etcd)?:\d+\.\d+\.\d+", image) for image in images.values())


@pytest.mark.parametrize("name", ["vfleet-coordinator", *(f"host-{name}" for name in HOSTS)])
def test_health_is_asked_of_the_health_service_where_the_daemon_listens(name):
    container = container_of(workloads()[name])
    commands = [container[probe]["exec"]["command"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert commands == [["sh", "-c", 'exec python -m vfleet.health "$POD_IP:7000"']] * 3
    assert importlib.util.find_spec("vfleet.health") is not None
    (listen,) = [each for each in container["args"] if each.startswith("--listen=")]
    # Also where `kubectl port-forward` comes from: the pod's own loopback.
    assert listen == "--listen=0.0.0.0:7000"
    assert environment(workloads()[name])["VFLEET_TLS"] == "/tls"
    # A daemon that waits for etcd to be mended is left alone: what starts anew on a restored etcd notices nothing.
    assert container["livenessProbe"]["periodSeconds"] * container["livenessProbe"]["failureThreshold"] >= 120
