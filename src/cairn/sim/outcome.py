"""What became of a simulated run, request by request, and its figures."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Of each request [requests]; NaN where it was shed. held_tokens: not computed, by the tier that had them."""

    arrived: npt.NDArray[np.float64]
    first: npt.NDArray[np.float64]
    last: npt.NDArray[np.float64]
    answer: npt.NDArray[np.int64]
    prompt_tokens: int  # of all that were served
    computed_tokens: int
    held_tokens: Mapping[str, int]

    @property
    def ttft_s(self) -> npt.NDArray[np.float64]:
        return self.first - self.arrived

    @property
    def tbt_s(self) -> npt.NDArray[np.float64]:
        """Mean time between the tokens of an answer; 0 where there is only one."""
        return (self.last - self.first) / np.maximum(1, self.answer - 1)

    @property
    def loaded_tokens(self) -> int:
        """Held in a tier beyond the KV cache."""
        return sum(tokens for tier, tokens in self.held_tokens.items() if tier != "vram")

    def good(self, ttft_slo_s: float, tbt_slo_s: float) -> int:
        """Requests within both bounds."""
        return int(np.count_nonzero((self.ttft_s <= ttft_slo_s) & (self.tbt_s <= tbt_slo_s)))

    def figures(self, seconds: float, ttft_slo_s: float, tbt_slo_s: float) -> dict[str, float]:
        """goodput: requests a second within both bounds, over `seconds`. shed, late and good: percent of all requests;
        computed, loaded: percent of prompt tokens.
        """
        ttft = self.ttft_s
        served = ttft[~np.isnan(ttft)]
        percent = 100 / len(ttft)
        tokens = 100 / max(1, self.prompt_tokens)
        good = self.good(ttft_slo_s, tbt_slo_s)
        return {
            "goodput": round(good / seconds, 1),
            "good_percent": round(percent * good, 1),
            "shed_percent": round(percent * (len(ttft) - len(served)), 1),
            "ttft_late_percent": round(percent * np.count_nonzero(ttft > ttft_slo_s), 1),
            "tbt_late_percent": round(percent * np.count_nonzero(self.tbt_s > tbt_slo_s), 1),
            "ttft_mean_s": round(float(served.mean()), 3) if len(served) else float("nan"),
            **{f"ttft_p{p}_s": _percentile(served, p) for p in (50, 95, 99)},
            "tbt_p95_s": _percentile(self.tbt_s[~np.isnan(ttft)], 95),
            "computed_percent": round(tokens * self.computed_tokens, 1),
            "loaded_percent": round(tokens * self.loaded_tokens, 1),
        }


def _percentile(values: npt.NDArray[np.float64], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 3) if len(values) else float("nan")
