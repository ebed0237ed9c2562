"""This process's limits, and this machine's memory."""

import ctypes
import os
import re
import resource
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from cairn.cli.doctor.facts import Host

_THP: Final = Path("/sys/kernel/mm/transparent_hugepage")
#: Where the memory of a cgroup is bounded, of version 2 and 1.
_CGROUPS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_PR_GET_THP_DISABLE: Final = 42
_CAP_IPC_LOCK: Final = 14


def probe_host() -> Host:
    shm = Path("/dev/shm")
    system = os.statvfs(shm) if shm.is_dir() else None
    off = "never (by prctl)" if ctypes.CDLL(None).prctl(_PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1 else ""
    return Host(
        memory=min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_cgroup_limits()),
        shm=system.f_blocks * system.f_frsize if system else 0,
        memlock=_memlock(),
        files=_soft(resource.RLIMIT_NOFILE),
        huge_pages=off or _chosen("enabled"),
        shared_huge_pages=off or _chosen("shmem_enabled"),
        gpu=Path("/dev/nvidiactl").exists(),
        vllm=find_spec("vllm") is not None,
    )


def _soft(limit: int) -> int:
    soft = resource.getrlimit(limit)[0]
    return soft if soft != resource.RLIM_INFINITY else 1 << 62


def _memlock() -> int | None:
    """The capability CAP_IPC_LOCK frees of the limit."""
    capable = re.search(r"^CapEff:\s*(\w+)", _text(Path("/proc/self/status")), re.MULTILINE)
    free = capable is not None and int(capable[1], 16) >> _CAP_IPC_LOCK & 1
    limit = _soft(resource.RLIMIT_MEMLOCK)
    return None if free or limit == 1 << 62 else limit


def _cgroup_limits() -> list[int]:
    return [int(text) for path in _CGROUPS if (text := _text(path).strip()).isdigit()] or [1 << 62]


def _chosen(name: str) -> str:
    """The word in brackets: always [madvise] never."""
    word = re.search(r"\[(\w+)\]", _text(_THP / name))
    return word[1] if word else ""


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
