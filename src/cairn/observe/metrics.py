"""Counters: what an engine counts about itself, in plain Python ints.

One `Metrics` an engine, and nothing global. A count costs less than a microsecond and is made for a request or a batch,
not for each block. What a tier counts itself (residents, evictions, queue depth, breaker) is read from its `stats` when
somebody looks (`watch`), so it costs nothing until then. `cairn.observe.prometheus` shows all of it to Prometheus.
"""

import itertools
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

#: A figure, or figures by label value, a level a label: {"hit_tokens": {"dram": 512}, "lookups": 3}.
Figures = dict[str, "float | Figures"]

Direction = Literal["load", "store"]

#: Upper bounds of buckets, from what copying a layer takes to what no request waits for.
SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Counter:
    """A sum that only grows, one for each combination of its labels' values.

    name: the unit last, no prefix (`hit_tokens`); labels: the labels' names. Thread-safe.
    """

    __slots__ = ("_lock", "_sums", "help", "labels", "name")

    def __init__(self, name: str, help: str, *labels: str) -> None:
        self.name = name
        self.help = help
        self.labels = labels
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, ...], float] = {}

    def add(self, amount: float = 1, **labels: str) -> None:
        """Adds `amount` (>= 0) under the labels' values, all of which must be given (KeyError otherwise)."""
        values = tuple([labels[name] for name in self.labels])
        with self._lock:
            self._sums[values] = self._sums.get(values, 0) + amount

    def count(self, *values: str) -> None:
        """Adds one under the labels' values in their order: for paths of a few microseconds."""
        with self._lock:
            self._sums[values] = self._sums.get(values, 0) + 1

    def value(self, **labels: str) -> float:
        """The sum over every combination that has these labels' values; without labels, over all."""
        wanted = [(i, labels[name]) for i, name in enumerate(self.labels) if name in labels]
        return sum(amount for values, amount in self.samples() if all(values[i] == value for i, value in wanted))

    def samples(self) -> list[tuple[tuple[str, ...], float]]:
        """(values of the labels, sum) of every combination counted so far."""
        with self._lock:
            return list(self._sums.items())

    def forget(self, label: str, value: str) -> None:
        """Leaves out every combination with this label's value from now on; nothing where there is no such label."""
        with self._lock:
            _forget(self._sums, self.labels, label, value)

    def figures(self) -> "float | Figures":
        """The sums as nested dicts, a level a label."""
        if not self.labels:
            return self.value()
        root: Figures = {}
        for values, amount in self.samples():
            level = root
            for value in values[:-1]:
                below = level.setdefault(str(value), {})
                assert isinstance(below, dict)
                level = below
            level[str(values[-1])] = amount
        return root


class Ticks(Counter):
    """A counter without labels for paths of a few microseconds: `tick` adds one in 50 ns, without a lock."""

    __slots__ = ("_ticks", "tick")

    def __init__(self, name: str, help: str) -> None:
        super().__init__(name, help)
        self._ticks = itertools.count()  # the one sum in Python that threads may add to and that needs no lock
        self.tick = self._ticks.__next__

    def samples(self) -> list[tuple[tuple[str, ...], float]]:
        ticks = int(repr(self._ticks).removeprefix("count(").removesuffix(")"))  # reading takes none away
        return [((), ticks + sum(amount for _, amount in super().samples()))]


class Ratio:
    """One sum over another, for each combination of labels' values. Thread-safe."""

    __slots__ = ("_above", "_below", "help", "labels", "name")

    def __init__(self, name: str, help: str, *labels: str) -> None:
        self.name = name
        self.help = help
        self.labels = labels
        self._above = Counter(name, help, *labels)
        self._below = Counter(name, help, *labels)

    def add(self, above: float, below: float, **labels: str) -> None:
        self._above.add(above, **labels)
        self._below.add(below, **labels)

    def samples(self) -> list[tuple[tuple[str, ...], float]]:
        """(values of the labels, ratio) of every combination that has one."""
        below = dict(self._below.samples())
        return [(values, above / below[values]) for values, above in self._above.samples() if below.get(values)]

    def value(self, **labels: str) -> float:
        """Over every combination that has these labels' values; 0 before there is any."""
        below = self._below.value(**labels)
        return self._above.value(**labels) / below if below else 0.0

    def figures(self) -> Figures:
        return {".".join(values): ratio for values, ratio in self.samples()}


class Histogram:
    """How often something took how long, in buckets, for each combination of labels' values.

    buckets: their upper bounds, ascending; beyond the last there is one without. Thread-safe.
    """

    __slots__ = ("_cells", "_lock", "buckets", "help", "labels", "name")

    def __init__(self, name: str, help: str, *labels: str, buckets: Sequence[float] = SECONDS) -> None:
        self.name = name
        self.help = help
        self.labels = labels
        self.buckets = tuple(buckets)
        self._lock = threading.Lock()
        self._cells: dict[tuple[str, ...], list[float]] = {}

    def observe(self, amount: float, count: int = 1, **labels: str) -> None:
        """Counts `count` cases of `amount` each."""
        values = tuple([labels[name] for name in self.labels]) if self.labels else ()
        bucket = bisect_left(self.buckets, amount)
        with self._lock:
            cell = self._cells.get(values)
            if cell is None:
                cell = self._cells[values] = [0.0] * (len(self.buckets) + 2)
            cell[bucket] += count
            cell[-1] += amount * count

    def samples(self) -> list[tuple[tuple[str, ...], list[float]]]:
        """(values of the labels, cases in each bucket and at last the sum) of every combination so far."""
        with self._lock:
            return [(values, list(cell)) for values, cell in self._cells.items()]

    def forget(self, label: str, value: str) -> None:
        """As `Counter.forget`."""
        with self._lock:
            _forget(self._cells, self.labels, label, value)

    def sums(self, **labels: str) -> tuple[float, float]:
        """(cases, sum) over every combination that has these labels' values."""
        wanted = [(i, labels[name]) for i, name in enumerate(self.labels) if name in labels]
        cells = [cell for values, cell in self.samples() if all(values[i] == value for i, value in wanted)]
        return sum(sum(cell[:-1]) for cell in cells), sum(cell[-1] for cell in cells)

    def figures(self) -> Figures:
        return {".".join(values): {"count": sum(cell[:-1]), "sum": cell[-1]} for values, cell in self.samples()}


class Counted:
    """A set of counters, which a subclass makes before it calls __init__, and what is watched beside them.

    Thread-safe.
    """

    def __init__(self) -> None:
        self.counters = tuple(value for value in vars(self).values() if isinstance(value, Counter))
        self.ratios = tuple(value for value in vars(self).values() if isinstance(value, Ratio))
        self.histograms = tuple(value for value in vars(self).values() if isinstance(value, Histogram))
        self._watched: dict[str, Callable[[], Mapping[str, float]]] = {}

    def watch(self, tier: str, stats: Callable[[], Mapping[str, float]]) -> None:
        """Makes a tier's own figures part of the snapshot: `stats` is called whenever one is taken, from any thread.

        Names carry their unit as suffix; those that end in `_total` only grow.
        """
        self._watched[tier] = stats

    def forget(self, label: str, value: str) -> None:
        """Leaves out what was counted under this label's value: whoever it names is gone, and may never come back."""
        every: tuple[Counter | Histogram, ...] = (*self.counters, *self.histograms)
        for one in every:
            one.forget(label, value)

    def tiers(self) -> dict[str, Mapping[str, float]]:
        """The figures of every watched tier, read now."""
        return {tier: stats() for tier, stats in list(self._watched.items())}

    def snapshot(self) -> Figures:
        """All figures now: every counter under its name, and under "tiers" what the tiers say of themselves."""
        every: tuple[Counter | Ratio | Histogram, ...] = (*self.counters, *self.ratios, *self.histograms)
        figures: Figures = {one.name: one.figures() for one in every}
        figures["tiers"] = {tier: dict(stats) for tier, stats in self.tiers().items()}
        return figures


def _forget(kept: dict[tuple[str, ...], Any], labels: Sequence[str], label: str, value: str) -> None:
    if label in labels:
        at = labels.index(label)
        for values in [values for values in kept if values[at] == value]:
            del kept[values]


class Metrics(Counted):
    """Everything one engine counts. Thread-safe."""

    def __init__(self) -> None:
        #: A gauge that is 1, which is how Prometheus has texts.
        self.identity = Ratio("engine_info", "1: what its blocks are named after.", "model", "revision", "geometry")
        self.lookups = Ticks("lookups", "Requests looked up.")
        self.hit_tokens = Counter("hit_tokens", "Tokens served from a tier.", "tier")
        self.miss_tokens = Counter("miss_tokens", "Tokens asked for and not served, by reason.", "reason")
        self.stored_tokens = Counter("stored_tokens", "Tokens that became resident in a tier.", "tier")
        self.skipped_tokens = Counter("skipped_tokens", "Tokens offered to a tier and not stored.", "tier", "reason")
        self.transfers = Counter("transfers", "Batches moved.", "tier", "direction")
        self.transfer_bytes = Counter("transfer_bytes", "Bytes moved.", "tier", "direction")
        self.transfer_seconds = Counter(
            "transfer_seconds", "Time spent moving, summed over batches.", "tier", "direction"
        )
        self.failures = Counter("failures", "Operations of a tier that failed.", "tier", "reason")
        self.compression = Ratio("compression_ratio", "Bytes of blocks over bytes they were stored in.", "tier")
        self.decompression = Histogram("decompression_duration_seconds", "Time that decoding an object took.", "tier")
        self.decisions = Counter("decisions", "Decisions of the autopilot.", "kind", "choice", "reason")
        self.blend_lookups = Counter("blend_lookups", "Chunks, and their tokens, looked up to be blended.", "unit")
        self.blend_hits = Counter("blend_hits", "Chunks, and their tokens, of those that were found.", "unit")
        self.layerwise = Histogram("layerwise_load_latency_seconds", "Time that one layer of a layerwise load took.")
        super().__init__()

    def transferred(self, tier: str, direction: Direction, amount: int, seconds: float) -> None:
        """Counts one batch of `amount` bytes that took `seconds`."""
        self.transfers.add(1, tier=tier, direction=direction)
        self.transfer_bytes.add(amount, tier=tier, direction=direction)
        self.transfer_seconds.add(seconds, tier=tier, direction=direction)
