"""The identity codec: stored bytes are the block's bytes."""

from cairn.codec.base import Codec, Octets


class Raw(Codec):
    """Moves no bytes: encode returns the block's own memory, decode in place copies nothing."""

    id = "raw"
    lossless = True

    def stored_bytes_limit(self) -> int:
        return self.geometry.block_bytes

    def encode(self, block: Octets) -> Octets:
        return block

    def decode(self, stored: Octets, out: Octets) -> bool:
        if len(stored) != len(out):
            return False
        if stored.ctypes.data != out.ctypes.data:
            out[:] = stored
        return True
