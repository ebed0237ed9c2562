"""What nodes say to each other: a byte with the protocol's version, and a msgpack array behind it.

Over ZeroMQ on TCP, encrypted and authenticated by CURVE with keys that follow from the peers' shared secret: who does
not know it is not let in. KV bytes do not go this way. Keys are 16 bytes each, one behind the other, rows little-endian
int32. msgspec checks types and lengths before it takes memory for them.
"""

import hashlib
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash
import zmq
from zmq.utils import z85

from cairn.kv.keys import KEY_BYTES

VERSION: Final = 1

#: Blocks of a chain that are asked for in one call. A longer prompt is served up to there.
MAX_BLOCKS: Final = 1 << 16
#: Bytes of the largest frame in either direction: keys, or rows and checksums, take half of it.
MAX_FRAME: Final = 4 << 20
SUM_BYTES: Final = 16
#: Seconds for which rows may be lent at most.
MAX_LEASE_S: Final = 60.0

_Keys = Annotated[bytearray, msgspec.Meta(max_length=MAX_BLOCKS * KEY_BYTES)]
_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_Text = Annotated[str, msgspec.Meta(max_length=256)]


class _Message(msgspec.Struct, array_like=True, gc=False):
    pass


class Find(_Message, tag=1):
    """How many leading blocks of a chain are in DRAM; pool: see `cairn.node.pools.directory_of`. Answered by Found."""

    pool: _Text
    keys: _Keys


class Lend(_Message, tag=2):
    """Asks for blocks, consecutive ones of a chain, to be kept where they are for `seconds`; answered by Lent."""

    pool: _Text
    keys: _Keys
    seconds: Annotated[float, msgspec.Meta(gt=0, le=MAX_LEASE_S)]


class GiveBack(_Message, tag=3):
    """Ends a lease. Not answered."""

    lease: _Number


class Found(_Message, tag=1):
    blocks: _Number


class Lent(_Message, tag=2):
    """The leading blocks of those asked for, as many as could be had, are pinned under `lease`.

    endpoint: of the transport that reads them; address: of row 0 of `stride` bytes each. rows: int32 [n]. sums: of each
    block (`sum_of`).
    """

    lease: _Number
    endpoint: _Text
    address: _Number
    stride: _Number
    rows: Annotated[bytes, msgspec.Meta(max_length=MAX_BLOCKS * 4)]
    sums: Annotated[bytes, msgspec.Meta(max_length=MAX_BLOCKS * SUM_BYTES)]


Request = Find | Lend | GiveBack
Reply = Found | Lent

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_HEAD: Final = bytes([VERSION])


def encode(message: Request | Reply) -> bytes:
    return _HEAD + _encoder.encode(message)


def decode_request(frame: bytes) -> Request | None:
    """None for what is no request of this version."""
    try:
        return _requests.decode(memoryview(frame)[1:]) if frame[:1] == _HEAD else None
    except (msgspec.MsgspecError, RecursionError):
        return None


def decode_reply(frame: bytes) -> Reply | None:
    """None for what is no reply of this version."""
    try:
        return _replies.decode(memoryview(frame)[1:]) if frame[:1] == _HEAD else None
    except (msgspec.MsgspecError, RecursionError):
        return None


def sum_of(key: npt.NDArray[np.uint64], block: npt.NDArray[np.uint8]) -> bytes:
    """What proves a block: xxh3-128 of its bytes, seeded with its key [2], so that no other's can be taken for it."""
    return xxhash.xxh3_128_digest(block.data, int(key[0]))


class Keypair:
    """CURVE's keys of all who share a secret, and what sockets do with them."""

    def __init__(self, secret: str) -> None:
        private = hashlib.scrypt(secret.encode(), salt=b"cairn/peers", n=1 << 14, r=8, p=1, dklen=32)
        self.private = z85.encode(private)
        self.public = zmq.curve_public(self.private)

    def guard(self, socket: "zmq.Socket[bytes]", *, server: bool) -> None:
        """Lets a socket talk to those alone who have the same keys. Before it is bound or connected."""
        socket.curve_secretkey, socket.curve_publickey = self.private, self.public
        if server:
            socket.curve_server = True
        else:
            socket.curve_serverkey = self.public
