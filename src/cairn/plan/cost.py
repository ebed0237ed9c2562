"""Cost models fitted online: what recomputing and what loading a number of tokens takes, in seconds."""

import threading
from collections import deque
from itertools import combinations
from typing import NamedTuple

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


class RecomputeCost:
    """Prefill time of n tokens behind ctx others: t = a + b n + c n (ctx + n / 2).

    The last term is attention, n queries over on average ctx + n/2 keys.
    """

    def __init__(self, window: int = 64) -> None:
        self._fit = OnlineFit(3, window)

    @property
    def ready(self) -> bool:
        return self._fit.ready

    @property
    def horizon(self) -> float:
        """Up to how many tokens a prefill can be predicted: twice the longest one measured, 0 before there is a fit.

        After hits only their short rests have been measured, which say next to nothing about a long prompt.
        """
        return 2 * self._fit.largest(1) if self.ready else 0.0

    def knows(self, tokens: int) -> bool:
        """Whether a prefill of so many tokens can be predicted."""
        return tokens <= self.horizon

    def coefficients(self) -> Vector:
        """a, b and c [3]. Call only when `ready`."""
        return self._fit.coefficients()

    def observe(self, tokens: int, context: int, seconds: float) -> None:
        """A measured prefill of `tokens` behind `context` tokens."""
        self._fit.observe(self._of(tokens, context), seconds)

    def seconds(self, tokens: int, context: int) -> float:
        """Expected seconds of a prefill; 0 tokens cost nothing."""
        return self._fit.predict(self._of(tokens, context)) if tokens else 0.0

    @staticmethod
    def _of(tokens: int, context: int) -> tuple[float, float, float]:
        return 1.0, float(tokens), tokens * (context + tokens / 2)


class LoadCost:
    """Load time of n bytes from one tier: t = latency + n / bandwidth."""

    def __init__(self) -> None:
        self._fit = OnlineFit(2)

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


class Estimates(NamedTuple):
    """What a cost model has learnt, for people: seconds and bytes per second; None before there is an estimate."""

    prefill_1k_s: float | None
    load_bytes_per_s: dict[str, float | None]


class CostModel:
    """All that the planner knows of one engine: its prefill and its tiers."""

    def __init__(self) -> None:
        self.recompute = RecomputeCost()
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
