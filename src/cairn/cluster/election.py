"""Elections: of several candidates one leads, and what it writes can be fenced.

Who creates the key first leads, until the lease that it hangs from ends; so there is one leader by the registry's
count at every revision. A leader that was stopped, or cut off, may not know yet that it was replaced: `held()` is its
own guess by its own clock, and `guard` the proof. A transaction with the guard is applied only while this leadership
lasts; what is written elsewhere carries `fence`, a number that grows from leader to leader, and whoever takes it in
refuses a smaller one than it has seen. (Chubby's sequencers: Burrows, OSDI 2006, section 2.4.)
"""

import asyncio

from cairn.cluster.base import Check, Listing, Put, Registry
from cairn.cluster.lease import Lease
from cairn.errors import ClusterError, LeaseLostError, UnclearError


class Leadership:
    """Won, and lasting until it lapses. fence: the revision at which it was won."""

    def __init__(self, key: str, fence: int, lease: Lease) -> None:
        self.fence = fence
        self.guard = Check(key, created=fence)
        self._lease = lease
        self._over = False

    def held(self) -> bool:
        """Whether nobody else can lead yet, by this machine's clock. Once False, always False."""
        self._over = self._over or not self._lease.held()
        return not self._over

    async def lapse(self) -> None:
        """Waits until it is not held any more."""
        if not self._over:
            await self._lease.lapse()
        self._over = True

    async def resign(self) -> None:
        """Lets another lead at once. Repeatable."""
        self._over = True
        await self._lease.close()


class Election:
    """One candidate's way to `folder`'s leadership; see `Keys.election`."""

    def __init__(self, registry: Registry, folder: str, candidate: str, ttl_s: float) -> None:
        """ttl_s: seconds from a leader's death until another may lead. candidate: its name, for people."""
        self._registry, self._folder, self._ttl_s = registry, folder, ttl_s
        self._key = f"{folder}leader"
        self._candidate = candidate.encode()

    async def lead(self) -> Leadership:
        """Waits to be elected; may be cancelled. Raises ClusterError if the registry does not answer."""
        while True:
            lease = await Lease.take(self._registry, self._ttl_s)
            fence = None
            try:
                fence = await self._win(lease)
            except LeaseLostError:
                continue
            finally:
                if fence is None:
                    await lease.close()
            return Leadership(self._key, fence, lease)

    async def leader(self) -> str | None:
        """Who leads now."""
        entry = await self._registry.get(self._key)
        return entry.value.decode("utf-8", "replace") if entry else None

    async def _win(self, lease: Lease) -> int:
        """The revision of the election. Raises LeaseLostError if the lease ends before."""
        while True:
            if lease.gone.is_set():
                raise LeaseLostError("the candidate's lease is gone")
            try:
                outcome = await self._registry.transact(
                    [Check.absent(self._key)], [Put(self._key, self._candidate, lease.id)]
                )
            except UnclearError:
                continue  # what stands there tells, next time
            if outcome.applied:
                return outcome.revision
            holder = outcome.found[0]
            if holder and holder.lease == lease.id:
                return holder.created
            await self._vacancy(Listing((holder,) if holder else (), outcome.revision), lease)

    async def _vacancy(self, since: Listing, lease: Lease) -> None:
        """Waits until the leader's key is deleted, or our own lease is gone."""
        loop = asyncio.get_running_loop()
        waiting = [loop.create_task(self._deletion(since)), loop.create_task(lease.gone.wait())]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
        for task in done:
            if not task.cancelled() and (error := task.exception()):
                raise error

    async def _deletion(self, since: Listing) -> None:
        async with self._registry.watch(self._folder, since) as watch:
            async for changes in watch:
                if any(change.key == self._key and change.entry is None for change in changes):
                    return
        raise ClusterError("the registry was closed during an election")
