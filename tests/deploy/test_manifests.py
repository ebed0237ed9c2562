"""What deploy/ holds is taken by the tools that it is for, and fits the commands and settings that there are."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cairn.config import Config, load_config
from tests.docs.commands import check, check_cairn
from tests.docs.pages import ROOT

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MANIFESTS = [path for path in sorted(KUBERNETES.glob("*.yaml")) if path.name != "kustomization.yaml"]


def documents(kind: str = "") -> list[dict[str, Any]]:
    found = [one for path in MANIFESTS for one in yaml.safe_load_all(path.read_text())]
    return [one for one in found if not kind or one["kind"] == kind]


def workloads() -> list[dict[str, Any]]:
    return [*documents("Deployment"), *documents("DaemonSet")]


def pods() -> list[tuple[str, dict[str, Any]]]:
    return [(one["metadata"]["name"], one["spec"]["template"]["spec"]) for one in workloads()]


def config_of(text: str, tmp_path: Path) -> Config:
    path = tmp_path / "cairn.yaml"
    path.write_text(text)
    return load_config(path, environ={})


def test_the_dockerfile_lints() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    subprocess.run([linter, "--failure-threshold", "style", DEPLOY / "Dockerfile"], check=True, timeout=60)


def test_the_dockerfile_copies_what_its_build_needs() -> None:
    """Nothing that is not there, all that pyproject.toml names, and no more than is let into the build's context."""
    copied = {
        part for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE) for part in line.split()[:-1]
    }
    assert [part for part in copied if not (ROOT / part).exists()] == []
    hatch = PYPROJECT["tool"]["hatch"]
    needed = [PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"], hatch["version"]["path"]]
    for path in ("pyproject.toml", *needed, *hatch["build"]["targets"]["wheel"]["packages"]):
        assert {path, path.partition("/")[0]} & copied, path
    ignored, *let_in = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert ignored == "*"
    assert {path.removeprefix("!") for path in let_in if path.startswith("!")} == copied


def test_what_the_image_installs_is_pinned_and_fits_together() -> None:
    """All that its extras need, and all that those need, in the versions of constraints.txt."""
    extras = re.search(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert extras
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines) if pin}
    wanted = [Requirement(f"cairn-kv[{extras[1]}]")]
    seen: set[str] = set()
    while wanted:
        one = wanted.pop()
        if str(one) in seen:
            continue
        seen.add(str(one))
        if one.name != "cairn-kv":
            assert pins[canonicalize_name(one.name)] in one.specifier, one
        needs = map(Requirement, metadata.requires(one.name) or ())
        wanted += [
            need
            for need in needs
            if not need.marker or any(need.marker.evaluate({"extra": extra}) for extra in ("", *one.extras))
        ]
    assert len(seen) > 30


def test_the_dockerfile_starts_a_command_that_there_is_as_nobody_else() -> None:
    entry = re.search(r'USER 10001:10001\nENTRYPOINT \["(.+)"\]\nCMD \["--help"\]\n$', DOCKERFILE)
    assert entry
    assert entry[1] in PYPROJECT["project"]["scripts"]


@pytest.mark.parametrize("version", ["1.28", "1.37"])
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_takes_them(path: Path, version: str) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_kustomization_names_them_all() -> None:
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == [path.name for path in MANIFESTS]


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_pods_have_no_more_rights_than_they_need(name: str, pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        rights = container["securityContext"]
        assert not rights["allowPrivilegeEscalation"]
        assert rights["readOnlyRootFilesystem"]
        assert rights["capabilities"]["drop"] == ["ALL"]
        assert {"cpu", "memory"} <= {*container["resources"]["requests"]}
        assert container["resources"]["limits"]["memory"]
    for container in pod["containers"]:
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= {*container}


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_what_pods_mount_is_there(name: str, pod: dict[str, Any], tmp_path: Path) -> None:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    maps = {one["metadata"]["name"]: one["data"] for one in documents("ConfigMap")}
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        for argument in container.get("args", []):
            where = next((path for path in mounts if argument.startswith(f"{path}/")), None)
            if where is None:
                continue
            source, file = mounts[where], argument.removeprefix(f"{where}/")
            given = maps[source["configMap"]["name"]] if "configMap" in source else source["secret"]["items"]
            assert file in (given if "configMap" in source else {item["path"] for item in given})
    if name == "cairn-node":
        config = config_of(maps["cairn"]["cairn.yaml"], tmp_path)
        paths = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert {"/dev/shm", str(config.storage.disk.path)} <= paths
        assert str(Path((config.node.address or "").removeprefix("ipc://")).parent) in paths
        limit = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
        assert limit >= config.storage.cpu.size + (2 << 30)


def test_services_budgets_and_policies_choose_pods_that_there_are() -> None:
    labels = {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"] for one in workloads()}
    ports = {name: {port["name"] for port in pod["containers"][0].get("ports", [])} for name, pod in pods()}

    def chosen(selector: dict[str, str]) -> str:
        (name,) = [name for name, own in labels.items() if selector.items() <= own.items()]
        return name

    for one in workloads():
        assert chosen(one["spec"]["selector"]["matchLabels"]) == one["metadata"]["name"]
    for service in documents("Service"):
        name = chosen(service["spec"]["selector"])
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports[name]
    budgets = [chosen(one["spec"]["selector"]["matchLabels"]) for one in documents("PodDisruptionBudget")]
    assert sorted(budgets) == sorted(one["metadata"]["name"] for one in documents("Deployment"))
    policies = {chosen(one["spec"]["podSelector"]["matchLabels"]): one for one in documents("NetworkPolicy")}
    assert {*policies} == {*labels}
    for name, policy in policies.items():
        assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} <= ports[name]


def test_they_are_given_the_time_to_end_that_they_take(tmp_path: Path) -> None:
    config = config_of(documents("ConfigMap")[0]["data"]["cairn.yaml"], tmp_path)
    takes = {"cairn-node": config.node.stop_timeout_s, "cairn-index": config.index.shutdown_s}
    takes["cairn-serve"] = config.serve.shutdown_s + 5  # preStop
    for name, pod in pods():
        assert pod["terminationGracePeriodSeconds"] > takes[name] + 5
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name in ("node", "index", "serve"):
        grace = int(compose["services"][name]["stop_grace_period"].removesuffix("s"))
        assert grace >= takes[f"cairn-{name}"]
    unit = (DEPLOY / "cairn-node.service").read_text()
    assert int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1]) > config.node.stop_timeout_s  # type: ignore[index]


def test_the_unit_starts_a_command_that_there_is() -> None:
    unit = (DEPLOY / "cairn-node.service").read_text()
    (line,) = re.findall(r"^ExecStart=/usr/bin/env cairn (.+)$", unit, re.MULTILINE)
    check_cairn(shlex.split(line))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no `systemd-analyze`")
def test_systemd_takes_the_unit() -> None:
    command = ["systemd-analyze", "verify", "--man=no", str(DEPLOY / "cairn-node.service")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert ran.stderr == ""


def test_the_compose_file_fits_together(tmp_path: Path) -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services, targets = compose["services"], re.findall(r" AS (\S+)$", DOCKERFILE, re.MULTILINE)
    config = config_of((DEPLOY / "cairn.yaml").read_text(), tmp_path)
    assert int(services["node"]["shm_size"].removesuffix("gb")) << 30 > config.storage.cpu.size
    for name, service in services.items():
        assert service["build"]["target"] in targets, name
        assert {*service.get("depends_on", []), *service.get("secrets", [])} <= {*services, *compose["secrets"]}
        assert service.get("network_mode", "none").removeprefix("service:") in {*services, "none"}
        assert service["mem_limit"]
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).is_file()
        if "entrypoint" in service:
            assert check(shlex.join([*service["entrypoint"], *service["command"]])) == 1
        elif name != "etcd":
            check_cairn(service["command"])
            files = [part for part in service["command"] if part.startswith("/run/secrets/")]
            assert {Path(part).name for part in files} == {*service.get("secrets", [])}
        if "ports" in service or name == "node":
            assert service["healthcheck"]["test"][0] == "CMD"
