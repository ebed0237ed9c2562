"""Whoever goes on from anywhere in a stream, however it was cut, says what would have been said."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cairn.serve.gateway.asked import Asked, edited
from cairn.serve.gateway.continuation import Continuation, DivergedError
from cairn.serve.gateway.sse import Events, Transcript, encode, payloads
from cairn.serve.mock import text_of, words

PATHS = ("/v1/completions", "/v1/chat/completions")


def stream_of(path: str, body: dict[str, Any], name: str) -> list[bytes]:
    """The events of an engine."""
    chat, text, count = path == PATHS[1], text_of(path, body), body["max_tokens"]
    found = []
    said = [*([""] if chat else []), *words(text, count, 5)]
    for i, word in enumerate(said):
        role = {"role": "assistant"} if chat and i == 0 else {}
        inside: dict[str, Any] = {"delta": role | {"content": word}} if chat else {"text": word}
        reason = "length" if i == len(said) - 1 else None
        found.append({"id": name, "created": 7, "choices": [{"index": 0, **inside, "finish_reason": reason}]})
    usage = {"prompt_tokens": len(text.split()), "completion_tokens": count}
    found.append({"id": name, "created": 7, "choices": [], "usage": usage})
    return [f"data: {json.dumps(one)}\n\n".encode() for one in found] + [b"data: [DONE]\n\n"]


def said_of(data: bytes) -> str:
    found = ""
    for event in payloads(data):
        for choice in event["choices"]:
            found += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    return found


def passed(pieces: list[bytes]) -> bytes:
    cutter = Events()
    return b"".join(map(cutter.take, pieces))


def cut_anywhere(data: bytes, places: list[int]) -> list[bytes]:
    ends = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[one:other] for one, other in pairwise(ends)]


@settings(deadline=None, max_examples=60)
@given(
    path=st.sampled_from(PATHS),
    prompt=st.text(max_size=20),
    count=st.integers(1, 60),
    deaths=st.lists(st.integers(0, 1 << 30), min_size=1, max_size=3),
    places=st.lists(st.integers(0, 1 << 30), max_size=9),
)
def test_the_text_is_the_same_wherever_engines_die(
    path: str, prompt: str, count: int, deaths: list[int], places: list[int]
) -> None:
    asked_for: dict[str, Any] = {"prompt": prompt, "max_tokens": count, "stream": True, "temperature": 0}
    if path == PATHS[1]:
        asked_for["messages"] = [{"role": "user", "content": asked_for.pop("prompt")}]
    asked = Asked(path, json.dumps(asked_for).encode())
    assert asked.resumable()
    assert asked.greedy
    whole = b"".join(stream_of(path, asked_for, "first"))
    transcript, got, continuation, body = Transcript(), b"", None, asked_for
    for death in [*deaths, None]:
        data = b"".join(stream_of(path, body, "first" if continuation is None else "other"))
        data = data if death is None else data[: death % len(data)]
        events = passed(cut_anywhere(data, places))
        if continuation is not None:
            events = continuation.rewritten(events)
        got += events
        transcript.add(events)
        transcript.read()
        if transcript.finished:
            break
        if got:
            continuation = Continuation(asked, transcript)
            body = json.loads(continuation.body())
    assert said_of(got) == said_of(whole)
    assert {event["id"] for event in payloads(got)} == {"first"}
    usages = [event["usage"] for event in payloads(got) if event.get("usage")]
    if usages:
        assert usages == [event["usage"] for event in payloads(whole) if event.get("usage")]


@example("a" + " " * 200 + "b")
@given(st.text(alphabet="a \n", max_size=300))
def test_another_engine_never_begins_behind_a_blank(text: str) -> None:
    """Templates trim them."""
    asked = Asked(PATHS[0], b'{"prompt": "", "max_tokens": 500, "stream": true, "temperature": 0}')
    transcript = Transcript()
    transcript.add(b"data: %b\n\n" % json.dumps({"choices": [{"index": 0, "text": text}]}).encode())
    transcript.read()
    said = json.loads(Continuation(asked, transcript).body())["prompt"]
    assert text.startswith(said)
    assert said == said.rstrip()
    assert len(said) < len(text) or not text


@pytest.mark.parametrize("path", PATHS)
def test_tokens_that_bring_no_text_count(path: str) -> None:
    """Of a character in three tokens, as vLLM streams it, two come as events without text."""
    asked_for: dict[str, Any] = {"prompt": "x", "messages": [], "max_tokens": 50, "stream": True, "temperature": 0}
    said = [{"role": "assistant", "content": ""}] if path == PATHS[1] else []
    said += [{"content": text} for _ in range(5) for text in ("", "", "\u9f98")] + [{"content": text} for text in " ab"]
    events = [{"delta": one} if path == PATHS[1] else {"text": one["content"]} for one in said]
    transcript = Transcript()
    for event in events:
        transcript.add(encode({"choices": [{"index": 0, **event, "finish_reason": None}]}))
    transcript.read()
    body = json.loads(Continuation(Asked(path, json.dumps(asked_for).encode()), transcript).body())
    assert body["max_tokens"] == 50 - 15


@pytest.mark.parametrize("usage", [[1], 7, {"completion_tokens": "x"}, {"completion_tokens": 3, "prompt_tokens": "x"}])
def test_a_usage_that_is_none_goes_on_as_it_came(usage: object) -> None:
    asked = Asked(PATHS[0], b'{"prompt": "x", "stream": true}')
    transcript = Transcript()
    transcript.add(encode({"choices": [{"index": 0, "text": "a"}]}))
    transcript.read()
    event = encode({"choices": [{"index": 0, "text": "a b"}], "usage": usage})
    said = Continuation(asked, transcript).rewritten(event)
    assert json.loads(said.removeprefix(b"data: "))["usage"] == usage


def test_a_text_that_is_none_is_found_out() -> None:
    asked = Asked(PATHS[0], b'{"prompt": "x", "stream": true}')
    transcript = Transcript()
    transcript.read()
    with pytest.raises(DivergedError):
        Continuation(asked, transcript).rewritten(encode({"choices": [{"index": 0, "text": 7}]}))


def test_another_text_is_found_out() -> None:
    asked_for = {"prompt": "x", "max_tokens": 20, "stream": True, "temperature": 0}
    asked = Asked(PATHS[0], json.dumps(asked_for).encode())
    transcript = Transcript()
    transcript.add(b"".join(stream_of(PATHS[0], asked_for, "a")[:9]))
    transcript.read()
    foreign = b"".join(stream_of(PATHS[0], asked_for | {"prompt": "y"}, "b"))
    with pytest.raises(DivergedError):
        Continuation(asked, transcript).rewritten(foreign)


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2}, {"logprobs": 3}, {"tools": [{}]},
        {"echo": True}, {"response_format": {"type": "json_object"}}, {"presence_penalty": 1.0}, {"prompt": ["a"]},
        {"continue_final_message": True}, {"include_stop_str_in_output": True}, {"truncate_prompt_tokens": 9},
        {"bad_words": ["no way"]}, {"regex": "a+"}, {"json_schema": "{}"},
    ],
)  # fmt: skip
def test_what_is_not_gone_on_with(more: dict[str, Any]) -> None:
    body = {"prompt": "x", "stream": True, "temperature": 0, "tools": None, "n": 1, "logprobs": None} | more
    assert not Asked(PATHS[0], json.dumps(body).encode()).resumable()


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0}]}}]}',
        b'data: {"choices": [{"index": 0, "delta": {"reasoning": "hm"}}]}',
        b'data: {"choices": [{"index": 1, "text": "hm"}]}',
        b'data: {"choices": [{"index": 0, "text": "hm", "logprobs": {"tokens": ["hm"], "text_offset": [0]}}]}',
        b'data: {"choices": [7]}',
        b'data: {"choices": [{"index": 0, "text": 7}]}',
        b'data: {"choices": [{"index": 0, "delta": {"content": ["hm"]}}]}',
        b"data: 7",
        b"event: said\ndata: {}",
    ],
)
def test_what_has_more_than_text_is_not_plain(event: bytes) -> None:
    transcript = Transcript()
    transcript.add(b": hello\n\n" + event + b"\n\n")
    transcript.read()
    assert not transcript.plain


def test_long_streams_are_kept_as_text() -> None:
    transcript = Transcript()
    event = b'data: {"id": "a", "choices": [{"index": 0, "text": " word", "finish_reason": null}]}\r\n\r\n'
    for _ in range(20_000):
        transcript.add(event)
    transcript.read()
    assert transcript.plain
    assert transcript.text == " word" * 20_000


def test_edits_leave_everything_else_byte_for_byte() -> None:
    body = b'{"a": 1.0, "max_tokens": 9,  "b": {"c":  [1e5, "\\u00e9"]}, "stream": true}'
    assert edited(body, {"max_tokens": 1, "stream": None, "new": [1]}) == (
        b'{"a":1.0,"b":{"c":  [1e5, "\\u00e9"]},"max_tokens":1,"new":[1]}'
    )
