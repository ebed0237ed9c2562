"""One publisher's stream of batches: in order, without gaps, of one process at a time; or dropped and begun anew.

Sequences count from 0 with each process and carry no epoch. So nothing is taken on a sequence's word alone where it
does not simply go on: the replay is asked from the last batch on that was taken in, and only if that comes back byte
for byte does the same process still publish. A publisher's thread sends a batch before it can answer a replay, so a
batch that a complete, proven replay does not lead to is of a process that is gone.
"""

import asyncio
import logging
import time
from contextlib import aclosing
from typing import Final

import zmq
import zmq.asyncio

from cairn.errors import InputError
from cairn.fleet.base import Source
from cairn.fleet.instances import Limits, State
from cairn.fleet.messages import Framed, Inbox, Messages
from cairn.fleet.metrics import Resync, Skip
from cairn.fleet.positions import Position
from cairn.fleet.replay import ReplayTimeoutError, replay
from cairn.fleet.sockets import attach, comings, make_socket, reattach, watch
from cairn.fleet.track import Track
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

#: What comes soon after what was taken in is taken in together: a round costs some hundred blocks' time, seconds.
_PAUSE_S: Final = 0.005

#: A subscription that was just made may not have reached the publisher yet; after this long it is looked at what was
#: missed meanwhile, seconds.
_SETTLE_S: Final = 1.0

#: Without a connection for so long, a new one is begun: ZeroMQ gives one up for good after a message that was too
#: large, seconds.
_REATTACH_S: Final = 3.0

#: Replayed batches whose live twins are told by their hash; those beyond it cost a replay each.
_TWINS: Final = 1 << 16


class Feed:
    """Follows one publisher until its task is cancelled. For one event loop."""

    def __init__(self, context: zmq.asyncio.Context, track: Track, limits: Limits, inbox: Inbox) -> None:
        """track: where it goes on; what it holds already must be proved by the publisher before anything is added.
        inbox: may be shared by the feeds of a loop. Opens the sockets. Raises InputError where an endpoint cannot be
        used, or there are too many.
        """
        self.instance = instance = track.instance
        self._context, self._track, self._limits, self._metrics = context, track, limits, track.metrics
        self._inbox = inbox
        self._live = make_socket(context, zmq.SUB, limits.queue)
        try:
            self._monitor = watch(self._live)
        except InputError:
            self._live.close(linger=0)
            raise
        self._events: zmq.Socket[bytes] = zmq.Socket.shadow(self._monitor.underlying)
        self._live.setsockopt(zmq.SUBSCRIBE, instance.topic.encode())
        try:
            attach(self._live, instance.endpoint, bind=instance.bind)
        except InputError:
            self.close()
            raise
        self._poller = zmq.asyncio.Poller()
        self._poller.register(self._live, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._peers = 0
        self._seen = 0.0
        self._heard = self._down = self._attached = time.monotonic()
        self._suspect = track.next is not None
        self._twins: dict[int, int] = {}

    def state(self) -> State:
        return State(self.instance, self._track.source, self._peers > 0, self._track.next, self._seen)

    @property
    def source(self) -> Source | None:
        return self._track.source

    def position(self) -> Position | None:
        """See `Track.position`; None too while it is not known whether another process publishes now."""
        return None if self._suspect else self._track.position()

    async def run(self) -> None:
        """Until cancelled. What fails inside is counted, and the source is begun anew."""
        while True:
            try:
                await self._follow()
            except Exception as error:  # noqa: BLE001 - counted; one source's trouble is not the others'
                log_once(logger, f"feed {error!r}", f"{self.instance.name}: {error!r}; begun anew")
                self.drop(Resync.INTERNAL)
                self._suspect = True
                await asyncio.sleep(1)  # a sink that fails at once would fail in a tight loop

    def drop(self, reason: Resync) -> None:
        """Makes the sink forget what came from here."""
        self._track.drop(reason)
        self._twins = {}

    def close(self) -> None:
        self._live.disable_monitor()
        self._monitor.close(linger=0)
        self._live.close(linger=0)

    async def _follow(self) -> None:
        idle = True
        while True:
            if idle:  # a poll costs as much as many messages
                await self._poller.poll(int(min(self._limits.check_s, self._limits.lost_s, _SETTLE_S) * 500))
            messages = self._inbox.drain(self._live)
            idle = not len(messages)
            self._note_peers()  # after that: of whoever sent them, it is known by now that he came
            if self._suspect:
                if self.instance.replay is not None or not self._peers:
                    messages = messages.part(0, 0)  # of one that is gone? If they count, the replay has them
                if self._peers:
                    await self._verify()
            taken = 0
            while taken < len(messages):
                if count := self._going_on(messages, taken):
                    self._track.accept(messages.part(taken, taken + count))
                    taken += count
                    continue
                messages = messages.kept()  # other feeds use the inbox meanwhile
                await self._message(messages.framed(taken))
                taken += 1
                if self._suspect:
                    break  # the rest may be of the process that is gone; the replay has it if it counts
            if len(messages):
                self._heard, self._seen = time.monotonic(), time.time()
            else:
                await self._note_silence()
            # A poll that finds something does not yield.
            await asyncio.sleep(0 if idle or messages.fill_a_round else _PAUSE_S)

    def _note_peers(self) -> None:
        for came in comings(self._events):
            if came:
                self._peers += 1
                self._suspect = True
                self._metrics.fleet_connects.add(1, instance=self.instance.name)
            else:
                self._peers = max(0, self._peers - 1)
                self._down = time.monotonic()

    async def _note_silence(self) -> None:
        now = time.monotonic()
        if not self._peers:
            if not self.instance.bind and now - max(self._down, self._attached) > _REATTACH_S:
                self._attached = now
                reattach(self._live, self.instance.endpoint)
            if self._track.next is not None and now - self._down > self._limits.lost_s:
                self.drop(Resync.LOST)
        elif now - self._heard > self._limits.check_s:
            self._heard = now
            await self._catch_up(suspicious=False)

    async def _verify(self) -> None:
        """After a connection was made: the same process, or another?"""
        self._suspect = False
        if self.instance.replay is None:
            self.drop(Resync.RESTART)  # nobody can tell
            return
        # What waits came before this, perhaps from a process that is gone; the replay has it all if it counts.
        while len(self._inbox.drain(self._live)):
            await asyncio.sleep(0)
        if not await self._catch_up(suspicious=True):
            self.drop(Resync.GAP)
        self._heard = time.monotonic() - self._limits.check_s + min(self._limits.check_s, _SETTLE_S)

    def _going_on(self, messages: Messages, first: int) -> int:
        """How many messages from `first` on simply go on: to be taken in together."""
        count = 0 if self._track.next is None else messages.going_on(first, self._track.next)
        if count:
            self._twins.clear()  # what lives comes in order: no twin is behind these
        return count

    async def _message(self, framed: Framed | None) -> None:
        if framed is None:
            self._metrics.fleet_skipped_batches.add(1, reason=Skip.FRAMES)
        elif not self._is_twin(framed):
            await self._reconcile(framed)

    def _is_twin(self, framed: Framed) -> bool:
        """Whether a replay was faster with this batch."""
        return self._twins.pop(framed.sequence, None) == hash(framed.payload)

    async def _reconcile(self, framed: Framed) -> None:
        """A batch that does not simply go on: after a gap, of a new process, or of one that is gone."""
        if self._track.next is not None:
            self._metrics.fleet_gaps.add(1, instance=self.instance.name)
        life = self._track.life
        known = await self._catch_up(suspicious=True)
        if known and self._track.life != life:
            self._suspect = True  # what waits behind this one is to be looked at as after a new connection
        if self._is_twin(framed):
            return
        if self._track.next is None or framed.sequence == self._track.next:
            self._track.accept(Messages.of(framed))
        elif known:
            self._metrics.fleet_skipped_batches.add(1, reason=Skip.STALE)
        else:
            self.drop(Resync.GAP if framed.sequence > self._track.next else Resync.RESTART)
            self._track.accept(Messages.of(framed))

    async def _catch_up(self, *, suspicious: bool) -> bool:
        """Takes in what the replay has and we have not; False if there is no replay, or it did not come to its end.

        suspicious: something hints at a restart, so that a replay without our last batch proves it.
        """
        if self.instance.replay is None:
            return False
        deadline = asyncio.get_running_loop().time() + self._limits.replay_s
        outcome = "timeout"
        try:
            while await self._ask(self.instance.replay, deadline, suspicious):
                pass
            outcome = "complete"
        except ReplayTimeoutError:
            pass
        self._metrics.fleet_replays.add(1, instance=self.instance.name, outcome=outcome)
        return outcome == "complete"

    async def _ask(self, endpoint: str, deadline: float, suspicious: bool) -> bool:
        """One question to the replay; True if it must be asked again from where we are then."""
        begun, proven = self._track.next, not self._track.next
        answers = replay(
            self._context,
            self._inbox,
            endpoint,
            max(0, (self._track.next or 0) - 1),
            deadline=deadline,
            quiet_s=self._limits.quiet_s,
            queue_messages=self._limits.queue,
        )
        async with aclosing(answers):
            async for framed in answers:
                if not proven:
                    assert self._track.next is not None
                    if framed.sequence < self._track.next - 1:
                        continue
                    proven = True
                    if framed.sequence > self._track.next - 1:
                        self.drop(Resync.GAP)  # the buffer does not reach back; what it has is all that can be known
                    elif not self._track.is_last(framed.payload):
                        self.drop(Resync.RESTART)
                        return True
                    else:
                        self._track.prove()
                        continue
                if self._track.next is not None and framed.sequence > self._track.next:
                    if self._track.next != begun:
                        return True  # a hole in the answer
                    self.drop(Resync.GAP)  # and it is there again
                self._replayed(framed)
        if not proven and suspicious:
            self.drop(Resync.RESTART)  # the buffer is empty: nothing has been published yet
        return False

    def _replayed(self, framed: Framed) -> None:
        if self._track.next is not None and framed.sequence < self._track.next:
            return
        self._metrics.fleet_replayed_batches.add(1, instance=self.instance.name)
        self._track.accept(Messages.of(framed))
        self._twins[framed.sequence] = hash(framed.payload)
        if len(self._twins) > _TWINS:
            del self._twins[next(iter(self._twins))]
