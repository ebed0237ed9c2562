"""The index of the disk tier and its records on disk, kept in step."""

import contextlib
import threading

import numpy as np

from cairn.index import PrefixIndex
from cairn.index.slots import SlotIds
from cairn.kv import Keys
from cairn.tier.disk_table import RecordTable, Recovered


class Ledger:
    """Everything that changes both the index and the table, one call at a time.

    The order inside each call makes a crash at any point harmless: a record is emptied before its slot can be written,
    and published after the block is there. The calls may wait for the disk, so nothing that must not wait (lookups,
    statistics) comes here; that asks the index. Raises OSError where said.
    """

    def __init__(self, index: PrefixIndex, table: RecordTable) -> None:
        self.index = index
        self._table = table
        self._lock = threading.Lock()

    def restore(self, found: Recovered) -> int:
        """Fills the index from recovered records; returns how many blocks were kept. Touches no record."""
        return len(self.index.restore(found.keys, found.parents, found.roots, found.slots))

    def reserve(self, count: int) -> SlotIds:
        """Up to `count` slots, empty on disk too. Raises OSError; nothing is reserved then."""
        with self._lock:
            ids = self.index.reserve(count)
            try:
                self._table.clear(ids)
            except OSError:
                self.index.free(ids)
                raise
            return ids

    def commit(self, keys: Keys, first: int, ids: SlotIds, namespace: bytes) -> int:
        """Publishes ids[i] as keys[first + i]; returns how many leading keys are resident and recorded after it.

        Blocks whose record cannot be written are removed again: OSError.
        """
        with self._lock:
            done = self.index.commit(keys, first, ids)
            before = keys[first - 1] if first else np.frombuffer(namespace, np.uint64)
            parents = np.concatenate([before[None], keys[first : first + len(ids) - 1]])
            try:
                self._table.publish(ids[done], keys[first : first + len(ids)][done], parents[done], namespace)
            except OSError:
                if done.any():
                    self.index.remove(keys[first + int(np.argmax(done))])
                raise
            return self.index.match(keys[: first + len(ids)])

    def drop(self, key: Keys) -> int:
        """Removes one block (key [2]) and all that follow from it, records included; returns how many.

        A record that cannot be emptied is harmless: a later start finds its block, and the reader proves or drops it.
        """
        with self._lock:
            with contextlib.suppress(OSError):
                self._table.clear(self.index.subtree(key))
            return self.index.remove(key)

    def sync(self) -> None:
        """Brings the records to the device. Raises OSError."""
        self._table.sync()

    def close(self) -> None:
        """Writes no record any more, so that the file may be closed."""
        with self._lock:
            self._table.close()
