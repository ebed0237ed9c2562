"""KV events of the tiers: what DRAM and disk hold, told in vLLM's own words.

The indexes know keys, and a listener wants tokens. So requests *name* their blocks here, and the tiers' journals
(`cairn.index.journal`) say which of them came or went. A block that nobody has named, because it was found on disk
after a restart or was named too long ago, stays silent until a request names it again: neither its coming nor its going
is told.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

from cairn.connect.vllm.identity import pictures
from cairn.index.journal import Changes, JournalReader
from cairn.kv import KeyChain, Keys
from cairn.kv.keys import KEY_BYTES
from cairn.kv.namespace import salt_mark

#: What vLLM calls the tiers.
_MEDIUM: Final = {"dram": "CPU", "disk": "STORAGE"}

#: Names kept at least; a tier with more slots keeps as many as it has, so that its slowest writer still finds them.
_NAMES: Final = 1 << 16


class _Named(NamedTuple):
    """Consecutive blocks as a request has them: keys [n, 2], tokens [n * block], the key before, and beside the tokens
    what a listener must know: adapter, and content and mark by block, counted from the first of these.
    """

    keys: Keys
    tokens: npt.NDArray[np.uint32]
    parent: bytes | None
    lora_id: int | None
    lora_name: str | None
    mark: tuple[str, ...]
    pictures: dict[int, list[tuple[str, int]]]

    def find(self, key: Keys) -> int:
        """Where a key [2] is, which must be one of these."""
        return int(np.flatnonzero((self.keys[:, 0] == key[0]) & (self.keys[:, 1] == key[1]))[0])

    def extra_keys(self, start: int, stop: int) -> list[tuple[Any, ...] | None] | None:
        """As vLLM's: adapter, pictures, mark of the salt; None where there is nothing."""
        lora = (self.lora_name,) if self.lora_name else ()
        if not (lora or self.mark or self.pictures):
            return None
        return [(*lora, *self.pictures.get(i, ()), *self.mark) or None for i in range(start, stop)]


class TierEvents:
    """Turns the tiers' journals into vLLM's events. For vLLM's scheduler loop alone.

    Hashes are Cairn's block keys, 16 bytes, the same in every process that serves the same model. Every block told as
    stored is told as removed by its tier, or cleared; a tier tells a block once, however often it is stored.
    """

    def __init__(self, journals: Mapping[str, JournalReader], block_tokens: int) -> None:
        self._journals = [(_MEDIUM[tier], journal) for tier, journal in journals.items()]
        self._block = block_tokens
        self._limit = max([_NAMES, *(journal.capacity for journal in journals.values())])
        self._names: dict[bytes, _Named] = {}
        self._recent: deque[_Named] = deque()
        self._named = 0
        self._cleared = False

    def name(self, request: Any, chain: KeyChain, first: int, tokens: npt.NDArray[np.uint32]) -> None:
        """A request has the blocks first.. of its chain; tokens [n]: its tokens from there on, an unfinished block's at
        the end left out.
        """
        keys = chain.keys[first:].copy()
        if not len(keys):
            return
        adapter, salt = request.lora_request, request.cache_salt
        named = _Named(
            keys,
            tokens[: len(keys) * self._block],
            chain.key(first - 1) if first else None,
            adapter.adapter_id if adapter else None,
            adapter.lora_name if adapter else None,
            (salt_mark(salt),) if salt is not None else (),
            {block - first: items for block, items in pictures(request, self._block).items()},
        )
        self._names.update(dict.fromkeys(_split(keys), named))
        self._recent.append(named)
        self._named += len(keys)
        while self._named > self._limit and len(self._recent) > 1:
            self._forget(self._recent.popleft())
        for _, journal in self._journals:
            journal.mention(keys)

    def clear(self) -> None:
        """Nothing of what was told so far can be found any more."""
        self._names.clear()
        self._recent.clear()
        self._named = 0
        for _, journal in self._journals:
            journal.clear()
        self._cleared = True

    def take(self) -> list[Any]:
        """What is new since the last call, a clear first, removals before what was stored."""
        events: list[Any] = [AllBlocksCleared()] if self._cleared else []
        self._cleared = False
        for medium, journal in self._journals:
            changes = journal.changes()
            if len(changes.removed):
                events.append(BlockRemoved(block_hashes=_split(changes.removed), medium=medium, group_idx=0))
            if len(changes.stored):
                self._stored(changes, journal, medium, events)
        return events

    def _stored(self, changes: Changes, journal: JournalReader, medium: str, events: list[Any]) -> None:
        """Adds an event for each run of blocks that one request has named; silences the others."""
        hashes, at, silent = _split(changes.stored), 0, []
        while at < len(hashes):
            named = self._names.get(hashes[at])
            if named is None:
                silent.append(at)
                at += 1
                continue
            start = named.find(changes.stored[at])
            length = _common(changes.stored[at:], named.keys[start:])
            events.append(self._event(named, start, hashes[at : at + length], medium))
            at += length
        journal.silence(changes.slots[silent])

    def _event(self, named: _Named, start: int, hashes: list[bytes], medium: str) -> Any:
        stop = start + len(hashes)
        return BlockStored(
            block_hashes=hashes,
            parent_block_hash=named.keys[start - 1].tobytes() if start else named.parent,
            token_ids=named.tokens[start * self._block : stop * self._block].tolist(),
            block_size=self._block,
            lora_id=named.lora_id,
            medium=medium,
            lora_name=named.lora_name,
            extra_keys=named.extra_keys(start, stop),
            group_idx=0,
        )

    def _forget(self, named: _Named) -> None:
        self._named -= len(named.keys)
        for key in _split(named.keys):
            if self._names.get(key) is named:  # a later request may have named it too
                del self._names[key]


def _split(keys: Keys) -> list[bytes]:
    """Keys [n, 2], each as its 16 bytes."""
    whole = keys.tobytes()
    return [whole[at : at + KEY_BYTES] for at in range(0, len(whole), KEY_BYTES)]


def _common(some: Keys, others: Keys) -> int:
    """How many leading keys are the same."""
    length = min(len(some), len(others))
    same = (some[:length] == others[:length]).all(axis=1)
    return length if same.all() else int(np.argmin(same))
