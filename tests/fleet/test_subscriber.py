"""The subscriber against real publishers in processes of their own, over ZeroMQ on loopback."""

import asyncio
import base64
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import zmq

from cairn.errors import ClosedError, InputError
from cairn.fleet.base import Event, Source
from cairn.fleet.instances import Instance, Limits
from cairn.fleet.metrics import Resync, Skip
from cairn.fleet.recording import Player, Recorder, Recording
from cairn.fleet.subscriber import Subscriber
from tests.fleet.holder import Holder
from tests.fleet.peers import LIMITS, Publisher, free_endpoint, until
from tests.fleet.wire_events import encode, removed, stored

Body = Callable[[Subscriber, Holder], Awaitable[None]]


def following(body: Body, *publishers: Publisher, holder: Holder | None = None, limits: Limits = LIMITS) -> Subscriber:
    """Runs `body` beside a subscriber that follows the publishers."""
    held = holder or Holder()

    async def run() -> Subscriber:
        async with Subscriber(held, [one.instance for one in publishers], limits=limits) as subscriber:
            await body(subscriber, held)
        return subscriber

    return asyncio.run(run())


def holds(holder: Holder, publisher: Publisher) -> Callable[[], bool]:
    return lambda: holder.hashes(publisher.source) == publisher.state()


def drops(subscriber: Subscriber, reason: Resync) -> float:
    return subscriber.metrics.fleet_drops.value(reason=reason)


async def connected(subscriber: Subscriber) -> None:
    """Until what is published now is heard: connected, and what was before is caught up."""
    await until(lambda: all(state.connected and state.next is not None for state in subscriber.states()), "connected")


def test_what_was_published_before_comes_by_replay() -> None:
    with Publisher() as publisher:
        for _ in range(5):
            publisher.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await until(holds(holder, publisher), "the replay")
            publisher.publish()
            publisher.publish(removed([2]))
            await until(holds(holder, publisher), "live")
            assert holder.hashes(publisher.source) == {1, 3, 4, 5, 6}
            assert [(state.next, state.source) for state in subscriber.states()] == [(7, Source("a", 0))]
            assert holder.drops == []

        following(body, publisher)


def test_a_gap_is_filled_by_the_replay() -> None:
    with Publisher() as publisher:
        publisher.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await connected(subscriber)
            for _ in range(3):
                publisher.publish(lost=True)
            publisher.publish()
            await until(holds(holder, publisher), "the gap's blocks")
            assert subscriber.metrics.fleet_gaps.value() + subscriber.metrics.fleet_replays.value() > 1
            assert holder.drops == []

        following(body, publisher)


def test_a_loss_at_the_end_is_found_in_the_silence() -> None:
    with Publisher() as publisher:
        publisher.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await connected(subscriber)
            publisher.publish(lost=True)
            await until(holds(holder, publisher), "the last batch")
            assert holder.drops == []

        following(body, publisher)


def test_a_gap_that_cannot_be_filled_drops_the_source() -> None:
    with Publisher(buffer=4) as publisher:
        publisher.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await connected(subscriber)
            for _ in range(9):
                publisher.publish(lost=True)
            publisher.publish()
            await until(lambda: holder.hashes(publisher.source) == {8, 9, 10, 11}, "what the buffer has")
            assert holder.drops == [publisher.source]
            assert drops(subscriber, Resync.GAP) == 1
            publisher.publish()
            await until(lambda: holder.hashes(publisher.source) == {8, 9, 10, 11, 12}, "it goes on")

        # Without looks into the silence, so that it is the live batch that shows the gap.
        following(body, publisher, limits=Limits(check_s=60))


def test_a_hole_in_the_replay_is_asked_for_again() -> None:
    with Publisher() as publisher:
        for _ in range(9):
            publisher.publish()
        publisher.do("leave_out", sequence=5)

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await until(holds(holder, publisher), "what was left out")
            assert holder.drops == []

        following(body, publisher, limits=Limits(check_s=60))


def test_a_buffer_that_begins_behind_the_last_batch_proves_nothing() -> None:
    with Publisher(buffer=1) as publisher:
        publisher.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await connected(subscriber)
            publisher.publish(lost=True)
            await until(lambda: holder.hashes(publisher.source) == {2}, "the drop")
            assert drops(subscriber, Resync.GAP) == 1

        following(body, publisher)


def test_without_a_replay_a_gap_drops_the_source() -> None:
    with Publisher() as publisher:
        publisher.instance = publisher.instance._replace(replay=None)

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            while not holder.hashes(publisher.source):
                publisher.publish()  # the first may be before the subscription
                await asyncio.sleep(0.02)
            publisher.publish(lost=True)
            publisher.publish()
            await until(lambda: holder.hashes(publisher.source) == {publisher.made}, "the drop")
            assert drops(subscriber, Resync.GAP) == 1

        following(body, publisher)


@pytest.mark.parametrize("replay", [True, False])
def test_a_killed_process_and_its_successor(replay: bool) -> None:
    with Publisher() as publisher:
        if not replay:
            publisher.instance = publisher.instance._replace(replay=None)

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await until(lambda: subscriber.states()[0].connected)
            while holder.hashes(publisher.source) != publisher.state() or not publisher.batches:
                publisher.publish()  # without a replay the first may be before the subscription
                await asyncio.sleep(0.05)
                if not replay and holder.hashes(publisher.source):
                    break
            publisher.kill()
            publisher.start()
            publisher.publish()
            publisher.publish()
            await until(lambda: drops(subscriber, Resync.RESTART) == 1, "the drop")
            while not replay and publisher.made not in holder.hashes(publisher.source):
                publisher.publish()
                await asyncio.sleep(0.05)
            await until(lambda: holder.hashes(publisher.source) <= publisher.state(), "only the successor's")
            if replay:
                await until(holds(holder, publisher), "all of the successor's")
            assert drops(subscriber, Resync.GAP) == 0

        following(body, publisher)


def test_a_successor_whose_sequence_seems_to_go_on() -> None:
    """Three batches of one process, and the first that is heard of the next one is its fourth."""
    with Publisher() as publisher:
        for _ in range(3):
            publisher.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await until(holds(holder, publisher))
            publisher.kill()
            await until(lambda: not subscriber.states()[0].connected, "the connection's end")
            publisher.start()
            for _ in range(3):
                publisher.publish(lost=True)
            publisher.publish()
            await until(holds(holder, publisher), "the successor's blocks alone")
            assert holder.hashes(publisher.source) == {4, 5, 6, 7}
            assert drops(subscriber, Resync.RESTART) == 1

        following(body, publisher)


def test_a_successor_that_has_published_nothing_yet() -> None:
    with Publisher() as publisher:
        publisher.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await connected(subscriber)
            publisher.kill()
            publisher.start()
            await until(lambda: not holder.hashes(publisher.source), "the drop")
            assert drops(subscriber, Resync.RESTART) == 1

        following(body, publisher)


def test_one_that_stays_away_is_dropped() -> None:
    with Publisher() as publisher:
        publisher.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await connected(subscriber)
            publisher.kill()
            await until(lambda: drops(subscriber, Resync.LOST) == 1, "the drop")
            assert holder.drops == [publisher.source]
            assert not subscriber.states()[0].connected
            publisher.start()
            publisher.publish()
            await until(holds(holder, publisher), "its return")

        following(body, publisher, limits=Limits(check_s=0.3, lost_s=0.5))


def test_a_broken_connection_to_a_process_that_goes_on_costs_nothing() -> None:
    with Publisher() as publisher:
        publisher.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await connected(subscriber)
            publisher.do("rebind")
            publisher.publish()
            await until(lambda: subscriber.metrics.fleet_connects.value() == 2, "the reconnect")
            publisher.publish()
            await until(holds(holder, publisher), "what was published meanwhile")
            assert holder.drops == []

        following(body, publisher)


def test_ranks_are_kept_apart() -> None:
    with Publisher(rank=0) as zero, Publisher(rank=1) as one:
        for _ in range(3):
            zero.publish()
        one.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await until(lambda: holds(holder, zero)() and holds(holder, one)())
            assert set(holder.held) == {Source("a", 0), Source("a", 1)}
            one.kill()
            one.start()
            await until(lambda: holder.drops == [Source("a", 1)], "the drop of one rank")
            assert holds(holder, zero)()

        following(body, zero, one)


def test_another_rank_on_the_same_stream_is_not_taken_in() -> None:
    with Publisher() as publisher:
        publisher.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await connected(subscriber)
            publisher.send(encode([stored([99], [1], 1)], rank=5))
            publisher.publish()
            await until(lambda: 2 in holder.hashes(publisher.source))
            assert holder.hashes(publisher.source) == {1, 2}
            assert subscriber.metrics.fleet_skipped_batches.value(reason=Skip.FOREIGN_RANK) == 1

        following(body, publisher)


def test_two_publishers_of_one_rank_are_not_mixed() -> None:
    """As ranks are that nobody has numbered: the one that tells first counts, and the other once that is gone."""
    with Publisher() as first, Publisher() as second:
        first.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await connected(subscriber)
            subscriber.add(second.instance)
            await connected(subscriber)
            second.send(encode([stored([98, 99], [1, 2], 1)], rank=0))
            skipped = subscriber.metrics.fleet_skipped_batches
            await until(lambda: skipped.value(reason=Skip.TAKEN_RANK) > 1, "the other's")
            first.publish()
            await until(holds(holder, first), "the first's")
            assert holder.drops == []
            first.kill()
            await until(lambda: holder.drops == [first.source], "the drop of one that is gone")
            second.send(encode([stored([97], [1], 1)], rank=0))
            await until(lambda: holder.hashes(first.source) == {97}, "the other's turn")

        second.publish()
        following(body, first)


def test_a_publisher_that_connects() -> None:
    with Publisher(bind=False) as publisher:
        publisher.publish(lost=True)

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await connected(subscriber)
            publisher.publish()
            await until(holds(holder, publisher))
            publisher.kill()
            publisher.start()
            publisher.publish()
            await until(holds(holder, publisher), "the successor's blocks")
            assert holder.drops == [publisher.source]

        following(body, publisher)


def test_a_replay_without_end_is_given_up() -> None:
    with Publisher() as publisher:
        publisher.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await connected(subscriber)
            publisher.do("silence", mute=True)
            publisher.forget()
            publisher.publish(lost=True)
            publisher.forget()
            publisher.publish()
            await until(lambda: holder.hashes(publisher.source) == {3}, "what comes after the gap")
            await until(lambda: subscriber.metrics.fleet_replays.value(outcome="timeout") == 1)
            publisher.publish()
            await until(lambda: holder.hashes(publisher.source) == {3, 4}, "it goes on")
            assert holder.drops == [publisher.source]

        following(body, publisher, limits=Limits(check_s=60, quiet_s=0.5, replay_s=2))


def test_a_message_of_a_process_that_is_gone_is_left_out() -> None:
    with Publisher() as publisher:
        publisher.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await connected(subscriber)
            old = encode([stored([99], [1], 1)])
            for sequence in (0, 7):
                frames = [b"kv", sequence.to_bytes(8, "big"), old]
                publisher.do("raw", frames=[base64.b64encode(frame).decode() for frame in frames])
            await until(lambda: subscriber.metrics.fleet_skipped_batches.value(reason=Skip.STALE) == 2)
            publisher.publish()
            await until(holds(holder, publisher))
            assert holder.drops == []

        following(body, publisher)


def test_malformed_messages_cost_themselves_only() -> None:
    with Publisher() as publisher:
        publisher.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await connected(subscriber)
            publisher.send(b"\xc1 no batch")
            for frames in ([b"kv"], [b"kv", b"short", b"x"], [b"", b"", b"", b""]):
                publisher.do("raw", frames=[base64.b64encode(frame).decode() for frame in frames])
            publisher.publish()
            await until(holds(holder, publisher))
            skipped = subscriber.metrics.fleet_skipped_batches
            assert (skipped.value(reason=Skip.FRAMES), skipped.value(reason=Skip.NOT_A_BATCH)) == (3, 1)
            assert holder.drops == []

        following(body, publisher)


class Slow(Holder):
    """Holds the event loop up until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.hold = lambda: None

    def apply(self, source: Source, events: Sequence[Event]) -> None:
        self.hold()
        super().apply(source, events)


def test_a_sink_that_does_not_keep_up_loses_nothing_for_good() -> None:
    """Queues of ten messages, and 500 batches of 60 kB published while the sink stands still."""
    holder, lost = Slow(), list[float]()
    with Publisher(hwm=10) as publisher:
        publisher.publish()

        async def body(subscriber: Subscriber, _: Holder) -> None:
            await connected(subscriber)

            def burst() -> None:
                holder.hold = lambda: None
                big = encode([stored(list(range(100, 150)), [70_000] * 12_000, 240)])
                publisher.send(big, count=500)

            holder.hold = burst
            publisher.publish()
            await until(lambda: subscriber.states()[0].next == len(publisher.batches), "the burst's end")
            publisher.publish()
            await until(holds(holder, publisher))
            lost.append(subscriber.metrics.fleet_gaps.value())

        following(body, publisher, holder=holder, limits=Limits(queue=10, check_s=0.3))
        if not lost[0]:
            pytest.skip("the kernel's buffers took all of it: nothing was lost on the way, so nothing was tested")


def test_a_sink_that_fails_is_counted_and_begun_anew() -> None:
    holder = Slow()
    with Publisher() as publisher:
        publisher.publish()

        def fail() -> None:
            holder.hold = lambda: None
            raise ZeroDivisionError

        async def body(subscriber: Subscriber, _: Holder) -> None:
            await connected(subscriber)
            holder.hold = fail
            publisher.publish()
            await until(lambda: drops(subscriber, Resync.INTERNAL) == 1)
            await until(holds(holder, publisher), "all again")

        following(body, publisher, holder=holder)


def test_what_a_dead_process_left_in_the_queue_is_not_taken_for_its_successors() -> None:
    """Batches 4 to 6 wait while the sink stands still; the successor has published 0 to 4 meanwhile."""
    holder = Slow()
    with Publisher() as publisher:
        for _ in range(3):
            publisher.publish()

        def die() -> None:
            holder.hold = lambda: None
            for _ in range(3):
                publisher.publish()
            publisher.kill()
            publisher.start()
            for _ in range(5):
                publisher.publish(lost=True)
            deadline = time.monotonic() + 20
            while not established(publisher.endpoint):
                assert time.monotonic() < deadline

        async def body(subscriber: Subscriber, _: Holder) -> None:
            await until(holds(holder, publisher))
            holder.hold = die
            publisher.publish()
            await until(holds(holder, publisher), "the successor's blocks alone")
            publisher.publish()
            await until(holds(holder, publisher), "it goes on")
            assert drops(subscriber, Resync.RESTART) == 1

        following(body, publisher, holder=holder)


def established(endpoint: str) -> bool:
    """Whether somebody is connected to a port of this machine."""
    port = f":{int(endpoint.rpartition(':')[2]):04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(fields[1].endswith(port) and fields[3] == "01" for fields in lines)


def test_instances_come_and_go() -> None:
    with Publisher("a") as first, Publisher("b") as second:
        first.publish()
        second.publish()

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            await until(holds(holder, first))
            subscriber.add(second.instance)
            await until(holds(holder, second))
            with pytest.raises(InputError, match="followed already"):
                subscriber.add(second.instance)
            await subscriber.remove("a")
            assert set(holder.held) == {Source("b", 0)}
            assert drops(subscriber, Resync.REMOVED) == 1
            await subscriber.remove("nobody")
            subscriber.add(first.instance)
            await until(holds(holder, first), "it comes back")

        subscriber = following(body, first)
        assert subscriber.states() == []

    async def late() -> None:
        subscriber.add(first.instance)

    with pytest.raises(ClosedError):
        asyncio.run(late())


def test_endpoints_that_cannot_be_used() -> None:
    async def follow(*instances: Instance) -> None:
        async with Subscriber(Holder(), instances):
            pass

    taken = free_endpoint()
    with pytest.raises(InputError, match="Address already in use"):
        asyncio.run(follow(Instance("a", taken, bind=True), Instance("b", taken, bind=True)))
    with pytest.raises(InputError, match="nonsense: cannot be connected to"):
        asyncio.run(follow(Instance("a", "nonsense")))
    for rank in (-1, 1 << 16, 1 << 70):  # of the last no snapshot could be written
        with pytest.raises(InputError, match="rank="):
            asyncio.run(follow(Instance("a", "tcp://127.0.0.1:1", rank=rank)))


def test_many_publishers_are_followed_and_too_many_refused() -> None:
    """Each takes several sockets; where there are no more, it is a line, and all goes on with those there are."""

    async def run() -> None:
        async with Subscriber(Holder()) as subscriber:
            for number in range(400):
                subscriber.add(Instance(f"a{number}", "tcp://127.0.0.1:1"))
        for room in range(3):
            async with Subscriber(Holder()) as subscriber:
                subscriber._context.set(zmq.MAX_SOCKETS, 3 + room)
                subscriber.add(Instance("a", "tcp://127.0.0.1:1"))
                for _ in range(3):
                    with pytest.raises(InputError, match="ulimit"):
                        subscriber.add(Instance("b", "tcp://127.0.0.1:1"))
                assert [state.instance.name for state in subscriber.states()] == ["a"]

    asyncio.run(run())


def test_a_recording_plays_to_the_same_state(tmp_path: Path) -> None:
    holder = Holder()
    with Publisher(buffer=3) as publisher, Recorder(tmp_path / "events") as recorder:
        publisher.publish()

        async def run() -> None:
            limits = Limits(check_s=60)
            async with Subscriber(holder, [publisher.instance], limits=limits, tap=recorder.write) as subscriber:
                await connected(subscriber)
                for _ in range(7):
                    publisher.publish(lost=True)
                publisher.publish()
                await until(lambda: len(holder.hashes(publisher.source)) == 3)
                publisher.kill()
                publisher.start()
                publisher.publish()
                await until(holds(holder, publisher))

        asyncio.run(run())
    played = Holder()
    Player(played).play(Recording(tmp_path / "events"))
    assert played.held == holder.held
    assert played.drops == holder.drops


@pytest.mark.parametrize("seed", range(4))
def test_storms(seed: int) -> None:
    """Whatever happens: at its end the sink holds nothing that the publisher does not, and all that could be known."""
    chance = random.Random(seed)
    with Publisher(buffer=30) as publisher:

        async def body(subscriber: Subscriber, holder: Holder) -> None:
            for _ in range(120):
                dice = chance.random()
                if dice < 0.5:
                    publisher.publish(lost=chance.random() < 0.2)
                elif dice < 0.7 and publisher.state():
                    publisher.publish(removed([chance.choice(sorted(publisher.state()))]), lost=chance.random() < 0.2)
                elif dice < 0.75:
                    for _ in range(40):
                        publisher.publish(lost=True)
                elif dice < 0.78:
                    publisher.kill()
                    publisher.start()
                elif dice < 0.8:
                    publisher.do("rebind")
                else:
                    await asyncio.sleep(0)
            publisher.publish()
            await until(lambda: publisher.made in holder.hashes(publisher.source), "the last block")
            held, state = holder.hashes(publisher.source), publisher.state()
            assert held <= state
            assert held >= publisher.made_of(publisher.kept)

        following(body, publisher)


def test_figures_of_instances_that_are_gone_are_forgotten_but_for_the_latest() -> None:
    async def main() -> None:
        async with Subscriber(Holder()) as subscriber:
            metrics, names = subscriber.metrics, [f"pod-{i}" for i in range(300)]
            for name in names:
                subscriber.add(Instance(name, "tcp://127.0.0.1:9"))
                metrics.fleet_connects.add(1, instance=name)
                metrics.fleet_event_lag.observe(0.1, instance=name)
                await subscriber.remove(name)
                if name == "pod-1":
                    subscriber.add(Instance("pod-0", "tcp://127.0.0.1:9"))  # it is back
            kept = {("pod-0",), *((name,) for name in names[-256:])}
            assert {labels for labels, _ in metrics.fleet_connects.samples()} == kept
            assert {labels for labels, _ in metrics.fleet_event_lag.samples()} == kept

    asyncio.run(main())
