"""Limits of this process and of this machine, against what the configuration wants of them."""

from collections.abc import Iterator, Mapping
from typing import Final

from cairn.cli.doctor.base import Found, Severity, check, found, readable, setting
from cairn.cli.doctor.facts import Host
from cairn.config import Config

#: Share of the memory that an arena may take.
_SHARE: Final = 0.9
#: Descriptors of a process that does nothing yet, libraries and logs included.
_OWN_FILES: Final = 256
#: From here on page tables and TLB misses are felt.
_LARGE_ARENA: Final = 1 << 30


@check(
    "arena-memory",
    "host",
    Severity.ERROR,
    why="The arena is taken and faulted in whole when the engine starts; the kernel kills it (OOM) in the middle.",
    fix="storage.cpu.size: {size}",
)
def memory(config: Config, host: Host) -> Iterator[Found]:
    """A DRAM arena that leaves the machine, or its cgroup, hardly any memory."""
    size = config.storage.cpu.size
    if size > host.memory * _SHARE:
        text = f"storage.cpu.size is {readable(size)}, there are {readable(host.memory)} of memory"
        yield found(text, size=setting(host.memory / 2))


@check(
    "shm-size",
    "host",
    Severity.ERROR,
    why="A node's arena, and the vLLM connector's, lie in /dev/shm: the engine does not start, or runs without Cairn. "
    "Docker gives 64 MiB unless told otherwise.",
    fix="docker run --ipc=host (or --shm-size {needed}), or mount -o remount,size={needed} /dev/shm",
)
def shm(config: Config, host: Host) -> Iterator[Found]:
    """A shared arena that is larger than /dev/shm."""
    size = config.storage.cpu.size
    if _is_shared(config, host) and size > host.shm:
        text = f"/dev/shm has {readable(host.shm)}, storage.cpu.size is {readable(size)}"
        yield found(text, needed=f"{-(-size // (1 << 30)) + 1}g")


@check(
    "memlock",
    "host",
    Severity.WARNING,
    why="What a GPU or an RDMA card copies from directly is locked in memory. Registering it with RDMA fails beyond "
    "the limit, and so do GPU drivers that keep to it; copies then take the slow way, or the tier does not open.",
    fix="ulimit -l unlimited (docker run --ulimit memlock=-1; systemd: LimitMEMLOCK=infinity)",
)
def memlock(config: Config, host: Host) -> Iterator[Found]:
    """A limit on locked memory (ulimit -l) below the arena, where a GPU or RDMA pins it."""
    storage = config.storage
    pinned = host.gpu or (storage.vram.size and storage.vram.device != "stand-in")
    pinned = pinned or "protocol=rdma" in (storage.remote.url or "")
    if pinned and host.memlock is not None and host.memlock < storage.cpu.size:
        yield found(f"ulimit -l is {readable(host.memlock)}, storage.cpu.size is {readable(storage.cpu.size)}")


@check(
    "open-files",
    "host",
    Severity.WARNING,
    why="Beyond the limit new connections are refused and files cannot be opened: requests fail, tiers go away.",
    fix="ulimit -n {needed} (docker run --ulimit nofile={needed}; systemd: LimitNOFILE={needed})",
)
def files(config: Config, host: Host) -> Iterator[Found]:
    """A limit on open files (ulimit -n) below what the threads, and the service's requests, may need."""
    needed = _OWN_FILES + config.storage.disk.threads + 2 * config.storage.remote.threads
    if config.serve.backends or config.cluster.etcd_addr:
        needed += 2 * config.serve.max_requests  # a client's connection and an engine's
    if host.files < needed:
        yield found(f"ulimit -n is {host.files:,}, up to {needed:,} are needed", needed=needed)


@check(
    "huge-pages",
    "host",
    Severity.NOTE,
    why="With pages of 4 KiB a large arena takes longer to fault in, and copies miss the TLB.",
    fix="echo {word} > /sys/kernel/mm/transparent_hugepage/{file}",
)
def huge_pages(config: Config, host: Host) -> Iterator[Found]:
    """Transparent huge pages switched off for the kind of memory that a large arena is made of."""
    shared = _is_shared(config, host)
    word, file = (host.shared_huge_pages, "shmem_enabled") if shared else (host.huge_pages, "enabled")
    if config.storage.cpu.size >= _LARGE_ARENA and word.startswith(("never", "deny")):
        text = f"transparent_hugepage/{file} is {word}, storage.cpu.size is {readable(config.storage.cpu.size)}"
        yield found(text, file=file, word="advise" if shared else "madvise")


@check(
    "hash-seed",
    "seeds",
    Severity.NOTE,
    why="Cairn needs none: its keys hash token ids by BLAKE2s, and its index names blocks of KV events by their "
    "tokens, so neither depends on it. vLLM mixes it into its own block hashes: routers that compare those need one "
    "value everywhere. And a fixed one takes away Python's protection against hash flooding.",
    fix="unset PYTHONHASHSEED; for routers that compare vLLM's hashes: one value for all engines",
)
def hash_seed(config: Config, seeds: Mapping[str, str]) -> Iterator[Found]:
    """PYTHONHASHSEED set to a value, as tools need that compare engines' own hashes."""
    fixed = {name: seed for name, seed in seeds.items() if seed != "random"}
    if fixed:
        yield found("PYTHONHASHSEED is " + ", ".join(f"{seed} ({name})" for name, seed in sorted(fixed.items())))


def _is_shared(config: Config, host: Host) -> bool:
    return config.node.address is not None or host.vllm
