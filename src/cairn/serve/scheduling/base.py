"""What a scheduler is asked, what it sees, and what it may answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from cairn.cluster.values import Role
from cairn.plan import CostModel

#: The names of tiers in `Ask.held`, fastest first.
TIERS: Final = ("vram", "dram", "disk", "remote")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request to be placed.

    id: unique among those in flight. prompt_tokens: an estimate where nobody has tokenized it. arrived: when it came,
    on the clock of `now`. held: by instance, how many tokens of the prompt it would take from each tier, in prompt
    order; an instance that is not in it holds nothing. ttft_slo_s, tbt_slo_s: until the first token, and between two,
    seconds. max_tokens: of the answer, 0: not told. priority: the higher, the sooner.
    """

    id: str
    prompt_tokens: int
    arrived: float
    held: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    ttft_slo_s: float = 2.0
    tbt_slo_s: float = 0.1
    max_tokens: int = 0
    priority: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class InstanceView:
    """An instance, one object for each of its lives, brought up to date between calls.

    available: it may be chosen. running, waiting, ttft_s, tpot_s: as it reported them at `reported_at`, so all callers'
    requests count. cost: fitted by the scheduler.
    """

    id: str
    role: Role = Role.DEFAULT
    available: bool = True
    running: int = 0
    waiting: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    reported_at: float = float("-inf")
    cost: CostModel = field(default_factory=CostModel)


class Send(NamedTuple):
    """Send it now. prefill_on: another instance that computes the prompt first. expected_ttft_s: NaN: not known."""

    instance_id: str
    prefill_on: str | None = None
    expected_ttft_s: float = float("nan")


class Wait(NamedTuple):
    """Ask again at `until_s` (on the clock of `now`), or as soon as a request has ended."""

    until_s: float


class Shed(NamedTuple):
    """Refuse it: 429 with Retry-After. reason: one line."""

    retry_after_s: float
    reason: str


Choice = Send | Wait | Shed


class Scheduler(Protocol):
    """Chooses, and learns from what came of it. For one event loop; no call may wait.

    `now` is in seconds on a monotonic clock, the same in all calls. A request that is `sent` then has its `first_token`
    and is `finished`; or it has `failed` at any point, as when its client leaves. It may be asked for again then.
    """

    def choose(self, request: Ask, view: Sequence[InstanceView], now: float) -> Choice:
        """Where it goes. view: at least one instance."""

    def sent(self, request: Ask, choice: Send, now: float) -> None:
        """It is on its way."""

    def first_token(self, request: Ask, now: float) -> None:
        """Its first token has come."""

    def finished(self, request: Ask, now: float, tokens: int) -> None:
        """It has ended, with so many tokens."""

    def failed(self, request: Ask, now: float) -> None:
        """It has ended otherwise."""
