"""The contract of an object store: where the remote tier keeps its objects, and nothing else.

A backend moves bytes under a name. It knows neither blocks nor frames, trusts nobody and is trusted by nobody: what it
gives back is proved by the tier. That is what lets a backend be small.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from cairn.observe.reasons import Reason


class Put(NamedTuple):
    """One object to store: its name (ASCII letters, digits, `/`, `-`) and its bytes, part after part."""

    name: bytes
    parts: Sequence[memoryview]

    @property
    def size(self) -> int:
        return sum(len(part) for part in self.parts)


class Get(NamedTuple):
    """Bytes of one object from `offset` on, to be put into `parts`, one after the other.

    whole: that is all of the object, so that a store may use its plain read instead of a range.
    """

    name: bytes
    offset: int
    parts: Sequence[memoryview]
    whole: bool = False

    @property
    def size(self) -> int:
        return sum(len(part) for part in self.parts)


class ObjectStore(ABC):
    """Immutable objects by name. What is put twice under one name is the same content, so either may win.

    Batch first and synchronous; called by several threads at a time. A call returns by its `deadline` (time.monotonic
    seconds) and never raises for what happens inside: it answers with a Reason, ABSENT for what is not there, TIMEOUT,
    NO_SPACE, or IO_ERROR, which also stands for a store that cannot be reached. When a call has returned, nothing
    touches the caller's memory any more. A store that is down when it is opened is no error: it is asked again.

    object_bytes: the size of object that it likes best, by measurement. probe_names: how many names it answers for in
    one round trip.
    """

    object_bytes: ClassVar[int]
    probe_names: ClassVar[int]

    @abstractmethod
    def exists(self, names: Sequence[bytes], *, deadline: float) -> list[bool] | Reason:
        """Which of at most `probe_names` objects are there, in one round trip. Counts as a use of them."""

    @abstractmethod
    def put(self, puts: Sequence[Put], *, deadline: float) -> list[Reason | None]:
        """Stores objects; each is found whole or not at all. What became of each."""

    @abstractmethod
    def get_into(self, gets: Sequence[Get], *, deadline: float) -> list[int | Reason]:
        """How many bytes of each came: fewer than asked for if the object ends before. Counts as a use."""

    @abstractmethod
    def delete(self, names: Sequence[bytes], *, deadline: float) -> Reason | None:
        """Takes objects away; None too if they were not there."""

    @abstractmethod
    def health(self, *, deadline: float) -> Reason | None:
        """Whether the store answers: None, or why not."""

    def stats(self) -> Mapping[str, float]:
        """Figures of its own by name, units as suffix."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Gives connections and threads back. Idempotent; no call is under way."""
