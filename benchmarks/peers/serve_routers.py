"""`cairn serve` beside vllm-router and smg (Rust), cache-aware, in turns, in front of the same mock engines.

    python benchmarks/peers/serve_routers.py --peers /tmp/routers --out benchmarks/results/serve.json

The peers live in a venv of their own:

    python3 -m venv /tmp/routers && /tmp/routers/bin/pip install vllm-router==0.1.17 smg==1.13.0

Measured as `cairn bench serve` does. None of them tokenizes: the engines publish no KV events, so all three guess from
the prompts' text where a prefix may be.
"""

import argparse
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cairn.cli.bench_serve import Load, Target, engines, gateway, measure
from cairn.cli.output import machine

COMMANDS = {"vllm-router": ["vllm-router"], "smg": ["smg", "launch"]}
START_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def router(home: Path, name: str, urls: Sequence[str]) -> Iterator[Target]:
    """A rival, once it serves."""
    port = free_port()
    first, *rest = COMMANDS[name]
    command = [str(home / "bin" / first), *rest, "--worker-urls", *urls, "--policy", "cache_aware"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={})
    url = f"http://127.0.0.1:{port}"
    try:
        wait(url, child)
        yield Target(url, child.pid)
    finally:
        child.kill()
        child.wait()


def wait(url: str, child: "subprocess.Popen[bytes]") -> None:
    body = json.dumps({"model": "mock", "prompt": "hello", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            if child.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{url}: has not started")
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="The venv that has them.")
    parser.add_argument("--only", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    load = Load(requests=given.requests)
    with ExitStack() as stack:
        urls = stack.enter_context(engines(load.engines))
        targets = {"direct": Target(urls[0]), "cairn": stack.enter_context(gateway(urls))}
        targets |= {name: stack.enter_context(router(given.peers, name, urls)) for name in given.only}
        result = {"load": load._asdict(), **measure(targets, load)}
    command = shlex.join(["python", *sys.argv])
    text = json.dumps({"machine": machine() | {"command": command}, **result}, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
