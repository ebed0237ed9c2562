"""Objects in S3, Google Cloud Storage or Azure, and in whatever speaks S3: through obstore.

Objects are created only where there are none (a conditional put), so that an object stays as its first writer made it.
Deadlines are kept by an event loop of our own, which gives up a request when its time is over; loads, for which a loop
takes more of the processor than for anything else, block in lanes instead, and whoever waits for one leaves. Unused
objects go by the bucket's lifecycle rules.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Final, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from cairn.observe.log import log_once
from cairn.observe.reasons import Reason
from cairn.tier.remote.base import Get, ObjectStore, Put
from cairn.transport.lanes import Call, Lanes
from cairn.transport.moving import Scatter

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

#: Beyond this size a put goes in parts; S3 does not make those conditional.
_MULTIPART_BYTES: Final = 64 << 20
_FULL: Final = ("InsufficientStorage", "QuotaExceeded", "StorageFull", "No space left")
#: Loads at a time, and so the threads that a hanging store can keep.
LANES: Final = 12
#: Larger objects come by pieces of so many bytes at least, which the cache holds; those that it holds whole come whole.
_PIECE: Final = 256 << 10
_WHOLE: Final = 2 << 20
#: Not the bare number: an error tells its URL and how long it took, and a key is hexadecimal.
_PAST_THE_END: Final = ("InvalidRange", "416 Range Not Satisfiable")


class ObstoreStore(ObjectStore):
    """store: an obstore store, whose prefix is where the objects are; name: how it is called in logs."""

    object_bytes = 16 << 20
    probe_names = 64
    calls = 1  # each has to find a lane

    def __init__(self, store: Any, name: str) -> None:
        self._store = store
        self._name = name
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cairn-s3", daemon=True)
        self._thread.start()
        self._lanes = Lanes(LANES, "cairn-s3-load")

    def exists(self, names: Sequence[bytes], *, deadline: float) -> list[bool] | Reason:
        async def one(name: bytes) -> bool:
            try:
                await obstore.head_async(self._store, name.decode())
            except FileNotFoundError:
                return False
            return True

        async def every() -> list[bool]:
            return await asyncio.gather(*(one(name) for name in names))

        return self._wait(every(), deadline)

    def put(self, puts: Sequence[Put], *, deadline: float) -> list[Reason | None]:
        return [self._put(put, deadline) for put in puts]

    def get_into(self, gets: Sequence[Get], *, deadline: float) -> list[int | Reason]:
        found: list[int | Reason] = []
        refusal = self._lanes.run(lambda _, call: self._load_each(gets, found, call), deadline)
        return found + [refusal or Reason.IO_ERROR] * (len(gets) - len(found))

    def delete(self, names: Sequence[bytes], *, deadline: float) -> Reason | None:
        async def every() -> None:
            # One by one: not every store that speaks S3 deletes in bulk, and there are few.
            for name in names:
                try:
                    await obstore.delete_async(self._store, name.decode())
                except FileNotFoundError:
                    continue

        return self._wait(every(), deadline)

    def health(self, *, deadline: float) -> Reason | None:
        answer = self.exists([b"cairn/health"], deadline=deadline)
        return answer if isinstance(answer, Reason) else None

    def stats(self) -> Mapping[str, float]:
        return {"abandoned_calls_total": self._lanes.abandoned, "free_lanes": self._lanes.free}

    def close(self) -> None:
        if not self._loop.is_closed():
            self._lanes.close()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _put(self, put: Put, deadline: float) -> Reason | None:
        # Joined, because the request may outlive this call, and with it the use of the memory.
        data = b"".join(put.parts)
        large = len(data) > _MULTIPART_BYTES

        async def one() -> None:
            try:
                await obstore.put_async(
                    self._store,
                    put.name.decode(),
                    data,
                    mode="overwrite" if large else "create",
                    use_multipart=large,
                )
            except AlreadyExistsError:
                return

        return self._wait(one(), deadline)

    def _load_each(self, gets: Sequence[Get], found: list[int | Reason], call: Call) -> Reason | None:
        """Loads one after the other, and notes what became of each while the caller waits."""
        for get in gets:
            answer = self._load(get, call)
            if not call.with_caller(found.append, answer):
                return Reason.TIMEOUT
        return None

    def _load(self, get: Get, call: Call) -> int | Reason:
        came, size, target = 0, get.size, Scatter(get.parts, get.sums)
        options: Any = None if get.whole else {"range": (get.offset, get.offset + size)}
        try:
            for data in _pieces(obstore.get(self._store, get.name.decode(), options=options)):
                if not call.with_caller(target.take, data):
                    return Reason.TIMEOUT
                came += len(data)
                if came > size:
                    break
        except FileNotFoundError:
            return Reason.ABSENT
        except (BaseError, OSError) as error:
            return 0 if any(word in str(error) for word in _PAST_THE_END) else self._reason(error)
        return came

    def _reason(self, error: Exception) -> Reason:
        text = str(error)
        log_once(log, f"{self._name} {type(error).__name__}", f"{self._name}: {text[:300]}")
        return Reason.NO_SPACE if any(word in text for word in _FULL) else Reason.IO_ERROR

    def _wait(self, work: Coroutine[Any, Any, Answer], deadline: float) -> Answer | Reason:
        """Runs `work` in the loop, until the deadline."""
        left = deadline - time.monotonic()
        if left <= 0:
            work.close()
            return Reason.TIMEOUT
        future = asyncio.run_coroutine_threadsafe(_within(work, left), self._loop)
        try:
            return future.result()
        except (TimeoutError, FutureTimeoutError):
            return Reason.TIMEOUT
        except (BaseError, OSError) as error:
            return self._reason(error)


def _pieces(answer: Any) -> Iterable[Any]:
    """The bytes of an answer, as they come."""
    start, stop = answer.range
    return [answer.bytes()] if stop - start < _WHOLE else answer.stream(_PIECE)


async def _within(work: Coroutine[Any, Any, Answer], seconds: float) -> Answer:
    async with asyncio.timeout(seconds):
        return await work
