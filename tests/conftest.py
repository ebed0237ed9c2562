"""What holds for all tests."""

from collections import Counter
from importlib.util import find_spec

import pytest

# tests/vllm runs where vLLM is installed: `make test-vllm`. That environment has no hypothesis.
collect_ignore = [] if find_spec("vllm") else ["vllm"]

if find_spec("hypothesis"):
    from hypothesis import settings

    # How long an example takes says more about what else runs than about the code.
    settings.register_profile("cairn", deadline=None)
    settings.load_profile("cairn")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A folder's tests run in one process, so that its kernels are compiled once. Folders with the most slow tests come
    first, so that no core is left with one of them when the others are done.
    """
    slow = Counter(item.path.parent for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path.parent])
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.path.parent.name))
