"""What Cairn's services share: how a request is refused, and within which bounds it may come."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from cairn.errors import InputError

#: A prompt: token ids [n], uint32.
Tokens = npt.NDArray[np.uint32]

T = TypeVar("T")


class RequestError(InputError):
    """A request that is not served. The message is one line; status: HTTP's."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What a request may ask for. Sizes in bytes, times in seconds.

    body: as it is on the wire. bodies: all that are being read together. prompt: of text in UTF-8, given or rendered.
    messages: of a chat. waiting: requests whose text is being tokenized or waits for it. request: until a request is
    answered or refused.
    """

    body: int = 16 << 20
    bodies: int = 256 << 20
    prompt: int = 8 << 20
    messages: int = 4096
    waiting: int = 256
    request: float = 10.0


async def within(seconds: float, work: Awaitable[T]) -> T:
    """The result of `work`, or RequestError 504 after so many seconds."""
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        raise RequestError(f"not done after {seconds:g} s; try again later, or ask for less", 504) from None
