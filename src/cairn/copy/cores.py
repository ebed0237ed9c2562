"""Which cores copies may run on. A thread begins bound as the one that started it is, and models bind theirs."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

#: OpenMP binds the threads of a process that has one of these to cores; vLLM sets them for its workers on CPUs.
_BINDINGS: Final = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")


def usable_cores() -> set[int]:
    """The calling thread's, and where it may be bound as part of the model, those of the Python that started this one.

    vLLM's engine leaves a core to each worker's transfers, on which none of the worker's own threads runs.
    """
    cores = os.sched_getaffinity(0)
    if any(name in os.environ for name in _BINDINGS):
        parent = os.getppid()
        with suppress(OSError):
            if Path(f"/proc/{parent}/exe").samefile("/proc/self/exe"):
                cores |= os.sched_getaffinity(parent)
    return cores


def roam() -> None:
    """Lets the calling thread run on all of them."""
    with suppress(OSError):  # another limit than a binding: it stays where it is
        os.sched_setaffinity(0, usable_cores())
