"""The gateway's interfaces: how an engine is spoken to, and how it becomes known what engines hold of a prompt.

The way of a request: `app` takes it in, `asked` looks into its body, `prompts` tells what instances hold of it,
`dispatch` asks the scheduler, `relay` sends it through an `Upstream` and its answer back to the client; `continuation`
takes over where an engine dies in the midst of a stream.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from cairn.errors import CairnError
from cairn.serve.gateway.asked import Asked

#: Headers as ASGI has them: names in lower case.
Headers = Sequence[tuple[bytes, bytes]]


class UpstreamError(CairnError):
    """An engine did not answer, or not to the end. reason: one word of `refused`, `closed`, `timeout`, `protocol`,
    `status`, `engine`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Answer(Protocol):
    """An engine's answer, as it comes. One reader."""

    status: int
    headers: Headers

    async def read(self, timeout_s: float) -> bytes:
        """The next bytes of the body, decoded of chunks; b"" at its end. What is not asked for is not taken off the
        wire beyond a small bound. Raises UpstreamError if it breaks off, or if nothing comes in `timeout_s`.
        """

    def close(self) -> None:
        """Ends it wherever it is, and thereby the engine's work on it. Repeatable."""


class Upstream(Protocol):
    """A way to one engine. For one event loop."""

    async def post(self, path: bytes, headers: Headers, body: bytes, timeout_s: float) -> Answer:
        """Asks; returns once the answer's head has come. headers: end-to-end ones, without the body's length.

        Raises UpstreamError if it has not in `timeout_s`.
        """

    def close(self) -> None:
        """Ends what is idle; answers that are being read go on. Repeatable."""


class Prompt(msgspec.Struct, frozen=True):
    """tokens: of the prompt, about. held: by instance, how many of them it would take from each tier (by their names in
    `cairn.plan.schedule.base.TIERS`). key: how its `Prompts` knows it again.
    """

    tokens: int
    held: Mapping[str, Mapping[str, int]]
    key: Any = None


class Prompts(Protocol):
    """Knows who holds how much of a prompt, as far as it can be known. For one event loop."""

    async def look(self, asked: Asked) -> Prompt:
        """Of a request. Never raises for what a client sent: what cannot be tokenized is held by nobody."""

    def sent(self, prompt: Prompt, instance: str) -> None:
        """The prompt goes there, and so counts as held there soon."""

    def forget(self, instance: str) -> None:
        """The instance is gone with all it held."""
