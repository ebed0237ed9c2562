"""Texts that were tokenized lately: who asks for scores tells the decision with the same text a moment later."""

import threading
from collections import OrderedDict
from typing import Final

from cairn.serve.base import Tokens

#: What a text costs beside its own bytes and its tokens': the object, the key, the entry.
_OVERHEAD: Final = 256


class Recent:
    """Text -> tokens, of at most `room` bytes together; the longest unused goes first. Thread-safe."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._taken = 0
        self._entries: OrderedDict[tuple[str, bool, str], Tokens] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, model: str, special: bool, text: str) -> Tokens | None:
        key = model, special, text
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def put(self, model: str, special: bool, text: str, tokens: Tokens) -> None:
        """Remembers tokens, which must not change any more."""
        key, size = (model, special, text), _size(text, tokens)
        if size > self._room // 4:
            return  # one text must not drive out all others
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = tokens
            self._taken += size
            while self._taken > self._room:
                (_, _, oldest), freed = self._entries.popitem(last=False)
                self._taken -= _size(oldest, freed)


def _size(text: str, tokens: Tokens) -> int:
    return 4 * len(text) + tokens.nbytes + _OVERHEAD
