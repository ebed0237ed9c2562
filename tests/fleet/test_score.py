"""Scores by weights and by seconds, and what routing decisions add until their time is up."""

from typing import Any

import numpy as np
import pytest

from cairn.errors import InputError
from cairn.fleet import FleetIndex, Source, Stored, Tier
from cairn.fleet.score import SecondsSaved, score
from cairn.fleet.speculation import Speculation
from cairn.plan import CostModel, Work

A, B, C = Source("a", 0), Source("b", 0), Source("c", 3)
TOKENS = list(range(100))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fleet() -> FleetIndex:
    """A holds 8 blocks of 10 tokens in VRAM, B 4 in VRAM and all in its CPU's memory."""
    index = FleetIndex()
    names = tuple(range(10))
    index.apply(A, [Stored(names[:8], None, TOKENS[:80], 10, Tier.VRAM, b"", ())])
    index.apply(
        B, [Stored(names, None, TOKENS, 10, Tier.CPU, b"", ()), Stored(names[:4], None, [], 0, Tier.VRAM, b"", ())]
    )
    return index


def test_tokens_are_weighted_by_tier() -> None:
    scores = score(fleet(), TOKENS, [B, A, C])
    assert list(scores) == [B, A, C]
    assert scores[A] == ({Tier.VRAM: 80, Tier.CPU: 0, Tier.DISK: 0, Tier.REMOTE: 0}, 80.0)
    assert scores[B] == ({Tier.VRAM: 40, Tier.CPU: 60, Tier.DISK: 0, Tier.REMOTE: 0}, 40 + 0.8 * 60)
    assert scores[C] == (dict.fromkeys(Tier, 0), 0.0)
    assert score(fleet(), TOKENS, [B], {Tier.CPU: 2.0})[B].score == 120.0
    assert score(fleet(), TOKENS, [A], namespace=b"salt")[A].score == 0.0
    assert score(FleetIndex(), TOKENS, [A])[A].score == 0.0
    with pytest.raises(InputError):
        score(fleet(), ["a"], [A])


def test_seconds_saved() -> None:
    cost = CostModel()
    saved = SecondsSaved(cost, 1000)
    assert score(fleet(), TOKENS, [A, B], saved) == score(fleet(), TOKENS, [A, B])
    for tokens in (50, 100, 200):
        cost.recompute.observe(Work.of([(tokens, 0)]), 0.01 * tokens)
    scores = score(fleet(), TOKENS, [A, B, C], saved)
    assert scores[A].score == pytest.approx(0.8, rel=0.01)
    assert scores[B].score == pytest.approx(0.99, rel=0.01)  # one token is always computed
    assert scores[C].score == 0.0
    for size in (10_000, 100_000):
        cost.observe_load("dram", size, size * 1e-6)  # ten times faster than computing, for a thousand bytes a token
    assert score(fleet(), TOKENS, [B], saved)[B].score == pytest.approx(0.99 - 0.06, rel=0.01)
    for size in range(10_000, 100_000, 1000):
        cost.observe_load("dram", size, size * 1e-4)  # and now slower: what the CPU has is not worth its loading
    assert score(fleet(), TOKENS, [B], saved)[B].score == pytest.approx(0.4, rel=0.01)


def test_what_was_routed_counts_until_its_time_is_up() -> None:
    index, clock = fleet(), Clock()
    speculation = Speculation(2.0, clock=clock)

    def held(source: Source, tokens: Any = TOKENS) -> int:
        return score(index, tokens, [C, source], speculation=speculation)[source].tokens[Tier.VRAM]

    speculation.routed(A, index.hashed(TOKENS))
    assert [held(A), held(B), held(A, TOKENS[:50]), held(A, [0, *TOKENS])] == [100, 40, 50, 0]
    clock.now = 1.5
    speculation.routed(A, index.hashed(TOKENS[:90]))
    assert held(A) == 100
    clock.now = 2.0
    assert held(A) == 90
    clock.now = 3.5
    assert held(A) == 80
    speculation.routed(A, index.hashed(TOKENS))
    speculation.forget(A)
    assert held(A) == 80
    speculation.routed(A, index.hashed([0, *TOKENS]))
    assert held(A) == 80


def test_a_table_that_overflows_forgets_and_invents_nothing() -> None:
    index, speculation = FleetIndex(), Speculation(room=64, clock=Clock())
    index.apply(C, [Stored((1,), None, [1], 1, Tier.VRAM, b"", ())])
    random = np.random.default_rng(1)
    prompts = [random.integers(10, 1000, 50) for _ in range(20)]
    for tokens in prompts:
        speculation.routed(A, index.hashed(tokens))
    speculation.routed(B, index.hashed([5]))
    assert speculation.tokens([A], index.hashed(prompts[-1])) > 0
    for tokens in prompts:
        longer = np.concatenate([tokens, [1, 2, 3]])
        assert speculation.tokens([A], index.hashed(longer)) <= 50
        assert speculation.tokens([B], index.hashed(tokens)) == 0


@pytest.mark.parametrize(("seconds", "room"), [(0, 1), (1, 0), (-1, 1)])
def test_refuses_what_makes_no_sense(seconds: float, room: int) -> None:
    with pytest.raises(InputError):
        Speculation(seconds, room=room)


def test_a_prompt_is_hashed_as_far_as_it_was_routed() -> None:
    """In pieces of 512 blocks and more; what nobody holds or was sent is not hashed beyond the first."""
    index, speculation = fleet(), Speculation(clock=Clock())
    tokens = np.random.default_rng(1).integers(10, 1000, 60_000)
    speculation.routed(A, index.hashed(tokens[:50_000]))
    for prompt, expected, hashed in ((tokens, 50_000, 6000), (tokens[:40_000], 40_000, 4000), (tokens[1:], 0, 512)):
        assert score(index, prompt, [A, B], speculation=speculation)[A].tokens[Tier.VRAM] == expected
        (keys,) = index.look_up(prompt, beyond=lambda begun: speculation.covers([A], begun))[1]
        assert len(keys.keys) == hashed
