"""The contract of a codec: the canonical bytes of a KV block <-> the bytes that are stored."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cairn.kv import KVGeometry

#: Contiguous bytes in host memory, uint8 [n].
Octets = npt.NDArray[np.uint8]


class Codec(ABC):
    """Turns blocks of one geometry into stored bytes and back.

    id: what the object frame names it by, unique for ever. lossless: decode gives back every bit. parameters: whatever
    beside the id changes the stored bytes, as the frame carries it; two codecs read each other's objects exactly when
    id, parameters and geometry are equal. Thread-safe: encode and decode run in the tiers' workers.
    """

    id: ClassVar[str]
    lossless: ClassVar[bool]

    def __init__(self, geometry: KVGeometry) -> None:
        self.geometry = geometry

    @property
    def parameters(self) -> bytes:
        return b""

    @abstractmethod
    def stored_bytes_limit(self) -> int:
        """The most bytes `encode` can return; what a reader takes memory for."""

    @abstractmethod
    def encode(self, block: Octets) -> Octets:
        """The stored form of a block, uint8 [geometry.block_bytes]. May be `block` itself, which the caller then keeps
        untouched for as long as it uses the result."""

    @abstractmethod
    def decode(self, stored: Octets, out: Octets) -> bool:
        """Fills `out`, uint8 [geometry.block_bytes], which may be the memory of `stored` itself.

        Returns False, `out` undefined, if `stored` is not what `encode` returns. Never raises for what `stored` holds.
        """
