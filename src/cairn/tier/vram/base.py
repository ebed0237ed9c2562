"""The contract of a device whose memory processes of one host share."""

from abc import ABC, abstractmethod

import numpy as np

from cairn.copy import Copier, PagedKV, RowMemory
from cairn.kv import KVGeometry

#: The longest handle of a segment, bytes.
MAX_HANDLE = 256


class Segment(ABC):
    """`slots` rows of `stride` bytes of device memory: this process's own, or another's that is mapped here.

    memory: what a copier of the device takes. handle: by which other processes map it. Owned by whoever made it, who
    closes it once no copy is under way.
    """

    memory: RowMemory
    handle: bytes

    def __init__(self, slots: int, stride: int) -> None:
        self.slots = slots
        self.stride = stride

    @abstractmethod
    def close(self) -> None:
        """Gives it back, or unmaps it. Idempotent. Raises nothing: what fails is logged."""

    @property
    @abstractmethod
    def address(self) -> int:
        """Where row 0 is, for the device's copies."""

    def as_paged(self, geometry: KVGeometry, device: int) -> PagedKV:
        """The segment as a paged cache whose pages are its rows: for copies between rows here and rows elsewhere."""
        plane = geometry.block_tokens * geometry.vector_bytes
        planes = np.arange(geometry.layers * geometry.planes, dtype=np.int64).reshape(geometry.layers, geometry.planes)
        return PagedKV(
            bases=self.address + planes * plane,
            page_tokens=geometry.block_tokens,
            page_stride=self.stride,
            token_stride=geometry.vector_bytes,
            head_stride=geometry.head_dim * geometry.element_bytes,
            slots=self.slots * geometry.block_tokens,
            opaque=False,
            owner=self,
            device=device,
        )


class Device(ABC):
    """A GPU, or what stands in for one. Thread-safe.

    index: as in `PagedKV.device`.
    """

    index: int

    @abstractmethod
    def take(self, slots: int, stride: int) -> Segment:
        """New memory of this device, whose handle others may map. Raises StorageError where there is not that much."""

    @abstractmethod
    def map(self, handle: bytes, slots: int, stride: int) -> Segment:
        """Another process's segment, of whichever device. Raises StorageError for a handle that is none (any more)."""

    @abstractmethod
    def copier(self, geometry: KVGeometry, threads: int) -> Copier:
        """A copier between a paged cache on this device and rows in segments or in host memory."""
