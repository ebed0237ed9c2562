"""One gateway for many tests."""

from collections.abc import Iterator

import pytest

from tests.serve.gateway.running import Bench


@pytest.fixture(scope="package")
def bench() -> Iterator[Bench]:
    bench = Bench(36)
    with bench.gateway:
        yield bench
