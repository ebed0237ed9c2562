"""What a simulated instance takes for a step and for a load, in seconds: from measurements, of one machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import msgspec

from cairn.errors import InputError
from cairn.plan import CostModel, Work
from cairn.plan.schedule.base import TIERS


@dataclass(frozen=True, slots=True)
class Link:
    """The way out of a tier: a load of n bytes takes latency_s + n / bytes_s."""

    latency_s: float
    bytes_s: float

    def seconds(self, size: int) -> float:
        return self.latency_s + size / self.bytes_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """An engine on its GPU, with continuous batching and chunked prefill.

    step = max(floor_s, token_s (n + batch) + attention_s n (context + n / 2) + read_s (tokens attended) [+ fixed_s])

    n tokens of a prefill behind `context` others (without any, fixed_s does not count), and `batch` requests that
    decode one token each. links: to the tiers beyond the KV cache, by name; each instance has its own, and one load at
    a time.
    """

    floor_s: float  # of a step: launching kernels, sampling, the scheduler
    fixed_s: float = 0.0  # of a step that prefills, beside its work
    token_s: float
    attention_s: float  # a pair of query and key
    read_s: float  # of one token's KV
    token_bytes: int  # of KV a token
    blocks: int  # of KV that fit
    block_tokens: int = 512  # the trace's
    chunk: int = 2048  # tokens of a step
    running: int = 256  # requests at once
    prefix_cache: bool = True  # whether a request finds what others have left in the KV cache
    links: Mapping[str, Link] = field(default_factory=dict)

    def step_s(self, computed: int, attended: float, batch: int, read: int) -> float:
        """computed: tokens of prefill; attended: their pairs of query and key; read: tokens that the batch attends."""
        return max(self.floor_s, self.work_s(computed, attended, batch, read))

    def work_s(self, computed: int, attended: float, batch: int, read: int) -> float:
        """A step without its floor."""
        fixed = self.fixed_s if computed else 0.0
        return fixed + self.token_s * (computed + batch) + self.attention_s * attended + self.read_s * read

    def cost(self) -> CostModel:
        """The same as the planner of an engine knows it."""
        model = CostModel()
        for tokens in (512, 4096, 32768, 131_072):
            model.recompute.observe(Work.of([(tokens, 0)]), self.step_s(tokens, tokens * tokens / 2, 0, 0))
            for tier, link in self.links.items():
                model.observe_load(tier, tokens * self.token_bytes, link.seconds(tokens * self.token_bytes))
        return model

    @classmethod
    def of(cls, row: Mapping[str, Any], where: str) -> Self:
        """From a file's content; `where` names it in errors. Raises InputError."""
        known = {one.name for one in fields(cls)}
        wrong = sorted(set(row) - known) + sorted(set(row.get("links", ())) - set(TIERS[1:]))
        if wrong:
            raise InputError(f"{where}: unknown {wrong[0]}; known are {', '.join(sorted(known))}; links: {TIERS[1:]}")
        try:
            return msgspec.convert(row, cls)
        except msgspec.ValidationError as error:
            raise InputError(f"{where}: {error}") from None


#: vLLM 0.26 with Llama-3.1-8B in bf16 on one H200. Prefill and floor: the cold and GPU-hit times of
#: benchmarks/results/ttft_vllm.json, DRAM: the copy of that run (a test holds these to it); reads: 128 KiB a token at
#: the 4,220 GB/s that the GPU's memory moved; blocks: 100 GB. Disk: one NVMe with 2 MiB blocks, of another machine,
#: benchmarks/results/disk.json. Remote: 100 Gb/s, an assumption.
H200_8B = Machine(
    floor_s=0.032,
    token_s=2.238e-5,
    attention_s=9.13e-10,
    read_s=131_072 / 4.22e12,
    token_bytes=131_072,
    blocks=1_500,
    links={"dram": Link(1e-3, 55.3e9), "disk": Link(1e-3, 3.435e9), "remote": Link(1e-3, 12.5e9)},
)

MACHINES = {"h200-llama-8b": H200_8B}


def read_machine(name: str) -> Machine:
    """A preset by its name, or a JSON file: a machine's fields, or a result of `cairn bench machine`, which has them
    under "calibrated". Raises InputError.
    """
    if name in MACHINES:
        return MACHINES[name]
    try:
        row = msgspec.json.decode(Path(name).read_bytes())
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}; a machine is one of {', '.join(MACHINES)}, or a file") from None
    except msgspec.DecodeError as error:
        raise InputError(f"{name}: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{name}: a machine is a JSON object")
    return Machine.of(row.get("calibrated", row), name)
