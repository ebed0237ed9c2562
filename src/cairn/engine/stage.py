"""A stage: a prompt's leading blocks, planned, brought up and held in DRAM (or VRAM), ready to be copied into a paged
cache.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Executor
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from cairn.copy import Copier, PagedKV, Progress, TokenSlots
from cairn.engine.hold import Hold
from cairn.engine.layers import LayerLoad
from cairn.node.base import Home, VramHome
from cairn.observe import trace
from cairn.observe.layers import LayerTimes
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.plan import CostModel

#: Bytes copied between two looks at the deadline: 10 ms from DRAM on a CPU, 40 ms over NVLink, where every call costs
#: as much as 100 MiB.
COPY_BYTES = 64 << 20
VRAM_COPY_BYTES = 16 << 30


class Span(NamedTuple):
    """The tokens a stage is about: start..blocks_end in whole blocks are wanted, of a prompt of `prompt` tokens.

    declined: how many of them are held, but not to be loaded; declined_as: why.
    """

    start: int
    blocks_end: int
    prompt: int
    declined: int
    declined_as: Reason = Reason.CHEAPER_TO_RECOMPUTE


class Placed(NamedTuple):
    """Consecutive blocks in memory of one kind (`tier`, see `Run`): rows of `home`, see there."""

    tier: str
    home: Home | VramHome | None
    rows: npt.NDArray[np.int32]


class Stage:
    """Leading blocks of one prompt, kept where they are until `release` (a context manager does it).

    What is copied is copied while it is held, so it is right; what could not be brought up in time is simply not part
    of the stage. Tokens before `span.start` are the caller's and their slots are never written. On release, what was
    copied counts as hits and the rest of the prompt, but for what its parts (`part_of`) copied, as misses. Owned by one
    request; `abandon` may come from any thread.
    """

    def __init__(
        self,
        hold: Hold,
        copier: Copier,
        executor: Executor,
        metrics: Metrics,
        cost: CostModel,
        span: Span,
        deadline: float,
        *,
        times: LayerTimes,
        traced: trace.Span = trace.NO_SPAN,
    ) -> None:
        """times: of layers. traced: the load's, which this ends."""
        self.span = span
        self._times, self._trace = times, traced
        self.deadline = deadline
        self._hold = hold
        self._copier = copier
        self._executor = executor
        self._metrics = metrics
        self._cost = cost
        self._block = copier.geometry.block_tokens
        self._loaded = span.start
        self._whole: Stage | None = None
        self._by_parts = 0
        self._layer_load: LayerLoad | None = None
        self._progress: Progress | None = None
        self._released = False
        self._abandoned = False

    def part_of(self, whole: "Stage") -> None:
        """This stage is of a chunk in the prompt of `whole`, which is released later and counts for both what neither
        copied.
        """
        self._whole = whole

    @property
    def blocks(self) -> int:
        """Leading blocks that are there now."""
        return self._hold.ready

    @property
    def tokens(self) -> int:
        """Leading tokens that are there now, those before `span.start` included."""
        return self._hold.ready * self._block

    @property
    def planned_tokens(self) -> int:
        """Leading tokens that there will be if all goes well."""
        return len(self._hold.keys) * self._block

    @property
    def loaded_tokens(self) -> int:
        """Up to which token copies were made or started."""
        return self._loaded

    def tokens_by_tier(self, start: int, stop: int) -> dict[str, int]:
        """In which tiers tokens start..stop were found, of those that are there now."""
        found: dict[str, int] = {}
        lead, rest = start // self._block, -(-stop // self._block)
        for tier, blocks in self._hold.blocks_by_tier(lead, rest).items():
            # Tiers follow one another, so that what the ends have too much is the first's and the last's.
            first, last = lead * self._block, (lead + blocks) * self._block
            found[tier] = max(0, min(last, stop) - max(first, start))
            lead += blocks
        return found

    @property
    def settled(self) -> bool:
        """Whether no more blocks will come, because all are there, some never will be, or the deadline passed."""
        return self._hold.settled or time.monotonic() > self.deadline

    def wait(self) -> int:
        """Waits until all planned blocks are there, or no more will come, or the deadline; returns how many tokens
        are.
        """
        self._hold.wait(self.deadline)
        return self.tokens

    def copy_to(self, kv: PagedKV, slots: TokenSlots) -> int:
        """Copies tokens from `span.start` on into the paged cache as they come up; returns up to which token it got.

        slots: int64, the slot of token span.start + i; tokens beyond it are left out. When this returns, nothing
        touches the slots any more. Raises InputError for slots outside the cache.
        """
        first, slots = self._whole_blocks(slots)
        stop = first + len(slots) // self._block
        done = first
        while done < stop and not self._hold.abandoned:
            run = self._hold.run(done)
            most = VRAM_COPY_BYTES if run.tier == "vram" else COPY_BYTES
            step = max(1, most // self._copier.row_geometry.block_bytes)
            ready = min(stop, self._hold.wait_beyond(done, self.deadline), done + step, run.stop)
            if ready <= done or (done > first and time.monotonic() > self.deadline):
                break
            started = time.monotonic()
            part = slots[(done - first) * self._block : (ready - first) * self._block]
            if not self._hold.scatter(self._copier, kv, part, range(done, ready)):
                break
            self._copied(run.tier, ready - done, time.monotonic() - started)
            done = ready
        self._loaded = max(self._loaded, done * self._block)
        return self._loaded

    def load_layers(self, kv: PagedKV, slots: TokenSlots) -> LayerLoad:
        """Starts to copy the tokens that are there now layer by layer; slots as for `copy_to`. Raises ClosedError."""
        first, slots = self._whole_blocks(slots)
        stop = max(first, min(self.blocks, first + len(slots) // self._block))
        runs = list(self._runs(first, stop))

        def part(blocks: range, layers: range | Progress) -> bool:
            of_blocks = slots[(blocks.start - first) * self._block : (blocks.stop - first) * self._block]
            return self._hold.scatter(self._copier, kv, of_blocks, blocks, layers)

        def copy(progress: Progress) -> bool:
            if self._abandoned:
                return False
            if [tier for tier, _ in runs] == ["dram"]:
                return part(runs[0][1], progress)
            return all(part(blocks, group) for group in progress.groups() for _, blocks in runs)

        def finished(seconds: float) -> None:
            for tier, blocks in runs:
                self._copied(tier, len(blocks), seconds * len(blocks) / (stop - first))

        # Told of before the load begins, which may be abandoned at once.
        self._progress = progress = Progress(self._copier.geometry.layers)
        self._layer_load = LayerLoad(self._executor, progress, copy, finished, times=self._times, trace=self._trace)
        self._loaded = max(self._loaded, stop * self._block)
        return self._layer_load

    @property
    def tier(self) -> str:
        """The memory that the first block to load is read from, see `Run`: "vram" only leads."""
        return self._hold.run(self.span.start // self._block).tier

    def rows(self, stop_token: int) -> list[Placed]:
        """Where the blocks are that hold tokens span.start..stop_token, in order, for a caller who copies them by
        itself.

        Counts them as loaded. They stay held until `release`.
        """
        first, stop = self.span.start // self._block, min(self.blocks, -(-stop_token // self._block))
        self._loaded = max(self.span.start, stop * self._block)
        return [Placed(tier, *self._hold.placed(blocks)) for tier, blocks in self._runs(first, stop)]

    def failed(self, reason: Reason) -> None:
        """What `rows` gave could not be copied: nothing was loaded."""
        self._loaded = self.span.start
        self._hold.stop_short(reason)

    def abandon(self) -> None:
        """Stops waiting and copying at the next step."""
        self._abandoned = True
        if self._progress:
            self._progress.stop()
        self._hold.abandon()

    def release(self) -> None:
        """Stops a layer load under way and gives the blocks back. Idempotent."""
        if self._released:
            return
        self._released = True
        error = self._layer_load.close() if self._layer_load else None
        self._hold.release()
        self._count()
        self._trace.end()
        if error:
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _whole_blocks(self, slots: TokenSlots) -> tuple[int, TokenSlots]:
        """The first block to copy and slots from its first token on: what comes before span.start gets no slot."""
        lead = self.span.start % self._block
        if lead:
            slots = np.concatenate([np.full(lead, -1, np.int64), slots])
        first = self.span.start // self._block
        count = max(0, min(self.span.blocks_end // self._block - first, len(slots) // self._block))
        return first, slots[: count * self._block]

    def _runs(self, first: int, stop: int) -> Iterator[tuple[str, range]]:
        """Blocks first..stop by the memory they are read from."""
        while first < stop:
            run = self._hold.run(first)
            upto = min(stop, run.stop)
            yield run.tier, range(first, upto)
            first = upto

    def _copied(self, tier: str, blocks: int, seconds: float) -> None:
        size = blocks * self._copier.row_geometry.block_bytes
        self._metrics.transferred(tier, "load", size, seconds)
        self._cost.observe_load(tier, size, seconds)

    def _count(self) -> None:
        span = self.span
        for tier, tokens in self.tokens_by_tier(span.start, self._loaded).items():
            if tokens:
                self._metrics.hit_tokens.add(tokens, tier=tier)
                if self._trace.on:
                    self._trace.note(**{f"hit_tokens.{tier}": tokens})
        if self._whole:
            self._whole._by_parts += self._loaded - span.start
            return
        missed = max(0, span.blocks_end - self._loaded)
        by_parts = min(self._by_parts, missed)
        missed -= by_parts
        partial = span.prompt - max(span.start, span.blocks_end) - (self._by_parts - by_parts)
        declined = min(span.declined, missed)
        reason = self._hold.reason or (Reason.CANCELLED if self._abandoned else Reason.ABSENT)
        self._missed(span.declined_as, declined)
        self._missed(reason, missed - declined)
        self._missed(Reason.PARTIAL_BLOCK, partial)

    def _missed(self, reason: Reason, tokens: int) -> None:
        if tokens:
            self._metrics.miss_tokens.add(tokens, reason=reason)
            if self._trace.on:
                self._trace.note(**{f"miss_tokens.{reason}": tokens})
