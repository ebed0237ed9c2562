"""A stream whose engine died, gone on with by another: from the prompt and the text so far.

The other engine begins a little before the end of that text, and what it says first must be what was said already. So a
word is never cut where its tokens may differ, blanks that a template trims come again, and an engine that would go
another way is found out instead of followed.
"""

import bisect
import re
from typing import Any, Final

from cairn.serve.gateway.asked import Asked, edited
from cairn.serve.gateway.sse import DONE, Transcript, choices_of, encode, payloads

#: Characters that are said again at most.
_OVERLAP: Final = 96
_LAST_WORD: Final = re.compile(r"\s+\S+\s*\Z")
#: Tokens of a completion that does not say how many.
_DEFAULT_TOKENS: Final = 16


class DivergedError(Exception):
    """The other engine does not say what was said already."""


class Continuation:
    """What another engine is asked, and what of its answer the client gets. For one engine; a further one gets another.

    Ids, time and model stay those of the first event; usage counts the whole answer.
    """

    def __init__(self, asked: Asked, transcript: Transcript) -> None:
        """transcript: read, plain, not finished."""
        text, cut = transcript.text, _cut(transcript.text)
        self._asked, self._head = asked, transcript.head
        self._base, self._pending = text[:cut], text[cut:]
        self._before = bisect.bisect_right(transcript.ends, cut) if cut else 0

    def body(self) -> bytes:
        """The request to the other engine."""
        asked, changes = self._asked, dict[str, Any]()
        limit = asked.max_tokens or (0 if asked.chat else _DEFAULT_TOKENS)
        if limit:
            named = "max_completion_tokens" if b'"max_completion_tokens"' in asked.body else "max_tokens"
            changes[named] = max(1, limit - self._before)
        if self._base:
            fields = asked.everything()
            if asked.chat:
                changes["messages"] = [*fields["messages"], {"role": "assistant", "content": self._base}]
                changes |= {"add_generation_prompt": False, "continue_final_message": True}
            else:
                changes["prompt"] = fields["prompt"] + self._base
        return edited(asked.body, changes)

    def rewritten(self, data: bytes) -> bytes:
        """What the client gets of these events. Raises DivergedError."""
        try:
            events = [encode(value) for value in payloads(data) if self._take(value)]
        except ValueError as error:
            raise DivergedError(f"the other engine sends what is no event of a stream: {error}") from None
        if data.rstrip().endswith(b"[DONE]"):
            events.append(DONE)
        return b"".join(events)

    def _take(self, value: dict[str, Any]) -> bool:
        """Changes an event; False: nothing of it is new."""
        value |= {name: self._head[name] for name in ("id", "created", "model") if name in self._head}
        usage = value.get("usage")
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            usage["completion_tokens"] += self._before
            if isinstance(usage.get("prompt_tokens"), int):
                usage["prompt_tokens"] -= self._before
        choices = choices_of(value)
        new = [self._choice(choice) for choice in choices]
        return not choices or any(new)

    def _choice(self, choice: dict[str, Any]) -> bool:
        delta = choice.get("delta")
        holder, name = (choice, "text") if delta is None else (delta, "content")
        holder.pop("role", None)
        text = holder.get(name) or ""
        known = min(len(text), len(self._pending))
        if text[:known] != self._pending[:known]:
            raise DivergedError("another engine says something else")
        self._pending = self._pending[known:]
        ends = choice.get("finish_reason") is not None
        if ends and self._pending:
            raise DivergedError("another engine ends sooner")
        if name in holder:
            holder[name] = text[known:]
        return bool(text[known:]) or ends


def _cut(text: str) -> int:
    """Where the other engine begins: before the blanks before the last word."""
    word = _LAST_WORD.search(text, max(0, len(text) - _OVERLAP))
    cut = word.start() if word else max(0, len(text) - _OVERLAP)
    while cut and text[cut - 1].isspace():
        cut -= 1
    return cut
