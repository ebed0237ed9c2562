"""Roles in a fleet: who is sent what, and MIX instances under load."""

from tests.plan.schedule.driving import ask, instance, send

from cairn.plan.role import Role
from cairn.plan.schedule import InstanceView, Send, SloAware


def pairs(scheduler: SloAware, view: list[InstanceView], now: float, count: int = 8) -> set[tuple[str | None, str]]:
    """Who would prefill and who decode, over some turns."""
    found = set()
    for i in range(count):
        choice = scheduler.choose(ask(f"probe{i}", 1000, at=now, slo=1e4), view, now)
        assert isinstance(choice, Send)
        found.add((choice.prefill_on, choice.instance_id))
    return found


def test_mix_instances_divide_and_one_alone_does_everything() -> None:
    scheduler, view = SloAware(), [instance(name, Role.MIX) for name in "abcd"]
    found = pairs(scheduler, view, 0.0)
    prefilling, decoding = {first for first, _ in found}, {then for _, then in found}
    assert len(prefilling) == len(decoding) == 2
    assert not prefilling & decoding
    assert pairs(scheduler, view[:1], 1.0) == {(None, "a")}


def test_default_instances_take_whole_requests_beside_pairs() -> None:
    scheduler = SloAware()
    view = [instance("p", Role.PREFILL), instance("d", Role.DECODE), instance("w")]
    both = [send(scheduler, ask(f"r{i}", 1000), view, 0.0) for i in range(2)]
    assert {(one.instance_id, one.prefill_on) for one in both} == {("w", None), ("d", "p")}
    view[0].available = False
    third = send(scheduler, ask("r3", 500, slo=1e4), view, 0.0)
    assert (third.prefill_on, third.instance_id) == (None, "w")


def test_prompts_that_queue_draw_a_mix_instance_to_prefill_and_it_stays() -> None:
    scheduler, view = SloAware(), [instance(name, Role.MIX) for name in "abcdef"]
    counts = []
    for second in range(60):
        now = float(second)
        if second < 30:
            for i in range(6):
                send(scheduler, ask(f"r{second}-{i}", 2000, at=now, slo=1e4), view, now)
        pairs(scheduler, view, now, 1)
        counts.append(int(scheduler.sides._prefill.sum()))
    assert counts[0] == 3
    assert counts == sorted(counts)
    assert counts[-1] == 5  # nobody decodes, and the last one stays


def test_each_model_has_pressures_of_its_own() -> None:
    """One model's prompts queue, and it gets one more to prefill, beside another, idle, that is asked more often."""
    scheduler, busy, idle = SloAware(), *([instance(f"{m}{i}", Role.MIX) for i in range(6)] for m in "bi")
    for one in (*busy, *idle):
        one.model = one.id[0]
    before = len(_prefilling(scheduler, busy, 0.0))
    prefilling = _prefilling(scheduler, idle, 0.0)
    for tick in range(300):
        now = tick / 10
        _prefilling(scheduler, idle, now)
        if tick % 10 == 5:
            for i in range(6):
                send(scheduler, ask(f"r{tick}-{i}", 2000, at=now, slo=1e4), busy, now)
    assert len(_prefilling(scheduler, busy, 30.0)) == before + 2
    assert _prefilling(scheduler, idle, 30.0) == prefilling


def test_who_was_there_all_the_time_keeps_its_side_when_it_is_away_for_a_moment() -> None:
    scheduler, view = SloAware(), [instance(name, Role.MIX) for name in "abcdef"]
    for hour in range(2):
        scheduler.sides.mix.follow(dict.fromkeys("abcde", Role.PREFILL) | {"f": Role.DECODE}, hour * 3600.0)
        scheduler.sides.mix.follow(None, hour * 3600.0)
        for minute in range(60):
            now = hour * 3600.0 + minute * 60
            assert _prefilling(scheduler, view, now) == [*"abcde"]
        assert _prefilling(scheduler, view[3:], now + 1) == [*"de"]
        assert _prefilling(scheduler, view, now + 2) == [*"abcde"]


def _prefilling(scheduler: SloAware, view: list[InstanceView], now: float) -> list[str]:
    scheduler.choose(ask("probe", 1000, at=now, slo=1e4), view, now)
    return [one.id for one in view if scheduler.sides.mix.roles[one.id] is Role.PREFILL]
