"""Cost models fitted online: what recomputing and what loading a number of tokens takes, in seconds."""

import threading
from collections import deque
from collections.abc import Iterable
from itertools import combinations
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


class OnlineFit:
    """Non-negative least squares over the latest observations: y ~ sum of coefficient * feature.

    Weighted by 1 / y, so that a relative error counts alike for short and long calls. With three features at most,
    trying every subset is the whole of the non-negativity: the best subset whose coefficients are all positive wins.
    Thread-safe. `ready` once enough was seen to trust it.
    """

    def __init__(self, features: int, window: int = 64) -> None:
        self._features = features
        self._rows: deque[tuple[float, ...]] = deque(maxlen=window)
        self._coefficients: Vector | None = None
        self._lock = threading.Lock()

    @property
    def ready(self) -> bool:
        return len(self._rows) >= 2

    def largest(self, feature: int) -> float:
        """The largest value that a feature had in the observations."""
        with self._lock:
            return max((row[feature] for row in self._rows), default=0.0)

    def observe(self, features: tuple[float, ...], seconds: float) -> None:
        """One measured call: its features and how long it took (more than 0 seconds, else ignored)."""
        if seconds > 0:
            with self._lock:
                self._rows.append((*features, seconds))
                self._coefficients = None

    def forget(self) -> None:
        """Drops the oldest observation, but not the last."""
        with self._lock:
            if len(self._rows) > 1:
                self._rows.popleft()
                self._coefficients = None

    def predict(self, features: tuple[float, ...]) -> float:
        """Expected seconds. Call only when `ready`."""
        return float(np.dot(self.coefficients(), features))

    def coefficients(self) -> Vector:
        with self._lock:
            if self._coefficients is None:
                self._coefficients = self._fit()
            return self._coefficients

    def _fit(self) -> Vector:
        table = np.array(self._rows)
        weighted = table[:, :-1] / table[:, -1:]
        ones = np.ones(len(table))
        best, best_error = np.zeros(self._features), np.inf
        for size in range(1, self._features + 1):
            for columns in combinations(range(self._features), size):
                chosen = weighted[:, columns]
                solution = np.linalg.lstsq(chosen, ones, rcond=None)[0]
                error = float(np.sum((chosen @ solution - ones) ** 2))
                # A larger subset has to earn its place: a fit through noise extrapolates badly.
                if (solution >= 0).all() and error < best_error * (1 - 1e-3):
                    best, best_error = np.zeros(self._features), error
                    best[list(columns)] = solution
        return best


class Work(NamedTuple):
    """What an engine computes in one step: new tokens, and pairs of a query and a key that it attends to."""

    tokens: int
    pairs: float

    @classmethod
    def of(cls, chunks: Iterable[tuple[int, int]]) -> Self:
        """(tokens, context) of every request in the step: n queries see on average context + n / 2 keys."""
        tokens, pairs = 0, 0.0
        for new, context in chunks:
            tokens += new
            pairs += new * (context + new / 2)
        return cls(tokens, pairs)


class RecomputeCost:
    """Time of a step that computes n tokens and p pairs of attention: t = a + b n + c p.

    Linear, so that a step's requests add up: steps shared by several prefills and decodes are as good to learn from as
    one prefill alone. step_tokens: how many tokens one step of the engine computes at most; longer prompts take several
    steps. None: no limit.
    """

    def __init__(self, window: int = 64) -> None:
        self.step_tokens: int | None = None
        self._fit = OnlineFit(3, window)

    @property
    def ready(self) -> bool:
        return self._fit.ready

    @property
    def horizon(self) -> float:
        """Up to how many tokens a step can be predicted: twice the longest one measured, 0 before there is a fit.

        After hits only their short rests have been measured, which say next to nothing about a long prompt.
        """
        return 2 * self._fit.largest(1) if self.ready else 0.0

    def knows(self, tokens: int, context: int = 0) -> bool:
        """Whether a prefill of so many tokens behind `context` others can be predicted: each of its steps, also the
        last, which attends to most; up to four times the pairs of the largest one measured.
        """
        step = min(tokens, self.step_tokens or tokens)
        last = Work.of([(step, context + tokens - step)])
        return self.ready and step <= self.horizon and last.pairs <= 4 * self._fit.largest(2)

    def coefficients(self) -> Vector:
        """a, b and c [3]. Call only when `ready`."""
        return self._fit.coefficients()

    def observe(self, work: Work, seconds: float) -> None:
        """A measured step."""
        self._fit.observe((1.0, *work), seconds)

    def seconds(self, tokens: int, context: int) -> float:
        """Expected seconds of a prefill; 0 tokens cost nothing."""
        if not tokens:
            return 0.0
        steps = -(-tokens // self.step_tokens) if self.step_tokens else 1
        return self.seconds_of(Work.of([(tokens, context)]), steps)

    def seconds_of(self, work: Work, steps: int = 1) -> float:
        """Expected seconds of any work. Call only when `ready`."""
        return self._fit.predict((float(steps), *work))


class LoadCost:
    """Load time of n bytes from one tier: t = latency + n / bandwidth."""

    def __init__(self) -> None:
        # A tier's speed changes with what else uses it: few observations, so that it is soon noticed.
        self._fit = OnlineFit(2, window=16)

    @property
    def ready(self) -> bool:
        return self._fit.ready

    def coefficients(self) -> Vector:
        """Seconds of latency and seconds a byte [2]. Call only when `ready`."""
        return self._fit.coefficients()

    def observe(self, size: int, seconds: float) -> None:
        """A measured transfer of `size` bytes; none moved says nothing."""
        if size:
            self._fit.observe((1.0, float(size)), seconds)

    def seconds(self, size: int) -> float:
        """Expected seconds of a transfer; 0 bytes cost nothing."""
        return self._fit.predict((1.0, float(size))) if size else 0.0


class BlendCost:
    """How much longer blendings take than their work and their loads would by themselves. Thread-safe.

    A forward pass of its own, keys to turn and tokens to choose: one factor over all of it, 1 until it was measured
    and at least: where a device is told what to do and not waited for, less is measured than it takes.
    """

    def __init__(self) -> None:
        self._fit = OnlineFit(1, window=16)

    @property
    def factor(self) -> float:
        return max(1.0, self._fit.predict((1.0,))) if self._fit.ready else 1.0

    def observe(self, bare_s: float, seconds: float) -> None:
        """A blending that took `seconds`, of `bare_s` for its work and its loads."""
        if bare_s > 0:
            self._fit.observe((1.0,), seconds / bare_s)

    def declined(self) -> None:
        """It was left alone: what is not done is not measured, so that the oldest measurement is forgotten, and one
        bad hour does not end blending for ever.
        """
        self._fit.forget()


class Estimates(NamedTuple):
    """What a cost model has learnt, for people: seconds and bytes per second; None before there is an estimate."""

    prefill_1k_s: float | None
    load_bytes_per_s: dict[str, float | None]


class CostModel:
    """All that the planner knows of one engine: its prefill, its blending and its tiers."""

    def __init__(self) -> None:
        self.recompute = RecomputeCost()
        self.blend = BlendCost()
        self.load: dict[str, LoadCost] = {}

    def observe_load(self, tier: str, size: int, seconds: float) -> None:
        """A measured transfer of `size` bytes out of `tier`."""
        self.load.setdefault(tier, LoadCost()).observe(size, seconds)

    def load_seconds(self, tier: str, size: int) -> float:
        """Expected seconds to load from a tier; 0 until it has been measured, so that it will be."""
        cost = self.load.get(tier)
        return cost.seconds(size) if cost and cost.ready else 0.0

    def estimates(self) -> Estimates:
        mebi = 1 << 20
        prefill = self.recompute.seconds(1024, 0) if self.recompute.ready else None
        speeds: dict[str, float | None] = {}
        for tier, cost in self.load.items():
            seconds = cost.seconds(64 * mebi) if cost.ready else 0.0
            speeds[tier] = 64 * mebi / seconds if seconds > 0 else None
        return Estimates(prefill, speeds)
