"""A prompt that one process has computed, served by another from each store: the same tokens in float32."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cairn.connect.transformers import CairnConnector
from tests.tier.remote.servers import s3_url
from tests.tier.remote.tokens import answer, load_model, open_engine, store_elsewhere, text

PROMPT = 100


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_another_process_answers_the_same_from_every_store(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model, ids = load_model(), text(PROMPT)
    urls = {
        "files": f"file://{tmp_path}/shared",
        "valkey": f"valkey://127.0.0.1:{request.getfixturevalue('valkey_server').ports[0]}",
        "s3": s3_url(request.getfixturevalue("s3_server").ports[0]),
    }
    with contextlib.suppress(pytest.skip.Exception):  # the conformance suite says why
        urls["mooncake"] = request.getfixturevalue("mooncake_cluster").url
    expected = answer(model, ids)
    store_elsewhere(ids, list(urls.values()))
    for kind, url in urls.items():
        with open_engine(model, url, PROMPT) as engine, CairnConnector(model, engine) as connector:
            remote = answer(model, ids, connector.cache)
        assert remote.tokens == expected.tokens, kind
        assert remote.tiers == {"dram": 0, "remote": PROMPT // 16 * 16}, kind
