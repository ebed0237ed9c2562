"""What one vLLM has computed another serves from a remote store; a store that hangs delays a request by one lookup."""

import threading
import time
from pathlib import Path
from typing import Any

from cairn.observe.reasons import Reason
from tests.vllm.engine import BLOCK, OTHER, PROMPTS, answers, connector, no_leak, serving, settle, stats

ASKED = PROMPTS[:8]
#: Far beyond what a lookup takes on a machine that does much else, far below what a test may take.
LOOKUP_S = 5


def hits(llm: Any) -> dict[str, float]:
    found: dict[str, float] = stats(llm)["hit_tokens"]
    return found


def test_another_engine_serves_what_one_has_stored(tiny: Path, tiny_plain: list[list[int]], tmp_path: Path) -> None:
    settings = {
        "storage.remote.url": f"file://{tmp_path}/shared",
        # A block an object: which longer objects come to be, and so what is found, is a matter of timing.
        "storage.remote.object_size": "64KiB",
        "storage.remote.timeout_s": 60,
        "storage.remote.lookup_timeout_s": LOOKUP_S,
        "storage.cpu.size": "64MiB",
        "engine.timeout_s": 60,
        "engine.lease_s": 120,
    }
    with serving(tiny, settings, skip_tokenizer_init=True) as llm:
        assert answers(llm, ASKED) == tiny_plain[:8]
        settle(llm)
        assert connector(llm)._scheduler.engine.flush(30)
    with serving(tiny, settings, skip_tokenizer_init=True, enable_prefix_caching=False) as llm:
        assert answers(llm, ASKED) == tiny_plain[:8]
        settle(llm)
        assert "absent" not in stats(llm)["miss_tokens"]
        assert hits(llm)["remote"] >= max(map(len, ASKED)) // BLOCK * BLOCK
        assert connector(llm)._scheduler.engine.flush(30)
        no_leak(llm)
        # The store hangs: who asks waits for one lookup, and computes.
        tier = connector(llm)._scheduler.engine._store._lower[-1]
        whole, gate = tier._store.exists, threading.Event()

        def hung(names: list[bytes], *, deadline: float) -> Reason:
            gate.wait(deadline - time.monotonic())
            return Reason.TIMEOUT

        tier._store.exists = hung
        begun = time.monotonic()
        answers(llm, [OTHER])
        assert time.monotonic() - begun < 4 * LOOKUP_S
        settle(llm)
        tier._store.exists = whole
        gate.set()
        assert connector(llm)._scheduler.engine.flush(60)
        no_leak(llm)
