"""The real processes, started as the manifests say, answer the manifests' probes."""

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cairn.config import load_config
from tests.cluster.etcd import etcd, needs_etcd
from tests.deploy.test_manifests import DEPLOY, documents, pods

DEADLINE_S = 120.0
RUN = [sys.executable, "-c", "from cairn.cli import main; main()"]
PODS = dict(pods())
#: What only a test changes: a place of its own, and little of everything.
SMALL = {"CAIRN_STORAGE__CPU__SIZE": "16MiB", "CAIRN_STORAGE__DISK__SIZE": "16MiB", "CAIRN_INDEX__BLOCKS": "65536"}

Start = Callable[[list[str], dict[str, str]], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `cairn` and returns once it has said something."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("CAIRN_")}
    with ExitStack() as stack:

        def begin(arguments: list[str], environ: dict[str, str]) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [*RUN, *arguments],
                env=clean | SMALL | environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(process.wait, DEADLINE_S)
            stack.callback(process.terminate)
            assert process.stdout
            stack.callback(process.stdout.close)
            assert select.select([process.stdout], [], [], DEADLINE_S)[0]
            return process

        yield begin


def settings(tmp_path: Path) -> Path:
    """The ConfigMap's file."""
    path = tmp_path / "cairn.yaml"
    path.write_text(documents("ConfigMap")[0]["data"]["cairn.yaml"])
    return path


def placed(arguments: list[str], tmp_path: Path) -> list[str]:
    """With this test's files in the place of those that are mounted, and on loopback."""
    files = {"/etc/cairn/cairn.yaml": str(settings(tmp_path)), "0.0.0.0": "127.0.0.1"}
    for name in ("api-keys", "index-token"):
        (tmp_path / name).write_text("a-key\n")
        files[f"/run/secrets/cairn/{name}"] = str(tmp_path / name)
    found = [files.get(argument, argument) for argument in arguments]
    assert not [argument for argument in found if argument.startswith(("/etc/", "/run/"))]
    return found


def probes(container: dict[str, Any]) -> set[tuple[str, str]]:
    """Paths and ports that probes ask."""
    names = ("startupProbe", "readinessProbe", "livenessProbe")
    return {(container[name]["httpGet"]["path"], container[name]["httpGet"]["port"]) for name in names}


def address(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    line = process.stdout.readline()
    assert "HTTP on http://" in line, line
    return line.partition("HTTP on ")[2].split(",")[0].strip()


def test_the_index_answers_its_probes(start: Start, tmp_path: Path) -> None:
    (container,) = PODS["cairn-index"]["containers"]
    nowhere = {"CAIRN_CLUSTER__ETCD_ADDR": "[]", "CAIRN_INDEX__HTTP_PORT": "0", "CAIRN_INDEX__RPC_PORT": "0"}
    process = start(placed(container["args"], tmp_path), nowhere)
    url = address(process)
    assert probes(container) == {("/health", "http"), ("/health/ready", "http")}
    for path, _ in probes(container):
        assert httpx.get(f"{url}{path}", timeout=DEADLINE_S).status_code == 200
    assert httpx.get(f"{url}/instances", timeout=DEADLINE_S).status_code == 401
    key = {"authorization": "Bearer a-key"}
    assert httpx.get(f"{url}/instances", headers=key, timeout=DEADLINE_S).status_code == 200


@needs_etcd
def test_the_service_answers_its_probes(start: Start, tmp_path: Path) -> None:
    (container,) = PODS["cairn-serve"]["containers"]
    with etcd() as cluster:
        here = {"CAIRN_CLUSTER__ETCD_ADDR": ",".join(cluster.endpoints), "CAIRN_SERVE__HTTP_SERVER_PORT": "0"}
        named = {one["name"]: "a-pod" for one in container["env"] if "fieldRef" in one["valueFrom"]}
        process = start(placed(container["args"], tmp_path), here | named)
        url = address(process)
        asked = {path: httpx.get(f"{url}{path}", timeout=DEADLINE_S).status_code for path, _ in probes(container)}
        assert asked == {"/health": 200, "/health/ready": 503}  # there is no engine
        assert httpx.get(f"{url}/v1/models", timeout=DEADLINE_S).status_code == 401
        process.terminate()  # while its registry lives
        assert process.wait(DEADLINE_S) == 0


def test_the_node_answers_its_probe(start: Start, tmp_path: Path) -> None:
    (container,) = PODS["cairn-node"]["containers"]
    here = {"CAIRN_NODE__ADDRESS": f"ipc://{tmp_path}/node.sock", "CAIRN_STORAGE__DISK__PATH": str(tmp_path / "cache")}
    start(placed(container["args"], tmp_path), here)
    commands = [container[name]["exec"]["command"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert all(command == commands[0] for command in commands)
    assert commands[0][0] == "cairn"
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert compose["services"]["node"]["healthcheck"]["test"][1:] == commands[0]
    ran = subprocess.run(
        [*RUN, *placed(commands[0][1:], tmp_path)],
        env=os.environ | here,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_ports_are_those_that_they_listen_on(tmp_path: Path) -> None:
    config = load_config(settings(tmp_path), environ={})
    ports = {name: pod["containers"][0].get("ports", []) for name, pod in pods()}
    assert {name: {port["name"]: port["containerPort"] for port in own} for name, own in ports.items()} == {
        "cairn-node": {},
        "cairn-index": {"http": config.index.http_port, "grpc": config.index.rpc_port},
        "cairn-serve": {"http": config.serve.http_server_port},
    }
