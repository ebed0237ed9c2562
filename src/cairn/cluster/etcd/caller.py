"""Calls with a deadline: attempts on whichever member answers, bounded, with growing pauses between."""

import asyncio
import random
from typing import Any, Final, Literal

import grpc.aio

from cairn.cluster.etcd.endpoint import Endpoint, Headers
from cairn.cluster.etcd.endpoints import Endpoints
from cairn.cluster.etcd.failures import Verdict, describe, judge
from cairn.cluster.etcd.login import Login
from cairn.cluster.etcd.settings import EtcdSettings
from cairn.cluster.metrics import ClusterMetrics
from cairn.errors import CairnError, ClosedError, ClusterError, UnclearError

#: Pauses between attempts, seconds: doubled from the first up to the last, times 0.5 to 1 by chance.
_FIRST_PAUSE_S: Final = 0.05
_LAST_PAUSE_S: Final = 1.0

#: Logins that one call may cost.
_LOGINS: Final = 2


class RefusedError(ClusterError):
    """etcd says no, and will again."""


Method = Literal["range", "put", "delete", "transact", "grant", "keep_alive", "revoke"]


class CompactedError(ClusterError):
    """The revision asked for is not in the history any more."""


class Caller:
    """What all calls and watches of one registry share: members, token, times, counts."""

    def __init__(self, settings: EtcdSettings, metrics: ClusterMetrics) -> None:
        """Raises InputError for settings that cannot be used."""
        self.endpoints = Endpoints(settings, metrics)
        self.login = Login(settings, metrics)
        self.timeout_s, self.attempt_s = settings.timeout_s, settings.attempt_s
        self.metrics = metrics
        self.closed = False

    async def call(self, method: Method, request: Any, *, repeat: bool = True, known: tuple[Verdict, ...] = ()) -> Any:
        """The answer to a request; of a verdict in `known`, None.

        repeat: it may be applied twice; if not, a broken connection raises UnclearError. Raises ClusterError past the
        deadline or if it is refused, CompactedError, ClosedError.
        """
        outcome = "failed"
        try:
            answer = await self._attempts(method, request, repeat, known)
            outcome = "done"
            return answer
        except asyncio.CancelledError:
            outcome = "cancelled"
            task = asyncio.current_task()
            if self.closed and task and not task.cancelling():  # gRPC cancels what waits on a channel that is closed
                raise self.closed_error() from None
            raise
        finally:
            self.metrics.cluster_requests.add(call=method, outcome=outcome)

    async def close(self) -> None:
        self.closed = True
        await self.endpoints.close()

    @staticmethod
    def closed_error() -> CairnError:
        return ClosedError("the registry is closed; open another")

    async def _attempts(self, method: Method, request: Any, repeat: bool, known: tuple[Verdict, ...]) -> Any:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.timeout_s
        tries = logins = 0
        while True:
            if self.closed:
                raise self.closed_error()
            endpoint: Endpoint | None = None
            headers: Headers = ()
            try:
                endpoint = await self.endpoints.pick(deadline - loop.time())
                headers = await self.login.headers(endpoint, min(self.attempt_s, max(0.0, deadline - loop.time())))
                timeout = min(self.attempt_s, max(0.0, deadline - loop.time()))
                return await getattr(endpoint, method)(request, timeout=timeout, metadata=headers)
            except TimeoutError:
                verdict, said = Verdict.NOT_APPLIED, "no login in time"
            except grpc.aio.AioRpcError as error:
                verdict, said = judge(error), describe(error)
            except grpc.aio.UsageError:  # the channel was closed meanwhile
                raise self.closed_error() from None
            except ClusterError as error:
                verdict, said = Verdict.NOT_APPLIED, str(error)
            if verdict in known:
                return None
            if verdict is Verdict.TOKEN and self.login.refused(headers) and logins < _LOGINS:
                logins += 1
                continue
            if endpoint and verdict.elsewhere:
                self.endpoints.failed(endpoint)
                said = f"{endpoint.target}: {said}"
            self._raise_final(verdict, said, repeat)
            pause = backoff(tries)
            tries += 1
            if loop.time() + pause >= deadline:
                raise ClusterError(f"etcd has not answered in {self.timeout_s:g} s: {said}")
            self.metrics.cluster_retries.add(reason=verdict.name.lower())
            await asyncio.sleep(pause)

    def _raise_final(self, verdict: Verdict, said: str, repeat: bool) -> None:
        """Raises what no repetition mends."""
        if verdict is Verdict.COMPACTED:
            raise CompactedError(f"etcd: {said}")
        if not verdict.elsewhere:
            raise RefusedError(f"etcd refuses: {said}")
        if verdict is Verdict.UNCLEAR and not repeat:
            raise UnclearError(f"etcd may have applied the transaction or not: {said}")


def backoff(tries: int) -> float:
    """Seconds to wait after `tries` failures before this one."""
    return min(_LAST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(tries, 10)) * random.uniform(0.5, 1.0)
