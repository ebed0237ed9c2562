"""`cairn bench machine`: what a real stack takes for a prefill, a decode and loads, as `cairn plan --machine` wants it.

The stack is Transformers on the CPU with a `CairnConnector`: DRAM and disk. Visits of prompts that are new, in DRAM and
on disk take turns, and one fit over all of them tells

    ttft = fixed + token n + attention pairs + (a load from DRAM: latency + bytes / speed) + (the same from disk)
"""

import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from cairn.cli.demo.model import NAME, default_cache_dir, fetch_model, open_model
from cairn.cli.demo.show import Screen
from cairn.connect.transformers import CairnCache, CairnConnector
from cairn.kv import KVGeometry
from cairn.plan.cost import OnlineFit, Work
from cairn.sim.machine import Link, Machine

ANSWER = 12
_LENGTHS = (64, 224, 480, 960)
_MORE = 32  # tokens that a prompt has when it comes back
_FASTEST = 1e12  # bytes a second, where a load costs less than can be measured


class Visit(NamedTuple):
    """A request that was answered. reused: tokens that were loaded, by tier. cpu_s: the first two by the processor time
    of this process, which other work on the machine changes little.
    """

    ttft_s: float
    total_s: float
    cpu_s: tuple[float, float]
    prompt: int
    answer: list[int]
    reused: dict[str, int]

    def by_cpu(self) -> "Visit":
        return self._replace(ttft_s=self.cpu_s[0], total_s=self.cpu_s[1])


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when the first new token is out; the prompt comes first."""

    def __init__(self) -> None:
        self.puts = 0
        self.first = self.first_cpu = 0.0

    def put(self, _: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:
            self.first, self.first_cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Nothing is held back."""


def visit(model: Any, ids: list[int], answer: int, cache_of: Callable[[torch.Tensor], Any]) -> Visit:
    """Asks for exactly `answer` tokens, greedily; the clock includes the search for a prefix, and storing.

    cache_of: makes the cache of a prompt, ids [1, n]: a `CairnCache`, or one of Transformers.
    """
    inputs, clock = torch.tensor([ids]), _Clock()
    began, began_cpu = time.perf_counter(), time.process_time()
    cache = cache_of(inputs)
    with cache if isinstance(cache, CairnCache) else nullcontext():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            past_key_values=cache,
            max_new_tokens=answer,
            min_new_tokens=answer,
            do_sample=False,
            streamer=clock,
        )
    return Visit(
        clock.first - began,
        time.perf_counter() - began,
        (clock.first_cpu - began_cpu, time.process_time() - began_cpu),
        len(ids),
        output[0, len(ids) :].tolist(),
        dict(cache.reused_by_tier) if isinstance(cache, CairnCache) else {},
    )


class Stack:
    """A model with a cache of its own, asked one request at a time. A context manager."""

    def __init__(self, model: Any, directory: Path, dram_bytes: int, disk_bytes: int) -> None:
        self._model = model
        self._connector = CairnConnector.open(
            model, dram_bytes=dram_bytes, disk_path=directory, disk_bytes=disk_bytes, revision="measured"
        )
        self.geometry = self._connector.engine.geometry

    def ask(self, ids: list[int], answer: int = ANSWER) -> Visit:
        """See `visit`."""
        return visit(self._model, ids, answer, self._connector.cache)

    def flush(self) -> None:
        """Waits until the disk has everything."""
        self._connector.engine.flush(120.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connector.close()


class Calibration:
    """Measures a stack, a visit at a time, so that other work can be measured in turns with it."""

    def __init__(self, stack: Stack, seed: int = 0) -> None:
        """The stack's DRAM must hold the longest prompt (992 tokens) twice, and not all lengths together twice."""
        self._stack = stack
        self._rng = np.random.default_rng(seed)
        self._known: deque[list[int]] = deque()
        self._todo: deque[tuple[str, int]] = deque()
        self.visits: list[Visit] = []

    def visit(self) -> Visit:
        """A new prompt; or the last one again, from DRAM; or an old one, from disk."""
        if not self._todo:
            self._todo.extend((kind, n) for n in _LENGTHS for kind in ("new", "dram", "disk"))
        kind, length = self._todo.popleft()
        if kind == "new":
            ids = self._tokens(length)
            self._known.append(ids)
        else:
            ids = self._known[-1] if kind == "dram" else self._known[0]
            if len(self._known) > len(_LENGTHS) and kind == "disk":
                self._known.popleft()
            ids = ids + self._tokens(_MORE)
        self.visits.append(self._stack.ask(ids))
        self._stack.flush()
        return self.visits[-1]

    def _tokens(self, count: int) -> list[int]:
        ids: list[int] = self._rng.integers(1000, 40_000, count).tolist()
        return ids


def machine_of(visits: Sequence[Visit], geometry: KVGeometry) -> Machine:
    """What visits say: those of two rounds (24) at least."""
    size = geometry.token_bytes
    fit = OnlineFit(7, window=len(visits))
    for one in visits:
        fit.observe(_features(one, size), one.ttft_s)
    # The fit weighs relative errors, so it is low where noise is one-sided; the sums shall be equal.
    level = sum(one.ttft_s for one in visits) / sum(fit.predict(_features(one, size)) for one in visits)
    fixed, token, pair, dram, dram_byte, disk, disk_byte = (level * fit.coefficients()).tolist()
    return Machine(
        floor_s=sum(one.total_s - one.ttft_s for one in visits) / sum(len(one.answer) - 1 for one in visits),
        fixed_s=fixed,
        token_s=token,
        attention_s=pair,
        read_s=0.0,  # in the floor
        token_bytes=size,
        blocks=1 << 10,
        block_tokens=geometry.block_tokens,
        chunk=1 << 20,
        running=1,
        prefix_cache=False,
        links={
            "dram": Link(dram, 1 / max(dram_byte, 1 / _FASTEST)),
            "disk": Link(disk, 1 / max(disk_byte, 1 / _FASTEST)),
        },
    )


def _features(visit: Visit, token_bytes: int) -> tuple[float, ...]:
    reused = sum(visit.reused.values())
    dram, disk = (visit.reused.get(tier, 0) for tier in ("dram", "disk"))
    work = Work.of([(visit.prompt - reused, reused)])
    return (1.0, *work, float(dram > 0), float(dram * token_bytes), float(disk > 0), float(disk * token_bytes))


def load_model(directory: Path | None) -> Any:
    """SmolLM2-135M-Instruct, or the model in a directory in Hugging Face format; float32, on the CPU."""
    home = directory or fetch_model(default_cache_dir(), Screen(quiet=True))
    return open_model(home)[0]


def run_machine(directory: Path | None, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Measures for `rounds` rounds of twelve visits. Raises CairnError as its parts do."""
    model = load_model(directory)
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cairn-machine-")))
        asked = stack.enter_context(Stack(model, home, *probe_sizes(model)))
        asked.ask(list(range(100, 164)), 2)
        calibration = Calibration(asked, seed)
        for _ in range(12 * rounds):
            calibration.visit()
        calibrated = machine_of(calibration.visits, asked.geometry)
    return {
        "model": NAME if directory is None else directory.name,
        "threads": torch.get_num_threads(),
        "visits": len(calibration.visits),
        "calibrated": asdict(calibrated),
    }


def probe_sizes(model: Any) -> tuple[int, int]:
    """Bytes of DRAM and disk for a `Calibration` of a model: DRAM for 2,200 tokens, so that old prompts are on disk."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * dim * 4
    return 2200 * token, 20_000 * token
