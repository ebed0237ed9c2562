"""What holds for all tests."""

import os
from importlib.util import find_spec
from pathlib import PurePath
from typing import Any

import pytest

# tests/vllm runs where vLLM is installed: `make test-vllm`. That environment has no hypothesis.
collect_ignore = [] if find_spec("vllm") else ["vllm"]

if find_spec("hypothesis"):
    from hypothesis import settings

    # How long an example takes says more about what else runs than about the code.
    settings.register_profile("cairn", deadline=None)
    settings.load_profile("cairn")


#: Parts that take long, the longest first: they begin first, so that no core is left with one of them when all others
#: are done. Those of tests/vllm are in no run together with the others.
LONG: tuple[str, ...] = ("codec", "cli", "connect", "remote", "node", "fleet", "docs", "gateway", "serve", "cluster")
LONG += ("tier", "demo", "engine", "sim")
LONG += ("service", "test_tokens", "test_serve", "test_fleet_serve", "test_kill", "test_blending", "test_ranks")
LONG += ("test_node", "test_stages", "test_quantized", "test_roles")


def part_of(path: PurePath) -> PurePath:
    """What runs in one process, so that its kernels are compiled and its servers started once: a folder. tests/vllm,
    where each module starts engines of its own, is too long for one process.
    """
    return path if path.parent.name == "vllm" else path.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(name) if (name := part_of(item.path).stem) in LONG else len(LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A part's tests run in one process. (xdist 3.8's groups are lost on pytest 9: it sends each test to whoever is
    free.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Parts(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return str(part_of(PurePath(nodeid.partition("::")[0])))

    config.option.loadscopereorder = False  # but as sorted above
    return Parts(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Half as many again as cores: a third of the time is spent waiting for other processes, and for time-outs."""
    return max(2, len(os.sched_getaffinity(0)) * 3 // 2)
