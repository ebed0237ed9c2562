"""Copies between an engine's paged KV cache and rows of block memory. Knows nothing of tiers."""

from cairn.copy.base import Copier, DeviceRows, RowMemory
from cairn.copy.cpu import CpuCopier
from cairn.copy.paged import LAYOUTS, PagedKV, TokenSlots
from cairn.copy.progress import Progress

__all__ = ["LAYOUTS", "Copier", "CpuCopier", "DeviceRows", "PagedKV", "Progress", "RowMemory", "TokenSlots"]
