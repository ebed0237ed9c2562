"""Requests as servers and clients log them, a JSON object a line, and the way from any file to a trace.

    timestamp          seconds, or text in ISO 8601; or `created`, as OpenAI's API says
    prompt_token_ids   the prompt; or `prompt`: text, or token ids; or `messages`, a chat, with its `tools`
    output_token_ids   the answer; or `output_tokens`, how many; or `choices` and `usage.completion_tokens`, as there

They may stand in objects `request` (or `body`) and `response`, bodies of that API as they are. Other fields are not
looked at. Text is not tokenized: four bytes of UTF-8 count as one token, so prefixes are told apart exactly and lengths
are about right. Where the answer is known too, the next turn of a chat finds its blocks.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cairn.errors import InputError
from cairn.fleet.recording import MAGIC
from cairn.kv import KeyChain, as_tokens
from cairn.sim import vllm_log
from cairn.sim.recorded import read_recording
from cairn.sim.trace import Trace, lines, read_trace

_NAMESPACE = bytes(16)
#: Objects whose fields count as the line's own, the later ones' first.
_PARTS = ("request", "body", "response")


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Message(msgspec.Struct):
    role: str = ""
    content: str | list[Any] | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    message: _Message | None = None
    token_ids: list[int] | None = None  # vLLM's, with return_token_ids


class _Row(msgspec.Struct):
    timestamp: float | str | None = None
    created: float | None = None
    prompt_token_ids: list[int] | None = None
    prompt: str | list[int] | None = None
    messages: list[_Message] | None = None
    tools: list[Any] | None = None
    output_token_ids: list[int] | None = None
    output_tokens: int | None = None
    choices: Sequence[_Choice] = ()
    usage: _Usage | None = None


def open_trace(path: Path, block_tokens: int = 512, limit: int | None = None) -> Trace:
    """A trace in Mooncake's format, a log of requests, or a recording of KV events: the file itself tells.

    block_tokens: of a log; the others bring theirs. limit: requests to read. Raises InputError.
    """
    first = next(lines(path, 1), (0, b""))[1]
    if first.startswith(MAGIC):
        trace = read_recording(path)
        return trace.repeated(min(limit or len(trace), len(trace)))
    return read_trace(path, limit) if b'"hash_ids"' in first else read_log(path, block_tokens, limit)


def read_log(path: Path, block_tokens: int, limit: int | None = None) -> Trace:
    """A log of JSON objects, or vLLM's own. Raises InputError with the number of a bad line."""
    times, chains, lengths, asked = list[float](), list[list[int]](), list[tuple[int, int]](), list[int]()
    for number, row in _rows(path, limit):
        try:
            given = msgspec.convert(row, _Row)
            times.append(_seconds(given))
            prompt, answer, answered = _tokens(given)
        except (msgspec.ValidationError, ValueError, InputError) as error:
            raise _refused(path, number, error) from None
        chain = KeyChain(_NAMESPACE, block_tokens, prompt)
        asked.append(len(chain))
        chain.extend(answer)
        chains.append((chain.keys[:, 0] >> np.uint64(1)).tolist())
        lengths.append((len(prompt), answered))
    if not times:
        raise InputError(f"{path}: no requests; a log has one JSON object a line")
    return Trace.of(times, chains, lengths, asked, block_tokens)


def _rows(path: Path, limit: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers of lines, and what the requests there say."""
    if not next(lines(path, 1), (0, b"{"))[1].lstrip().startswith(b"{"):
        yield from vllm_log.requests(path, limit)
        return
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    for number, line in lines(path, limit):
        try:
            yield number, _flat(decode(line))
        except msgspec.DecodeError as error:
            raise _refused(path, number, error) from None


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    for name in _PARTS:
        if isinstance(part := row.get(name), dict):
            row = row | _flat(part)
    return row


def _refused(path: Path, number: int, error: Exception) -> InputError:
    return InputError(f"{path}, line {number}: {error}; see docs/planning.md for the format")


def _seconds(row: _Row) -> float:
    if isinstance(row.timestamp, str):
        return datetime.fromisoformat(row.timestamp).timestamp()
    found = row.timestamp if row.timestamp is not None else row.created
    if found is None:
        raise InputError("no time: give timestamp or created")
    return found


def _tokens(row: _Row) -> tuple[Any, Any, int]:
    """The prompt's tokens, the answer's as far as known, and how many those are."""
    prompt = row.prompt_token_ids if row.prompt_token_ids is not None else row.prompt
    if row.messages is not None and prompt is None:
        prompt = _chat(row.messages, row.tools)
    if not prompt:
        raise InputError("no prompt: give prompt_token_ids, prompt or messages")
    said, answer = _said(row)
    told = row.output_tokens or (row.usage.completion_tokens if row.usage else 0)
    answered = len(answer) or told or -(-len(said.encode()) // 4)
    if answered < 1:
        raise InputError("no answer: give output_token_ids, output_tokens, usage.completion_tokens or choices")
    if isinstance(prompt, str):
        text = prompt.encode()
        both = text + said.encode()
        tokens, asked = np.frombuffer(both + bytes(-len(both) % 4), "<u4"), -(-len(text) // 4)
        return tokens[:asked], tokens[asked : asked + answered], answered
    return as_tokens(prompt), as_tokens(answer), answered


def _chat(messages: Sequence[_Message], tools: list[Any] | None) -> str:
    """A chat as one text, up to where its answer begins: equal as far as the chats are."""
    return _text(tools or ()) + "".join(f"<{one.role}>{_content(one)}" for one in messages) + "<assistant>"


def _content(message: _Message) -> str:
    """What a message says, whether in one piece or in parts, and the tools that it calls."""
    content = [message.content] if isinstance(message.content, str) else message.content or []
    return _text([*content, *(message.tool_calls or ())])


def _text(parts: Sequence[Any]) -> str:
    """Texts as they are, all else as JSON."""
    texts = (part.get("text", part) if isinstance(part, dict) else part for part in parts)
    return "".join(one if isinstance(one, str) else msgspec.json.encode(one).decode() for one in texts)


def _said(row: _Row) -> tuple[str, list[int]]:
    """An answer's text and its token ids, as far as known."""
    first = row.choices[0] if row.choices else _Choice()
    text = first.text or (_content(first.message) if first.message else "")
    return text, row.output_token_ids or first.token_ids or []
