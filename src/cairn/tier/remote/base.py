"""The contract of an object store: where the remote tier keeps its objects, and nothing else.

A backend moves bytes under a name. It knows neither blocks nor frames, trusts nobody and is trusted by nobody: what it
gives back is proved by the tier. That is what lets a backend be small.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

from cairn.codec.base import Octets
from cairn.observe.reasons import Reason
from cairn.transport.moving import sums_of


class Put(NamedTuple):
    """One object to store: its name (ASCII letters, digits, `/`, `-`) and its bytes: the blocks, and a tail, if any.

    tail: makes it, `tail_bytes` long, of the xxh3-128 of each block, uint8 [blocks, 16], where zeros stand for those
    that are still to be made. A store that sums blocks on their way calls it when they have gone; others take `parts`.
    """

    name: bytes
    blocks: Sequence[memoryview]
    tail: Callable[[Octets], memoryview] | None = None
    tail_bytes: int = 0

    @property
    def parts(self) -> Sequence[memoryview]:
        """All bytes of the object, part after part."""
        return [*self.blocks, self.tail(sums_of(self.blocks))] if self.tail else self.blocks

    @property
    def size(self) -> int:
        return sum(len(block) for block in self.blocks) + self.tail_bytes


class Get(NamedTuple):
    """Bytes of one object from `offset` on, to be put into `parts`, one after the other.

    whole: that is all of the object, so that a store may use its plain read instead of a range. sums: uint8
    [parts, 16], zeros; a store that sums parts on their way puts the xxh3-128 there of what now stands in them, and
    others leave that to the tier.
    """

    name: bytes
    offset: int
    parts: Sequence[memoryview]
    whole: bool = False
    sums: Octets | None = None

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
    one round trip. calls: a thread's part of a batch of small objects is loaded in so many calls; more than one lets
    threads that are done help those whose answers come late.
    """

    object_bytes: ClassVar[int]
    probe_names: ClassVar[int]
    calls: ClassVar[int] = 2

    def together(self, size: int) -> int:
        """How many objects of `size` bytes are best moved by one call: those that make one of the size it likes."""
        return max(1, self.object_bytes // size)

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
