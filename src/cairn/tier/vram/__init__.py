"""VRAM that a process shares with the others of its host: real, or a stand-in without a GPU."""

from cairn.tier.vram.base import Device, Segment
from cairn.tier.vram.open import open_device

__all__ = ["Device", "Segment", "open_device"]
