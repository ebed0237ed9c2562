"""What the demo found out, as values: for the table, the plot and `--json`."""

import os
import platform
from pathlib import Path
from statistics import median

import msgspec

from cairn.cli.demo.events import Answer


class Question(msgspec.Struct):
    """One question and the requests it was asked in. plain: without Cairn; cold: only of the first question."""

    text: str
    plain: Answer
    dram: Answer
    disk: Answer
    cold: Answer | None = None

    @property
    def identical(self) -> bool:
        """Whether every answer is the plain one, token by token."""
        others = [answer for answer in (self.cold, self.dram, self.disk) if answer]
        return all(answer.token_ids == self.plain.token_ids for answer in others)


class Summary(msgspec.Struct):
    """Medians over the questions. Shares are of the plain TTFT."""

    ttft_plain_s: float
    ttft_cold_s: float
    ttft_dram_s: float
    ttft_disk_s: float
    dram_share: float
    disk_share: float
    identical: bool


class Report(msgspec.Struct):
    """A whole run. machine, date: where and when; flush_s: seconds until all stored KV was on disk."""

    machine: str
    date: str
    model: str
    dtype: str
    text: str
    license: str
    prompt_tokens: int
    kv_token_bytes: int
    versions: dict[str, str]
    questions: list[Question]
    flush_s: float

    def summary(self) -> Summary:
        """The figures that the demo is about."""
        plain = median(question.plain.ttft_s for question in self.questions)
        dram = median(question.dram.ttft_s for question in self.questions)
        disk = median(question.disk.ttft_s for question in self.questions)
        return Summary(
            ttft_plain_s=plain,
            ttft_cold_s=median(question.cold.ttft_s for question in self.questions if question.cold),
            ttft_dram_s=dram,
            ttft_disk_s=disk,
            dram_share=dram / plain,
            disk_share=disk / plain,
            identical=all(question.identical for question in self.questions),
        )

    def to_json(self) -> str:
        """Summary and all, indented."""
        summary = msgspec.to_builtins(self.summary())
        document = {"summary": summary, **msgspec.to_builtins(self)}
        return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()


def describe_machine() -> str:
    """The processor and how many of its cores this process may use."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"
