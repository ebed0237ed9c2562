"""The identity codec: stored bytes are the block's bytes."""

from cairn.codec.base import Codec, Octets


class Raw(Codec):
    """Moves no bytes: encode returns the block itself, and decode leaves it alone when it is given as both."""

    id = "raw"
    lossless = True

    def stored_bytes_limit(self) -> int:
        return self.geometry.block_bytes

    def encode(self, block: Octets) -> Octets:
        return block

    def decode(self, stored: Octets, out: Octets) -> bool:
        if len(stored) != len(out):
            return False
        if stored is not out:
            out[:] = stored
        return True
