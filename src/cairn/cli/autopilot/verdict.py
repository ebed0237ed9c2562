"""What times of contenders say: means, paired ratios with intervals, and the bars."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cairn.cli.autopilot.workload import CLASSES
from cairn.cli.bench_machine import Visit

AUTOPILOT: Final = "auto"
NO_CACHE: Final = "no cache"
#: What no class may take of no cache's time to first token.
WORST: Final = 1.01

_RESAMPLES: Final = 2000
_Times = npt.NDArray[np.float64]


def verdict(kinds: Sequence[str], visits: Mapping[str, Sequence[Visit]]) -> dict[str, Any]:
    """All figures of the requests so far. kinds: their classes; visits: by contender, as many each."""
    clocks = {
        "wall": {name: np.array([one.ttft_s for one in some]) for name, some in visits.items()},
        "cpu": {name: np.array([one.cpu_s[0] for one in some]) for name, some in visits.items()},
    }
    of_class = {kind: np.array([one == kind for one in kinds]) for kind in CLASSES if kind in kinds}
    found: dict[str, Any] = {"requests": len(kinds)}
    for clock, times in clocks.items():
        found[f"ttft_{clock}"] = {
            name: {
                "mean_ms": _ms(taken.mean()),
                **{f"{kind}_mean_ms": _ms(taken[some].mean()) for kind, some in of_class.items()},
                **{f"{kind}_median_ms": _ms(np.median(taken[some])) for kind, some in of_class.items()},
            }
            for name, taken in times.items()
        }
        auto, none = times[AUTOPILOT], times[NO_CACHE]
        found[f"autopilot_share_{clock}"] = {name: _ratio(auto, taken) for name, taken in times.items()}
        found[f"autopilot_share_of_no_cache_{clock}"] = {
            kind: _ratio(auto[some], none[some]) for kind, some in of_class.items()
        }
    found["total_s"] = {name: round(sum(one.total_s for one in some), 3) for name, some in visits.items()}
    found["bars"] = {clock: _bars(found, clock) for clock in clocks}
    return found


def _bars(found: Mapping[str, Any], clock: str) -> dict[str, Any]:
    """Whether they are met, by means; sure: also by the ends of the intervals."""
    beaten = {name: share for name, share in found[f"autopilot_share_{clock}"].items() if name != AUTOPILOT}
    classes = found[f"autopilot_share_of_no_cache_{clock}"]
    worst = max(classes, key=lambda kind: classes[kind]["share"])
    return {
        "better_than_every_preset": all(share["share"] < 1 for share in beaten.values()),
        "better_than_every_preset_sure": all(share["interval_95"][1] < 1 for share in beaten.values()),
        "worst_class": worst,
        "worst_class_share": classes[worst]["share"],
        "worst_class_met": classes[worst]["share"] <= WORST,
        "worst_class_met_sure": classes[worst]["interval_95"][1] <= WORST,
    }


def _ratio(one: _Times, other: _Times) -> dict[str, Any]:
    """One's mean over the other's, with an interval by bootstrap over requests; and the median of the pairs' ratios."""
    drawn = np.random.default_rng(0).integers(0, len(one), (_RESAMPLES, len(one)))
    low, high = np.quantile(one[drawn].mean(axis=1) / other[drawn].mean(axis=1), [0.025, 0.975])
    return {
        "share": round(float(one.mean() / other.mean()), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
        "median_of_pairs": round(float(np.median(one / other)), 4),
    }


def _ms(seconds: Any) -> float:
    return round(1e3 * float(seconds), 2)
