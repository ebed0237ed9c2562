"""What is remembered of requests, and the tree that is made of it."""

from hypothesis import given
from hypothesis import strategies as st

from cairn.serve.dashboard.base import PrefixShown
from cairn.serve.dashboard.prefixes import tree
from cairn.serve.dashboard.traffic import Recent, Traffic

BLOCK = 64


def recent(text: bytes, **held: dict[str, int]) -> Recent:
    return Recent(text, len(text), len(text) // 4, held, "a")


def test_requests_are_told_as_cold_or_hit_by_what_was_held() -> None:
    traffic = Traffic()
    for held, seconds in ((0, 3.0), (49, 2.0), (50, 1.0), (100, 0.5)):
        traffic.answered_at("a", 100, {"dram": held}, seconds)
    traffic.answered_at("a", 100, {"disk": 100}, None)
    assert traffic.served() == (2, 2, [2.0, 3.0], [0.5, 1.0])
    assert traffic.served() == (0, 0, [], [])
    assert traffic.hits == {"a": {"dram": 199, "disk": 100}}
    assert traffic.misses == {"a": 500 - 299}
    traffic.keep({"a"})
    assert traffic.misses
    traffic.keep({"b"})
    assert not traffic.hits
    assert not traffic.misses


def test_a_busy_period_is_told_by_few_fair_quantiles() -> None:
    traffic = Traffic()
    for i in range(20_000):
        traffic.answered_at("a", 0, {}, (i * 7919 % 20_000) / 20_000)
    told = traffic.served()
    assert told.hit == 20_000
    assert len(told.hit_s) == 8
    assert all(abs(value - (i + 0.5) / 8) < 0.15 for i, value in enumerate(told.hit_s))


def test_few_prompts_of_a_period_are_remembered_and_few_in_all() -> None:
    traffic = Traffic()
    for _ in range(10):
        for i in range(100):
            if traffic.answered_at("a", 1, {}, None):
                traffic.remember(recent(b"%d" % i))
        traffic.served()
    assert [one.beginning for one in traffic.recent] == 4 * [b"%d" % i for i in range(64)]


WORDS = [bytes([letter]) * BLOCK for letter in b"abc"]
PROMPTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=5).map(b"".join), max_size=12)


@given(PROMPTS)
def test_a_node_counts_the_prompts_that_begin_with_it(prompts: list[bytes]) -> None:
    shown = tree([recent(one) for one in prompts], with_text=True)
    path: list[PrefixShown] = []
    for node in shown:
        assert node.depth <= len(path)
        path = [*path[: node.depth], node]
        beginning = path[0].text.encode()
        alike = [one for one in prompts if one.startswith(beginning[:BLOCK])]
        assert 2 <= node.requests <= len(alike)
        assert node.depth == 0 or node.requests <= path[node.depth - 1].requests
        assert node.tokens > (path[node.depth - 1].tokens if node.depth else 0)
    roots = [node for node in shown if node.depth == 0]
    shared = {word: sum(one.startswith(word) for one in prompts) for word in WORDS}
    assert sorted(node.requests for node in roots) == sorted(count for count in shared.values() if count > 1)


def test_a_conversation_reads_as_one() -> None:
    system = '[{"role": "system", "content": "You are \\"brief\\".\\n' + "Be kind. " * 20 + '"}, {"role": "user", '
    one = system + '"content": "Why is it so that no one has asked it before me, or will ever again?"}]'
    other = system + '"content": "Who?"}]'
    nodes = tree([recent(text.encode(), b={"dram": 10, "disk": 10}) for text in (one, one, other)], with_text=True)
    assert [(node.depth, node.requests) for node in nodes] == [(0, 3), (1, 2)]
    assert nodes[0].text.startswith("system: You are brief . Be kind.")
    assert nodes[1].text == "Why is it so that no one has asked it before me, or will ever again?"
    assert nodes[0].held["a"] == 1.0
    assert 0 < nodes[0].held["b"] < 1
    hidden = tree([recent(one.encode()), recent(one.encode())], with_text=False)
    assert [node.text for node in hidden] == [""]
    assert len(hidden[0].digest) == 8
