"""What a failed attempt means: whether it may be repeated, and whether it may have been applied nevertheless.

Statuses and messages as in etcd's `api/v3rpc/rpctypes/error.go` and gRPC's `statuscodes.md`.
"""

from enum import Enum, auto
from typing import Final

import grpc
import grpc.aio


class Verdict(Enum):
    """What follows from a failed attempt."""

    NOT_APPLIED = auto()  # certainly not: repeat it
    UNCLEAR = auto()  # applied or not: repeat what may be applied twice
    TOKEN = auto()  # not applied, since the token is not valid (any more): log in and repeat
    LEASE_GONE = auto()
    LEASE_THERE = auto()  # a lease of this id has been granted
    COMPACTED = auto()
    REFUSED = auto()  # no repetition will help

    @property
    def elsewhere(self) -> bool:
        """Whether another endpoint is to be tried."""
        return self in (Verdict.NOT_APPLIED, Verdict.UNCLEAR)


_UNAPPLIED: Final = (
    "etcdserver: no leader",
    "etcdserver: not capable",
    "not supported for learner",
    "failed to connect",
)
_TOKEN: Final = ("invalid auth token", "revision of auth store is old")
_REFUSED: Final = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.UNIMPLEMENTED,
}


def judge(error: grpc.aio.AioRpcError) -> Verdict:
    """What an attempt's error means. What is not known may have been applied."""
    code, text = error.code(), error.details() or ""
    if code == grpc.StatusCode.UNAUTHENTICATED or any(sign in text for sign in _TOKEN):
        return Verdict.TOKEN
    if "lease not found" in text:
        return Verdict.LEASE_GONE
    if "lease already exists" in text:
        return Verdict.LEASE_THERE
    if "has been compacted" in text:
        return Verdict.COMPACTED
    if "too many requests" in text or any(sign in text for sign in _UNAPPLIED):
        return Verdict.NOT_APPLIED
    return Verdict.REFUSED if code in _REFUSED else Verdict.UNCLEAR


def describe(error: grpc.aio.AioRpcError) -> str:
    """One line for people."""
    text = " ".join((error.details() or "").split())
    if "user name is empty" in text:
        return "etcd asks for a user and a password; set cluster.username and cluster.password"
    return f"{error.code().name}: {text[:200]}" if text else error.code().name
