"""The admin API: how the engines stand, and which of them get nothing new."""

import time
from typing import Any

from cairn.cluster import Keys, Registry, drain, undrain
from cairn.errors import ClusterError, InputError
from cairn.serve.base import RequestError
from cairn.serve.gateway.dispatch import Dispatch
from cairn.serve.gateway.members import Member, Members


class Admin:
    """`GET /admin/instances`, `POST /admin/instances/NAME/drain` and `.../undrain`, which all replicas hear of."""

    def __init__(self, members: Members, dispatch: Dispatch, registry: Registry, keys: Keys) -> None:
        self._members, self._dispatch = members, dispatch
        self._registry, self._keys = registry, keys

    async def answer(self, method: str, path: str) -> dict[str, Any]:
        """What a request is answered. Raises RequestError for one that means nothing."""
        match method, path.strip("/").split("/"):
            case "GET", ["admin", "instances"]:
                every = [_state(member) for member in self._members.members.values()]
                return {"instances": every, "waiting": self._dispatch.waiting}
            case "POST", ["admin", "instances", name, "drain" | "undrain" as what]:
                member = self._members.members.get(name)
                if member is None:
                    raise RequestError(f"instance {name[:100]!r}: is not there; /admin/instances lists them", 404)
                try:
                    await (drain if what == "drain" else undrain)(self._registry, self._keys, name)
                except InputError as error:  # it has left just now
                    raise RequestError(str(error), 404) from error
                except ClusterError as error:
                    raise RequestError(f"nothing is changed, as nobody could be told: {error}", 503) from error
                self._members.drain(member, what == "drain")  # the others hear of it
                return _state(member)
        raise RequestError(f"{method} {path[:200]}: there is nothing like it here", 404)


def _state(member: Member) -> dict[str, Any]:
    """drained: nothing is under way there any more."""
    instance = member.instance
    return {
        "name": member.name,
        "http": instance.http,
        "role": instance.role,
        "model": instance.model,
        "incarnation": instance.incarnation,
        "ready": member.ready(time.monotonic()),
        "draining": member.drains,
        "drained": member.drains and member.running == 0,
        "running": member.running,
        "queued_tokens": member.queued,
        "load": None if member.load is None else {"running": member.load.running, "waiting": member.load.waiting},
    }
