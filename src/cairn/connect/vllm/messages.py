"""What scheduler and workers tell each other, once a step: plain values that vLLM carries for its connectors."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from cairn.observe.reasons import Reason
from cairn.plan import Work

if TYPE_CHECKING:  # loads numba, which must not be there before the worker is: see `connector`
    from cairn.node.base import Home, VramHome


@dataclass(slots=True)
class Copy:
    """Blocks to copy between arena and paged cache: row rows[i] of the arena <-> page pages[i].

    number: of this copy, to report it by. request: whose blocks they are. home: in which arena the rows are, or in
    which VRAM, see `cairn.node.base.Home`; None: in the engine's own arena.
    """

    number: int
    request: str
    rows: list[int]
    pages: list[int]
    home: "Home | VramHome | None" = None


@dataclass(slots=True)
class Part:
    """Tokens start..stop of a prompt that are loaded to be blended, computed at positions start - origin and on.

    rows: of the arena, the blocks from the one on that holds token `start`. home: as in `Copy`.
    """

    start: int
    stop: int
    origin: int
    rows: list[int]
    home: "Home | VramHome | None" = None

    def skipped(self, block_tokens: int) -> int:
        """How many tokens stand before `start` in the first row."""
        return (self.start - self.origin) % block_tokens


@dataclass(slots=True)
class Blend:
    """A prompt whose KV is to be put together (`cairn.blend`) while its request waits outside of the step.

    number, request: as in `Copy`. tokens: uint32, those whose KV is wanted. start: tokens before it are exact, be they
    in the paged cache or in a part, and those of parts behind it are not. context: pages that are there. pages: those
    behind, which are written.
    """

    number: int
    request: str
    tokens: bytes
    start: int
    parts: list[Part]
    context: list[int]
    pages: list[int]


@dataclass(slots=True)
class Learn:
    """A chunk to be computed alone, in a step that computes nothing else, and stored: block first + i in rows[i].

    number, request, home: as in `Copy`. tokens: uint32, those of the blocks up to the last row's, the prelude first.
    """

    number: int
    request: str
    tokens: bytes
    first: int
    rows: list[int]
    home: "Home | VramHome | None" = None


@dataclass(slots=True)
class Orders(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers shall do in this step.

    layered: loads that this step's forward pass needs, layer by layer. loads: loads whose requests wait outside of the
    step. blends: the same. learns: chunks for later requests. stores: made after the forward pass. released: requests
    that are over and whose blocks vLLM may free. work: what the step computes, if it is to be timed for the planner.
    settle_stores: blocks are about to be taken from requests, so stores under way must end first. early: nothing else
    is written to new blocks before the forward pass. forgiven: failed copies that the scheduler has heard of, so that
    no request goes on with what they left.
    """

    layered: list[Copy] = field(default_factory=list)
    loads: list[Copy] = field(default_factory=list)
    blends: list[Blend] = field(default_factory=list)
    learns: list[Learn] = field(default_factory=list)
    stores: list[Copy] = field(default_factory=list)
    released: set[str] = field(default_factory=set)
    work: Work | None = None
    settle_stores: bool = False
    early: bool = False
    forgiven: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Done(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What workers have done since the last report.

    copies: by number, how many ranks have made the copy. failed: copies that at least one rank could not make, and why.
    seconds: a copy's time on the slowest rank. work, work_seconds: a step that was timed. blends: whether the worker is
    able to blend; said once. donation: by which number the worker's VRAM is in the pool from now on (0: it is not);
    None: as before.
    """

    copies: dict[int, int] = field(default_factory=dict)
    failed: dict[int, Reason] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    work: Work | None = None
    work_seconds: float = 0.0
    blends: bool = False
    donation: int | None = None

    def aggregate(self, other: Any) -> "Done":
        """Both reports in one (vLLM folds the ranks' reports of a step this way)."""
        copies = dict(self.copies)
        for number, ranks in other.copies.items():
            copies[number] = copies.get(number, 0) + ranks
        seconds = dict(self.seconds)
        for number, taken in other.seconds.items():
            seconds[number] = max(taken, seconds.get(number, 0.0))
        timed = self if self.work else other
        return Done(
            copies,
            self.failed | other.failed,
            seconds,
            timed.work,
            timed.work_seconds,
            self.blends or other.blends,
            self.donation if other.donation is None else other.donation,
        )
