"""The stack that all tests of this folder ask, and whose parts they end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.service.stack import Engine, engines
from tests.vllm.test_node import Node


@pytest.fixture(scope="package")
def stack(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, list[Engine]]]:
    with engines(model, tmp_path_factory.mktemp("stack")) as made:
        yield made
