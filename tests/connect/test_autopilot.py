"""The autopilot's decisions, as Transformers' connector follows them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from cairn.connect.transformers import CairnConnector
from cairn.observe.log import JsonFormatter, serving
from tests.connect.rig import check, figures, generate, open_engine, prompt, tiny_model
from tests.connect.test_blending import SETTINGS, A, B, C, Tokenizer
from tests.connect.test_blending import prompt as rag_prompt

MODEL = tiny_model()
CHAT = {"autopilot.preset": "chat"}


def decided(engine: Any, kind: str) -> Any:
    return figures(engine)["decisions"].get(kind, {})


@pytest.mark.parametrize("layerwise", ["auto", "always", "never"])
def test_answers_are_the_same_however_layers_come_and_go(layerwise: str, tmp_path: Path) -> None:
    settings = {"autopilot.layerwise": layerwise}
    with open_engine(MODEL, disk=tmp_path, **settings) as engine, CairnConnector(MODEL, engine) as cairn:
        check(MODEL, cairn, prompt(1, 100))
        cache = check(MODEL, cairn, prompt(1, 150))
        assert cache.reused_tokens == 96
        assert cache.stored_tokens == 48
        when = {"auto": "token_first", "always": "pinned", "never": "pinned"}[layerwise]
        assert decided(engine, "store") == {"while_computing" if layerwise == "always" else "behind": {when: 2}}
        assert decided(engine, "layerwise").keys() == {"no" if layerwise == "never" else "yes"}


def test_a_prompt_is_stored_behind_its_first_token_and_waits_for_no_end() -> None:
    ids = prompt(2, 64)
    with open_engine(MODEL) as engine, CairnConnector(MODEL, engine) as cairn:
        cache = cairn.cache(ids)
        MODEL(ids, past_key_values=cache)
        assert engine.lookup(ids[0]) == 0
        MODEL(ids[:, :1], past_key_values=cache)
        assert engine.lookup(ids[0]) == 64
        assert cache.stored_tokens == 64
        assert cache.finish() == 0


def test_nothing_is_loaded_stored_or_written_where_that_is_pinned(tmp_path: Path) -> None:
    ids = prompt(3, 64)
    with open_engine(MODEL, disk=tmp_path) as engine, CairnConnector(MODEL, engine) as cairn:
        check(MODEL, cairn, ids)
        assert engine.flush(30)
    never = {f"autopilot.{name}": "never" for name in ("load", "store", "disk")}
    with open_engine(MODEL, disk=tmp_path, **never) as engine, CairnConnector(MODEL, engine) as cairn:
        assert check(MODEL, cairn, ids).reused_tokens == 0
        check(MODEL, cairn, prompt(4, 64))
        assert figures(engine)["miss_tokens"]["pinned"] == 64
        assert figures(engine)["skipped_tokens"]["dram"].keys() == {"pinned"}
    only_dram = {"autopilot.disk": "never"}
    with open_engine(MODEL, disk=tmp_path, **only_dram) as engine, CairnConnector(MODEL, engine) as cairn:
        check(MODEL, cairn, prompt(4, 64))
        assert check(MODEL, cairn, ids).reused_by_tier["disk"] == 63
        assert engine.flush(30)
        assert "disk" not in figures(engine)["stored_tokens"]


def test_blending_is_left_where_it_is_pinned_and_measured_where_it_is_not() -> None:
    with open_engine(MODEL, **SETTINGS, **CHAT) as engine, CairnConnector(MODEL, engine, Tokenizer()) as cairn:
        cairn.learn(A)
        assert check(MODEL, cairn, rag_prompt(B, A)).blended.missing == []
        assert engine.metrics.blend_lookups.value() == 0
    auto = {**SETTINGS, "engine.planner": True}
    with open_engine(MODEL, **auto) as engine, CairnConnector(MODEL, engine, Tokenizer()) as cairn:
        for chunk in (A, B, C):
            cairn.learn(chunk)
        for length in (600, 700):  # so that a prefill of this length is known
            check(MODEL, cairn, prompt(length, length))
        ids = rag_prompt(C, A, B)
        with cairn.cache(ids) as cache:
            generate(MODEL, ids, cache)
        assert sum(decided(engine, "blend").get("yes" if cache.blended.reused else "no", {}).values()) == 1


def test_decisions_are_logged_with_the_request_and_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with open_engine(MODEL) as engine, CairnConnector(MODEL, engine) as cairn:
        caplog.set_level(logging.DEBUG, "cairn.observe.decisions")
        formatted = []
        caplog.handler.setFormatter(JsonFormatter())
        with serving("r-7"):
            for _ in range(2):
                check(MODEL, cairn, prompt(5, 64))
            formatted = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    assert {line["request_id"] for line in formatted} == {"r-7"}
    told = [(line["kind"], line["choice"], line["reason"]) for line in formatted]
    assert told[:2] == [("load", "none", "nothing_held"), ("store", "behind", "token_first")]
    assert ("load", "all", "pinned") in told
