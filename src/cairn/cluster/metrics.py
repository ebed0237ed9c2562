"""What the cluster's side counts: `cairn_cluster_*`."""

from enum import StrEnum

from cairn.observe.metrics import Counted, Counter


class Resume(StrEnum):
    """Why a watch did not simply go on."""

    BROKEN = "broken"  # the connection ended, or a member lost its leader
    SILENT = "silent"  # a member did not answer
    COMPACTED = "compacted"  # the history does not reach back: the difference came instead
    RESET = "reset"  # another store, or an older state of it: the difference came instead


class Unread(StrEnum):
    """Why a value under one of our keys was not taken in."""

    MALFORMED = "malformed"  # not of the form, or a field breaks its rule
    NEWER = "newer"  # of a version that this one does not know
    MISPLACED = "misplaced"  # names another than its key does
    STALE = "stale"  # a report of an incarnation that is gone, or not yet there


class ClusterMetrics(Counted):
    """Everything that is counted about the registry and what stands in it. Thread-safe."""

    def __init__(self) -> None:
        self.cluster_requests = Counter("cluster_requests", "Calls by how they ended.", "call", "outcome")
        self.cluster_retries = Counter("cluster_retries", "Attempts that failed and were repeated.", "reason")
        self.cluster_failovers = Counter("cluster_failovers", "Times another endpoint was taken.")
        self.cluster_logins = Counter("cluster_logins", "Tokens asked for.")
        self.cluster_watch_resumes = Counter("cluster_watch_resumes", "Watches begun anew, by reason.", "reason")
        self.cluster_leases_lost = Counter("cluster_leases_lost", "Leases of ours that were gone.")
        self.cluster_unread = Counter("cluster_unread", "Values not taken in, by kind and reason.", "kind", "reason")
        self.cluster_joined = Counter("cluster_joined", "Instances that came.")
        self.cluster_left = Counter("cluster_left", "Instances that went.")
        self.cluster_internal = Counter("cluster_internal", "Bugs, here or in a listener; the log has them.")
        super().__init__()
