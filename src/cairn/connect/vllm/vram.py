"""A worker's part in the VRAM pool: the segment of its GPU that it donates, and copies to it and from its peers'.

The scheduler reserves and pins rows in a session of its own, whose gate guards them as it guards rows in DRAM; it is
told the donation's number, and nothing else of the segment.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

from cairn.config import Config
from cairn.connect.vllm.model import Served
from cairn.connect.vllm.movers import Copying, Polled, failed
from cairn.connect.vllm.places import START_S
from cairn.copy import RowMemory
from cairn.engine.vram import Source, open_segment
from cairn.errors import ConfigError, StorageError
from cairn.node.base import VramHome
from cairn.node.client import Link, NodeClient
from cairn.node.gate import Entrance
from cairn.node.wire import VramPart
from cairn.observe.reasons import Reason

#: Between two attempts to donate the segment, seconds.
_RETRY_S = 1.0
#: Segments that are remembered until those that are over are forgotten.
_KEPT = 64


class VramError(StorageError):
    """A copy that was not made, or cannot be believed, and the reason that is counted."""

    def __init__(self, reason: Reason, why: str) -> None:
        super().__init__(why)
        self.reason = reason


_AWAY = VramError(Reason.NODE_AWAY, "the node is away, or has taken the rows back")
_GONE = VramError(Reason.OWNER_GONE, "the owner of a segment of VRAM is gone, or has taken it back")


def refuse_vram(served: Served, config: Config) -> None:
    """Raises ConfigError where an engine cannot share VRAM and was told to."""
    size = config.storage.vram.size
    reasons = {
        "VRAM is shared through the host's node; set node.address": not config.node.address,
        f"each of this engine's {served.ranks} ranks holds a part of a block, and VRAM is shared whole": (
            served.ranks > 1
        ),
    }
    for reason, holds in reasons.items():
        if size and holds:
            raise ConfigError(f"storage.vram.size={size}: {reason}, or set the size to 0")


class _VramCopy:
    """A copy that begins once its segment is mapped, and has failed unless the rows were right until its end.

    Owned by the model runner's thread, which polls it.
    """

    def __init__(self, source: "Future[Source]", begin: Callable[[RowMemory], Copying], entrance: Entrance):
        self._source = source
        self._begin = begin
        self._entrance = entrance
        self._inside = ExitStack()
        self._copying: Copying | None = None
        self._error: BaseException | None = None
        self._judged = False
        self.done()

    def done(self) -> bool:
        if self._copying is None and self._source.done():
            self._copying = self._start()
        return self._copying is not None and self._copying.done()

    def exception(self) -> BaseException | None:
        wait([self._source])
        self.done()
        assert self._copying
        if not self._judged:  # once: the segment may go after the copy
            self._judged = True
            self._error = self._copying.exception()
            if self._error is None and not self._source.result().sound():
                self._error = _GONE
            self._inside.close()
        return self._error

    def result(self) -> float:
        error = self.exception()
        if error:
            raise error
        assert self._copying
        return self._copying.result()

    def _start(self) -> Copying:
        unreachable = self._source.exception()
        if unreachable:
            return failed(unreachable)
        source = self._source.result()
        if not self._entrance.enter():
            return failed(_AWAY)
        with ExitStack() as inside:
            inside.callback(self._entrance.leave)
            memory = inside.enter_context(source.using())
            if memory is None:
                return failed(_GONE)
            copying = self._begin(memory)
            self._inside = inside.pop_all()
            return copying


class WorkerVram:
    """For the model runner's thread alone, which waits for nothing here after the start: another donates and maps.

    Has a session of its own at the node, which lives as long as the memory does, whatever becomes of the scheduler's.
    """

    def __init__(self, config: Config, served: Served) -> None:
        """Takes and donates the segment. Raises ConfigError or StorageError where the device has not that much."""
        geometry, address = served.row_geometry, config.node.address
        assert address
        _, self._vram = open_segment(config, geometry)
        self._own: tuple[Link, Source] | None = None
        self._donating: tuple[Link, Future[Source | None]] | None = None
        self._again = 0.0
        self._sources: dict[int, Future[Source]] = {}
        self._background = ThreadPoolExecutor(1, "cairn-vram")
        self._client = NodeClient(address, geometry, served.row_layout, timeout_s=config.node.timeout_s)
        link = self._client.wait(START_S if self._client.path.exists() else 0.0)
        if link:
            self._donate(link)
            self._donated(wait_s=config.node.timeout_s)

    def donation(self) -> int:
        """By which number the segment is in the pool now; 0: it is not."""
        link = self._client.link
        if self._own and self._own[0] is link and not self._own[1].over():
            return self._own[1].number
        self._own = None
        if self._donating:
            self._donated()
        elif link and time.monotonic() >= self._again:
            self._donate(link)
        return self._own[1].number if self._own else 0

    def copy(self, home: VramHome, begin: Callable[[RowMemory], Copying], entrance: Entrance | None) -> Polled:
        """Begins a copy from or to the memory that `home` names, at once where it is mapped, else when it is. entrance:
        of the home's gate.
        """
        return _VramCopy(self._source(home), begin, entrance) if entrance else failed(_AWAY)

    def close(self) -> None:
        """Takes the segment back, when no copy is under way any more."""
        self._background.shutdown(wait=True)
        self._vram.close(self._client.link, 0.0)
        self._client.close()

    # --- parts ---------------------------------------------------------------------------------------------------

    def _donate(self, link: Link) -> None:
        self._donating = link, self._background.submit(self._vram.donated, link)
        self._again = time.monotonic() + _RETRY_S

    def _donated(self, wait_s: float = 0.0) -> None:
        """Takes in what has become of `_donate`."""
        assert self._donating
        link, future = self._donating
        if not wait([future], wait_s).done:
            return
        self._donating = None
        source = future.result()
        if source:
            self._own = link, source
            own = self._sources[source.number] = Future()
            own.set_result(source)

    def _source(self, home: VramHome) -> "Future[Source]":
        found = self._sources.get(home.donation)
        if found and not _over(found):
            return found
        link = self._client.link
        if link is None or home.part is None:
            nowhere: Future[Source] = Future()
            nowhere.set_exception(_AWAY if link is None else _GONE)
            return nowhere
        if len(self._sources) >= _KEPT:
            self._sources = {number: one for number, one in self._sources.items() if not _over(one)}
        mapping = self._sources[home.donation] = self._background.submit(self._map, link, home.part)
        return mapping

    def _map(self, link: Link, part: VramPart) -> Source:
        source = self._vram.source(link, part)
        if source is None:
            raise VramError(Reason.IO_ERROR, "a segment of VRAM cannot be mapped")
        return source


def _over(source: "Future[Source]") -> bool:
    """Whether it was mapped and is not any more: it may be again, in another session."""
    return source.done() and not source.exception() and source.result().over()
