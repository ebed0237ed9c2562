"""What the autopilot decides, and why: closed sets, as they stand in metrics, logs and spans."""

from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What a decision is about."""

    LOAD = "load"  # how much of what tiers hold of a prompt is loaded: all, part, none
    BLEND = "blend"  # whether a prompt's chunks are blended: yes, no
    LAYERWISE = "layerwise"  # whether a load goes on while the model computes: yes, no
    STORE = "store"  # when a prompt is stored: while it is computed, behind its first token, never
    WRITE = "write"  # whether a tier below DRAM gets it: the tier's name, no
    CODEC = "codec"  # by which codec an object is stored: its name


class Why(StrEnum):
    """Why it was decided so."""

    PINNED = "pinned"  # the configuration says so
    FASTER = "faster"  # by measured costs this is sooner ready
    SLOWER = "slower"  # by measured costs computing is sooner ready, or loading it later would be slower
    UNMEASURED = "unmeasured"  # costs of this size are not known yet
    NOTHING_HELD = "nothing_held"  # there is nothing to decide about
    ALONE = "alone"  # nobody else waits for the same step
    BRIEF = "brief"  # others wait for the same step, but not for long
    OTHERS_WAIT = "others_wait"  # others would wait for a step that loads
    UNABLE = "unable"  # this engine cannot do otherwise
    SHARED = "shared"  # other hosts may have use for it, whatever it costs this one
    AWAITED = "awaited"  # another instance waits for what is stored
    TOKEN_FIRST = "token_first"  # nobody waits for it, but somebody for the first token
    AS_FAST = "as_fast"  # a more exact codec loads as fast as a smaller one


class Decision(NamedTuple):
    """One decision. choice: see `Kind`. expected_s: seconds that what was chosen is expected to take; instead_s: the
    alternative, usually to compute; NaN: not known. tokens: that it is about.
    """

    kind: Kind
    choice: str
    why: Why
    tokens: int = 0
    expected_s: float = float("nan")
    instead_s: float = float("nan")
