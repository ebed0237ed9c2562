"""Why a block was not served, not stored or not moved. Every miss has one of these, and every one is counted."""

from enum import StrEnum
from typing import Final


class Reason(StrEnum):
    """Reasons of misses and of skipped stores, as they stand in metrics (`reason="..."`) and logs."""

    ABSENT = "absent"  # nobody has stored it, or it was evicted before the lookup
    EVICTED = "evicted"  # it went between the lookup and the load
    CORRUPT = "corrupt"  # its checksum or its frame is wrong
    FOREIGN = "foreign"  # a sound frame, but of another key, namespace, geometry or codec
    IO_ERROR = "io_error"  # the system reported an error
    NO_PARENT = "no_parent"  # the block before it is not there, so it could never be found
    NO_SPACE = "no_space"  # the file system is full
    NO_SLOT = "no_slot"  # every slot of the tier is in use
    TIMEOUT = "timeout"  # the deadline passed first
    CANCELLED = "cancelled"  # the caller withdrew
    BREAKER_OPEN = "breaker_open"  # the tier failed too often and is resting
    BACKPRESSURE = "backpressure"  # the queue of background writes is full
    NOT_ADMITTED = "not_admitted"  # write admission spares the device
    CHEAPER_TO_RECOMPUTE = "cheaper_to_recompute"  # the planner expects prefill to be faster than loading
    PINNED = "pinned"  # the configuration pins that nothing is loaded, or stored
    PARTIAL_BLOCK = "partial_block"  # fewer tokens than a block
    NODE_AWAY = "node_away"  # the host's node does not answer, or has taken back what was held
    OWNER_GONE = "owner_gone"  # the process in whose VRAM it was is gone, or has taken its segment back
    INTERNAL = "internal"  # a bug in Cairn; the log has it once
    CLOSED = "closed"  # the engine is shutting down


_ENGINES: Final = (
    Reason.BACKPRESSURE,
    Reason.CHEAPER_TO_RECOMPUTE,
    Reason.PINNED,
    Reason.PARTIAL_BLOCK,
    Reason.NODE_AWAY,
    Reason.OWNER_GONE,
)
#: Those that a tier below DRAM has for a block; an engine alone has the others.
TIERS_REASONS: Final = tuple(reason for reason in Reason if reason not in _ENGINES)
