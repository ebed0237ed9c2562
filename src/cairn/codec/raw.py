"""The identity codec: stored bytes are the blocks' bytes."""

from cairn.codec.base import Codec, Octets


class Raw(Codec):
    """Moves no bytes of one block: encode returns the block itself, and decode leaves it alone when given as both."""

    id = "raw"
    lossless = True

    def stored_bytes_limit(self, blocks: int = 1) -> int:
        return blocks * self.geometry.block_bytes

    def encode(self, blocks: Octets, *, sinks: int = 0) -> Octets:
        return blocks if blocks.ndim == 1 else self.plain(self.rows(blocks))

    def decode(self, stored: Octets, out: Octets) -> bool:
        return stored is out or self.put_plain(stored, self.rows(out))
