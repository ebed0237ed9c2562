"""The bench behind `cairn bench node`: what a call over ipc takes, what the shared arena gives, what the node uses."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLOCKS = 512
CLIENTS = 4
#: Calls of each client, in batches that take turns with as many bare round trips.
BATCHES, BATCH = 20, 50
#: Pause between calls of a client: engines ask when a request comes, and not as fast as they can.
PAUSE_S = 0.002
REQUESTS_PER_S, REQUEST_BLOCKS, REQUEST_SECONDS = 200, 256, 10


def run_node() -> dict[str, Any]:
    """Everything but the node's own part in processes of their own, as engines are.

    `match_and_pin`: a hold of 512 blocks and its answer, 4 clients, `floor` in turns with it: a bare round trip
    of the same sizes through a process that only answers. `saturated`: the same without pauses, so that clients wait
    for one another. `disk_busy`: `match_and_pin` while blocks of 2 MiB of another model go to the disk and come from it
    as fast as they can. `retrieve`: from the node's arena, beside memcpy, as `cairn bench engine` does it. `cpu`: what
    the node uses at 200 requests/s of 4,096 tokens, each looked up, held, released, and every other one stored anew.
    """
    with tempfile.TemporaryDirectory(prefix="cairn-bench-") as home:
        with _node(home, "64MiB") as (address, process), _echo(home) as floor:
            paced = _clients(address, floor, PAUSE_S)
            saturated = _clients(address, floor, 0.0)
            cpu = _cpu(address, process)
        with _node(home, "600MiB") as (address, _):
            copies = _apart("copies", address)
        disk = ["--set", f"storage.disk.path={home}/disk", "--set", "storage.disk.size=4GiB", "--set", "node.pools=2"]
        with _node(home, "512MiB", *disk) as (address, process), _echo(home) as floor, _disk_load(address):
            before, started = _cpu_seconds(process.pid), time.monotonic()
            busy = _clients(address, floor, PAUSE_S)
            busy["node_cpu_share_of_a_core"] = round(
                (_cpu_seconds(process.pid) - before) / (time.monotonic() - started), 4
            )
    shares = ("memcpy_gb_per_s", "store_gb_per_s", "retrieve_gb_per_s", "retrieve_share_of_memcpy")
    return {
        "clients": CLIENTS,
        "blocks": BLOCKS,
        "match_and_pin": paced,
        "saturated": saturated,
        "disk_busy": busy,
        "retrieve": {name: copies[name] for name in shares},
        "cpu": cpu,
        "load_average": round(os.getloadavg()[0], 2),
    }


@contextmanager
def _node(home: str, size: str, *more: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    address = f"ipc://{home}/node.sock"
    arguments = ["node", "--foreground", "--address", address, "--set", f"storage.cpu.size={size}"]
    # Clients of a busy machine may have to wait; a bench that lost its node would measure nothing.
    arguments += ["--set", "node.lease_s=60", *more]
    with _listening([sys.executable, "-c", "from cairn.cli import main; main()", *arguments]) as process:
        yield address, process


@contextmanager
def _echo(home: str) -> Iterator[str]:
    address = f"ipc://{home}/echo.sock"
    with _listening([sys.executable, "-m", "cairn.cli.bench_node", "echo", address]):
        yield address


@contextmanager
def _disk_load(address: str) -> Iterator[None]:
    with _listening([sys.executable, "-m", "cairn.cli.bench_node", "load", address]):
        yield


@contextmanager
def _listening(command: list[str]) -> "Iterator[subprocess.Popen[str]]":
    """A process that says a line on stderr once it listens."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        process.stderr.readline()
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _clients(address: str, floor: str, pause: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "cairn.cli.bench_node", "calls", address, floor, str(pause)]
    processes = [
        subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for seed in range(CLIENTS)
    ]
    for process in processes:  # all begin together
        assert process.stdout
        process.stdout.readline()
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    both = {name: sorted(value for one in told for value in one[name]) for name in ("node", "floor")}
    figures = {
        f"{name}_us_p{share}": round(values[int(len(values) * share / 100)] * 1e6, 1)
        for name, values in both.items()
        for share in (50, 99)
    }
    return {"calls": len(both["node"]), **figures}


def _cpu(address: str, process: "subprocess.Popen[str]") -> dict[str, Any]:
    before = _cpu_seconds(process.pid)
    told = _apart("requests", address)
    used = _cpu_seconds(process.pid) - before
    return {**told, "node_cpu_share_of_a_core": round(used / told["seconds"], 4)}


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _apart(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "cairn.cli.bench_node", *arguments]
    done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=600)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# --- in processes of their own ----------------------------------------------------------------------------------------


def _engine(address: str) -> Any:
    from cairn.cli.bench_engine import SMALL
    from cairn.config import load_config
    from cairn.engine import CacheEngine
    from cairn.kv import Namespace

    config = load_config(environ={}, overrides={"node.timeout_s": 2, "engine.planner": False})
    return CacheEngine(Namespace(model="bench", geometry=SMALL), config, node=address)


def _stored(engine: Any, seed: int, blocks: int) -> Any:
    """The keys of a prompt whose blocks are in the node, whatever they hold."""
    import numpy as np

    chain = engine.chain(np.random.default_rng(seed).integers(0, 1 << 20, blocks * 16, dtype=np.uint32))
    writing = engine.reserve(chain)
    if writing:
        writing.commit(len(writing.rows))
        writing.end()
    return chain.keys


def calls(address: str, floor: str, pause: str, seed: str) -> dict[str, Any]:
    """Holds, and bare round trips of the same sizes, in turns."""
    from cairn.node.address import socket_path
    from cairn.node.zmtp import Dealer

    with _engine(address) as engine:
        store = engine._store
        keys = _stored(engine, int(seed), BLOCKS)
        dealer = Dealer(socket_path(floor), 5.0)
        frame = bytes(BLOCKS * 16 + 32)

        def hold() -> float:
            started = time.perf_counter()
            held = store.hold(keys, deadline=time.monotonic() + 5)
            taken = time.perf_counter() - started
            if held.ready != BLOCKS:
                raise AssertionError(f"{held.ready} of {BLOCKS} blocks held: the bench has lost its node")
            held.release()
            return taken

        def trip() -> float:
            started = time.perf_counter()
            dealer.send(frame)
            dealer.recv()
            return time.perf_counter() - started

        taken: dict[str, list[float]] = {"node": [], "floor": []}
        for call in (hold, trip):
            for _ in range(BATCH):
                call()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        for _ in range(BATCHES):
            for name, call in (("node", hold), ("floor", trip)):
                for _ in range(BATCH):
                    taken[name].append(call())
                    if float(pause):
                        time.sleep(float(pause))
        dealer.close()
    return taken


def echo(address: str) -> None:
    """Answers everything with as many bytes as a hold's answer has."""
    from cairn.node.address import Address
    from cairn.node.bell import Bell
    from cairn.node.zmtp import Router

    router = Router(Address(address).bind(), Bell())
    sys.stderr.write("listening\n")
    sys.stderr.flush()
    answer = bytes(BLOCKS * 4 + 32)
    while True:
        for sender, _ in router.messages(1.0):
            sender.send(answer)


def load(address: str) -> None:
    """Stores prompts and takes up those of a while ago, which only the disk has any more."""
    import numpy as np

    from cairn.cli.bench_engine import LLAMA_8B
    from cairn.config import load_config
    from cairn.engine import CacheEngine
    from cairn.kv import Namespace

    config = load_config(environ={}, overrides={"node.timeout_s": 2, "engine.planner": False})
    with CacheEngine(Namespace(model="bench", geometry=LLAMA_8B), config, node=address) as engine:
        chains = [engine.chain(np.random.default_rng(seed).integers(0, 1 << 20, 256)) for seed in range(64)]
        for turn in range(1 << 30):
            writing = engine.reserve(chains[turn % 64])
            if writing:
                with writing.access() as memory:
                    assert isinstance(memory, np.ndarray)
                    if memory is not None:
                        memory[writing.rows, :64] = turn % 256
                writing.commit(len(writing.rows))
                writing.end()
            with engine.stage(chains[(turn + 32) % 64], timeout=2) as stage:
                stage.wait()
            if turn == 64:
                sys.stderr.write("loading\n")
                sys.stderr.flush()


def requests(address: str) -> dict[str, Any]:
    """Requests at a steady rate."""
    with _engine(address) as engine:
        store = engine._store
        known = _stored(engine, 0, REQUEST_BLOCKS)
        count = REQUESTS_PER_S * REQUEST_SECONDS
        started = time.monotonic()
        for i in range(count):
            time.sleep(max(0.0, started + i / REQUESTS_PER_S - time.monotonic()))
            keys = _stored(engine, i + 1, REQUEST_BLOCKS) if i % 2 else known
            if store.match(keys).dram != REQUEST_BLOCKS:
                raise AssertionError("not held: the bench has lost its node")
            store.hold(keys, deadline=time.monotonic() + 5).release()
        seconds = time.monotonic() - started
    return {"requests_per_s": round(count / seconds, 1), "blocks": REQUEST_BLOCKS, "seconds": round(seconds, 2)}


def copies(address: str) -> dict[str, Any]:
    from cairn.cli.bench_engine import bench_copies

    return bench_copies(address)


if __name__ == "__main__":
    part = {"calls": calls, "echo": echo, "requests": requests, "copies": copies, "load": load}[sys.argv[1]]
    print(json.dumps(part(*sys.argv[2:])))  # type: ignore[operator]
