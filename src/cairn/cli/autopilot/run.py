"""`cairn bench autopilot`: the autopilot beside every fixed preset and no cache, on a mixed workload."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from transformers import DynamicCache

from cairn.cli.autopilot.verdict import AUTOPILOT, NO_CACHE, verdict
from cairn.cli.autopilot.workload import Request, Workload, lengths
from cairn.cli.bench_machine import Visit, visit
from cairn.cli.demo.model import NAME, default_cache_dir, fetch_model, open_model
from cairn.cli.demo.show import Screen
from cairn.cli.output import machine
from cairn.config import load_config
from cairn.config.autopilot import PRESETS
from cairn.connect.transformers import CairnConnector, namespace_of
from cairn.engine import CacheEngine

#: Tokens of an answer: the second one shows what was put off until the first was out.
ANSWER: Final = 4
_DRAM_TOKENS: Final = 6000
_DISK_TOKENS: Final = 100_000
#: Requests after which what has been found so far is written.
_STEP: Final = 4

Tick = Callable[[int, int], None]


class Contender:
    """A model with a cache of its own, or with none (preset None)."""

    def __init__(self, model: Any, tokenizer: Any, engine: CacheEngine | None) -> None:
        self._model = model
        self.engine = engine
        self.connector = CairnConnector(model, engine, tokenizer) if engine else None

    def ask(self, ids: list[int]) -> Visit:
        """Answers one request; what is written behind it is over when this returns."""
        if self.connector is None or self.engine is None:
            return visit(self._model, ids, ANSWER, lambda _: DynamicCache(config=self._model.config))
        found = visit(self._model, ids, ANSWER, self.connector.cache)
        self.engine.flush(120.0)
        return found


@contextmanager
def contenders(model: Any, tokenizer: Any, home: Path) -> Iterator[dict[str, Contender]]:
    """By name: no cache, and every preset with DRAM and disk of its own under `home`."""
    made = {NO_CACHE: Contender(model, tokenizer, None)}
    with ExitStack() as stack:
        namespace = namespace_of(model, revision="measured")
        token = namespace.geometry.token_bytes
        for preset in PRESETS:
            settings = {
                "storage.cpu.size": _DRAM_TOKENS * token,
                "storage.disk.path": str(home / preset),
                "storage.disk.size": _DISK_TOKENS * token,
                "blending.enabled": True,
                "autopilot.preset": preset,
            }
            engine = stack.enter_context(CacheEngine(namespace, load_config(environ={}, overrides=settings)))
            made[preset] = Contender(model, tokenizer, engine)
            assert made[preset].connector
            stack.callback(made[preset].connector.close)  # type: ignore[union-attr]
        yield made


def run_autopilot(directory: Path | None, count: int, out: Path | None, tick: Tick, seed: int = 0) -> dict[str, Any]:
    """Asks `count` requests of every contender, who is first in turns. out: written as it goes, so that a run that is
    stopped has a result. Raises CairnError as its parts do.
    """
    torch.set_num_threads(1)  # two would wait for each other, and copies have a core of their own
    home = directory or fetch_model(default_cache_dir(), Screen(quiet=True))
    model, tokenizer = open_model(home)
    with (
        tempfile.TemporaryDirectory(prefix="cairn-autopilot-") as work,
        contenders(model, tokenizer, Path(work)) as every,
    ):
        blender = every[AUTOPILOT].connector.blender  # type: ignore[union-attr]
        assert blender
        requests = list(Workload(tokenizer, blender.separator, seed).requests(count))
        for one in every.values():
            one.ask(list(range(100, 164)))
        result: dict[str, Any] = {"model": NAME if directory is None else directory.name, "threads": 1}
        result |= {"prompt_tokens": lengths(requests)}
        for found in _measured(requests, every):
            tick(found["requests"], count)
            result |= found
            if out:
                out.write_text(json.dumps({**result, "machine": machine()}, indent=2))
    return result


def _measured(requests: list[Request], every: dict[str, Contender]) -> Iterator[dict[str, Any]]:
    """What is found so far, every few requests and at the end."""
    visits: dict[str, list[Visit]] = {name: [] for name in every}
    names = list(every)
    for i, request in enumerate(requests):
        turn = i % len(names)
        for name in [*names[turn:], *names[:turn]]:
            visits[name].append(every[name].ask(request.ids))
        if (i + 1) % _STEP == 0 or i + 1 == len(requests):
            found = verdict([one.kind for one in requests[: i + 1]], visits)
            engine = every[AUTOPILOT].engine
            yield found | {"decisions": engine.get_stats()["decisions"] if engine else {}}
