"""Namespaces: what must be equal for two processes to share a KV block, folded into one digest."""

import hashlib

import msgspec

from cairn.kv.geometry import KVGeometry

#: Version of the canonical block bytes. Raised when their meaning changes, so that old objects become misses.
LAYOUT_VERSION = 1

DIGEST_BYTES = 16

#: How the mark of a salt begins.
SALT_MARK = "salt:"


def salt_mark(salt: str) -> str:
    """What stands for a salt where others read along: a digest, the same in every process."""
    return SALT_MARK + hashlib.blake2s(salt.encode(), digest_size=16, person=b"cairn/st").hexdigest()


class Namespace(msgspec.Struct, frozen=True, kw_only=True):
    """The identity of a KV cache. Blocks are shared between two requests only when every field is equal.

    model: a model's name or path as the operator calls it. revision: of its weights (a commit, a hash of the
    checkpoint); a fine-tune under the same name must change it. layout: the name of the byte layout inside a block
    ("canonical" unless blocks are kept as an engine's opaque bytes). lora: adapter name and revision. salt: the
    tenant's secret; tenants with different salts cannot read, nor even probe, each other's blocks.

    Immutable. The salt is kept out of `repr` and leaves the process only inside the digest.
    """

    model: str
    geometry: KVGeometry
    revision: str = ""
    layout: str = "canonical"
    lora: str = ""
    salt: bytes = b""

    def __repr__(self) -> str:
        salted = ", salted" if self.salt else ""
        lora = f", lora={self.lora!r}" if self.lora else ""
        return f"Namespace({self.model!r}@{self.revision or '?'}, {self.layout}{lora}{salted})"

    def digest(self) -> bytes:
        """16 bytes, the root of every key chain. Fields are length-prefixed, so no two field lists encode alike."""
        fields = (
            self.model,
            self.revision,
            self.layout,
            str(LAYOUT_VERSION),
            self.lora,
            *self.geometry.digest_fields(),
        )
        hasher = hashlib.blake2s(digest_size=DIGEST_BYTES, person=b"cairn/ns")
        for field in (*(text.encode() for text in fields), self.salt):
            hasher.update(len(field).to_bytes(4, "little"))
            hasher.update(field)
        return hasher.digest()
