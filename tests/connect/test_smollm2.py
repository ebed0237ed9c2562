"""SmolLM2-135M in float32: greedy tokens with Cairn are those of plain Transformers, whatever the prompts share; and so
are the logits that they were chosen by, which a wrong prefix changes long before it changes a token.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from cairn.cli.demo.text import load_text
from cairn.connect.transformers import CairnConnector
from tests.connect.rig import BLOCK, generate, open_engine
from tests.connect.test_prefixes import damage
from tests.smollm2 import smollm2

#: Two of them are read from the cache that they were added to; one more shows nothing else.
NEW = 3


class Real(NamedTuple):
    """The model, a real text as token ids, and what plain Transformers answers (computed once a prompt)."""

    model: Any
    text: list[int]
    answers: dict[tuple[int, ...], tuple[list[int], torch.Tensor]]

    def generated(self, ids: list[int], cache: Any = None) -> tuple[list[int], torch.Tensor]:
        """The new tokens, and the logits behind them [NEW, 1, vocabulary]."""
        tokens, logits = generate(self.model, torch.tensor([ids]), cache, NEW, eos_token_id=None, pad_token_id=0)
        return tokens[0, len(ids) :].tolist(), logits

    def plain(self, ids: list[int]) -> tuple[list[int], torch.Tensor]:
        key = tuple(ids)
        if key not in self.answers:
            self.answers[key] = self.generated(ids)
        return self.answers[key]

    def answer(self, ids: list[int]) -> list[int]:
        return self.plain(ids)[0]

    def check(self, connector: CairnConnector, ids: list[int]) -> Any:
        """One prompt with Cairn against the same without; returns the finished cache."""
        expected, expected_logits = self.plain(ids)
        with connector.cache(ids) as cache:
            tokens, logits = self.generated(ids, cache)
        assert tokens == expected
        torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-3)
        return cache


@pytest.fixture(scope="module")
def real() -> Real:
    from transformers import AutoTokenizer

    home = smollm2()
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, local_files_only=True).eval()
    text = AutoTokenizer.from_pretrained(home, local_files_only=True)(load_text(None).content[2000:8000])["input_ids"]
    return Real(model, text, {})


def prompts(real: Real) -> list[tuple[list[int], int]]:
    """52 prompts that share prefixes in every way, each with the tokens that those before it let it reuse."""
    text, other = real.text, real.text[600:]
    base = text[:96]
    answered = base + real.answer(base)
    found = [(base, 0), (base, 95), (base, 95)]
    # Shorter: whole blocks, parts of one, a single token.
    found += [(base[:n], min(n // BLOCK * BLOCK, n - 1)) for n in (80, 81, 79, 64, 50, 33, 32, 31, 17, 16, 15, 2, 1)]
    # Longer, and then longer still.
    found += [(text[:n], (n - step) // BLOCK * BLOCK) for n, step in ((97, 1), (112, 15), (130, 18), (150, 20))]
    # Diverging in the middle of a block, at its edges, at the very first token.
    found += [
        (text[:at] + other[: 100 - at], at // BLOCK * BLOCK) for at in (90, 81, 80, 79, 65, 64, 63, 40, 16, 15, 1)
    ]
    # Diverging in one token only, and coming back to the text.
    found += [([*text[:at], 7, *text[at + 1 : 96]], at // BLOCK * BLOCK) for at in (95, 60, 48, 47, 20, 0)]
    # The next turn of a chat: the prompt, its answer, more (the KV of the answer's last token was never computed).
    turn = answered + other[200:227]
    found += [(turn, (len(answered) - 1) // BLOCK * BLOCK), (turn, len(turn) // BLOCK * BLOCK)]
    turn = turn + real.answer(turn) + other[227:250]
    found += [(turn, (len(turn) - 24) // BLOCK * BLOCK), (turn[:-7], (len(turn) - 7) // BLOCK * BLOCK)]
    # Another text, also in the middle of which the first one stands: no prefix of it.
    found += [(other[40:100], 0), (other[40:100], 48), (other[70:90] + base[:60], 0), (other[40:90], 48)]
    # Repetition: equal blocks at other places are other blocks.
    found += [
        (base[:16] * 5, 16),
        (base[:16] * 5, 79),
        (base[:16] * 3, 47),
        (base[16:32] * 4, 0),
        (base[16:32] * 2, 31),
    ]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_greedy_tokens_are_the_same_with_and_without_cairn(real: Real, tmp_path: Path) -> None:
    asked = prompts(real)
    assert len(asked) >= 50
    with (
        open_engine(real.model, dram_blocks=400, disk=tmp_path / "kv", disk_bytes=400 << 20) as engine,
        CairnConnector(real.model, engine) as connector,
    ):
        reused = [real.check(connector, ids).reused_tokens for ids, _ in asked]
        assert reused == [expected for _, expected in asked]
        assert engine.flush(30)
    again = [asked[i][0] for i in (0, 19, 25, 39, 41, 45)]
    with (
        open_engine(real.model, dram_blocks=400, disk=tmp_path / "kv", disk_bytes=400 << 20) as engine,
        CairnConnector(real.model, engine) as connector,
    ):
        from_disk = [real.check(connector, ids).reused_by_tier["disk"] for ids in again]
        assert from_disk[0] == len(again[0]) - 1
    damage(tmp_path / "kv" / "data")
    with (
        open_engine(real.model, dram_blocks=12, disk=tmp_path / "kv", disk_bytes=400 << 20) as engine,
        CairnConnector(real.model, engine) as connector,
    ):
        # Nothing on disk is right any more, and DRAM holds 12 blocks: the prompts evict one another.
        assert [real.check(connector, ids).reused_by_tier.get("disk", 0) for ids in again] == [0] * len(again)
