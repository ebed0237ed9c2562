"""A real `cairn serve` and mock engines, each in a process of its own."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Self

import httpx

from tests.ports import free_ports
from tests.serve.running import DEADLINE_S, RUN, START_S, until


class Process:
    """A child that prints where it listens."""

    def __init__(self, command: list[str], says: str, **environ: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CAIRN_")}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean | environ
        )
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], START_S)[0], "nothing printed"
        line = self.process.stdout.readline()
        assert line.startswith(says), line + self.process.stdout.read()
        self.said = line.removeprefix(says).strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def end(self) -> int:
        """Its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Engine(Process):
    """A mock engine. options: fields of its `Settings`."""

    def __init__(self, port: int = 0, **options: Any) -> None:
        given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        super().__init__([sys.executable, "-m", "cairn.serve.mock", "--port", str(port), *given], "mock engine: ")
        self.url = self.said
        self.port = int(self.url.rpartition(":")[2])

    def seen(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/mock", timeout=DEADLINE_S).json())


class Gateway(Process):
    """`cairn serve` on a free port."""

    def __init__(self, *options: str, **environ: str) -> None:
        command = [sys.executable, "-c", RUN, "serve", "--http-server-port", "0", *options]
        super().__init__(command, "cairn serve: HTTP on http://", **environ)
        self.at, _, self.rpc = self.said.partition(", gRPC on ")
        self.client = httpx.Client(base_url=f"http://{self.at}", timeout=DEADLINE_S)

    def admin(self) -> dict[str, Any]:
        answer = self.client.get("/admin/instances", headers={"authorization": "Bearer boss"})
        assert answer.status_code == 200, answer.text
        return {one["name"]: one for one in answer.json()["instances"]}

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics", headers={"authorization": "Bearer boss"}).text.splitlines()
        assert any(line.startswith(f"# TYPE {name} ") for line in lines), f"no metric is called {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    def wait_for(self, *names: str) -> None:
        until(lambda: {*names} <= {*self.admin()}, f"instances {names}")

    def wait_without(self, name: str) -> None:
        until(lambda: name not in self.admin(), f"{name} gone")

    def __exit__(self, *_: object) -> None:
        self.client.close()
        super().__exit__()


class Bench:
    """One gateway, and places for engines that tests start and kill; each test has a model and engines of its own."""

    def __init__(self, places: int) -> None:
        self.ports = free_ports(places)
        self._next = 0
        backends = [
            part for i, port in enumerate(self.ports) for part in ("--backend", f"e{i}=http://127.0.0.1:{port}")
        ]
        settings = ["serve.max_body=1MiB", "serve.idle_s=30", "serve.queue_s=20", "serve.look_s=0.2"]
        options = [part for setting in settings for part in ("--set", setting)]
        self.gateway = Gateway(*backends, *options, CAIRN_SERVE__ADMIN_KEY="boss")

    def engines(self, model: str, *options: dict[str, Any]) -> list[Engine]:
        """Started, and known to the gateway; named by `name_of`. The caller ends them."""
        found = []
        for one in options:
            found.append(Engine(self.ports[self._next], model=model, **one))
            self._next += 1
        self.gateway.wait_for(*map(self.name_of, found))
        return found

    def name_of(self, engine: Engine) -> str:
        return f"e{self.ports.index(engine.port)}"


def events(answer: httpx.Response) -> Iterator[dict[str, Any] | None]:
    """The events of a stream as they come; None: the end."""
    for line in answer.iter_lines():
        if line:
            assert line.startswith("data: "), line
            data = line.removeprefix("data: ")
            yield None if data == "[DONE]" else json.loads(data)


def text_of(event: dict[str, Any] | None) -> str:
    """What an event says."""
    if event is None or not event.get("choices"):
        return ""
    choice = event["choices"][0]
    return str(choice["delta"].get("content") or "") if "delta" in choice else str(choice["text"])
