"""What a request asks for: looked at within its body, which goes on to the engine byte for byte."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from cairn.serve.base import RequestError

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"

#: Bytes of text that make a token, about, where nobody has tokenized it.
_TOKEN_BYTES: Final = 4

#: Of an answer; more is taken for this, as the scheduler adds such numbers up in 64 bits.
_MOST_TOKENS: Final = 1 << 31

#: What an answer depends on beside the text so far: where one of these is set, no other engine can take over.
_STATEFUL: Final = (
    "bad_words", "best_of", "continue_final_message", "ebnf", "echo", "frequency_penalty", "functions", "guided_json",
    "guided_regex", "guided_choice", "guided_grammar", "include_stop_str_in_output", "json_schema", "logprobs",
    "presence_penalty", "prompt_logprobs", "regex", "repetition_detection", "response_format", "structural_tag",
    "structured_outputs", "suffix", "tools", "top_logprobs", "truncate_prompt_tokens", "use_beam_search",
    "repetition_penalty", "min_tokens", "return_token_ids",
)  # fmt: skip
_NOTHING: Final[tuple[Any, ...]] = (None, False, 0, 0.0, [], {}, "")


class _Fields(msgspec.Struct):
    """Of any type: what is wrong is the engine's to refuse."""

    model: Any = None
    stream: Any = None
    prompt: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    max_tokens: Any = None
    max_completion_tokens: Any = None
    priority: Any = None
    cache_salt: Any = None
    temperature: Any = None


_decode = msgspec.json.Decoder(_Fields).decode
_decode_all = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Asked:
    """A request. path: where it came to. body: as it came. model: "" where it names none."""

    __slots__ = ("_fields", "body", "chat", "max_tokens", "model", "path", "priority", "streams")

    def __init__(self, path: str, body: bytes) -> None:
        """Raises RequestError for what is no object in JSON."""
        try:
            fields = _decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"the body is no object in JSON: {error}") from None
        except RecursionError:
            raise RequestError("the body is nested too deeply") from None
        self.path, self.body, self._fields = path, body, fields
        self.chat = path == CHAT
        self.model = fields.model if isinstance(fields.model, str) else ""
        self.streams = fields.stream is True
        told = fields.max_completion_tokens if fields.max_completion_tokens is not None else fields.max_tokens
        self.max_tokens = _count(told)
        self.priority = fields.priority if isinstance(fields.priority, int) else 0

    @property
    def prompt(self) -> bytes:
        """The prompt or the messages, in JSON; a later turn of a chat begins as the one before, but for the end."""
        return bytes(self._fields.messages if self.chat else self._fields.prompt)

    def beginning(self, most: int) -> tuple[bytes, int]:
        """Of the prompt, at most so many bytes; and how many all of it has."""
        raw = memoryview(self._fields.messages if self.chat else self._fields.prompt)
        return bytes(raw[:most]), len(raw)

    def tokens(self, prompt: bytes) -> int:
        """About how many tokens the prompt has. prompt: its JSON, which is a copy each time it is asked for."""
        if not self.chat and prompt[:1] == b"[" and prompt[1:2] != b'"':
            return prompt.count(b",") + 1
        return len(prompt) // _TOKEN_BYTES

    @property
    def text(self) -> str | None:
        """A completion's prompt, if it is one text."""
        raw = self.prompt
        return msgspec.json.decode(raw, type=str) if raw[:1] == b'"' else None

    @property
    def salt(self) -> str | None:
        """What separates this tenant's blocks from others'."""
        return self._fields.cache_salt if isinstance(self._fields.cache_salt, str) else None

    def everything(self) -> dict[str, Any]:
        """All fields. Raises RequestError."""
        try:
            found = msgspec.json.decode(self.body)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is no object in JSON: {error}") from None
        assert isinstance(found, dict)
        return found

    def _readable(self) -> dict[str, Any] | None:
        """All fields; None: there are some that engines may take and that cannot be read here, as 1e999."""
        try:
            return self.everything()
        except RequestError:
            return None

    @property
    def greedy(self) -> bool:
        """Whether the answer is the same each time."""
        return bool(self._fields.temperature == 0)

    def resumable(self) -> bool:
        """Whether another engine can go on in the midst of the answer, from the text so far alone. Reads all fields."""
        fields = self._readable()
        if fields is None:
            return False
        if any(fields.get(name) not in _NOTHING for name in _STATEFUL) or fields.get("n") not in (None, 1):
            return False
        return self.chat or isinstance(fields.get("prompt"), str)

    def single(self) -> bool:
        """Whether the answer is one text, so that it ends with the first end of a choice. Reads all fields."""
        fields = self._readable()
        if fields is None:
            return False
        prompt = fields.get("prompt")
        several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
        return fields.get("n") in (None, 1) and (self.chat or not several)


def edited(body: bytes, changes: Mapping[str, Any]) -> bytes:
    """A body with other values of some fields, None: without the field; all other values are kept byte for byte.

    Raises RequestError for fields whose names cannot be read.
    """
    try:
        fields: dict[str, Any] = {**_decode_all(body)}
    except ValueError as error:
        raise RequestError(f"the body is no object in JSON: {error}") from None
    for name, value in changes.items():
        fields.pop(name, None)
        if value is not None:
            fields[name] = value
    return msgspec.json.encode(fields)


def _count(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        return 0
    return value if value < _MOST_TOKENS else _MOST_TOKENS
