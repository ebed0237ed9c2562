"""The tiers below DRAM: the disk's directory, the remote store, and what is compressed on the way there."""

from collections.abc import Iterator
from typing import Final

from cairn.cli.doctor.base import Found, Severity, check, found, readable, setting
from cairn.cli.doctor.facts import Disk, Model, Remote
from cairn.config import Config

_MEMORY: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_BAD: Final = {
    **dict.fromkeys(_MEMORY, "which is memory"),
    "overlay": "the container's own layer, which goes with it and is slow to write",
    **dict.fromkeys(("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph"), "which is on the network"),
}


@check(
    "disk-unusable",
    "disk",
    Severity.ERROR,
    why="The disk tier cannot be opened, and the engine does not start.",
    fix="storage.disk.path: a directory that this user may write to",
)
def disk_unusable(config: Config, disk: Disk) -> Iterator[Found]:
    """A cache directory that cannot be written to."""
    if disk.fault:
        yield found(f"{disk.path}: {disk.fault}")


@check(
    "disk-space",
    "disk",
    Severity.ERROR,
    why="The directory is preallocated, so that it never fills up at run time; the engine does not start.",
    fix="storage.disk.size: {size}, or free some space",
)
def disk_space(config: Config, disk: Disk) -> Iterator[Found]:
    """Less room in the file system than the configured capacity."""
    size = config.storage.disk.size
    if not disk.fault and disk.room < size:
        text = f"{disk.path} has room for {readable(disk.room)}, storage.disk.size is {readable(size)}"
        yield found(text, size=setting(disk.room * 0.9))


@check(
    "disk-direct",
    "disk",
    Severity.WARNING,
    why="Reads and writes go through the page cache: one more copy of every block, and DRAM twice for the same bytes.",
    fix="storage.disk.path: a directory on ext4 or xfs on a local SSD",
)
def disk_direct(config: Config, disk: Disk) -> Iterator[Found]:
    """A file system that refuses O_DIRECT, by trying it."""
    if not disk.fault and not disk.direct:
        yield found(f"{disk.path}: {disk.kind or 'its file system'} refuses O_DIRECT")


@check(
    "disk-kind",
    "disk",
    Severity.WARNING,
    why="A disk tier is to be larger than DRAM, fast, and there after a restart; there it lacks one of these.",
    fix="storage.disk.path: a directory on a local SSD (docker run -v /ssd:/cache)",
)
def disk_kind(config: Config, disk: Disk) -> Iterator[Found]:
    """A cache directory in memory (tmpfs), in a container's own layer (overlay), or on the network."""
    if disk.kind in _BAD:
        yield found(f"{disk.path} is on {disk.kind}, {_BAD[disk.kind]}")


@check(
    "remote-unreachable",
    "remote",
    Severity.ERROR,
    why="Every lookup there fails until the tier's breaker opens; nothing is shared, and nothing outlives this host.",
    fix="start the store or mend storage.remote.url; `cairn bench remote URL` tries it",
)
def remote_unreachable(config: Config, remote: Remote) -> Iterator[Found]:
    """A remote store that does not answer within storage.remote.timeout_s."""
    if remote.fault:
        yield found(f"{remote.url}: {remote.fault}")


@check(
    "compressed-hot",
    "remote",
    Severity.WARNING,
    why="Memory loads raw blocks faster than a core decodes them (0.8 to 1.6 GB/s), so compressing costs time on every "
    "hit. (VRAM, DRAM and disk are never compressed.)",
    fix="autopilot.codec: auto, or compression.algorithm: none",
)
def compressed_hot(config: Config, remote: Remote) -> Iterator[Found]:
    """Compression always (autopilot.codec) on a store in this machine's memory: on tmpfs, or a server on loopback."""
    algorithm = config.compression.algorithm
    if algorithm != "none" and config.autopilot.codec == "always" and remote.memory:
        yield found(f"compression.algorithm is {algorithm}, always, and {remote.url} is in memory here")


@check(
    "arena-prompt",
    "model",
    Severity.WARNING,
    why="Every load passes the arena, layer by layer too, whatever tier it comes from; what does not fit is computed "
    "again each time, and one long prompt evicts all others.",
    fix="storage.cpu.size: {size}",
)
def arena_prompt(config: Config, model: Model) -> Iterator[Found]:
    """A DRAM arena, the buffer of all loads, that cannot hold the model's longest prompt in all its layers."""
    prompt, size = -(-model.longest // model.block_tokens) * model.row_bytes, config.storage.cpu.size
    if prompt > size:
        text = f"a prompt of {model.longest:,} tokens takes {readable(prompt)}, storage.cpu.size is {readable(size)}"
        yield found(text, size=f"{-(-2 * prompt // (1 << 30))}GiB")
