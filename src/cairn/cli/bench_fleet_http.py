"""The part of `cairn bench fleet` that asks the service: 131,072 tokens over HTTP, and in process beside it."""

import contextlib
import http.client
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from cairn.cli import bench_fleet
from cairn.cli.bench_fleet import BLOCK_TOKENS, events_of, feed, percentiles, prompt_of, warm
from cairn.errors import StorageError

_PATIENCE_S: Final = 120.0
_TIMES: Final = 300
_EVENT_BLOCKS: Final = 512

#: Blocks of prompts that nobody has told before, a second, while figures called busy are taken.
_FLOOD: Final = 100_000


class _Followed(NamedTuple):
    """A publisher's name and endpoints."""

    name: str
    endpoint: str
    replay: str

    def __str__(self) -> str:
        return f"{self.name}={self.endpoint},replay={self.replay}"


def run_http(sources: int) -> dict[str, float]:
    """All sources hold the prompt, and are followed by a real `cairn index`, over one connection that stays open.

    `in_process`: tokens to scores, without a service. `http_*`: the same over loopback, by kind of body. `busy`: while
    one more instance tells of 100,000 blocks a second that are new to the index.
    """
    blocks = bench_fleet.QUERY_BLOCKS
    tokens = prompt_of(1, blocks)
    listed = json.dumps({"token_ids": tokens.tolist()}, separators=(",", ":")).encode()
    found = percentiles("in_process", _in_process(sources, blocks), _TIMES)
    every = [_Followed(f"w{i}", _free_endpoint(), _free_endpoint()) for i in range(sources)]
    flood = _Followed("flood", _free_endpoint(), _free_endpoint())
    # Every publisher is there before the service: who connects to a port that nobody holds may be given that very port.
    with (
        _published(every, blocks),
        _process("-m", __name__, flood.endpoint, flood.replay) as flooding,
        _service([*every, flood]) as service,
    ):
        service.wait_for([one.name for one in every], blocks)
        binary = service.question("/score/tokens", "application/octet-stream", tokens.tobytes(), every, blocks)
        found |= percentiles("http_binary", binary, _TIMES)
        found |= percentiles("http_json", service.question("/score", "application/json", listed, every, blocks), _TIMES)
        flooding.stdin.close()  # which begins it
        service.wait_for([flood.name], 1)
        found |= percentiles("http_binary_busy", binary, _TIMES)
    return found


def _in_process(sources: int, blocks: int) -> Callable[[], object]:
    from cairn.fleet import FleetIndex, Source, Speculation, score

    warm()
    index, speculation, tokens = FleetIndex(), Speculation(), prompt_of(1, blocks)
    every = [Source(f"w{i}", 0) for i in range(sources)]
    feed(index, sources, events_of(1, blocks, _EVENT_BLOCKS))
    return lambda: score(index, tokens, every, speculation=speculation)


def _payloads(seed: int, blocks: int) -> list[bytes]:
    """A prompt as batches on the wire."""
    import msgspec

    pack, told = msgspec.msgpack.Encoder().encode, []
    for event in events_of(seed, blocks, _EVENT_BLOCKS):
        fields = {"block_hashes": event.hashes, "parent_block_hash": event.parent, "token_ids": event.tokens}
        more = {"block_size": BLOCK_TOKENS, "lora_id": None, "medium": "GPU", "lora_name": None}
        told.append(pack([0.0, [{"type": "BlockStored", **fields, **more}], 0]))
    return told


@contextlib.contextmanager
def _published(every: list[_Followed], blocks: int) -> Iterator[None]:
    """A publisher for each, which has told of the prompt."""
    from cairn.fleet.publisher import Publisher

    payloads = _payloads(1, blocks)
    with contextlib.ExitStack() as stack:
        for one in every:
            publisher = stack.enter_context(Publisher(one.endpoint, one.replay))
            for payload in payloads:
                publisher.publish(payload)
        yield


def _flood(endpoint: str, replay: str) -> None:
    """Publishes new prompts, evenly, once its input has ended, until it is killed."""
    from cairn.fleet.publisher import Publisher

    with Publisher(endpoint, replay) as publisher:
        print("ready", flush=True)
        sys.stdin.read()
        due, seed = time.monotonic(), 1000
        while True:
            for payload in _payloads(seed, _EVENT_BLOCKS):
                publisher.publish(payload)
            seed, due = seed + 1, due + _EVENT_BLOCKS / _FLOOD
            time.sleep(max(0.0, due - time.monotonic()))


class _Service:
    """A running `cairn index`, and one connection to it."""

    def __init__(self, address: str) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=_PATIENCE_S)

    def wait_for(self, names: list[str], blocks: int) -> None:
        """Until the instances are known to hold so many blocks."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            states = json.loads(self._ask("GET", "/instances"))["instances"]
            if set(names) <= {state["name"] for state in states if state["blocks"] >= blocks}:
                return
            time.sleep(0.02)
        raise StorageError(f"the service has not heard all events within {_PATIENCE_S:g} s")

    def question(self, path: str, kind: str, body: bytes, every: list[_Followed], blocks: int) -> Callable[[], object]:
        """A call that asks for scores, whose answer was checked once."""
        scores = json.loads(self._ask("POST", path, kind, body))["scores"]
        held = {scores[one.name]["tokens"]["vram"] for one in every}
        if held != {blocks * BLOCK_TOKENS}:
            raise StorageError(f"the service knows {held} tokens of {blocks * BLOCK_TOKENS}")
        return lambda: self._ask("POST", path, kind, body)

    def close(self) -> None:
        self._connection.close()

    def _ask(self, method: str, path: str, kind: str = "", body: bytes | None = None) -> bytes:
        self._connection.request(method, path, body, {"Content-Type": kind} if kind else {})
        return self._connection.getresponse().read()


@contextlib.contextmanager
def _service(every: list[_Followed]) -> Iterator[_Service]:
    options = [part for one in every for part in ("--instance", str(one))]
    run = "from cairn.cli import main; main()"
    with _process("-c", run, "index", "--http-port", "0", "--no-rpc", *options) as process:
        line = process.stdout.readline()
        service = _Service(line.partition("http://")[2].strip())
        yield service
        service.close()


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[Any]:
    """A Python process that has something to say, and does not outlive what is done with it."""
    command, pipe = [sys.executable, *arguments], subprocess.PIPE
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe) as process:
        try:
            assert process.stdout is not None
            if not select.select([process.stdout], [], [], _PATIENCE_S)[0] or process.poll() is not None:
                raise StorageError(f"{arguments[1]}: has not started")
            yield process
        finally:
            process.kill()


def _free_endpoint() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{found.getsockname()[1]}"


if __name__ == "__main__":
    _flood(*sys.argv[1:])
