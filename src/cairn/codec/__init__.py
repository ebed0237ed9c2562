"""Values <-> bytes: codecs, and the object frame around everything that leaves DRAM."""

from cairn.codec.base import Codec
from cairn.codec.frame import FrameHeader, Shard
from cairn.codec.raw import Raw, canonical_codec

__all__ = ["Codec", "FrameHeader", "Raw", "Shard", "canonical_codec"]
