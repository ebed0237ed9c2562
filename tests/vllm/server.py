"""`vllm serve`: an API server and its engine in processes of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.ports import free_ports

STOP_S = 30.0


class Server:
    """One `vllm serve` of a model, under the name "smol", and all its processes. Its log is `home`/log."""

    def __init__(self, model: Path, home: Path, *options: str, environ: Mapping[str, str] | None = None) -> None:
        """options: of the command line; environ: beside this process's own."""
        (self.port,) = free_ports(1)
        self.log = home / "log"
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self._command += ["--served-model-name", "smol", "--host", "127.0.0.1", "--port", str(self.port)]
        self._command += ["--dtype", "float32", "--enforce-eager", *options]
        self._environ = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        self._environ |= environ or {}
        self.start()

    def start(self) -> None:
        """At the same port as before, if it was killed."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._environ, start_new_session=True
            )

    def answers(self, path: str = "/health") -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait(self, deadline: float) -> None:
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)  # nothing tells when a server is up but asking

    def complete(self, prompt: list[int], tokens: int, **more: Any) -> Any:
        """A completion, greedy, as the API has it."""
        body = {"model": "smol", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} | more
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def metric(self, name: str, *labels: str) -> float:
        """The sum over a metric's samples that have these labels (`tier="dram"`)."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as reply:
            lines = [line.decode() for line in reply if line.decode().startswith((name + "{", name + " "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in labels))

    def processes(self) -> list[int]:
        """Every process of the server's session."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue  # it has just ended
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found

    def named(self, name: str) -> list[int]:
        """Its processes of that name, of which the system keeps 15 characters."""
        found = []
        for number in self.processes():
            with contextlib.suppress(OSError):  # it has just ended
                if Path(f"/proc/{number}/comm").read_text().strip() == name[:15]:
                    found.append(number)
        return found

    def ended(self, within: float) -> bool:
        """Whether all its processes end by themselves in so many seconds."""
        deadline = time.monotonic() + within
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)  # nothing tells when another's child has ended but looking
        self.process.wait(STOP_S)
        return True

    def kill(self) -> None:
        """All at once, but the process that removes their shared memory when they are gone."""
        for tracked in (True, False):
            for number in self.processes():
                with contextlib.suppress(OSError):
                    if not tracked or b"resource_tracker" not in Path(f"/proc/{number}/cmdline").read_bytes():
                        os.kill(number, signal.SIGKILL)
            if self.ended(5.0):
                return

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        finally:
            self.kill()
