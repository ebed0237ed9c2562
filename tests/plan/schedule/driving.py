"""Small helpers to drive schedulers: instances, requests, and an engine that takes prompts one after the other."""

from collections.abc import Mapping

from cairn.plan import CostModel
from cairn.plan.role import Role
from cairn.plan.schedule import Ask, InstanceView, Scheduler, Send

#: Prefill of the instances below: a thousandth of a second a token. Loads: a tenth of that.
TOKEN_S = 1e-3


def cost(token_s: float = TOKEN_S) -> CostModel:
    """A cost model that has seen prefills of up to 4,096 tokens, so that prompts of 8,192 are known."""
    model = CostModel()
    for tokens in (64, 512, 4096):
        model.recompute.observe(tokens, 0, token_s * tokens)
        for tier in ("dram", "remote"):
            model.observe_load(tier, tokens, token_s * tokens / 10)
    return model


def instance(name: str, role: Role = Role.DEFAULT, *, token_s: float = TOKEN_S, available: bool = True) -> InstanceView:
    return InstanceView(
        id=name, role=role, available=available, cost=cost(token_s), token_bytes=1, reported_at=0.0, kv_tokens=10**6
    )


def ask(
    name: str,
    tokens: int = 100,
    *,
    at: float = 0.0,
    held: Mapping[str, Mapping[str, int]] | None = None,
    slo: float = 2.0,
) -> Ask:
    return Ask(id=name, prompt_tokens=tokens, arrived=at, held=held or {}, ttft_slo_s=slo, max_tokens=10)


def send(scheduler: Scheduler, request: Ask, view: list[InstanceView], now: float) -> Send:
    """Asks, expects an instance, and tells that the request is on its way."""
    choice = scheduler.choose(request, view, now)
    assert isinstance(choice, Send), choice
    scheduler.sent(request, choice, now)
    return choice
