"""Requests out of a vLLM server's own log.

Several lines name a request: when it came and how long its answer may be, the prompt's token ids, and the answer's
where vLLM tells them (chats). Where it does not, the answer counts as long as it may be. Times are whole seconds.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cairn.errors import InputError
from cairn.sim.trace import lines

#: Without them a server logs less than is needed.
OPTIONS = ("--enable-log-requests", "--enable-log-outputs", "--log-level", "DEBUG")

_LINE = re.compile(
    rb"(?:INFO|DEBUG) (\d\d-\d\d \d\d:\d\d:\d\d) \[[^\]]*\] "
    rb"(Received request|Request|Generated response) (\S+?):? (.*)",
    re.DOTALL,
)
# The last of each: a prompt's own text may say anything.
_PROMPT = re.compile(rb".*prompt_token_ids: \[([\d, ]+)\]", re.DOTALL)
_ANSWER = re.compile(rb".*output_token_ids: \[([\d, ]+)\]", re.DOTALL)
_MOST = re.compile(rb".*max_tokens=(\d+)", re.DOTALL)


@dataclass(slots=True)
class _Request:
    line: int
    time: float
    prompt: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    most: int = 0


class _Clock:
    """Seconds out of times that leave the year out: one that is months earlier than the last is the next year's."""

    def __init__(self) -> None:
        self._year = 2000  # which has a 29th of February
        self._last = datetime(2000, 1, 1)

    def seconds(self, text: str) -> float:
        now = datetime.strptime(f"{self._year}-{text}", "%Y-%m-%d %H:%M:%S")
        if self._last - now > timedelta(days=180):
            self._year += 1
            now = now.replace(year=self._year)
        self._last = now
        return (now - datetime(2000, 1, 1)).total_seconds()


def requests(path: Path, limit: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers of the lines where requests begin, and requests in the fields of `cairn.sim.logs`, the first `limit`.

    Raises InputError for a file without any.
    """
    found: dict[bytes, _Request] = {}
    clock = _Clock()
    for number, line in lines(path):
        match = _LINE.search(line)
        if match:
            at, what, name, rest = match.groups()
            try:
                time = clock.seconds(at.decode())
            except ValueError:
                raise InputError(f"{path}, line {number}: {at.decode()} is no time; leave the line out") from None
            if name in found or what != b"Generated response":
                _tell(found.setdefault(name, _Request(number, time)), what, rest)
    told = [one for one in found.values() if one.prompt and (one.answer or one.most)]
    if not told:
        raise InputError(
            f"{path}: no requests; a log has one JSON object a line, or is a vLLM server's with {' '.join(OPTIONS)}"
        )
    for one in told[:limit]:
        answer = {"output_token_ids": one.answer} if one.answer else {"output_tokens": one.most}
        yield one.line, {"timestamp": one.time, "prompt_token_ids": one.prompt, **answer}


def _tell(request: _Request, what: bytes, rest: bytes) -> None:
    if what == b"Generated response":
        request.answer += _ids(_ANSWER, rest)
        return
    request.prompt = request.prompt or _ids(_PROMPT, rest)
    most = _MOST.match(rest) if what == b"Received request" else None
    if most:
        request.most = int(most[1])


def _ids(pattern: re.Pattern[bytes], text: bytes) -> list[int]:
    found = pattern.match(text)
    return [int(one) for one in found[1].split(b",")] if found else []
