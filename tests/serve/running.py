"""A real `cairn index` in a process of its own, and what is asked of it."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Self

import httpx
import numpy as np

DEADLINE_S = 60.0
#: A first start compiles kernels.
START_S = 180.0
RUN = "from cairn.cli import main; main()"


class Service:
    """Listens on free ports. `lines`: what it has printed, stderr included."""

    def __init__(self, *options: str, **environ: str) -> None:
        ports = ["--http-port", "0", *([] if "--no-rpc" in options or "--rpc-port" in options else ["--rpc-port", "0"])]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CAIRN_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, "index", *ports, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=clean | {"CAIRN_INDEX__REQUEST_S": "50"} | environ,  # the first chat imports what renders it
        )
        self.lines: list[str] = []
        line = self.line(START_S)
        assert line.startswith("cairn index: HTTP on http://"), line
        self.http, _, self.rpc = line.removeprefix("cairn index: HTTP on http://").strip().partition(", gRPC on ")
        self.client = httpx.Client(base_url=f"http://{self.http}", timeout=DEADLINE_S)

    def line(self, timeout_s: float = DEADLINE_S) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], timeout_s)[0], "nothing printed"
        self.lines.append(self.process.stdout.readline())
        return self.lines[-1]

    def score(self, **fields: Any) -> dict[str, Any]:
        return self._post("/score", fields)

    def chat(self, **fields: Any) -> dict[str, Any]:
        return self._post("/score_chat_completions", fields)

    def routed(self, **fields: Any) -> dict[str, Any]:
        return self._post("/routed", fields)

    def binary(self, tokens: Any, **query: Any) -> dict[str, Any]:
        body = np.asarray(tokens, "<u4").tobytes()
        answer = self.client.post(
            "/score/tokens", params=query, content=body, headers={"content-type": "application/octet-stream"}
        )
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def state(self, name: str, rank: int = 0) -> dict[str, Any]:
        states = self.client.get("/instances").json()["instances"]
        return next((one for one in states if (one["name"], one["rank"]) == (name, rank)), {"blocks": 0})

    def wait_for_blocks(self, name: str, blocks: int, rank: int = 0) -> None:
        until(lambda: self.state(name, rank)["blocks"] == blocks, f"{blocks} blocks of {name}/{rank}")

    def end(self, by: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(by)
        return self.process.wait(DEADLINE_S)

    def _post(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        answer = self.client.post(path, content=json.dumps(fields), headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait(DEADLINE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a condition, by the clock at most DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        select.select([], [], [], 0.02)
