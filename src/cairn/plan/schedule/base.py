"""Scheduling's contract: which instance of the fleet takes a request, and when.

Schedulers are pure: no I/O, no clock of their own, no asyncio. The service and the simulator drive the same code. `now`
and all points in time are seconds of the caller's clock, which never goes back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import msgspec

from cairn.plan.cost import CostModel
from cairn.plan.role import Role

#: Tiers that a prompt's KV may be held in, fastest first: the names in `Ask.held` and in `CostModel.load`.
TIERS: Final = ("vram", "dram", "disk", "remote")

#: What a token held in a tier is worth, next to one in VRAM, where seconds are not known.
TIER_WEIGHTS: Final = (1.0, 0.8, 0.4, 0.3)

#: The SLO of requests that bring none: seconds to the first token, and between tokens.
TTFT_SLO_S: Final = 2.0
TBT_SLO_S: Final = 0.1


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A request that looks for its instance.

    id: names the request in all calls, unique among those in flight. held: by instance, tokens of the prompt by the
    tier that the instance would take them from, in prompt order (`fleet.score` gives them); instances that hold nothing
    may be left out. max_tokens: of the answer, as far as known; it counts as KV memory. priority: higher ones leave the
    waiting room first. arrived: when the client sent it; its TTFT counts from there. streams: whether its first token
    will be told; that of others is taken to come when it is expected.
    """

    id: str
    prompt_tokens: int
    arrived: float
    held: Mapping[str, Mapping[str, int]] = msgspec.field(default_factory=dict)
    ttft_slo_s: float = TTFT_SLO_S
    tbt_slo_s: float = TBT_SLO_S
    max_tokens: int = 0
    priority: int = 0
    streams: bool = True


@dataclass(slots=True, kw_only=True, eq=False)
class InstanceView:
    """What the caller knows of an instance. The caller keeps one a life of an instance, and updates it between calls.

    model: that it serves; "": not told. available: registered, alive, not draining; nothing is sent to others. running,
    waiting, queued_prefill_tokens, ttft_s, tpot_s: as the instance reported them at `reported_at`, so all callers'
    requests count; tokens queued may be 0 where it does not tell. kv_tokens: that its own KV cache can hold; 0: not
    known. token_bytes: of KV a token. cost: fitted from what the scheduler sees of prefills; loads come from whoever
    sees those.
    """

    id: str
    role: Role = Role.DEFAULT
    model: str = ""
    available: bool = True
    running: int = 0
    waiting: int = 0
    queued_prefill_tokens: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    reported_at: float = float("-inf")
    kv_tokens: int = 0
    token_bytes: int = 0
    cost: CostModel = field(default_factory=CostModel)


class Send(msgspec.Struct, frozen=True):
    """To `instance_id`; with `prefill_on` the prefill there, and the decode, which streams to the client, here.

    expected_ttft_s: from now on; NaN where nothing is predicted.
    """

    instance_id: str
    prefill_on: str | None = None
    expected_ttft_s: float = float("nan")


class Wait(NamedTuple):
    """Nowhere yet: ask again at `until_s`, or earlier when something has changed; least slack first (`WaitingRoom`)."""

    until_s: float


class Shed(NamedTuple):
    """Refuse (HTTP 429): it would not be served in time. retry_after_s: when there may be room. reason: for people."""

    retry_after_s: float
    reason: str


Choice = Send | Wait | Shed


class Scheduler(Protocol):
    """Chooses, and learns from what became of its choices. Not thread-safe: one event loop owns it.

    Each `Send` that is carried out is told with `sent`, then `first_token`, then `finished`; or, at any point after
    `sent`, with `failed`. Calls about unknown requests are ignored: they may come late. `choose` takes O(instances).
    """

    def choose(self, request: Ask, view: Sequence[InstanceView], now: float) -> Choice:
        """Where `request` goes. Never to an instance that is not available. `view` has every id once."""
        ...

    def sent(self, request: Ask, choice: Send, now: float) -> None:
        """The request was sent as chosen."""
        ...

    def first_token(self, request: Ask, now: float) -> None:
        """Its first token came back, if it streams."""
        ...

    def finished(self, request: Ask, now: float, tokens: int) -> None:
        """Its last token came back; `tokens` in all."""
        ...

    def failed(self, request: Ask, now: float) -> None:
        """It ended otherwise: an error, a dead instance, a client that went away."""
        ...
