"""Reads by Mooncake's Transfer Engine: over TCP, or RDMA.

Its calls cannot be interrupted, and one that has given up may still write when a frozen peer goes on. So it reads into
memory of the transport's own, in a lane, and from there bytes are copied to where they belong while the caller waits.
That memory is never unmapped, as late bytes would land in whatever takes its place.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cairn.errors import ConfigError, StorageError
from cairn.observe.reasons import Reason
from cairn.transport.base import Read, Transport
from cairn.transport.lanes import Call, Lane, Lanes
from cairn.transport.moving import rehearse, scatter

#: Calls at a time, and so the threads and buffers that hanging peers can keep.
_LANES: Final = 12
_LANE_BYTES: Final = 16 << 20
#: Its environment variables: seconds after which it gives up a connection that does not move, and a transfer (which it
#: does not cancel); less noise on stderr.
_SETTINGS: Final = {
    "MC_TCP_STATUS_TIMEOUT_SEC": "2",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "2",
    "MC_TRANSFER_TIMEOUT": "5",
    "GLOG_minloglevel": "2",
    "MC_LOG_LEVEL": "ERROR",
}


class MooncakeTransport(Transport):
    """host: an address of this host that peers reach. device: RDMA devices, comma-separated; empty: all that are there.

    Its data plane listens on all interfaces, and asks nobody who he is.
    """

    def __init__(self, host: str, *, protocol: str = "tcp", device: str = "") -> None:
        """Raises ConfigError without the package, StorageError where the engine does not start."""
        for variable, value in _SETTINGS.items():
            os.environ.setdefault(variable, value)
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise ConfigError(
                f"node.peers: needs mooncake-transfer-engine (or -non-cuda) and libibverbs1: {error}"
            ) from None
        rehearse()
        engine = TransferEngine()
        code = engine.initialize(host, "P2PHANDSHAKE", protocol, device)
        if code != 0:
            raise StorageError(f"node.peers: the transfer engine does not start at {host} over {protocol} ({code})")
        self._engine = _Engine(engine)
        self.endpoint = f"{host}:{engine.get_rpc_port()}"
        self.guarded = protocol == "tcp"  # RDMA registers no memory that cannot be written
        self._lanes = Lanes(_LANES, "cairn-transport")

    def serve(self, memory: npt.NDArray[np.uint8]) -> None:
        code = self._engine.register_buffer(memory.ctypes.data, memory.nbytes)
        if code != 0:
            raise StorageError(f"the transfer engine refuses {memory.nbytes} bytes of memory ({code})")

    def withdraw(self, memory: npt.NDArray[np.uint8]) -> None:
        self._engine.unregister_buffer(memory.ctypes.data)

    def read(self, endpoint: str, reads: Sequence[Read], *, deadline: float) -> Reason | None:
        for chunk in _chunks(reads):
            reason: Reason | None = self._lanes.run(_Reading(self._engine, endpoint, chunk), deadline)
            if reason is not None:
                return reason
        return None

    def close(self) -> None:
        self._lanes.close()


class _Engine:
    """The engine, by the names that a lane uses."""

    def __init__(self, inner: Any) -> None:
        self.register_buffer: Callable[[int, int], int] = inner.register_memory
        self.unregister_buffer: Callable[[int], int] = inner.unregister_memory
        self.read: Callable[[str, list[int], list[int], list[int]], int] = inner.batch_transfer_sync_read


class _Reading:
    """Reads of at most _LANE_BYTES together, in a lane."""

    def __init__(self, engine: _Engine, endpoint: str, reads: Sequence[Read]) -> None:
        self._engine = engine
        self._endpoint = endpoint
        self._reads = reads

    def __call__(self, lane: Lane, call: Call) -> Reason | None:
        memory = lane.memory(self._engine, _LANE_BYTES)
        addresses, parts = zip(*self._reads, strict=True)
        sizes = [len(part) for part in parts]
        starts = [lane.address + sum(sizes[:i]) for i in range(len(sizes))]
        if self._engine.read(self._endpoint, starts, list(addresses), sizes) != 0:
            return Reason.IO_ERROR
        return None if call.with_caller(scatter, memory[: sum(sizes)], parts) else Reason.TIMEOUT


def _chunks(reads: Sequence[Read]) -> Iterator[list[Read]]:
    """The reads, cut and grouped so that each group fits a lane."""
    chunk: list[Read] = []
    room = _LANE_BYTES
    for address, into in reads:
        while len(into):
            chunk.append(Read(address, into[:room]))
            taken = len(chunk[-1].into)
            address, into, room = address + taken, into[taken:], room - taken
            if not room:
                yield chunk
                chunk, room = [], _LANE_BYTES
    if chunk:
        yield chunk
