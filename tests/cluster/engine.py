"""What a registrar sees of an engine: /health, /metrics, /v1/models, /version, as vLLM answers them."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """A fresh engine's metrics under vLLM's names, of two data-parallel ranks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels, ranks = ("model_name", "engine"), [("tiny", "0"), ("tiny", "1")]

        def all_of(kind: type[Counter] | type[Gauge] | type[Histogram], name: str, help: str) -> list[object]:
            family = kind(name, help, labels, registry=self.registry)
            return [family.labels(*rank) for rank in ranks]

        self.running = all_of(Gauge, "vllm:num_requests_running", "Running.")
        self.waiting = all_of(Gauge, "vllm:num_requests_waiting", "Waiting.")
        self.usage = all_of(Gauge, "vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
        self.ttft = all_of(Histogram, "vllm:time_to_first_token_seconds", "TTFT.")
        self.tpot = all_of(Histogram, "vllm:inter_token_latency_seconds", "TPOT.")
        self.prompt = all_of(Counter, "vllm:prompt_tokens", "Prompt tokens.")
        self.lengths = all_of(Histogram, "vllm:request_prompt_tokens", "Tokens of a prompt.")
        self._info = Gauge("vllm:cache_config_info", "Of the cache.", ("block_size", "engine"), registry=self.registry)
        self.block_size("32")

    def block_size(self, tokens: str) -> None:
        self._info.clear()
        self._info.labels(tokens, "0").set(1)


class Engine:
    """`with Engine() as engine`: listens at `engine.url` until `stop`; `hang` and `token` as they say. model: as
    /v1/models has it. ahead_s: by which its clock is ahead of ours.
    """

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.model, self.ahead_s = {"id": "tiny"}, 0.0
        self.status, self.token = 200, ""
        self.hang = threading.Event()
        self._port = 0
        self.start()

    def start(self) -> None:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if engine.hang.is_set():
                    engine._woken.wait(30)
                    return
                allowed = not engine.token or self.headers.get("Authorization") == f"Bearer {engine.token}"
                status, body = engine.answer(self.path)
                self.send_response(status if allowed else 401)
                self.end_headers()
                self.wfile.write(body if allowed else b"{}")

            def date_time_string(self, timestamp: float | None = None) -> str:
                return super().date_time_string(time.time() + engine.ahead_s)

            def log_message(self, *_: object) -> None:
                pass

        self._woken = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def answer(self, path: str) -> tuple[int, bytes]:
        if path == "/health":
            return self.status, b""
        if path == "/metrics":
            return 200, generate_latest(self.metrics.registry)
        answers = {"/v1/models": {"data": [self.model]}, "/version": {"version": "0.33.0"}}
        return (200, json.dumps(answers[path]).encode()) if path in answers else (404, b"")

    def stop(self) -> None:
        self._woken.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
