"""Prefill on one instance, decode on another: what they tell each other in vLLM's `kv_transfer_params`.

The prefill instance answers how much of the prompt it has stored, or will have in a moment: vLLM gives the answer while
the last copies are under way, and leaves the blocks to them. The decode instance waits until they can be found, no
longer than computing them would take. Nothing that is told is believed: what is loaded is found by the decode
instance's own keys, and what does not come is computed.
"""

import logging
import time
from concurrent.futures import Future
from typing import Any, Final

import msgspec

from cairn.engine.core import EngineCore
from cairn.kv import KeyChain
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

_FIELD: Final = "cairn"
#: Pauses between two looks at what is to come, seconds: doubled from the first up to the last, so that many requests
#: that wait for one slow instance do not hold up those that run.
_FIRST_PAUSE_S: Final = 0.002
_LAST_PAUSE_S: Final = 0.05


class _Stored(msgspec.Struct):
    """What the prefill instance tells. blocks: how many lead the prompt. last: the key of the last, in hex."""

    blocks: int
    last: str


def is_wanted(request: Any) -> bool:
    """Whether another instance will decode the request of vLLM's."""
    params = request.kv_transfer_params
    return isinstance(params, dict) and params.get("do_remote_decode") is True


def told(chain: KeyChain, blocks: int) -> dict[str, Any] | None:
    """The prefill instance's answer, when so many leading blocks are stored, or will be."""
    if blocks == 0:
        return None
    stored = _Stored(blocks, chain.key(blocks - 1).hex())
    return {"do_remote_prefill": True, "do_remote_decode": False, _FIELD: msgspec.to_builtins(stored)}


class Promise:
    """Blocks of a request that another instance is about to have stored. For vLLM's scheduler loop."""

    def __init__(self, engine: EngineCore, chain: KeyChain, blocks: int) -> None:
        self.blocks = blocks
        self._engine, self._chain = engine, chain
        self._answer: Future[None] | None = None
        self._look_at = self._until = 0.0
        self._pause_s = _FIRST_PAUSE_S

    def pending(self) -> bool:
        """Whether they are worth waiting for: not all here, and not late. The time runs from the first call on."""
        now = time.monotonic()
        if now < self._look_at:
            return True
        if self._engine.held(self._chain) >= self.blocks:
            return False
        if not self._until:
            self._until = min(self._engine.deadline(None), now + self._engine.recompute_s(self._chain))
        if now > self._until:
            log_once(
                logger,
                "promise",
                "what a prefill instance has stored did not come in time and is computed: do both have the same "
                "node or remote store, or nodes that are peers?",
            )
            return False
        self._look_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)
        if self._answer is None or self._answer.done():
            self._answer = self._engine.ask(self._chain)
        return True


def promise(request: Any, chain: KeyChain, engine: EngineCore) -> Promise | None:
    """What a prefill instance has told of the request; None: nothing, or it is about other blocks."""
    params = request.kv_transfer_params
    if not isinstance(params, dict) or params.get("do_remote_prefill") is not True:
        return None
    try:
        stored = msgspec.convert(params.get(_FIELD), _Stored)
    except msgspec.ValidationError:
        return None  # another connector's
    alike = 0 < stored.blocks <= len(chain) and chain.key(stored.blocks - 1).hex() == stored.last
    return Promise(engine, chain, stored.blocks) if alike else None
