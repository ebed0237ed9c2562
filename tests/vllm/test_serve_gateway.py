"""`cairn serve` before two real `vllm serve`: OpenAI's own client, and a stream that outlives its engine."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.vllm.server import Server

pytest.importorskip("uvicorn")
pytest.importorskip("zmq")

from tests.ports import free_ports
from tests.serve.gateway.running import Gateway
from tests.serve.running import until

openai = pytest.importorskip("openai")

START_S = 240.0
TOKENS = 48
SYSTEM = "You are a librarian who knows every book about the sea, its ships and its storms. " * 6


@pytest.fixture(scope="module")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[Server, str]]]:
    """Two, each with how the gateway is told of it."""
    found = []
    with ExitStack() as stack:
        for i in range(2):
            home = tmp_path_factory.mktemp(f"server{i}")
            events, replay = free_ports(2)
            publisher = '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:%d", '
            publisher += '"replay_endpoint": "tcp://*:%d"}'
            options = ["--kv-events-config", publisher % (events, replay), "--block-size", "32"]
            options += ["--num-gpu-blocks-override", "64", "--max-model-len", "1024", "--max-num-seqs", "2"]
            threads = {"VLLM_CPU_OMP_THREADS_BIND": str(i % (os.cpu_count() or 1)), "OMP_NUM_THREADS": "1"}
            quiet = {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "passive"}
            server = Server(model, home, *options, environ=threads | quiet)
            stack.callback(server.kill)
            told = f"e{i}=http://127.0.0.1:{server.port}"
            told += f",events=tcp://127.0.0.1:{events},replay=tcp://127.0.0.1:{replay}"
            found.append((server, told))
        deadline = time.monotonic() + START_S
        for server, _ in found:
            server.wait(deadline)
        yield found


def test_a_chat_outlives_its_engine(servers: list[tuple[Server, str]], model: Path) -> None:
    backends = [part for _, told in servers for part in ("--backend", told)]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Name three ships and their fates."}]
    with Gateway(*backends, "--tokenizer-path", str(model), CAIRN_SERVE__ADMIN_KEY="boss") as gateway:
        gateway.wait_for("e0", "e1")
        client = openai.OpenAI(base_url=f"http://{gateway.at}/v1", api_key="x", max_retries=0, timeout=120)
        assert [one.id for one in client.models.list()] == ["smol"]

        def ask(**more: object) -> object:
            asked = {"model": "smol", "messages": messages, "max_tokens": TOKENS, "temperature": 0}
            return client.chat.completions.create(**asked, **more)

        whole = ask().choices[0].message.content  # type: ignore[attr-defined]
        text, usage, killed = "", None, False
        for chunk in ask(stream=True, stream_options={"include_usage": True}):  # type: ignore[attr-defined]
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            usage = chunk.usage or usage
            if len(text) > len(whole) // 3 and not killed:
                killed = True
                busy = next(name for name, state in gateway.admin().items() if state["running"])
                servers[int(busy[1])][0].kill()
        assert killed
        assert text == whole
        assert usage is not None
        assert usage.completion_tokens == TOKENS
        assert gateway.metric("cairn_serve_resumed_total") == 1
        until(lambda: len(gateway.admin()) == 1, "the dead one is forgotten")
        assert ask().choices[0].message.content == whole  # type: ignore[attr-defined]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=messages)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="smol", prompt="x", max_tokens=-1)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(60) == 0
