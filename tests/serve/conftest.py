"""One `cairn index` for many tests: what they publish is theirs alone, as no two use the same tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cairn.fleet.publisher import Publisher
from tests.fleet.peers import free_endpoint
from tests.serve.running import Service


class Fleet(NamedTuple):
    """A service, and the publishers it follows: `a`, and `b` with two ranks; `other` serves another model."""

    service: Service
    a: Publisher
    b: tuple[Publisher, Publisher]
    other: Publisher


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single bytes, with a chat template."""
    from tests.demo.tiny import tiny_tokenizer

    home = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(home)
    return home


@pytest.fixture(scope="package")
def fleet(tiny: Path) -> Iterator[Fleet]:
    ends = [(free_endpoint(), free_endpoint()) for _ in range(4)]
    told = [f"{name}={end},replay={replay}" for name, (end, replay) in zip("abbo", ends, strict=True)]
    told[2] += ",rank=1"
    told[3] += ",model=other"
    options = [part for one in told for part in ("--instance", one)]
    options += ["--model", f"tiny={tiny}", "--set", "index.max_body=2MiB", "--set", "index.speculation_s=1.5"]
    options += ["--set", "index.max_prompt=100000", "--set", "index.max_messages=100"]
    publishers = [Publisher(end, replay) for end, replay in ends]
    try:
        with Service(*options) as service:
            yield Fleet(service, publishers[0], (publishers[1], publishers[2]), publishers[3])
    finally:
        for publisher in publishers:
            publisher.close(0)
