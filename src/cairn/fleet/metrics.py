"""What the fleet's side counts: `cairn_fleet_*`, with the reason of everything that was not taken in."""

from enum import StrEnum

from cairn.observe.metrics import Counted, Counter, Histogram


class Skip(StrEnum):
    """Why an event, or a whole batch, was not taken in."""

    TOO_LARGE = "too_large"  # a payload beyond the bound
    NOT_A_BATCH = "not_a_batch"  # not msgpack, or not [time, events, rank]
    FRAMES = "frames"  # a message that is not (topic, sequence, payload)
    FOREIGN_RANK = "foreign_rank"  # another data-parallel rank on the stream of one
    TAKEN_RANK = "taken_rank"  # a rank that another endpoint of the instance tells of already
    STALE = "stale"  # of a process that has been replaced meanwhile
    UNKNOWN_TAG = "unknown_tag"  # a kind of event that this version does not know
    MALFORMED = "malformed"  # a known kind with a field of another type or out of bounds
    EMPTY = "empty"  # no blocks
    UNKNOWN_MEDIUM = "unknown_medium"  # a tier by a name that this version does not know
    NOT_FULL_ATTENTION = "not_full_attention"  # a group whose blocks say nothing about a prefix (sliding window, mamba)
    OTHER_GROUP = "other_group"  # one more full-attention group, told in step with the first
    UNKNOWN_GROUP = "unknown_group"  # a group beyond the first that does not say what it is
    TOKEN_COUNT = "token_count"  # fewer tokens than the blocks need
    AMBIGUOUS = "ambiguous"  # more token blocks than hashes: which are the skipped ones is not told
    EXTRA_KEYS = "extra_keys"  # not one entry a block, or two salts in one prompt


class Resync(StrEnum):
    """Why a source's blocks were dropped."""

    GAP = "gap"  # batches were lost, and the replay does not reach back to them
    RESTART = "restart"  # another process publishes now
    LOST = "lost"  # nobody has been connected for too long
    REMOVED = "removed"  # taken off the list
    UNCLAIMED = "unclaimed"  # in the snapshot, and no instance of the list's
    INTERNAL = "internal"  # a bug, here or in the sink; the log has it


class WarmStarted(StrEnum):
    """How reading a snapshot ended. All but WARM are cold starts."""

    WARM = "warm"
    ABSENT = "absent"  # no such file
    TORN = "torn"  # it ends too early
    CORRUPT = "corrupt"  # a checksum, or a value out of its bounds
    FOREIGN = "foreign"  # another kind of file, or of keys
    NEWER = "newer"  # of a later version
    UNREADABLE = "unreadable"  # the system refuses


class FleetMetrics(Counted):
    """Everything that is counted between the wire and the index. Thread-safe."""

    def __init__(self) -> None:
        self.fleet_batches = Counter("fleet_batches", "Batches taken in.", "instance")
        self.fleet_events = Counter("fleet_events", "Events taken in.", "instance")
        self.fleet_skipped_events = Counter("fleet_skipped_events", "Events not taken in, by reason.", "reason")
        self.fleet_skipped_batches = Counter("fleet_skipped_batches", "Batches not taken in, by reason.", "reason")
        self.fleet_gaps = Counter("fleet_gaps", "Jumps in a sequence of batches.", "instance")
        self.fleet_replays = Counter("fleet_replays", "Replays asked for, by how they ended.", "instance", "outcome")
        self.fleet_replayed_batches = Counter("fleet_replayed_batches", "Batches that came by replay.", "instance")
        self.fleet_drops = Counter("fleet_drops", "Times all blocks of a source were dropped.", "instance", "reason")
        self.fleet_connects = Counter("fleet_connects", "Connections made to a publisher.", "instance")
        self.fleet_warm_starts = Counter("fleet_warm_starts", "Snapshots read, by how that ended.", "outcome")
        self.fleet_snapshots = Counter("fleet_snapshots", "Snapshots written, by how that ended.", "outcome")
        self.fleet_shared_rounds = Counter(
            "fleet_shared_rounds", "Turns to write copies to the shared store, by how they ended.", "outcome"
        )
        self.fleet_event_lag = Histogram(
            "fleet_event_lag_seconds",
            "From a batch's publishing, by the publisher's clock, to its taking in.",
            "instance",
        )
        super().__init__()
