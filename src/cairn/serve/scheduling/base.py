"""What a scheduler is asked, what it sees, and what it may answer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from cairn.cluster.values import Load, Role
from cairn.fleet.base import Tier
from cairn.plan import CostModel


class Ask(NamedTuple):
    """A request to be placed. prompt_tokens: of its prompt; an estimate where nobody has tokenized it.

    held: by instance, how many tokens of the prompt it would take from each tier, in prompt order; an instance that is
    not in it holds nothing. ttft_slo_s, tbt_slo_s: until the first token, and between two, seconds. max_tokens: of the
    answer, 0: not told. priority: the lower the sooner, as vLLM has it. since: when it came, on the clock of `now`.
    """

    prompt_tokens: int
    held: Mapping[str, Mapping[Tier, int]]
    ttft_slo_s: float
    tbt_slo_s: float
    max_tokens: int = 0
    priority: int = 0
    since: float = 0.0


class InstanceView(NamedTuple):
    """An instance as the gateway sees it at this moment. Only those that may be chosen are shown.

    running: requests sent there that have not ended. queued_tokens: of their prompts, those that are still to be
    computed, as far as known. load: its last report. cost: its fitted costs, fed by whoever measures.
    """

    id: str
    role: Role
    running: int
    queued_tokens: int
    load: Load | None
    cost: CostModel


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

    `now` is in seconds on a monotonic clock, the same in all calls. A request is told as `sent`, then at most once each
    `first_token`, and then exactly one of `finished` and `failed`; `request` is the ask that was chosen for, the same
    object in all of them.
    """

    def choose(self, request: Ask, view: Sequence[InstanceView], now: float) -> Choice:
        """Where it goes. view: at least one instance."""

    def sent(self, request: Ask, choice: Send, now: float) -> None:
        """It is on its way."""

    def first_token(self, request: Ask, instance_id: str, now: float) -> None:
        """Its first token has come."""

    def finished(self, request: Ask, instance_id: str, tokens: int, now: float) -> None:
        """It has ended, with so many tokens (0: not known), or its client has left."""

    def failed(self, request: Ask, instance_id: str, now: float) -> None:
        """The instance has failed it."""
