"""A small engine in a process of its own: OpenAI's API over a `CacheEngine`, which goes on with a request's trace.

The characters of a prompt are its tokens. It answers with the number of tokens that were loaded, layer by layer.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from cairn.config import load_config
from cairn.engine import CacheEngine
from cairn.observe.trace import joined
from tests.engine.pages import GEOMETRY, SLOT, Pages, kv_of, namespace


def answer(engine: CacheEngine, prompt: str) -> int:
    pages, tokens = Pages(), np.frombuffer(prompt.encode(), np.uint8).astype(np.int64)
    slots = pages.slots(len(tokens))
    kv = engine.register_kv_caches(pages.tensors)
    chain = engine.chain(tokens)
    with engine.stage(chain) as stage:
        stage.wait()
        load = stage.load_layers(kv, slots)
        assert all(load.wait(layer, 60) for layer in range(GEOMETRY.layers)) or not stage.tokens
        loaded = stage.loaded_tokens
    values = kv_of(tokens)
    for layer, tensor in enumerate(pages.tensors):
        there = tensor.reshape(2, -1, GEOMETRY.head_dim)[:, slots[:loaded]].transpose(1, 0, 2)
        assert (there == values[:loaded, layer]).all()
    pages.prefill(tokens, slots)
    engine.store(tokens, None, kv, slots)
    return loaded


def main() -> None:
    overrides = {"storage.cpu.size": 64 * SLOT, "observe.http_port": 0}
    engine = CacheEngine(namespace(), load_config(overrides=overrides))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with joined({name.lower(): value for name, value in self.headers.items()}):
                loaded = answer(engine, body["prompt"])
            self._say({"object": "text_completion", "choices": [{"index": 0, "text": str(loaded)}]})

        def do_GET(self) -> None:
            self._say({"object": "list", "data": [{"id": "m", "object": "model"}]})

        def _say(self, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    assert engine._figures is not None
    sys.stdout.write(f"engine: http://127.0.0.1:{server.server_address[1]} {engine._figures.url}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
