"""What holds for all tests."""

import os
from importlib.util import find_spec
from typing import Any

import pytest

# tests/vllm runs where vLLM is installed: `make test-vllm`. That environment has no hypothesis.
collect_ignore = [] if find_spec("vllm") else ["vllm"]

if find_spec("hypothesis"):
    from hypothesis import settings

    # How long an example takes says more about what else runs than about the code.
    settings.register_profile("cairn", deadline=None)
    settings.load_profile("cairn")


#: Folders that take long, the longest first: they begin first, so that no core is left with one of them when all others
#: are done.
LONG = (
    *("codec", "cli", "connect", "remote", "node", "fleet", "docs", "gateway", "serve", "cluster", "tier", "demo"),
    *("engine", "sim"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(name) if (name := item.path.parent.name) in LONG else len(LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A folder's tests run in one process, so that its kernels are compiled and its servers started once. (xdist 3.8's
    groups are lost on pytest 9: it sends each test to whoever is free.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Folders(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0].rpartition("/")[0]

    config.option.loadscopereorder = False  # but as sorted above
    return Folders(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Half as many again as cores: a third of the time is spent waiting for other processes, and for time-outs."""
    return max(2, len(os.sched_getaffinity(0)) * 3 // 2)
