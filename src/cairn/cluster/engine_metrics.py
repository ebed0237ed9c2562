"""An engine's load, read from its /metrics: vLLM's names (`vllm/v1/metrics/loggers.py`), older ones too."""

from collections import deque
from collections.abc import Mapping
from typing import Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from cairn.cluster.cache_metrics import WANTED, Figures, figures_of
from cairn.cluster.values import Load

#: Seconds over which TTFT and TPOT are means.
WINDOW_S: Final = 30.0

_RUNNING: Final = "vllm:num_requests_running"
_WAITING: Final = "vllm:num_requests_waiting"
_USAGE: Final = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_TTFT: Final = "vllm:time_to_first_token_seconds"
_TPOT: Final = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
_PROMPT: Final = "vllm:prompt_tokens_total"
#: Gauges whose labels are what an engine says of itself: vLLM, and Cairn in it.
_INFO: Final = ("vllm:cache_config_info", "cairn_engine_info")


class Scrape(NamedTuple):
    """sums: samples by name, added up over their labels (data-parallel ranks). peaks: their maxima.

    says: of itself, by label (`block_size`, `revision`, `geometry`). cache: of its tiers, see `cache_metrics`.
    """

    sums: Mapping[str, float]
    peaks: Mapping[str, float]
    says: Mapping[str, str]
    cache: Figures

    @property
    def block_tokens(self) -> int:
        """0: not told."""
        told = self.says.get("block_size", "")
        return int(told) if told.isdecimal() and len(told) < 10 else 0


def parse(text: str) -> Scrape:
    """A scrape in Prometheus' text format. Raises ValueError where it is none."""
    sums: dict[str, float] = {}
    peaks: dict[str, float] = {}
    says: dict[str, str] = {}
    wanted = "\n".join(filter(_wanted, text.splitlines())) + "\n"
    try:
        samples = [sample for family in text_string_to_metric_families(wanted) for sample in family.samples]
    except IndexError as error:  # of the library's, for labels that break off
        raise ValueError(f"labels that are none: {error}") from None
    for sample in samples:
        if sample.name in _INFO:
            says |= sample.labels
        sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        peaks[sample.name] = max(peaks.get(sample.name, sample.value), sample.value)
    return Scrape(sums, peaks, says, figures_of(samples))


class LoadMeter:
    """Makes reports of scrapes. One for each life of an engine."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._scrapes: deque[tuple[float, Scrape]] = deque()

    def restarted(self, scrape: Scrape) -> bool:
        """Whether this scrape is of another process than the last: a counter has gone back."""
        return bool(self._scrapes) and scrape.sums.get(_PROMPT, 0.0) < self._scrapes[-1][1].sums.get(_PROMPT, 0.0)

    def report(self, scrape: Scrape, incarnation: str, now: float, at: float) -> Load:
        """now: seconds on a monotonic clock. at: since the epoch."""
        while len(self._scrapes) > 1 and now - self._scrapes[1][0] >= self._window_s:
            self._scrapes.popleft()
        oldest = self._scrapes[0][1] if self._scrapes else None
        self._scrapes.append((now, scrape))
        usage = next((scrape.peaks[name] for name in _USAGE if name in scrape.peaks), 0.0)
        tpot = next((name for name in _TPOT if f"{name}_count" in scrape.sums), _TPOT[0])
        return Load(
            incarnation=incarnation,
            time=at,
            running=_count(scrape.sums.get(_RUNNING, 0.0)),
            waiting=_count(scrape.sums.get(_WAITING, 0.0)),
            kv_usage=min(1.0, max(0.0, usage)) if usage == usage else 0.0,
            ttft_s=_mean(scrape, oldest, _TTFT),
            tpot_s=_mean(scrape, oldest, tpot),
        )


def _mean(scrape: Scrape, oldest: Scrape | None, name: str) -> float | None:
    """Of a histogram, over what was observed since the oldest scrape."""
    if oldest is None:
        return None
    before = oldest.sums
    count = scrape.sums.get(f"{name}_count", 0.0) - before.get(f"{name}_count", 0.0)
    total = scrape.sums.get(f"{name}_sum", 0.0) - before.get(f"{name}_sum", 0.0)
    return total / count if count > 0 and total >= 0 else None


def _count(value: float) -> int:
    return int(value) if 0 <= value < 1e12 else 0


def _wanted(line: str) -> bool:
    """Histograms' buckets are most of a scrape, and not needed."""
    return line.startswith(("vllm:", *_INFO, *WANTED)) and "_bucket{" not in line
