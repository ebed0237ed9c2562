"""`cairn up`: a cluster of mock engines from one file, which serves, mends itself, and leaves nothing behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.serve.running import DEADLINE_S, RUN, until

from cairn.cli.up.plan import children_of
from cairn.cli.up.spec import load_spec
from cairn.cli.up.state import answers
from cairn.cli.up.supervisor import Supervisor
from cairn.errors import ConfigError, StorageError


class Up:
    """`cairn up` in a process of its own."""

    def __init__(self, home: Path, text: str) -> None:
        home.mkdir(exist_ok=True)
        self.home, file = home / "state", home / "cluster.yaml"
        file.write_text(text)
        command = [sys.executable, "-c", RUN, "up", str(file), "--dir", str(self.home)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []

    def wait_ready(self) -> str:
        """The service's address."""
        while not self.lines or not self.lines[-1].startswith("ready: "):
            assert self.process.stdout is not None
            self.lines.append(self.process.stdout.readline())
            assert self.lines[-1], self.lines
        return self.lines[-1].removeprefix("ready: ").partition(";")[0]

    def status(self) -> dict[str, Any]:
        command = [sys.executable, "-c", RUN, "status", "--dir", str(self.home), "--json"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
        assert ended.stdout, ended.stderr
        return dict(json.loads(ended.stdout)["children"])

    def pids(self) -> dict[str, int]:
        state = json.loads((self.home / "state.json").read_text())
        return {name: one["pid"] for name, one in state["children"].items()}


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Any]:
    started = []

    def start(text: str) -> Up:
        started.append(Up(tmp_path, text))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            one.process.wait(DEADLINE_S)
        assert one.process.stdout is not None
        one.process.stdout.close()


@pytest.mark.parametrize("registry", ["memory", "etcd"])
def test_a_cluster_serves_mends_itself_and_ends(up: Any, registry: str) -> None:
    if registry == "etcd" and shutil.which("etcd") is None:
        pytest.skip("no `etcd` here: apt-get install etcd-server")
    text = "engines: [{kind: mock, name: m, count: 2}]\nconfig: {serve: {http_server_port: 0}}\n"
    cluster = up(text + f"etcd: {'true' if registry == 'etcd' else 'false'}\ntraffic: {{rate: 20}}\n")
    url = cluster.wait_ready()
    body = {"model": "mock", "prompt": "x", "max_tokens": 2}
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE_S).status_code == 200
    pids = cluster.pids()
    until(lambda: httpx.get(f"{url}/api/v1/state").json()["prompts"] > 3, "the traffic")
    expected = {"m-0", "m-1", "service", "traffic"}
    if registry == "etcd":
        expected |= {"etcd", "m-0.register", "m-1.register"}
        assert {name: one["state"] for name, one in cluster.status().items()} == dict.fromkeys(expected, "ready")
    assert pids.keys() == expected
    os.kill(pids["m-0"], signal.SIGKILL)
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE_S).status_code == 200
    until(lambda: cluster.pids()["m-0"] != pids["m-0"], "it was started anew")
    every = [*cluster.pids().values()]
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.process.wait(DEADLINE_S) == 0
    assert not any(psutil.pid_exists(pid) for pid in every)
    assert not (cluster.home / "state.json").exists()


def test_what_cannot_be_started_is_said_in_a_line_and_leaves_nothing(up: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            f"engines: [{{kind: mock, port: {port}}}]": f"port {port}: is in use",
            "engines: [{kind: command, command: [sh, -c, 'echo no such model; exit 3']}]": "no such model",
            "engines: [{kind: vllm}]": "model must be named",
            "engines: []": "at least 1 item",
            "engines: [{kind: mock}]\nconfig: {serve: {nonsense: 1}}": "nonsense",
        }
        for text, says in cases.items():
            cluster = up(text)
            said, _ = cluster.process.communicate(timeout=DEADLINE_S)
            assert cluster.process.returncode in (1, 2)
            assert says in said
            assert said.count("\n") == 1
            assert not (cluster.home / "state.json").exists()


def test_status_without_a_cluster(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, "status", "--dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "no cluster runs" in ended.stderr


def test_what_cannot_be_run_or_written_ends_in_one_line(tmp_path: Path) -> None:
    spec = tmp_path / "cluster.yaml"
    spec.write_text("engines: [{kind: command, name: e, command: [/nothing/at/all]}]\n")
    with pytest.raises(StorageError, match="e: /nothing/at/all cannot be run: No such file"):
        Supervisor(children_of(load_spec(spec), tmp_path / "state"), tmp_path / "state", print).run()
    assert (tmp_path / "state" / "cairn.yaml").stat().st_mode & 0o777 == 0o600, "others may read its keys"
    with pytest.raises(StorageError, match="name another place with --dir"):
        children_of(load_spec(spec), spec / "below")
    spec.write_text("engines: [{kind: mock, name: 2026-02-30}]\n")
    with pytest.raises(ConfigError, match="day is out of range for month"):
        load_spec(spec)


def test_what_speaks_no_http_is_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as client:
                client.recv(1)
                client.sendall(b"hello\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert not answers(f"http://127.0.0.1:{server.getsockname()[1]}/health")
        thread.join()
