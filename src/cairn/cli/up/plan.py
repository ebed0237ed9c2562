"""From the file to processes: which, in which order, with which command lines and ports."""

import json
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from cairn.cli.up.spec import ClusterSpec, EngineSpec, names_of
from cairn.config import load_config
from cairn.config.schema import Config
from cairn.errors import InputError, StorageError

_CAIRN: Final = (sys.executable, "-c", "from cairn.cli import main; main()")
_START_S: Final = 180.0
SERVICE: Final = "service"
_ENGINE_START_S: Final = 600.0


class Child(NamedTuple):
    """A process to be. ready: URL that answers 200 once it serves; None: it serves once it lives. url: for people."""

    name: str
    command: tuple[str, ...]
    ready: str | None = None
    url: str | None = None
    environ: Mapping[str, str] = {}
    start_s: float = _START_S


class _Engine(NamedTuple):
    """Where one engine listens; events: of the ports of its publisher and replay, 0: it has none."""

    spec: EngineSpec
    name: str
    port: int
    events: int = 0
    replay: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def children_of(spec: ClusterSpec, home: Path) -> list[Child]:
    """In the order in which they are started; writes the configuration that they share to `home`.

    Raises ConfigError for settings that break a rule, InputError for ports that are in use and programs that are not
    there, StorageError where `home` cannot be written to.
    """
    config = load_config(overrides=spec.config, environ={})
    http = _fixed(config.serve.http_server_port)
    engines = _engines(spec)
    settings = dict(spec.config)
    address = f"ipc://{(home / 'node.sock').resolve()}"
    if spec.node:
        settings["node"] = {"address": address} | settings.get("node", {})
    file = home / "cairn.yaml"
    try:
        home.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.touch(mode=0o600)  # there may be keys among the settings
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{home}: {error.strerror or error}; name another place with --dir") from None
    found, cluster = list[Child](), list[str]()
    if spec.etcd:
        child, endpoint = _etcd(home)
        found.append(child)
        cluster = ["--etcd-addr", endpoint]
    if spec.node:
        found.append(Child("node", (*_CAIRN, "node", str(file), "--foreground"), url=address))
    found += [_engine(one, file, config) for one in engines]
    if spec.etcd:
        found += [_registrar(one, cluster) for one in engines]
    told = cluster or [part for one in engines for part in ("--backend", _backend(one))]
    serve = (*_CAIRN, "serve", "--config", str(file), "--http-server-port", str(http), *told)
    url = f"http://{config.serve.host}:{http}"
    found.append(Child(SERVICE, serve, f"http://127.0.0.1:{http}/health/ready", url))
    if spec.traffic:
        asks = ("--model", spec.traffic.model, "--rate", str(spec.traffic.rate))
        clients = (sys.executable, "-m", "cairn.cli.up.traffic", f"http://127.0.0.1:{http}", *asks)
        found.append(Child("traffic", clients))
    return found


def _engines(spec: ClusterSpec) -> list[_Engine]:
    found = []
    for one in spec.engines:
        ports = [_fixed(one.port + i if one.port else 0) for i in range(one.count)]
        for name, port in zip(names_of(one), ports, strict=True):
            events, replay = (_free(), _free()) if one.kind == "vllm" else (0, 0)
            found.append(_Engine(one, name, port, events, replay))
    if len({one.port for one in found}) < len(found):
        raise InputError("two engines are to have the same port; name others")
    return found


def _engine(one: _Engine, file: Path, config: Config) -> Child:
    spec, port = one.spec, str(one.port)
    if spec.kind == "mock":
        command = [sys.executable, "-m", "cairn.serve.mock", "--port", port, *spec.options]
    elif spec.kind == "command":
        command = [part.replace("{port}", port) for part in (*spec.command, *spec.options)]
    else:
        command = [
            _program("vllm"),
            "serve",
            spec.model,
            "--host",
            "127.0.0.1",
            "--port",
            port,
            *_with_cairn(one, config),
        ]
        command += spec.options
    environ = {"CAIRN_CONFIG": str(file.resolve())} | spec.environ
    return Child(one.name, tuple(command), f"{one.url}/health", one.url, environ, _ENGINE_START_S)


def _with_cairn(one: _Engine, config: Config) -> list[str]:
    """vLLM's options for Cairn's connector and KV events."""
    extra: dict[str, Any] = {"engine.enable_service_routing": True}
    transfer = {
        "kv_connector": "CairnConnector",
        "kv_connector_module_path": "cairn.connect.vllm",
        "kv_role": "kv_both",
    }
    events = {"enable_kv_cache_events": True, "publisher": "zmq"}
    # A publisher binds where its endpoint has a star.
    events |= {"endpoint": f"tcp://*:{one.events}", "replay_endpoint": f"tcp://*:{one.replay}"}
    given = json.dumps(transfer | {"kv_connector_extra_config": extra})
    block = ["--block-size", str(config.engine.block_tokens)] if config.engine.block_tokens != 16 else []
    return ["--kv-transfer-config", given, "--kv-events-config", json.dumps(events), *block]


def _backend(one: _Engine) -> str:
    told = f"{one.name}={one.url},role={one.spec.role}"
    if one.events:
        told += f",events=tcp://127.0.0.1:{one.events},replay=tcp://127.0.0.1:{one.replay}"
    return told


def _registrar(one: _Engine, cluster: Sequence[str]) -> Child:
    command = [*_CAIRN, "register", "--name", one.name, "--http", one.url, "--role", one.spec.role, *cluster]
    if one.events:
        command += ["--events", f"tcp://127.0.0.1:{one.events}", "--replay", f"tcp://127.0.0.1:{one.replay}"]
    return Child(f"{one.name}.register", tuple(command))


def _etcd(home: Path) -> tuple[Child, str]:
    client, peer = (f"http://127.0.0.1:{_free()}" for _ in range(2))
    command = [_program("etcd"), "--data-dir", str(home / "etcd"), "--log-level", "error", "--logger", "zap"]
    command += ["--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer]
    command += ["--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"]
    return Child("etcd", tuple(command), f"{client}/health", client), client


def _program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise InputError(f"{name}: is not installed, or not in PATH")
    return found


def _fixed(port: int) -> int:
    """The port, if it is free; for 0 a free one. Raises InputError."""
    if port == 0:
        return _free()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise InputError(f"port {port}: is in use; name another, or 0 for a free one") from None
    return port


_taken: set[int] = set()


def _free() -> int:
    """A port that nobody has, and that was not given before."""
    with ExitStack() as stack:
        while True:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if port not in _taken:
                _taken.add(port)
                return port
