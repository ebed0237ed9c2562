"""Real etcd on loopback: members in processes of their own, which die with the test."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_ports

DEADLINE_S = 20.0

#: Waits between two looks at something that has no other sign, seconds.
_LOOK_S = 0.02

needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="no `etcd` here: apt-get install etcd-server")


class Member:
    """One member of a cluster."""

    def __init__(self, name: str, directory: Path, ports: tuple[int, int], cluster: str, options: tuple[str, ...]):
        self.name, self.directory = name, directory
        self.port, peer = ports
        self.scheme = "https" if "--cert-file" in options else "http"
        self.endpoint = f"{self.scheme}://127.0.0.1:{self.port}"
        self._command = [
            "etcd", "--name", name, "--data-dir", str(directory / name), "--log-level", "error", "--logger", "zap",
            "--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint,
            "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-cluster", cluster, "--initial-cluster-state", "new", "--unsafe-no-fsync", *options,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        with (self.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def freeze(self) -> None:
        """Stops it; returns when all its threads have stopped."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def forget(self) -> None:
        """Its data, while it is dead."""
        shutil.rmtree(self.directory / self.name)

    def post(self, path: str, **body: Any) -> Any:
        """Asks the member's JSON gateway: what our client cannot do, or another client than ours."""
        request = urllib.request.Request(f"{self.endpoint}/v3/{path}", json.dumps(body).encode())
        if token := body.pop("token", None):
            request.add_header("Authorization", token)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return json.load(answer)

    def put(self, key: str, value: str, **more: Any) -> Any:
        return self.post("kv/put", key=b64(key), value=b64(value), **more)

    def compact(self, revision: int) -> None:
        self.post("kv/compaction", revision=revision, physical=True)

    def is_leader(self) -> bool:
        with contextlib.suppress(OSError, urllib.error.URLError):
            status = self.post("maintenance/status")
            return bool(status.get("leader")) and status["leader"] == status["header"]["member_id"]
        return False


class Cluster:
    """Members of one cluster."""

    def __init__(self, directory: Path, size: int, options: tuple[str, ...] = ()):
        self.directory = directory
        ports = free_ports(2 * size)
        cluster = ",".join(f"m{i}=http://127.0.0.1:{ports[2 * i + 1]}" for i in range(size))
        self.members = [
            Member(f"m{i}", directory, (ports[2 * i], ports[2 * i + 1]), cluster, options) for i in range(size)
        ]
        self.endpoints = tuple(member.endpoint for member in self.members)

    def leader(self) -> Member:
        """Waits for one."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            for member in self.members:
                if member.process.poll() is None and member.is_leader():
                    return member
            time.sleep(_LOOK_S)
        raise AssertionError(f"no leader in time; see the logs in {self.directory}")

    def stop(self) -> None:
        for member in self.members:
            if member.process.poll() is None:
                member.signal(signal.SIGCONT)
                member.kill()


@contextlib.contextmanager
def etcd(size: int = 1, *options: str, wait: bool = True) -> Iterator[Cluster]:
    """A cluster that has a leader."""
    with tempfile.TemporaryDirectory(prefix="cairn-etcd-") as directory:
        cluster = Cluster(Path(directory), size, options)
        try:
            if wait:
                cluster.leader()
            yield cluster
        finally:
            cluster.stop()


def b64(text: str) -> str:
    return b64encode(text.encode()).decode()
