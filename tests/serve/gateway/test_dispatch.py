"""What becomes of a scheduler's answers: sent, waited for, refused."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from cairn.cluster import Instance
from cairn.cluster.directory import Changed, Joined, Left
from cairn.cluster.directory import Member as Reported
from cairn.config.schema import Serve
from cairn.plan.schedule import RoundRobin
from cairn.plan.schedule.base import Ask, Choice, InstanceView, Send, Shed, Wait
from cairn.serve.gateway.base import Prompt
from cairn.serve.gateway.dispatch import Dispatch, RefusedError
from cairn.serve.gateway.members import Flight, Members
from cairn.serve.gateway.metrics import GatewayMetrics

PROMPT = Prompt(100, {})


class OneAtATime(RoundRobin):
    """An instance runs one request; whoever finds none free waits."""

    def __init__(self, members: Members) -> None:
        self._members = members.members

    def choose(self, request: Ask, view: Sequence[InstanceView], now: float) -> Choice:
        free = [one for one in view if not self._members[one.id].running]
        return Send(free[0].id) if free else Wait(now + 1000)


class Sheds(OneAtATime):
    def choose(self, request: Ask, view: Sequence[InstanceView], now: float) -> Choice:
        return Shed(2.5, "would take 9 s to the first token")


def members_of(config: Serve, *names: str) -> Members:
    members = Members(config)
    for name in names:
        members._hear(Joined(reported(name)))
    return members


def reported(name: str, model: str = "m") -> Reported:
    return Reported(Instance(name=name, incarnation="1", http="http://127.0.0.1:1", model=model))


def shed() -> None: ...


def ask(number: int) -> Ask:
    return Ask(id=str(number), prompt_tokens=100, arrived=float(number))


def test_waiting_requests_are_served_in_turn_whatever_leaves() -> None:
    """Fifty for two places, of which every fifth leaves while it waits, or just as it is let go."""

    async def main() -> list[int]:
        config = Serve(queue_s=60)
        members = members_of(config, "a", "b")
        dispatch = Dispatch(members, OneAtATime(members), config, shed)
        served: list[int] = []

        async def one(i: int) -> None:
            placed = await dispatch.place(ask(i), "m", ())
            with Flight(members, placed.member, PROMPT):
                assert placed.member.running == 1
                served.append(i)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(one(i)) for i in range(50)]
        for i in range(0, 50, 5):
            await asyncio.sleep(0)
            tasks[i].cancel()
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert dispatch.waiting == 0
        assert all(member.running == member.queued == 0 for member in members.members.values())
        return served

    served = asyncio.run(main())
    turns = sorted(served)
    assert all(abs(turns.index(one) - i) <= 2 for i, one in enumerate(served))  # two may be asking at the same time
    assert {i for i in range(50) if i % 5} <= {*served}


@pytest.mark.parametrize(
    ("scheduler", "names", "status", "after", "says"),
    [
        (Sheds, ("a",), 429, 3, "would take 9 s"),
        (OneAtATime, ("a",), 429, 1, "no room"),
        (OneAtATime, (), 503, 1, "no engine"),
    ],
)
def test_refusals_say_when_to_come_again(
    scheduler: Callable[[Members], OneAtATime], names: tuple[str, ...], status: int, after: int, says: str
) -> None:
    async def main() -> None:
        config = Serve(queue_s=0.05)
        members = members_of(config, *names)
        for member in members.members.values():
            member.running = 1
        with pytest.raises(RefusedError, match=says) as caught:
            await Dispatch(members, scheduler(members), config, shed).place(ask(0), "m", ())
        assert (caught.value.status, caught.value.retry_after_s) == (status, after)

    asyncio.run(main())


def test_refusals_and_requests_under_way_are_counted() -> None:
    async def main() -> None:
        config = Serve()
        members = members_of(config, "a")
        metrics = GatewayMetrics(members)

        def shown() -> set[str]:
            return {line for line in metrics.exposition().decode().splitlines() if line.endswith((" 1.0", " 100.0"))}

        with Flight(members, members.members["a"], PROMPT):
            figures = ("cairn_serve_running", 1.0), ("cairn_serve_queued_tokens", 100.0), ("cairn_serve_ready", 1.0)
            assert {f'{name}{{instance="a"}} {value}' for name, value in figures} <= shown()
        with pytest.raises(RefusedError):
            await Dispatch(members, Sheds(members), config, metrics.shed.add).place(ask(0), "m", ())
        assert "cairn_serve_shed_total 1.0" in shown()

    asyncio.run(main())


def test_who_may_serve() -> None:
    async def main() -> None:
        members = members_of(Serve(), "a")
        members._hear(Joined(reported("b", "n")))
        a, b = members.members["a"], members.members["b"]
        assert members.choices("m", (), 0.0) == [a]
        assert members.choices("adapter", (), 0.0) == members.choices("", (), 0.0) == [a, b]
        a.failed(10.0)
        assert members.choices("", (), 10.1) == [b]
        assert members.choices("m", (), 10.1) == [a]  # better one that rests than none
        assert members.choices("", ("b",), 10.1) == [a]
        assert members.choices("", (), 11.0) == [a, b]
        a.failed(11.0)
        assert not a.ready(11.9)
        a.succeeded()
        assert a.ready(11.9)
        assert members.choices("n", ("b",), 20.0) == []  # who serves another model would refuse, or say something else
        members.drain(b, True)
        assert members.choices("n", (), 20.0) == []
        assert members.choices("adapter", (), 20.0) == [a]
        members.drain(b, False)
        members._hear(Changed(reported("a", "n"), reported("a")))
        assert members.choices("n", (), 20.0) == [a, b]
        members._hear(Left(reported("b", "n")))
        assert members.choices("n", (), 20.0) == members.choices("", (), 20.0) == [a]

    asyncio.run(main())


def test_who_leaves_as_it_is_let_go_lets_the_next_one_go() -> None:
    async def main() -> None:
        config = Serve(queue_s=60)
        members = members_of(config, "a")
        dispatch = Dispatch(members, OneAtATime(members), config, shed)
        members.members["a"].running = 1
        first, second = (asyncio.create_task(dispatch.place(ask(i), "m", ())) for i in range(2))
        while dispatch.waiting < 2:
            await asyncio.sleep(0)
        members.members["a"].running = 0
        members.wake()
        first.cancel()
        async with asyncio.timeout(20):
            assert (await second).member.name == "a"

    asyncio.run(main())


def test_engines_that_all_left_just_now_are_waited_for_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that lost its leases forgets all engines, and has them back in a moment."""

    async def main() -> None:
        config = Serve(queue_s=60)
        members = members_of(config)
        dispatch = Dispatch(members, OneAtATime(members), config, shed)
        with pytest.raises(RefusedError, match="no engine is there"):
            await dispatch.place(ask(0), "m", ())

        members._hear(Joined(reported("a")))
        members._hear(Left(reported("a")))
        waits = asyncio.create_task(dispatch.place(ask(1), "m", ()))
        while not dispatch.waiting:
            await asyncio.sleep(0)
        members._hear(Joined(reported("b")))
        assert (await waits).member.name == "b"

        members._hear(Left(reported("b")))
        monkeypatch.setattr("cairn.serve.gateway.members._RETURN_S", 0.0)
        with pytest.raises(RefusedError, match="no engine is there"):
            await dispatch.place(ask(2), "m", ())

    asyncio.run(asyncio.wait_for(main(), 30))


def test_failures_of_engines_that_are_gone_are_forgotten_but_for_the_latest() -> None:
    members = members_of(Serve(), "here")
    metrics = GatewayMetrics(members)
    for name in ("here", *(f"pod-{i}" for i in range(300))):
        for reason in ("closed", "timeout"):
            metrics.failed(name, reason)
    lines = metrics.exposition().decode().splitlines()
    shown = [line for line in lines if line.startswith("cairn_serve_engine_failures_total{")]
    assert len(shown) == 2 * 257
    assert sum('"here"' in line for line in shown) == sum('"pod-299"' in line for line in shown) == 2
