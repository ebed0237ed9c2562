"""What an instance of a fleet is for."""

from enum import StrEnum


class Role(StrEnum):
    """What an instance does of a request: all (DEFAULT), its prefill, its decode, or whichever is needed (MIX)."""

    DEFAULT = "DEFAULT"
    PREFILL = "PREFILL"
    DECODE = "DECODE"
    MIX = "MIX"
