"""A stand-in for an engine: OpenAI's API over text that follows from the prompt, for tests, benchmarks and trials.

`python -m cairn.serve.mock --port 8000`. Each word follows from all the text before it, so whoever goes on from the
middle of an answer says what would have been said. It knows no tokens but its words, and holds no KV unless
`--compute-s` is given: then it has a real cache (`mock_cache`), by CAIRN_CONFIG, and only the model is made up.
"""

import argparse
import asyncio
import contextlib
import hashlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, cast

import httptools
import msgspec

from cairn.serve.process import loop_factory

if TYPE_CHECKING:
    from cairn.serve.mock_cache import MockCache

_TOKENS: Final = 16
#: The version that it tells: whoever shows an engine says that its model is made up.
SIMULATED: Final = "simulated"
_HEAD: Final = b"HTTP/1.1 %d OK\r\ncontent-type: %s\r\n"
_JSON: Final = b"application/json"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """token_s, prefill_s: time of a word, and of a prompt. compute_s: of a prompt's token that the cache lacks, on a
    device that computes one prompt after the other; 0: there is no cache. stall_after, error_after: words after which
    streams stand still, or end with an error; 0: none do. word_bytes: of each, blanks in front. fail: the status of
    every answer; 0: none fails.
    """

    model: str = "mock"
    token_s: float = 0.0
    prefill_s: float = 0.0
    compute_s: float = 0.0
    stall_after: int = 0
    error_after: int = 0
    word_bytes: int = 5
    fail: int = 0


class State:
    """What one engine has seen, for `GET /mock`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = asyncio.Lock()
        self.cache = _cache(settings.model) if settings.compute_s else None
        self.running = self.aborted = self.sent_bytes = 0
        self.requests: list[dict[str, Any]] = []


def _cache(model: str) -> "MockCache":
    from cairn.config import load_config  # slow to import, and most mocks have none
    from cairn.serve.mock_cache import MockCache

    return MockCache(model, load_config())


def text_of(path: str, body: dict[str, Any]) -> str:
    """What an answer follows from. A final message that is gone on with loses blanks, as with many templates."""
    if not path.endswith("/chat/completions"):
        return str(body.get("prompt", ""))
    messages = [f"<{one['role']}>{one['content']}" for one in body["messages"]]
    if body.get("continue_final_message"):
        return "".join(messages).rstrip()
    return "".join([*messages, "<assistant>"])


def words(text: str, count: int, size: int) -> Iterator[str]:
    """The words that follow, each with a blank or a new line before it."""
    state = hashlib.blake2b(text.encode(), digest_size=8)
    for _ in range(count):
        digest = state.hexdigest()
        word = ("\n" if digest[0] == "0" else " ") + digest[: size - 1].ljust(size - 1, "x")
        state.update(word.encode())
        yield word


class Connection(asyncio.Protocol):
    """Answers one connection's requests, one after the other."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._flows = asyncio.Event()
        self._flows.set()
        self._path, self._body = "", bytearray()
        self._headers: dict[str, str] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class

    def connection_lost(self, error: Exception | None) -> None:
        self._flows.set()
        if self._task is not None and not self._task.done():
            self._state.aborted += 1
            self._task.cancel()

    def pause_writing(self) -> None:
        self._flows.clear()

    def resume_writing(self) -> None:
        self._flows.set()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path = url.decode()
        self._body = bytearray()
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        state = self._state
        if self._parser.get_method() == b"POST":
            self._task = asyncio.get_running_loop().create_task(self._infer())
        elif self._path == "/v1/models":
            self._whole({"object": "list", "data": [{"id": state.settings.model, "object": "model"}]})
        elif self._path == "/mock":
            seen = {"running": state.running, "aborted": state.aborted, "sent_bytes": state.sent_bytes}
            self._whole(seen | {"requests": state.requests})
        elif self._path == "/metrics":
            running = f'vllm:num_requests_running{{model_name="{state.settings.model}"}} {state.running}\n'
            figures = state.cache.exposition() if state.cache else b""
            self._write(_HEAD % (200, b"text/plain"), running.encode() + figures)
        elif self._path == "/version":
            self._whole({"version": SIMULATED})
        else:
            self._whole({}, 200 if self._path == "/health" else 404)

    async def _infer(self) -> None:
        state, settings = self._state, self._state.settings
        body = msgspec.json.decode(bytes(self._body))
        if len(state.requests) < 1000:
            state.requests.append({"path": self._path, "body": body, "headers": self._headers})
        if settings.fail:
            return self._whole({"error": {"message": "failed as told", "code": settings.fail}}, settings.fail)
        state.running += 1
        try:
            if settings.prefill_s:
                await asyncio.sleep(settings.prefill_s)
            if state.cache:
                async with state.device:
                    lacking = await asyncio.to_thread(state.cache.prefill, text_of(self._path, body))
                    await asyncio.sleep(settings.compute_s * lacking)
            await (self._stream(body) if body.get("stream") else self._answer(body))
        finally:
            state.running -= 1
        return None

    async def _answer(self, body: dict[str, Any]) -> None:
        text = text_of(self._path, body)
        found = list(words(text, _count(body), self._state.settings.word_bytes))
        if self._state.settings.token_s:
            await asyncio.sleep(self._state.settings.token_s * len(found))
        self._whole({**self._event(body, "".join(found), "length", chunk=False), "usage": _usage(text, len(found))})

    async def _stream(self, body: dict[str, Any]) -> None:
        settings, text, count = self._state.settings, text_of(self._path, body), _count(body)
        self._write(_HEAD % (200, b"text/event-stream; charset=utf-8"), None)
        if self._path.endswith("/chat/completions"):
            await self._send(self._event(body, "", None, role="assistant"))
        for i, word in enumerate(words(text, count, settings.word_bytes), 1):
            await self._send(self._event(body, word, "length" if i == count else None))
            if settings.stall_after and i == settings.stall_after:
                await asyncio.Event().wait()
            if settings.error_after and i == settings.error_after:
                return await self._send({"error": {"message": "failed as told", "code": 500}})
            if settings.token_s:
                await asyncio.sleep(settings.token_s)
        if (body.get("stream_options") or {}).get("include_usage"):
            await self._send({**self._event(body, "", None), "choices": [], "usage": _usage(text, count)})
        return await self._send(None)

    def _event(self, body: dict[str, Any], text: str, reason: str | None, **more: Any) -> dict[str, Any]:
        chat = self._path.endswith("/chat/completions")
        chunk, role = more.get("chunk", True), {"role": more["role"]} if "role" in more else {}
        said: dict[str, Any] = {"text": text}
        if chat:
            said = {"delta" if chunk else "message": role | {"content": text}}
        kind = "chat.completion" + (".chunk" if chunk else "") if chat else "text_completion"
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        head = {"id": f"mock-{id(self):x}", "object": kind, "created": int(time.time())}
        return {**head, "model": body.get("model", ""), "choices": [choice]}

    async def _send(self, event: dict[str, Any] | None) -> None:
        """An event; None: the end."""
        data = b"data: " + (b"[DONE]" if event is None else msgspec.json.encode(event)) + b"\n\n"
        assert self._transport is not None
        self._transport.write(b"%x\r\n%b\r\n%b" % (len(data), data, b"0\r\n\r\n" if event is None else b""))
        self._state.sent_bytes += len(data)
        await self._flows.wait()

    def _whole(self, value: object, status: int = 200) -> None:
        self._write(_HEAD % (status, _JSON), msgspec.json.encode(value))

    def _write(self, head: bytes, body: bytes | None) -> None:
        assert self._transport is not None
        framing = b"transfer-encoding: chunked" if body is None else b"content-length: %d" % len(body)
        self._transport.write(b"%b%b\r\n\r\n%b" % (head, framing, body or b""))
        if body is not None and not self._parser.should_keep_alive():
            self._transport.close()


def _count(body: dict[str, Any]) -> int:
    return int(body.get("max_completion_tokens") or body.get("max_tokens") or _TOKENS)


def _usage(text: str, tokens: int) -> dict[str, int]:
    asked = len(text.split())
    return {"prompt_tokens": asked, "completion_tokens": tokens, "total_tokens": asked + tokens}


async def serve(port: int, settings: Settings) -> None:
    """Until cancelled; prints where it listens. port: 0: a free one."""
    state = State(settings)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(state), "127.0.0.1", port, backlog=1024)
    sys.stdout.write(f"mock engine: http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    async with server:
        await server.serve_forever()


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description="A mock engine.")
    parser.add_argument("--port", type=int, default=0)
    for field in msgspec.structs.fields(Settings):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    given = vars(parser.parse_args())
    port = given.pop("port")
    with asyncio.Runner(loop_factory=loop_factory()) as runner, contextlib.suppress(KeyboardInterrupt):
        runner.run(serve(port, Settings(**given)))


if __name__ == "__main__":
    main()
