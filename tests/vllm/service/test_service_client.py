"""`cairn serve` before two real `vllm serve`, asked by OpenAI's own client as it is: tools, errors, and a stream that
outlives its engine.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("zmq")

from tests.serve.gateway.running import Gateway
from tests.serve.running import until
from tests.vllm.service.stack import START_S, Engine
from tests.vllm.test_node import Node

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.timeout(900)

TOKENS = 48
KEY = "a client's key"
SYSTEM = "You are a librarian who knows every book about the sea, its ships and its storms. " * 6


@pytest.fixture(scope="module")
def engines(stack: tuple[Node, list[Engine]]) -> dict[str, Engine]:
    """By name; all are up."""
    for engine in stack[1]:
        engine.server.wait(time.monotonic() + START_S)
    return {engine.name: engine for engine in stack[1]}


@pytest.fixture(scope="module")
def gateway(engines: dict[str, Engine], model: Path) -> Iterator[Gateway]:
    options = [part for engine in engines.values() for part in engine.backend()]
    options += ["--tokenizer-path", str(model), "--set", "serve.max_body=1MiB", "--set", "serve.slo.ttft_s=60"]
    with Gateway(*options, CAIRN_SERVE__ADMIN_KEY="boss", CAIRN_SERVE__API_KEYS=json.dumps([KEY])) as one:
        one.wait_for(*engines)
        yield one


def client_of(at: str, key: str = KEY) -> Any:
    return openai.OpenAI(base_url=f"http://{at}/v1", api_key=key, max_retries=0, timeout=120)


@pytest.fixture
def client(gateway: Gateway) -> Any:
    return client_of(gateway.at)


@pytest.fixture
def direct(engines: dict[str, Engine]) -> Any:
    """The client of an engine itself."""
    return client_of(f"127.0.0.1:{engines['b'].server.port}")


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "strict": True, "parameters": schema}}


CITY, DAYS = {"enum": ["Oslo", "Rome"]}, {"enum": [1, 2, 3]}
TOOLS = [tool("weather", city=CITY, days=DAYS), tool("tide", city=CITY)]
QUESTION = {"role": "user", "content": "How high is the tide in Oslo?"}
ANSWER = {"model": "smol", "temperature": 0, "max_tokens": 64}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "tide"}}])
def test_tools(client: Any, direct: Any, choice: Any) -> None:
    """Whole, as a stream, and with what the tool has said: as the engine's own answers."""
    asked = ANSWER | {"messages": [QUESTION], "tools": TOOLS, "tool_choice": choice}
    whole, theirs = (one.chat.completions.create(**asked) for one in (client, direct))
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        streamed = stream.get_final_completion()
    assert said(whole) == said(streamed) == said(theirs)
    calls = whole.choices[0].message.tool_calls
    assert calls
    for call in calls:
        assert call.function.name in ("weather", "tide")
        assert json.loads(call.function.arguments)["city"] in CITY["enum"]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "1.2 m"} for call in calls]
    asked = ANSWER | {"messages": [QUESTION, whole.choices[0].message, *results], "tools": TOOLS, "max_tokens": 12}
    after = [one.chat.completions.create(**asked, tool_choice="none").choices[0].message for one in (client, direct)]
    assert after[0].content
    assert after[0] == after[1]


def said(completion: Any) -> Any:
    """But for what is drawn at random."""
    choice = completion.choices[0]
    calls = [(call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    tokens = completion.usage.prompt_tokens, completion.usage.completion_tokens
    return choice.message.role, choice.message.content or None, calls, choice.finish_reason, tokens


LONG = "sea " * 2000


@pytest.mark.parametrize(
    ("error", "more"),
    [
        (openai.BadRequestError, {"max_tokens": -1}),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": LONG}]}),
        (openai.BadRequestError, {"messages": [{"content": "nobody says this"}]}),
        (openai.BadRequestError, {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}),
        (openai.BadRequestError, {"response_format": {"type": "json_schema"}}),
        (openai.NotFoundError, {"model": "other"}),
    ],
    ids=["value", "long", "message", "tool", "format", "model"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_an_engine_refuses(client: Any, direct: Any, error: Any, more: dict[str, Any], stream: bool) -> None:
    """Is refused in the engine's words."""
    asked = ANSWER | {"messages": [QUESTION], "stream": stream} | more
    words = []
    for one in (client, direct):
        with pytest.raises(error) as refused:
            one.chat.completions.create(**asked)
        words.append((refused.value.status_code, refused.value.body))
    assert words[0] == words[1]
    assert words[0][1]["message"]


def test_what_the_gateway_refuses(gateway: Gateway, client: Any) -> None:
    asked = ANSWER | {"messages": [QUESTION]}

    def refused(error: Any, ask: Callable[[], Any]) -> Any:
        with pytest.raises(error) as found:
            ask()
        assert found.value.body["message"]
        return found.value

    refused(openai.AuthenticationError, lambda: client_of(gateway.at, "no key").chat.completions.create(**asked))
    refused(openai.NotFoundError, lambda: client.models.retrieve("other"))
    refused(openai.BadRequestError, lambda: client.post("/chat/completions", body=[1], cast_to=object))
    large = asked | {"messages": [{"role": "user", "content": "x" * (1 << 20)}]}
    assert refused(openai.APIStatusError, lambda: client.chat.completions.create(**large)).status_code == 413
    assert [one.id for one in client.models.list()] == ["smol"]


def test_a_chat_outlives_its_engine(engines: dict[str, Engine], gateway: Gateway, client: Any) -> None:
    """And one that nobody can go on with ends with an error."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Name three ships and their fates."}]
    asked = ANSWER | {"messages": messages, "max_tokens": TOKENS}

    def kill_busy() -> None:
        engines[next(name for name, state in gateway.admin().items() if state["running"])].server.kill()

    whole = client.chat.completions.create(**asked).choices[0].message.content
    text, usage, killed = "", None, False
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
        if len(text) > len(whole) // 3 and not killed:
            killed = True
            kill_busy()
    assert killed
    assert text == whole
    assert usage is not None
    assert usage.completion_tokens == TOKENS
    assert gateway.metric("cairn_serve_resumed_total") == 1
    until(lambda: len(gateway.admin()) == 1, "the dead one is forgotten")
    assert client.chat.completions.create(**asked).choices[0].message.content == whole

    stream = iter(client.chat.completions.create(**asked | {"temperature": 1, "max_tokens": 900}, stream=True))
    next(stream)
    kill_busy()
    with pytest.raises(openai.APIError, match="the answer ends here"):
        list(stream)
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(60) == 0
