"""Requests as servers log them, a JSON object a line, and the way from a file to a trace whatever its format.

    timestamp          seconds, or text in ISO 8601
    prompt_token_ids   the prompt; or `prompt`: text, or token ids; or `messages`, a chat
    output_token_ids   the answer; or `output_tokens`, how many; or `usage.completion_tokens`, as OpenAI's API says

Other fields are not looked at. Text is not tokenized: four bytes of UTF-8 count as one token, so prefixes are told
apart exactly and lengths are about right. Where the answer is known too, the next turn of a chat finds its blocks.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cairn.errors import InputError
from cairn.fleet.recording import MAGIC
from cairn.kv import KeyChain, as_tokens
from cairn.sim.recorded import read_recording
from cairn.sim.trace import Trace, lines, read_trace

_NAMESPACE = bytes(16)


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Row(msgspec.Struct):
    timestamp: float | str
    prompt_token_ids: list[int] | None = None
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    output_token_ids: list[int] | None = None
    output_tokens: int | None = None
    usage: _Usage | None = None


def open_trace(path: Path, block_tokens: int = 512, limit: int | None = None) -> Trace:
    """A trace in Mooncake's format, a log of requests, or a recording of KV events: the file itself tells.

    block_tokens: of a log; the others bring theirs. limit: lines to read of a text file. Raises InputError.
    """
    first = next(lines(path, 1), (0, b""))[1]
    if first.startswith(MAGIC):
        return read_recording(path)
    return read_trace(path, limit) if b'"hash_ids"' in first else read_log(path, block_tokens, limit)


def read_log(path: Path, block_tokens: int, limit: int | None = None) -> Trace:
    """Raises InputError with the number of a bad line."""
    times, chains, lengths, asked = list[float](), list[list[int]](), list[tuple[int, int]](), list[int]()
    decode = msgspec.json.Decoder(_Row).decode
    for number, line in lines(path, limit):
        try:
            row = decode(line)
            times.append(_seconds(row.timestamp))
            prompt, answer, answered = _tokens(row)
        except (msgspec.DecodeError, ValueError, InputError) as error:
            raise InputError(f"{path}, line {number}: {error}; see docs/planning.md for the format") from None
        chain = KeyChain(_NAMESPACE, block_tokens, prompt)
        asked.append(len(chain))
        chain.extend(answer)
        chains.append((chain.keys[:, 0] >> np.uint64(1)).tolist())
        lengths.append((len(prompt), answered))
    if not times:
        raise InputError(f"{path}: no requests; a log has one JSON object a line")
    return Trace.of(times, chains, lengths, asked, block_tokens)


def _seconds(timestamp: float | str) -> float:
    return datetime.fromisoformat(timestamp).timestamp() if isinstance(timestamp, str) else timestamp


def _tokens(row: _Row) -> tuple[Any, Any, int]:
    """The prompt's tokens, the answer's as far as known, and how many those are."""
    prompt = row.prompt_token_ids if row.prompt_token_ids is not None else row.prompt
    if row.messages is not None and prompt is None:
        prompt = "".join(f"<{one.get('role')}>{one.get('content')}" for one in row.messages)
    if not prompt:
        raise InputError("no prompt: give prompt_token_ids, prompt or messages")
    answer = row.output_token_ids or []
    answered = len(answer) or row.output_tokens or (row.usage.completion_tokens if row.usage else 0)
    if answered < 1:
        raise InputError("no answer: give output_token_ids, output_tokens or usage.completion_tokens, above 0")
    if isinstance(prompt, str):
        text = prompt.encode()
        return np.frombuffer(text + bytes(-len(text) % 4), "<u4"), as_tokens(answer), answered
    return as_tokens(prompt), as_tokens(answer), answered
