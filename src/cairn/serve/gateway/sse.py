"""Server-sent events as OpenAI's API streams them: cut from bytes, and remembered until an engine has finished."""

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from cairn.serve.gateway.base import UpstreamError

_END: Final = b"\n\n"
_ENDS: Final = (_END, b"\r\n\r\n")
_LAST: Final = b"data: [DONE]"
DONE: Final = _LAST + _END
_DATA: Final = b"data:"

#: Bytes of events that are kept as they came before their text is taken out.
_KEPT: Final = 256 << 10
#: Bytes of an event that is not whole.
_EVENT: Final = 8 << 20


class Events:
    """Cuts a stream behind its last whole event, so that a client never has half a one from an engine that died."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, data: bytes) -> bytes:
        """Everything up to the end of the last event that is whole. Raises UpstreamError for one that does not."""
        if self._rest:
            data = self._rest + data
        elif data.endswith(_END):
            return data
        end = max((data.rfind(one) + len(one) for one in _ENDS if one in data), default=0)
        self._rest = data[end:]
        if len(self._rest) > _EVENT:
            raise UpstreamError("protocol", f"an event of more than {_EVENT} bytes")
        return data[:end]

    @property
    def rest(self) -> bytes:
        """What stands behind the last whole event."""
        return self._rest


def encode(value: Any) -> bytes:
    """One event."""
    return b"data: " + msgspec.json.encode(value) + _END


def failed(data: bytes) -> bool:
    """Whether these events tell that the engine has failed, as vLLM tells it in the midst of a stream."""
    at = data.find(b'data: {"error"')
    return at == 0 or (at > 0 and data[at - 1] == 0x0A)


def before_failure(data: bytes) -> bytes:
    """The events before the one that tells of it."""
    return data[: data.find(b'data: {"error"')]


def payloads(data: bytes) -> Iterator[dict[str, Any]]:
    """The objects of whole events. Raises ValueError for what is none, but for the end and for comments."""
    for event in data.replace(b"\r\n", b"\n").split(_END):
        line = event.strip()
        if not line or line.startswith(b":") or line == _LAST:
            continue
        value = msgspec.json.decode(line[len(_DATA) :]) if line.startswith(_DATA) else None
        if not isinstance(value, dict):
            raise ValueError("an event that is no object")
        yield value


def choices_of(event: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of an event; none in those that bring usage alone. Raises ValueError for what are none."""
    choices = event.get("choices") or []
    if not isinstance(choices, list):
        raise ValueError("choices that are no list")
    for choice in choices:
        if not isinstance(choice, dict) or not isinstance(choice.get("delta") or {}, dict):
            raise ValueError("a choice that is no object")
        if not isinstance(text_of(choice), str | None):
            raise ValueError("a text that is none")
    return choices


def text_of(choice: dict[str, Any]) -> Any:
    """What a choice says, of a chat or a completion."""
    delta = choice.get("delta")
    return choice.get("text") if delta is None else delta.get("content")


class Transcript:
    """What a client has been sent of one stream, to go on from. Costs a reference an event until somebody asks.

    text: of the answer so far. ends: where each event's text ends in it; an event brings a token or more. head: the
    first event, whose id, model and time the others share. finished: whether the answer had its end. plain: False once
    it had anything but text (tool calls, reasoning, several choices), from which nobody can go on.
    """

    def __init__(self) -> None:
        self.text = ""
        self.ends: list[int] = []
        self.head: dict[str, Any] = {}
        self.finished = False
        self.plain = True
        self._events: list[bytes] = []
        self._size = 0

    def add(self, data: bytes) -> None:
        self._events.append(data)
        self._size += len(data)
        if self._size > _KEPT:
            self.read()

    def read(self) -> None:
        """Brings the fields up to date."""
        try:
            for value in payloads(b"".join(self._events)):
                self._take(value)
        except ValueError:
            self.plain = False
        self._events.clear()
        self._size = 0

    def _take(self, value: dict[str, Any]) -> None:
        if not self.head:
            self.head = value
        for choice in choices_of(value):
            if choice.get("index") != 0 or choice.get("logprobs"):
                self.plain = False
            delta, text = choice.get("delta"), text_of(choice)
            if delta and any(delta[name] for name in delta.keys() - {"role", "content"}):
                self.plain = False
            if text or not (delta and delta.get("role")):  # a token may be half a character; who speaks is none
                self.text += text or ""
                self.ends.append(len(self.text))
            self.finished |= choice.get("finish_reason") is not None
