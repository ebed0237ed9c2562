"""The contract of a transport: memory that peers read one-sided, and the reading of theirs.

A transport moves bytes that somebody has said are there. It knows neither blocks nor leases and proves nothing: what
an address means, whether it still does, and whether what came is right, is settled by those who use it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.observe.reasons import Reason


class Read(NamedTuple):
    """Bytes at `address` in the peer's process, to be put into `into`, which says how many."""

    address: int
    into: memoryview


class Transport(ABC):
    """One-sided reads between processes of different hosts. Thread-safe.

    A read never raises for what happens inside: it answers with a Reason, IO_ERROR for a peer that is gone or does not
    serve that memory, TIMEOUT past the deadline. endpoint: by which peers read from this process. guarded: whether
    memory that this process may only read can be served, so that no peer can write there.
    """

    endpoint: str
    guarded: bool

    @abstractmethod
    def serve(self, memory: npt.NDArray[np.uint8]) -> None:
        """Lets peers read `memory` (contiguous) by its addresses here. Its owner keeps it mapped until `withdraw`.

        Raises StorageError if the engine refuses it.
        """

    @abstractmethod
    def withdraw(self, memory: npt.NDArray[np.uint8]) -> None:
        """Ends that: reads that begin from now on fail. Those under way are not waited for."""

    @abstractmethod
    def read(self, endpoint: str, reads: Sequence[Read], *, deadline: float) -> Reason | None:
        """Reads from the process at `endpoint`, to which it connects as needed; None: everything has come.

        Returns by `deadline` (time.monotonic seconds), and nothing touches the caller's memory any more then, whatever
        the peer does. What is in there if it failed is not known.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives connections and threads back. Idempotent; no read is under way."""
