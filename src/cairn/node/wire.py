"""What clients and the node say to each other: a byte with the protocol's version, and a msgpack array behind it.

A client has two connections to the node (ZeroMQ's DEALER and ROUTER): on one it calls, and has its answer before it
calls again; on the other it sends heartbeats and hears what comes by itself (`Progress`, `Answered`, `Flushed`,
`Gone`). KV bytes go through neither. Keys are 16 bytes each, one behind the other, rows little-endian int32.

What comes in is bounded: the frame by MAX_FRAME, a chain by MAX_BLOCKS; msgspec checks types and lengths before it
takes memory for them.
"""

from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt

from cairn.errors import CairnError
from cairn.kv import CANONICAL, Keys, KVGeometry, Layout
from cairn.kv.keys import KEY_BYTES
from cairn.kv.namespace import DIGEST_BYTES

VERSION: Final = 3

Buffer = bytes | memoryview

#: Blocks of a chain that the node takes in one call. A longer prompt is served up to there.
MAX_BLOCKS: Final = 1 << 16

#: Slots of a donation: the node's records of them take 300 MiB.
MAX_DONATED: Final = 1 << 22

#: Bytes of the largest frame in either direction: a chain's keys take half of it.
MAX_FRAME: Final = 2 << 20

_Keys = Annotated[bytearray, msgspec.Meta(max_length=MAX_BLOCKS * KEY_BYTES)]
_Rows = Annotated[bytearray, msgspec.Meta(max_length=MAX_BLOCKS * 4)]
_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]


class _Message(msgspec.Struct, array_like=True, gc=False):
    pass


# --- from a client ----------------------------------------------------------------------------------------------------


class _Call(_Message):
    """call: answered with the same number. session: of `Welcome`; 0 before."""

    call: _Number
    session: _Number


class Hello(_Call, tag=1):
    """Asks for a session over blocks of this geometry, in rows of this layout; canonical: whether codecs can read their
    values.

    Answered by Welcome, Wait (ask again soon) or Refused.
    """

    geometry: KVGeometry
    layout: Layout = CANONICAL
    canonical: bool = True


class Match(_Call, tag=2):
    """How much of the chain is held; answered by Matched. own: as in TakeVram. number: as if TakeVram had been asked,
    where VRAM has the whole chain, and then no other tier is looked at; 0: not.
    """

    keys: _Keys
    own: _Number = 0
    number: _Number = 0


class Take(_Call, tag=3):
    """Pins the chain's leading blocks under `number`, and brings up what is not in DRAM within `seconds`.

    Answered by Progress, and followed by more of it until the hold has settled.
    """

    number: _Number
    keys: _Keys
    seconds: _Seconds


class Reserve(_Call, tag=4):
    """Rows for what DRAM lacks of the chain, under `number`; answered by Reserved."""

    number: _Number
    keys: _Keys
    namespace: Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class Commit(_Call, tag=5):
    """Publishes the next `count` rows of a reservation, which ends with its last; answered by Committed."""

    number: _Number
    count: Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOCKS)]


class Ask(_Call, tag=6):
    """Has the remote store asked; answered by Answered, now or later."""

    number: _Number
    keys: _Keys
    seconds: _Seconds
    worth_seconds: Annotated[float, msgspec.Meta(ge=0)]


class Stats(_Call, tag=7):
    """Answered by Figures."""


class Flush(_Call, tag=8):
    """Makes what is committed durable; answered by Flushed, later."""

    number: _Number
    seconds: _Seconds


class End(_Message, tag=9):
    """Gives back holds, reservations and questions by their numbers. Not answered."""

    session: _Number
    numbers: Annotated[list[_Number], msgspec.Meta(max_length=4096)]


class Beat(_Message, tag=10):
    """Keeps the session alive, and says by which socket it hears; answered by Beaten or Gone."""

    session: _Number


class Bye(_Message, tag=11):
    """Ends the session; answered by Gone."""

    session: _Number


class Donate(_Call, tag=30):
    """Gives the pool a segment of VRAM, in the place of what the session had given before. handle: by which a device
    maps it; owner: see `cairn.node.life.process_token`. Answered by Donated.
    """

    slots: Annotated[int, msgspec.Meta(ge=1, le=MAX_DONATED)]
    stride: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    handle: Annotated[bytes, msgspec.Meta(max_length=256)]
    owner: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Withdraw(_Call, tag=31):
    """Takes the session's segment out of the directory; answered by Withdrawn."""


class TakeVram(_Call, tag=32):
    """Pins the chain's leading blocks that are in VRAM under `number`; answered by TakenVram. own: the donation that
    counts as the asker's own; 0: the session's.
    """

    number: _Number
    keys: _Keys
    own: _Number = 0


class ReserveVram(_Call, tag=33):
    """Slots of the own segment for what that lacks of the chain, under `number`; answered by Reserved. own: as in
    TakeVram.
    """

    number: _Number
    keys: _Keys
    own: _Number = 0


class Used(_Message, tag=34):
    """Counts a use of the chain's blocks in a donation, which were read there without asking. Not answered."""

    session: _Number
    donation: _Number
    keys: _Keys


class Follow(_Message, tag=40):
    """Asks for the next `Changed` about a tier of the session's pool. Under another number than the last time it begins
    anew: what is there now is silent (`cairn.index.journal`). What the session matches and reserves is mentioned. Not
    answered at once, but when there is something.
    """

    session: _Number
    number: _Number
    tier: _Text


class Silence(_Message, tag=41):
    """These rows of the latest `Changed` are not to count as told. Not answered."""

    session: _Number
    number: _Number
    rows: _Rows


Request = (
    Hello
    | Match
    | Take
    | Reserve
    | Commit
    | Ask
    | Stats
    | Flush
    | End
    | Beat
    | Bye
    | Donate
    | Withdraw
    | TakeVram
    | ReserveVram
    | Used
    | Follow
    | Silence
)


# --- from the node ----------------------------------------------------------------------------------------------------


class Welcome(_Message, tag=1):
    """A session. arena, slots, stride: see `Home`; gate: its name. lease_s: silent for so long, and it is over.
    tiers: their names. asks: whether `Ask` may have something to find out.
    """

    call: _Number
    session: _Number
    arena: _Text
    slots: _Number
    stride: _Number
    gate: _Text
    lease_s: _Seconds
    tiers: list[_Text]
    asks: bool


class Wait(_Message, tag=2):
    call: _Number


class Refused(_Message, tag=3):
    """Never, and why: one line."""

    call: _Number
    why: _Text


class VramPart(_Message):
    """The next blocks of a chain are rows of a donation: its number, its segment, and the name of its page (`Life`)."""

    donation: _Number
    slots: _Number
    stride: _Number
    handle: bytes
    owner: bytes
    life: _Text
    rows: _Rows


class Matched(_Message, tag=4):
    """See `cairn.engine.base.Held`. vram: leading blocks in VRAM, whosesoever; own: those in the own segment. parts: as
    in TakenVram.
    """

    call: _Number
    dram: _Number
    below: list[tuple[_Text, _Number]]
    vram: _Number = 0
    own: _Number = 0
    parts: list[VramPart] = []


class Progress(_Message, tag=5):
    """Rows of the blocks first.. of a hold, which are there now and pinned; tiers: where these blocks were found, as
    (tier, blocks), in order. settled: no more will come, for `reason` if it is not empty. call: 0 if not an answer.
    """

    call: _Number
    number: _Number
    first: _Number
    rows: _Rows
    tiers: list[tuple[_Text, _Number]]
    settled: bool
    reason: _Text


class Reserved(_Message, tag=6):
    """Rows of the blocks first.. of a chain."""

    call: _Number
    first: _Number
    rows: _Rows


class Committed(_Message, tag=7):
    call: _Number
    new: _Number


class Answered(_Message, tag=8):
    """known: `match` says all now. False: it will be said with another Answered (call: 0)."""

    call: _Number
    number: _Number
    known: bool


class Figures(_Message, tag=9):
    call: _Number
    tiers: dict[str, dict[str, float]]


class Flushed(_Message, tag=10):
    """accepted, or (call: 0) over, and whether everything was in time."""

    call: _Number
    number: _Number
    done: bool


class Beaten(_Message, tag=11):
    """The session lives."""


class Gone(_Message, tag=12):
    """There is no such session (any more)."""

    call: _Number


class Donated(_Message, tag=30):
    """A donation's number, and the name of its page; 0 and none: the node has no memory to keep account of it."""

    call: _Number
    donation: _Number
    life: _Text


class Withdrawn(_Message, tag=31):
    """pins: how many slots others still read."""

    call: _Number
    pins: _Number


class TakenVram(_Message, tag=32):
    """Where the leading blocks are, in order."""

    call: _Number
    parts: list[VramPart]


class Retired(_Message, tag=33):
    """A donation is over, and who has its segment mapped must unmap it. number: the donation's. Comes by itself."""

    number: _Number


class Changed(_Message, tag=40):
    """What has come to a tier, parents first, and into which rows of it; and what has gone of that which was told.
    There is no more until the client asks for it.
    """

    number: _Number
    stored: _Keys
    rows: _Rows
    removed: _Keys


Reply = (
    Welcome
    | Wait
    | Refused
    | Matched
    | Progress
    | Reserved
    | Committed
    | Answered
    | Figures
    | Flushed
    | Beaten
    | Gone
    | Donated
    | Withdrawn
    | TakenVram
    | Retired
    | Changed
)

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_HEAD = bytes([VERSION])


class WireError(CairnError, ValueError):
    """A frame that cannot be understood."""


class VersionError(WireError):
    """A frame of another version of the protocol."""


def encode(message: Request | Reply) -> bytes:
    return _HEAD + _encoder.encode(message)


def decode_request(frame: Buffer) -> Request:
    """Raises WireError."""
    body = _body(frame, "client")
    try:
        return _requests.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise WireError(f"a malformed frame from the client: {error}") from None


def decode_reply(frame: Buffer) -> Reply:
    """Raises WireError."""
    body = _body(frame, "node")
    try:
        return _replies.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise WireError(f"a malformed frame from the node: {error}") from None


def _body(frame: Buffer, sender: str) -> memoryview:
    if not frame:
        raise WireError(f"an empty frame from the {sender}")
    if frame[0] != VERSION:
        raise VersionError(
            f"the {sender} speaks version {frame[0]} of the node's protocol, this is version {VERSION}; "
            "run the same release of Cairn on both sides"
        )
    return memoryview(frame)[1:]


def keys_of(raw: bytearray) -> Keys:
    """Keys [n, 2] of their bytes. Raises WireError."""
    if len(raw) % KEY_BYTES:
        raise WireError(f"{len(raw)} bytes of keys: must be a multiple of {KEY_BYTES}")
    return np.frombuffer(raw, np.uint64).reshape(-1, 2)


def rows_of(raw: bytearray) -> npt.NDArray[np.int32]:
    """Raises WireError."""
    if len(raw) % 4:
        raise WireError(f"{len(raw)} bytes of rows: must be a multiple of 4")
    return np.frombuffer(raw, np.int32)


def raw_of(array: npt.NDArray[np.uint64] | npt.NDArray[np.int32]) -> bytearray:
    """The bytes of keys or rows."""
    return bytearray(array)
