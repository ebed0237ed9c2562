"""Who holds how much of a prompt: exact where engines tell, guessed where they do not."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.config.schema import Index
from cairn.fleet import Source
from cairn.fleet.publisher import Publisher
from cairn.serve.gateway.asked import Asked
from cairn.serve.gateway.base import Prompt
from cairn.serve.gateway.guesses import Guesses, Pieces
from cairn.serve.gateway.prompts import FleetPrompts
from cairn.serve.indexer.lookup import Query
from cairn.serve.indexer.parts import Parts
from cairn.serve.tokenizers import ANY_MODEL
from tests.fleet.peers import free_endpoint
from tests.fleet.wire_events import encode, stored
from tests.serve.running import until

TEXT = "abcdefghijklmnop" * 4


def asked(path: str = "/v1/completions", **fields: Any) -> Asked:
    return Asked(path, json.dumps({"model": "m"} | fields).encode())


def pieces(prompt: bytes) -> Pieces:
    return Guesses(4).look(prompt)[0]


def held(guesses: Guesses, prompt: bytes) -> dict[str, int]:
    return dict(guesses.look(prompt)[1])


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4000)), max_size=30), st.integers(0, 3))
def test_guesses_are_the_longest_prefix_that_was_sent(sent: list[tuple[int, int, int]], family: int) -> None:
    """Against a list of everything that was sent. Prompts are prefixes of one of four texts."""
    texts = [bytes([65 + i]) * 100 + b"x" * 4000 for i in range(4)]  # in pieces of 512
    guesses = Guesses()
    for instance, which, size in sent:
        guesses.sent(pieces(texts[which][:size]), f"i{instance}")
    found = held(guesses, texts[family])
    expected: dict[str, int] = {}
    for instance, which, size in sent:
        end = min(size, len(texts[which])) // 512 * 512
        if which == family and end:
            expected[f"i{instance}"] = max(end, expected.get(f"i{instance}", 0))
    assert found == expected
    guesses.forget("i0")
    assert held(guesses, texts[family]) == {name: end for name, end in expected.items() if name != "i0"}
    guesses.sent(pieces(texts[family]), "new")  # perhaps by the number that has become free
    assert held(guesses, texts[family])["new"] == len(texts[family]) // 512 * 512


def test_pieces_of_long_prompts_are_longer() -> None:
    sizes = [512] * 16 + [1024] * 16 + [2048] * 16 + [4096] * 16 + [8192] * 40
    for count in (0, 1, 16, 17, 60, 104):
        whole = bytes(sum(sizes[:count]))
        assert len(pieces(whole)) == count
        assert len(pieces(whole + bytes(511))) == count
        guesses = Guesses()
        guesses.sent(pieces(whole), "a")
        assert held(guesses, whole + bytes(9000)) == ({"a": len(whole)} if count else {})


def test_a_piece_is_told_from_all_others() -> None:
    """Any byte that differs, and the order of pieces: by digests of prompts that differ in a bit."""
    base = bytes(range(256)) * 8
    seen = {pieces(base)[-1]}
    for place in range(len(base)):
        for bit in (1, 128):
            seen.add(pieces(base[:place] + bytes([base[place] ^ bit]) + base[place + 1 :])[-1])
    assert len(seen) == 2 * len(base) + 1
    assert pieces(base)[0] == pieces(base[:512] + bytes(512))[0]
    assert len({*pieces(bytes(4096)).tolist()}) == 8


def test_guesses_are_bounded() -> None:
    guesses, prompts = Guesses(room=8), [bytes([i]) * 1000 for i in range(100)]
    for i, prompt in enumerate(prompts):
        guesses.sent(pieces(prompt), "a")
        assert all(held(guesses, one) == {"a": 512} for one in prompts[max(0, i - 3) : i + 1])
    assert sum(bool(held(guesses, one)) for one in prompts) <= 8
    assert not any(held(guesses, one) for one in prompts[:80])


def test_what_was_sent_again_stays() -> None:
    guesses, prompts = Guesses(room=4), [bytes([i]) * 512 for i in range(5)]
    for i in (0, 1, 2, 3, 0, 4):
        guesses.sent(pieces(prompts[i]), "a")
    assert [bool(held(guesses, one)) for one in prompts] == [True, False, True, True, True]


def test_of_the_instances_that_hold_a_piece_the_latest_count() -> None:
    guesses, prompt = Guesses(), bytes(1024)
    for name in "abcdb":
        guesses.sent(pieces(prompt), name)
    assert held(guesses, prompt) == dict.fromkeys("bdca", 1024)
    guesses.sent(pieces(prompt), "e")
    assert held(guesses, prompt) == dict.fromkeys("ebdc", 1024)
    for name in "ec":
        guesses.forget(name)
    assert held(guesses, prompt) == dict.fromkeys("bd", 1024)


def test_there_are_only_so_many_instances() -> None:
    guesses, prompt, most = Guesses(), bytes(512), (1 << 16) - 1
    guesses._numbers = {f"i{number}": number for number in range(1, most + 1)}
    guesses._names = {number: name for name, number in guesses._numbers.items()}
    guesses.sent(pieces(prompt), "one too many")
    assert held(guesses, prompt) == {}
    guesses.forget("i7")
    guesses.sent(pieces(prompt), "one more")
    assert held(guesses, prompt) == {"one more": 512}


def test_the_index_is_asked_with_the_engine_s_tokens(tiny: Path) -> None:
    """Text, tokens and chats; a prompt that was sent counts as held there; and without events it is guessed."""
    endpoint, replay = free_endpoint(), free_endpoint()
    publisher = Publisher(endpoint, replay)
    config = Index(instances=(f"a={endpoint},replay={replay}",), models={ANY_MODEL: str(tiny)})
    parts = Parts(config)
    prompts = FleetPrompts(parts)

    async def main() -> None:
        text = asked(prompt=TEXT)
        ids = (await parts.tokenizers.text_async(None, TEXT)).tolist()
        publisher.publish(encode([stored([1, 2], ids[:32], 16)]))
        await asyncio.to_thread(until, lambda: bool(parts.following.sources()), "the source")
        await asyncio.to_thread(until, lambda: sum(parts.index.held().values()) == 2, "its blocks")
        assert (await prompts.look(text)).held["a"]["vram"] == 32
        assert (await prompts.look(text)).tokens == len(ids)
        by_ids = await prompts.look(asked(prompt=ids))
        assert (by_ids.tokens, by_ids.held["a"]["vram"]) == (len(ids), 32)
        prompts.sent(by_ids, "a")
        assert (await prompts.look(text)).held["a"]["vram"] == 64
        chat = asked("/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}])
        assert (await prompts.look(chat)).tokens == len("<user>Hello<answer>")
        assert (await prompts.look(asked(prompt=TEXT, cache_salt="s"))).held == {}
        for odd in (asked(prompt=["a", "b"]), asked(prompt=7), asked(messages=3), asked("/v1/chat/completions")):
            assert (await prompts.look(odd)).held == {}

    try:
        parts.start(config)
        asyncio.run(main())
    finally:
        parts.close()
        publisher.close(0)


def test_an_instance_that_leaves_just_as_a_prompt_goes_there_fails_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources go on another thread, between any two looks at them."""
    parts, source = Parts(Index()), Source("a", 0)
    seen = iter([{source: "m"}])
    monkeypatch.setattr(parts.following, "sources", lambda: next(seen, {}))
    FleetPrompts(parts).sent(Prompt(8, {}, Query(np.arange(8, dtype=np.uint32))), "a")
    parts.close()
