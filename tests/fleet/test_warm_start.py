"""Warm starts against real publishers: what comes back is what its process still publishes."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cairn.fleet import FleetIndex, Source
from cairn.fleet.instances import Instance, Limits
from cairn.fleet.keeper import SnapshotKeeper
from cairn.fleet.metrics import FleetMetrics, Resync, WarmStarted
from cairn.fleet.positions import WarmStart
from cairn.fleet.snapshot import read_snapshot, rehearse
from cairn.fleet.subscriber import Subscriber
from tests.fleet.peers import LIMITS, Publisher, free_endpoint, until
from tests.fleet.wire_events import removed, stored

PATIENT = Limits(replay_s=8.0, quiet_s=1.0, check_s=0.3, lost_s=60.0)


def held(index: FleetIndex, source: Source) -> set[int]:
    """The publisher's blocks, by their names (`Publisher.block`), that count for a source."""
    found = set()
    for made in range(1, 40):
        match = index.match(np.array([made, 1, 2, 3], np.uint32))
        if sum(match.of(source).values()):
            found.add(made)
    return found


def save(path: Path, *publishers: Publisher, batches: int = 5) -> None:
    """What a replica that follows the publishers writes."""

    async def run() -> None:
        index = FleetIndex(1 << 10)
        async with Subscriber(index, [one.instance for one in publishers], limits=LIMITS) as subscriber:
            for publisher in publishers:
                publisher.publish()
                await until(lambda one=publisher: held(index, one.source) == one.state(), "the first batch")
                for _ in range(batches - 1):
                    publisher.publish()
                publisher.publish(removed([2]))
                await until(lambda one=publisher: held(index, one.source) == one.state(), "the first replica")
            keeper = SnapshotKeeper(index, subscriber.position, path, subscriber.metrics)
            written = await keeper.write()
            assert written is not None
            assert (written.sources, written.left_out) == (len(publishers), 0)
            assert subscriber.metrics.fleet_snapshots.figures() == {"written": 1}

    asyncio.run(run())


def restarted(
    path: Path,
    instances: list[Instance],
    done: Callable[[FleetIndex, Subscriber], bool],
    limits: Limits = LIMITS,
) -> tuple[FleetIndex, Subscriber, WarmStart]:
    """A second replica, until `done`."""
    index, metrics = FleetIndex(1 << 10), FleetMetrics()
    warm = read_snapshot(path, index, metrics=metrics)
    assert warm.outcome is WarmStarted.WARM

    async def run() -> Subscriber:
        async with Subscriber(index, instances, limits=limits, metrics=metrics, warm=warm) as subscriber:
            await until(lambda: done(index, subscriber), "the second replica")
        return subscriber

    return index, asyncio.run(run()), warm


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    rehearse()


def drops(subscriber: Subscriber) -> dict[str, float]:
    return {reason: subscriber.metrics.fleet_drops.value(reason=reason) for reason in Resync}


def none_but(**counts: int) -> dict[str, float]:
    return {reason: counts.get(reason, 0) for reason in Resync}


def test_the_same_process_goes_on(tmp_path: Path) -> None:
    """Its buffer reaches back to the last batch, and no further: what is older comes from the snapshot alone."""
    with Publisher(buffer=3) as publisher:
        save(tmp_path / "fleet", publisher, batches=20)
        publisher.publish()
        publisher.publish(removed([1]))
        index, subscriber, warm = restarted(
            tmp_path / "fleet",
            [publisher.instance],
            lambda index, _: held(index, publisher.source) == publisher.state(),
        )
        assert warm.worker_blocks == 19
        assert held(index, publisher.source) == set(range(3, 22))
        assert drops(subscriber) == none_but()
        assert subscriber.metrics.fleet_replayed_batches.value() == 2


def test_nothing_counts_before_it_is_proved(tmp_path: Path) -> None:
    with Publisher() as publisher:
        save(tmp_path / "fleet", publisher)
        publisher.do("silence", mute=True)  # the replay does not come to its end, but begins
        index = FleetIndex(1 << 10)
        warm = read_snapshot(tmp_path / "fleet", index)
        assert (held(index, publisher.source), index.stats().worker_blocks) == (set(), 4)
        assert warm.sources == 1
        nowhere = publisher.instance._replace(replay=free_endpoint())

        async def run() -> None:
            async with Subscriber(index, [nowhere], limits=LIMITS, warm=warm) as subscriber:
                await until(lambda: subscriber.states()[0].connected, "the connection")
                assert held(index, publisher.source) == set()
                await until(lambda: index.sources() == (), "the drop")
                assert drops(subscriber) == none_but(gap=1)

        # The instance is another one by its replay alone, which a position does not name.
        asyncio.run(run())


def test_another_process_at_the_same_place(tmp_path: Path) -> None:
    """It has published as much, of other content, so its sequence goes on where the other's ended."""
    with Publisher() as publisher:
        save(tmp_path / "fleet", publisher)
        publisher.kill()
        publisher.start()
        for _ in range(8):
            publisher.publish()
        index, subscriber, _ = restarted(
            tmp_path / "fleet",
            [publisher.instance],
            lambda index, _: held(index, publisher.source) == publisher.state(),
        )
        assert held(index, publisher.source) == set(range(6, 14))
        assert drops(subscriber) == none_but(restart=1)


def test_another_process_that_has_published_nothing(tmp_path: Path) -> None:
    with Publisher() as publisher:
        save(tmp_path / "fleet", publisher)
        publisher.kill()
        publisher.start()
        _index, subscriber, _ = restarted(
            tmp_path / "fleet", [publisher.instance], lambda index, _: index.sources() == ()
        )
        assert drops(subscriber) == none_but(restart=1)


def test_the_same_process_without_its_buffer(tmp_path: Path) -> None:
    """Nobody can tell what was published meanwhile; what comes from now on is taken in."""
    with Publisher() as publisher:
        save(tmp_path / "fleet", publisher)
        publisher.forget()
        publisher.publish()
        _index, subscriber, _ = restarted(
            tmp_path / "fleet", [publisher.instance], lambda index, _: held(index, publisher.source) == {6}
        )
        assert drops(subscriber) == none_but(gap=1)


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    with Publisher() as publisher:
        save(tmp_path / "fleet", publisher)
        publisher.kill()
        _index, subscriber, _ = restarted(
            tmp_path / "fleet",
            [publisher.instance],
            lambda index, _: index.sources() == (),
            Limits(check_s=0.3, lost_s=0.5),
        )
        assert drops(subscriber) == none_but(lost=1)


def test_a_publisher_without_replay_proves_nothing(tmp_path: Path) -> None:
    with Publisher() as publisher:
        save(tmp_path / "fleet", publisher)
        _index, subscriber, _ = restarted(
            tmp_path / "fleet",
            [publisher.instance._replace(replay=None)],
            lambda index, _: index.sources() == (),
        )
        assert drops(subscriber) == none_but(restart=1)


def test_instances_that_are_not_on_the_list_any_more(tmp_path: Path) -> None:
    with Publisher("a") as one, Publisher("b") as other:
        save(tmp_path / "fleet", one, other)
        _index, subscriber, warm = restarted(
            tmp_path / "fleet",
            [one.instance],
            lambda index, _: index.sources() == (one.source,) and held(index, one.source) == one.state(),
            Limits(replay_s=8.0, quiet_s=1.0, check_s=0.3, lost_s=1.0),
        )
        assert warm.sources == 2
        assert drops(subscriber) == none_but(unclaimed=1)


def test_an_instance_that_a_registry_brings_later(tmp_path: Path) -> None:
    with Publisher(buffer=1) as publisher:
        save(tmp_path / "fleet", publisher)
        index = FleetIndex(1 << 10)
        warm = read_snapshot(tmp_path / "fleet", index)

        async def run() -> None:
            async with Subscriber(index, limits=PATIENT, warm=warm) as subscriber:
                subscriber.add(publisher.instance)
                await until(lambda: held(index, publisher.source) == {1, 3, 4, 5}, "the proof")
                assert subscriber.position(publisher.source) is not None

        asyncio.run(run())


def test_what_is_not_proved_is_not_written_again(tmp_path: Path) -> None:
    with Publisher() as publisher:
        save(tmp_path / "fleet", publisher)
        publisher.kill()
        index = FleetIndex(1 << 10)
        warm = read_snapshot(tmp_path / "fleet", index)

        async def run() -> None:
            async with Subscriber(index, [publisher.instance], limits=PATIENT, warm=warm) as subscriber:
                written = await SnapshotKeeper(
                    index, subscriber.position, tmp_path / "second", subscriber.metrics
                ).write()
                assert written is not None
                assert (written.sources, written.left_out) == (0, 1)

        asyncio.run(run())


@pytest.mark.parametrize("path", ["no/such", "/", "."])
def test_a_snapshot_that_cannot_be_written_is_counted(tmp_path: Path, path: str) -> None:
    async def run() -> FleetMetrics:
        metrics = FleetMetrics()
        keeper = SnapshotKeeper(FleetIndex(8), {}.get, Path(path) if path == "." else tmp_path / path, metrics)
        assert await keeper.write() is None
        return metrics

    assert asyncio.run(run()).fleet_snapshots.figures() == {"failed": 1}


def test_written_beside_a_stream_each_position_fits_its_blocks(tmp_path: Path) -> None:
    """Snapshots while batches come in: each brings back what the publisher had held at that batch."""
    with Publisher() as publisher:
        publisher.publish(stored([1], [1, 1, 2, 3], 4))
        publisher.made = 1

        async def run() -> None:
            index = FleetIndex(1 << 10)
            async with Subscriber(index, [publisher.instance], limits=LIMITS) as subscriber:
                await until(lambda: held(index, publisher.source) == {1})
                keeper = SnapshotKeeper(index, subscriber.position, tmp_path / "fleet", subscriber.metrics)
                for turn in range(10):
                    writing = asyncio.create_task(keeper.write())
                    for _ in range(3):
                        publisher.publish()
                        await asyncio.sleep(0)
                    publisher.publish(removed([1 + 3 * turn, 2 + 3 * turn]))
                    assert await writing
                    check_position()

        def check_position() -> None:
            other = FleetIndex(1 << 10)
            warm = read_snapshot(tmp_path / "fleet", other)
            stand = warm.take((publisher.instance.name, publisher.instance.endpoint))
            assert stand is not None
            other.show(stand.source)
            assert held(other, stand.source) == publisher.made_of(publisher.batches[: stand.position.next])

        asyncio.run(run())
