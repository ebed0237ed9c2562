"""BLAKE2s (RFC 7693) as numba kernels: the hash behind every block key.

Keys must resist deliberate collisions (a tenant chooses its prompts, also to collide with another's), which rules the
fast non-cryptographic hashes out, and 8,192 blocks must hash in about a millisecond, which rules a Python call a block
out. The kernels equal `hashlib.blake2s` bit for bit (that is their test) and hash a whole prompt in one call.
"""

import numpy as np
import numpy.typing as npt

from cairn.jit import kernel

Words = npt.NDArray[np.uint32]
Matrix = npt.NDArray[np.uint32]

IV = np.array(
    [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19], np.uint32
)
LAST = 0xFFFFFFFF
BLOCK_WORDS = 16


def initial_state(digest_bytes: int, person: bytes) -> Words:
    """The chaining value before the first compression: unkeyed, `person` (8 bytes) separating one use from another."""
    state = IV.copy()
    state[0] ^= np.uint32(0x01010000 | digest_bytes)
    state[6:8] ^= np.frombuffer(person, np.uint32)
    return state


@kernel
def _mix(a, b, c, d, x, y):  # type: ignore[no-untyped-def]
    a = np.uint32(a + b + x)
    d = np.uint32(d ^ a)
    d = np.uint32((d >> np.uint32(16)) | (d << np.uint32(16)))
    c = np.uint32(c + d)
    b = np.uint32(b ^ c)
    b = np.uint32((b >> np.uint32(12)) | (b << np.uint32(20)))
    a = np.uint32(a + b + y)
    d = np.uint32(d ^ a)
    d = np.uint32((d >> np.uint32(8)) | (d << np.uint32(24)))
    c = np.uint32(c + d)
    b = np.uint32(b ^ c)
    b = np.uint32((b >> np.uint32(7)) | (b << np.uint32(25)))
    return a, b, c, d


@kernel
def _round(v, m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, ma, mb, mc, md, me, mf):  # type: ignore[no-untyped-def]
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, va, vb, vc, vd, ve, vf = v
    v0, v4, v8, vc = _mix(v0, v4, v8, vc, m0, m1)
    v1, v5, v9, vd = _mix(v1, v5, v9, vd, m2, m3)
    v2, v6, va, ve = _mix(v2, v6, va, ve, m4, m5)
    v3, v7, vb, vf = _mix(v3, v7, vb, vf, m6, m7)
    v0, v5, va, vf = _mix(v0, v5, va, vf, m8, m9)
    v1, v6, vb, vc = _mix(v1, v6, vb, vc, ma, mb)
    v2, v7, v8, vd = _mix(v2, v7, v8, vd, mc, md)
    v3, v4, v9, ve = _mix(v3, v4, v9, ve, me, mf)
    return v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, va, vb, vc, vd, ve, vf


@kernel
def compress(h: Words, m: Words, length: int, last: int) -> None:
    """One compression in place: `h` [8] absorbs the block `m` [16]; `length` bytes so far, `last` is LAST or 0."""
    a, b, c, d, e, f, g, i = m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]
    j, k, l, n, o, p, q, r = m[8], m[9], m[10], m[11], m[12], m[13], m[14], m[15]  # noqa: E741
    v = (
        h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7], IV[0], IV[1], IV[2], IV[3],
        np.uint32(IV[4] ^ np.uint32(length)), IV[5], np.uint32(IV[6] ^ np.uint32(last)), IV[7],
    )  # fmt: skip
    v = _round(v, a, b, c, d, e, f, g, i, j, k, l, n, o, p, q, r)
    v = _round(v, q, l, e, j, k, r, p, g, b, o, a, c, n, i, f, d)
    v = _round(v, n, j, o, a, f, c, r, p, l, q, d, g, i, b, k, e)
    v = _round(v, i, k, d, b, p, o, n, q, c, g, f, l, e, a, r, j)
    v = _round(v, k, a, f, i, c, e, l, r, q, b, n, o, g, j, d, p)
    v = _round(v, c, o, g, l, a, n, j, d, e, p, i, f, r, q, b, k)
    v = _round(v, o, f, b, r, q, p, e, l, a, i, g, d, k, c, j, n)
    v = _round(v, p, n, i, q, o, b, d, k, f, a, r, e, j, g, c, l)
    v = _round(v, g, r, q, k, n, d, a, j, o, c, p, i, b, e, l, f)
    v = _round(v, l, c, j, e, i, g, b, f, r, n, k, q, d, o, p, a)
    h[0] ^= np.uint32(v[0] ^ v[8])
    h[1] ^= np.uint32(v[1] ^ v[9])
    h[2] ^= np.uint32(v[2] ^ v[10])
    h[3] ^= np.uint32(v[3] ^ v[11])
    h[4] ^= np.uint32(v[4] ^ v[12])
    h[5] ^= np.uint32(v[5] ^ v[13])
    h[6] ^= np.uint32(v[6] ^ v[14])
    h[7] ^= np.uint32(v[7] ^ v[15])


@kernel
def hash_rows(initial: Words, rows: Matrix, digests: Matrix) -> None:
    """`digests[i]` [8 words] = BLAKE2s of `rows[i]` (4 bytes a word, little-endian), each row hashed on its own."""
    words = rows.shape[1]
    block = np.empty(BLOCK_WORDS, np.uint32)
    for i in range(rows.shape[0]):
        state = digests[i]
        state[:] = initial
        done = 0
        while words - done > BLOCK_WORDS:
            compress(state, rows[i, done : done + BLOCK_WORDS], 4 * (done + BLOCK_WORDS), 0)
            done += BLOCK_WORDS
        block[:] = 0
        block[: words - done] = rows[i, done:]
        compress(state, block, 4 * words, LAST)


@kernel
def hash_chain(initial: Words, seed: Words, links: Matrix, keys: Matrix) -> None:
    """`keys[i]` [4 words] = BLAKE2s-128 of (`keys[i-1]`, `links[i]`); `seed` [4 words] stands before the first.

    `links` [n, w], w <= 12 words, so that a link costs one compression.
    """
    width = links.shape[1]
    block = np.zeros(BLOCK_WORDS, np.uint32)
    state = np.empty(8, np.uint32)
    block[:4] = seed
    for i in range(links.shape[0]):
        block[4 : 4 + width] = links[i]
        state[:] = initial
        compress(state, block, 4 * (4 + width), LAST)
        block[:4] = state[:4]
        keys[i] = state[:4]
