"""What the page is told (`GET /api/v1/state`), and what whoever is shown has to say of itself.

A `Source` is read by a `Board`, every `PERIOD_S`: it tells counts since the process began, and the board makes history
of their differences. All times are seconds, points in time since the epoch; below the top fields
at their defaults are left out.
"""

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

#: Between two samples, seconds; and how many of them are kept.
PERIOD_S: Final = 2.0
SAMPLES: Final = 300

#: Tokens or bytes, by tier or by reason.
Amounts = dict[str, float]
Kind = Literal["service", "node"]
Condition = Literal["ready", "resting", "draining", "gone"]


class TierShown(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A tier's fill. capacity_bytes: 0: not known. shared: by the instances of a host, through its node."""

    tier: str
    capacity_bytes: int = 0
    used_bytes: int = 0
    blocks: int = 0
    shared: bool = False


class InstanceShown(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One engine. since: when it came, or went. running, waiting: as it reports. kv_usage: of its own KV cache, 0 to 1;
    None: it does not tell.

    hit_rate: of prompt tokens in the last minute; None: there were none. measured: it reports what its tiers serve;
    else that is what the service expected when it routed. indexed_blocks: that the index knows it to hold; None: it is
    not followed.
    """

    name: str
    role: str = "DEFAULT"
    model: str = ""
    version: str = ""
    http: str = ""
    state: Condition = "ready"
    since: float = 0.0
    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    kv_usage: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    hit_rate: float | None = None
    measured: bool = False
    indexed_blocks: int | None = None


class PrefixShown(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A beginning that recent prompts share. depth: 0 at the root; nodes come in preorder. tokens: from the prompt's
    start up to here, about. requests: of the recent ones. text: of this node alone; "": not to be shown. held: share of
    it, by instance.
    """

    depth: int
    digest: str
    tokens: int
    requests: int
    text: str = ""
    held: dict[str, float] = {}


class Sample(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What happened in the period that ended at `t`. hit_tokens and load_bytes, store_bytes: by tier. missed_tokens: by
    reason. cold_s, hit_s: quantiles of TTFT, of prompts of which less than half, or at least half, was held.
    """

    t: float
    requests: int = 0
    failures: int = 0
    running: int = 0
    waiting: int = 0
    hit_tokens: Amounts = {}
    missed_tokens: Amounts = {}
    load_bytes: Amounts = {}
    store_bytes: Amounts = {}
    cold: int = 0
    hit: int = 0
    cold_s: list[float] = []
    hit_s: list[float] = []


class State(msgspec.Struct, kw_only=True):
    """All that the page shows. seq: number of the last sample; `?since=SEQ` leaves out what came before. started: tells
    one life of the process from the next. prompts: how many recent ones `hot` is made of.
    """

    v: int = 1
    kind: Kind
    name: str
    version: str
    started: float
    time: float
    period_s: float = PERIOD_S
    seq: int
    instances: list[InstanceShown]
    more_instances: int = 0
    tiers: list[TierShown]
    hot: list[PrefixShown] = []
    prompts: int = 0
    samples: list[msgspec.Raw]


class Counts(NamedTuple):
    """Of one life of a process, since it began: tokens by tier and by reason, bytes by tier."""

    hit_tokens: Amounts
    missed_tokens: Amounts
    load_bytes: Amounts
    store_bytes: Amounts


class Served(NamedTuple):
    """TTFT of requests since the last reading: how many, and quantiles in seconds."""

    cold: int
    hit: int
    cold_s: list[float]
    hit_s: list[float]


class Reading(NamedTuple):
    """counts: by the name and the life of whoever counts. requests, failures: since the process began. running,
    waiting: now, over all.
    """

    counts: Mapping[tuple[str, str], Counts]
    served: Served
    requests: int = 0
    failures: int = 0
    running: int = 0
    waiting: int = 0


class Source(Protocol):
    """What is shown. Called by one board alone, on its thread, but for `look`; waits for nothing."""

    @property
    def kind(self) -> Kind: ...

    @property
    def name(self) -> str: ...

    def look(self) -> None:
        """Once a period, before `read`: gets what must be waited for. On a thread of its own."""

    def read(self) -> Reading:
        """Once a period."""

    def instances(self) -> list[InstanceShown]:
        """In the order in which they are shown. At most once a period, and only while somebody looks, as all below."""

    def tiers(self) -> list[TierShown]:
        """Of all together; what is shared once."""

    def hot(self) -> tuple[list[PrefixShown], int]:
        """The hottest beginnings of prompts, and the number of prompts that were looked at."""
