"""Counters: what an engine counts about itself, in plain Python ints.

One `Metrics` an engine, and nothing global. A count costs less than a microsecond and is made for a request or a batch,
not for each block. What a tier counts itself (residents, evictions, queue depth, breaker) is read from its `stats` when
somebody looks (`watch`), so it costs nothing until then. `cairn.observe.prometheus` shows all of it to Prometheus.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Literal

#: A figure, or figures by label value, a level a label: {"hit_tokens": {"dram": 512}, "lookups": 3}.
Figures = dict[str, "float | Figures"]

Direction = Literal["load", "store"]


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

    def value(self, **labels: str) -> float:
        """The sum over every combination that has these labels' values; without labels, over all."""
        wanted = [(i, labels[name]) for i, name in enumerate(self.labels) if name in labels]
        return sum(amount for values, amount in self.samples() if all(values[i] == value for i, value in wanted))

    def samples(self) -> list[tuple[tuple[str, ...], float]]:
        """(values of the labels, sum) of every combination counted so far."""
        with self._lock:
            return list(self._sums.items())

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


class Pair:
    """Two sums that belong together, a pair for each combination of labels' values. Thread-safe."""

    __slots__ = ("_first", "_second", "help", "labels", "name")

    def __init__(self, name: str, help: str, *labels: str) -> None:
        self.name = name
        self.help = help
        self.labels = labels
        self._first = Counter(name, help, *labels)
        self._second = Counter(name, help, *labels)

    def add(self, first: float, second: float, **labels: str) -> None:
        self._first.add(first, **labels)
        self._second.add(second, **labels)

    def samples(self) -> list[tuple[tuple[str, ...], float, float]]:
        """(values of the labels, first sum, second sum) of every combination so far."""
        second = dict(self._second.samples())
        return [(values, amount, second.get(values, 0.0)) for values, amount in self._first.samples()]

    def sums(self, **labels: str) -> tuple[float, float]:
        """Both over every combination that has these labels' values."""
        return self._first.value(**labels), self._second.value(**labels)


class Ratio(Pair):
    """The first sum over the second one."""

    def value(self, **labels: str) -> float:
        """Over every combination that has these labels' values; 0 before there is any."""
        above, below = self.sums(**labels)
        return above / below if below else 0.0

    def figures(self) -> Figures:
        return {".".join(values): first / second for values, first, second in self.samples() if second}


class Summary(Pair):
    """How often something happened, and the sum of what was measured each time."""

    def observe(self, amount: float, **labels: str) -> None:
        self.add(1, amount, **labels)

    def figures(self) -> Figures:
        return {".".join(values): {"count": first, "sum": second} for values, first, second in self.samples()}


class Counted:
    """A set of counters, which a subclass makes before it calls __init__, and what is watched beside them.

    Thread-safe.
    """

    def __init__(self) -> None:
        self.counters = tuple(value for value in vars(self).values() if isinstance(value, Counter))
        self.pairs = tuple(value for value in vars(self).values() if isinstance(value, Ratio | Summary))
        self._watched: dict[str, Callable[[], Mapping[str, float]]] = {}

    def watch(self, tier: str, stats: Callable[[], Mapping[str, float]]) -> None:
        """Makes a tier's own figures part of the snapshot: `stats` is called whenever one is taken, from any thread.

        Names carry their unit as suffix; those that end in `_total` only grow.
        """
        self._watched[tier] = stats

    def tiers(self) -> dict[str, Mapping[str, float]]:
        """The figures of every watched tier, read now."""
        return {tier: stats() for tier, stats in list(self._watched.items())}

    def snapshot(self) -> Figures:
        """All figures now: every counter under its name, and under "tiers" what the tiers say of themselves."""
        figures: Figures = {one.name: one.figures() for one in (*self.counters, *self.pairs)}
        figures["tiers"] = {tier: dict(stats) for tier, stats in self.tiers().items()}
        return figures


class Metrics(Counted):
    """Everything one engine counts. Thread-safe."""

    def __init__(self) -> None:
        self.lookups = Counter("lookups", "Requests looked up.")
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
        self.decompression = Summary("decompression_duration_seconds", "Time that decoding an object took.", "tier")
        self.blend_lookups = Counter("blend_lookups", "Chunks, and their tokens, looked up to be blended.", "unit")
        self.blend_hits = Counter("blend_hits", "Chunks, and their tokens, of those that were found.", "unit")
        super().__init__()

    def transferred(self, tier: str, direction: Direction, amount: int, seconds: float) -> None:
        """Counts one batch of `amount` bytes that took `seconds`."""
        self.transfers.add(1, tier=tier, direction=direction)
        self.transfer_bytes.add(amount, tier=tier, direction=direction)
        self.transfer_seconds.add(seconds, tier=tier, direction=direction)
