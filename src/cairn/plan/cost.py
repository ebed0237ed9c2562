"""Cost models fitted online: what recomputing and what loading a number of tokens takes, in seconds."""

import math
import operator
import threading
from collections.abc import Iterable
from itertools import combinations
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Table = npt.NDArray[np.float64]


class OnlineFit:
    """Non-negative least squares over the latest observations: y ~ sum of coefficient * feature.

    Weighted by 1 / y, so that a relative error counts alike for short and long calls. With few features, trying every
    subset is the whole of the non-negativity: the best subset whose coefficients are all positive wins.
    Thread-safe. `ready` once enough was seen to trust it.
    """

    def __init__(self, features: int, window: int = 64) -> None:
        self._table: Table = np.empty((window, features + 1))  # features and seconds, the oldest first
        self._count = 0
        self._coefficients: Vector | None = None
        self._lock = threading.Lock()

    @property
    def ready(self) -> bool:
        return self._count >= 2

    def largest(self, feature: int) -> float:
        """The largest value that a feature had in the observations."""
        with self._lock:
            return float(self._rows()[:, feature].max(initial=0.0))

    def observe(self, features: tuple[float, ...], seconds: float) -> None:
        """One measured call: its features and how long it took (more than 0 seconds, else ignored)."""
        if seconds > 0:
            with self._lock:
                if self._count == len(self._table):
                    self._drop_oldest()
                self._table[self._count] = (*features, seconds)
                self._count += 1
                self._coefficients = None

    def forget(self) -> None:
        """Drops the oldest observation, but not the last."""
        with self._lock:
            if self._count > 1:
                self._drop_oldest()
                self._coefficients = None

    def predict(self, features: tuple[float, ...]) -> float:
        """Expected seconds. Call only when `ready`."""
        return float(np.dot(self.coefficients(), features))

    def coefficients(self) -> Vector:
        with self._lock:
            if self._coefficients is None:
                rows = self._rows()
                self._coefficients = _fitted(rows[:, :-1] / rows[:, -1:])
            return self._coefficients

    def _rows(self) -> Table:
        return self._table[: self._count]

    def _drop_oldest(self) -> None:
        self._count -= 1
        self._table[: self._count] = self._table[1 : self._count + 1]


#: A larger subset has to make the squared error smaller by this share, and by this much an observation: a fit through
#: noise extrapolates badly.
_EARNS, _EARNS_AT_LEAST = 1e-3, 1e-10

#: A feature that is the sum of others but for this share of its squared length tells nothing that they do not.
_NEW = 1e-10


def _fitted(rows: Table) -> Vector:
    """The coefficients [n], none negative, with which the columns of `rows` [m, n] best add up to 1.

    By the normal equations, in plain numbers: they are few, and a call of LAPACK takes longer than all of them.
    """
    lengths = np.sqrt(np.square(rows).sum(axis=0))
    lengths[lengths == 0.0] = 1.0
    scaled = rows / lengths  # pairs of tokens are a million times as many as tokens
    products, sums = (scaled.T @ scaled).tolist(), scaled.sum(axis=0).tolist()
    count = rows.shape[1]
    best, best_error = [0.0] * count, float(len(rows))
    for size in range(1, count + 1):
        # Of subsets that fit alike, as two observations do, the later features: what grows extrapolates better.
        for chosen in combinations(reversed(range(count)), size):
            found = _solved(products, sums, chosen)
            if found is None:
                continue
            # The squared error at a solution of the normal equations.
            error = len(rows) - sum(map(operator.mul, found, [sums[column] for column in chosen]))
            if error < best_error * (1 - _EARNS) - _EARNS_AT_LEAST * len(rows):
                best, best_error = [0.0] * count, error
                for column, value in zip(chosen, found, strict=True):
                    best[column] = value
    coefficients: Vector = np.array(best) / lengths
    return coefficients


def _solved(products: list[list[float]], sums: list[float], chosen: tuple[int, ...]) -> list[float] | None:
    """The normal equations of the chosen columns, by Cholesky's factors; None: no solution, or a negative one."""
    size = len(chosen)
    lower: list[list[float]] = []
    right: list[float] = []
    for i, column in enumerate(chosen):
        row: list[float] = []
        for j in range(i):
            row.append((products[column][chosen[j]] - sum(map(operator.mul, row, lower[j]))) / lower[j][j])
        rest = products[column][column] - sum(map(operator.mul, row, row))
        if rest <= _NEW:
            return None
        right.append((sums[column] - sum(map(operator.mul, row, right))) / math.sqrt(rest))
        lower.append([*row, math.sqrt(rest)])
    for i in reversed(range(size)):
        right[i] = (right[i] - sum(lower[k][i] * right[k] for k in range(i + 1, size))) / lower[i][i]
        if right[i] < 0.0:
            return None
    return right


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
    steps. None: no limit. stages: of a pipeline that a step passes through, the next one a stage behind it; what is
    observed is then the time of one stage. masks: attention behind a context computes all pairs and masks those that
    causality excludes, while without a context it leaves them out, as PyTorch's scaled_dot_product_attention does: a
    short hit before a long prompt then costs more than it spares.
    """

    def __init__(self, window: int = 64) -> None:
        self.step_tokens: int | None = None
        self.stages = 1
        self.masks = False
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
        last = self._last_step(tokens, context)
        return self.ready and last.tokens <= self.horizon and last.pairs <= 4 * self._fit.largest(2)

    def coefficients(self) -> Vector:
        """a, b and c [3]. Call only when `ready`."""
        return self._fit.coefficients()

    def work(self, tokens: int, context: int) -> Work:
        """Of one request in a step."""
        if self.masks and context:
            return Work(tokens, tokens * float(context + tokens))
        return Work.of([(tokens, context)])

    def observe(self, work: Work, seconds: float) -> None:
        """A measured step."""
        self._fit.observe((1.0, *work), seconds)

    def seconds(self, tokens: int, context: int) -> float:
        """Expected seconds of a prefill; 0 tokens cost nothing."""
        if not tokens:
            return 0.0
        steps = -(-tokens // self.step_tokens) if self.step_tokens else 1
        seconds = self.seconds_of(self.work(tokens, context), steps)
        if self.stages > 1:  # all steps pass through the first stage, the dearest then through the others
            seconds += (self.stages - 1) * self.seconds_of(self._last_step(tokens, context))
        return seconds

    def seconds_of(self, work: Work, steps: int = 1) -> float:
        """Expected seconds of any work on one stage. Call only when `ready`."""
        return self._fit.predict((float(steps), *work))

    def _last_step(self, tokens: int, context: int) -> Work:
        """A prefill's dearest step: as full as any, behind all others."""
        step = min(tokens, self.step_tokens or tokens)
        return self.work(step, context + tokens - step)


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
