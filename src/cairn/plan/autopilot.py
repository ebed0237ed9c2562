"""The autopilot: every choice that a request's way through the cache leaves open, made from measured costs.

One object an engine. Whoever comes to a fork asks it with what is known there; it answers, and tells `told` what it has
decided and why. What the configuration pins is decided by that alone, whatever was measured. Pure: no I/O, no clock.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from cairn.config.autopilot import Autopilot as Pins
from cairn.config.autopilot import Pin
from cairn.plan.blending import MOST_COMPUTED, Blend
from cairn.plan.cost import CostModel
from cairn.plan.decision import Decision, Kind, Why
from cairn.plan.planner import Plan, Segment, plan_load, worth_writing

#: A load expected to take longer than this is not waited for by a step that others take part in: its request waits
#: alone. That holds even where the step would compute for longer than the load takes: enqueueing a load layer by layer
#: costs the thread that launches the model's kernels, and everybody's step with it (serving_vllm.py: TTFT p50 1.3 of
#: OffloadingConnector's, instead of 0.8 to 1.0).
STEP_PATIENCE_S: Final = 0.002


class BlendPlan(NamedTuple):
    """Whether to blend. bare_s: what `CostModel.blend` is told with the time it took; NaN: not known."""

    yes: bool
    bare_s: float = math.nan


class Autopilot:
    """Decides, as `pins` leave it open, by `cost`. Thread-safe.

    token_bytes: of KV a token. told: of every decision. measures: False: what costs would decide is done wherever it
    can be.
    """

    def __init__(
        self,
        pins: Pins,
        cost: CostModel,
        token_bytes: int,
        told: Callable[[Decision], None] = lambda _: None,
        *,
        measures: bool = True,
    ) -> None:
        self.pins = pins
        self._cost = cost
        self._token_bytes = token_bytes
        self._told = told
        self._unpinned: Pin = "auto" if measures else "always"

    # --- loading -------------------------------------------------------------------------------------------------

    def load(self, segments: Sequence[Segment], prompt: int, *, start: int = 0) -> Plan:
        """How much to load of what is held of a prompt behind its first `start` tokens; see `plan_load`."""
        held = sum(segment.tokens for segment in segments)
        pin = self._pin(self.pins.load)
        plan, why = Plan(held, math.nan), Why.PINNED
        if pin == "never":
            plan = Plan(0, math.nan)
        elif not held:
            why = Why.NOTHING_HELD  # a cold request does not pay for the question
        elif pin == "auto":
            plan = plan_load(segments, prompt, self._token_bytes, self._cost, start=start)
            why = Why.UNMEASURED if math.isnan(plan.seconds) else Why.FASTER if plan.tokens else Why.SLOWER
        choice = "none" if not plan.tokens else "all" if plan.tokens == held else "part"
        instead = math.nan
        if why in (Why.FASTER, Why.SLOWER):
            instead = self._cost.recompute.seconds(prompt - start, start)
        self._told(Decision(Kind.LOAD, choice, why, plan.tokens, plan.seconds, instead))
        return plan

    def layerwise(self, tokens: int, *, able: bool = True, alone: bool = True) -> bool:
        """Whether `tokens` are loaded layer by layer while the model computes, or all before it begins.

        able: whether the engine can do so. alone: whether nobody else takes part in the step that would follow it.
        """
        expected = math.nan
        if not able:
            yes, why = False, Why.UNABLE
        elif self.pins.layerwise != "auto":
            yes, why = self.pins.layerwise == "always", Why.PINNED
        elif alone:
            yes, why = True, Why.ALONE
        else:
            expected = self._cost.load_seconds("dram", tokens * self._token_bytes)
            yes = expected < STEP_PATIENCE_S
            why = Why.BRIEF if yes else Why.OTHERS_WAIT
        self._told(Decision(Kind.LAYERWISE, "yes" if yes else "no", why, tokens, expected))
        return yes

    # --- blending ------------------------------------------------------------------------------------------------

    @property
    def blends(self) -> bool:
        """Whether chunks are worth looking for."""
        return self.pins.blend != "never"

    def blend(self, facts: Blend) -> BlendPlan:
        """Whether to blend a prompt whose chunks were looked up.

        Blending takes its chunks' loads and so much of a prefill as it computes, times what it was measured to take of
        that, and the rest of the prompt; the alternative computes all behind the prefix.
        """
        pin = self._pin(self.pins.blend)
        bare, expected, instead = self._blend_seconds(facts)
        if facts.stop <= facts.start or not facts.loaded:
            yes, why = False, Why.NOTHING_HELD
        elif pin != "auto":
            yes, why = pin == "always", Why.PINNED
        elif math.isnan(expected):
            yes, why = facts.share <= MOST_COMPUTED, Why.UNMEASURED
        else:
            yes = expected < instead
            why = Why.FASTER if yes else Why.SLOWER
            if not yes:
                self._cost.blend.declined()
        self._told(Decision(Kind.BLEND, "yes" if yes else "no", why, facts.loaded, expected, instead))
        return BlendPlan(yes, bare)

    def blended(self, plan: BlendPlan, seconds: float) -> None:
        """What a blending took."""
        if not math.isnan(plan.bare_s):
            self._cost.blend.observe(plan.bare_s, seconds)

    def _blend_seconds(self, facts: Blend) -> tuple[float, float, float]:
        """What blending takes by itself, what the prompt takes with it, and without it; NaN: not known."""
        recompute, behind = self._cost.recompute, facts.prompt - facts.start
        if not facts.loaded or not recompute.knows(behind, facts.start):
            return math.nan, math.nan, math.nan
        bare = recompute.seconds_of(facts.work) + self._cost.load_seconds("dram", facts.loaded * self._token_bytes)
        rest = recompute.seconds(facts.prompt - facts.stop, facts.stop)
        return bare, self._cost.blend.factor * bare + rest, recompute.seconds(behind, facts.start)

    # --- storing -------------------------------------------------------------------------------------------------

    @property
    def stores(self) -> bool:
        """Whether anything is stored at all."""
        return self.pins.store != "never"

    def store_while_computing(self, tokens: int, *, awaited: bool = False) -> bool:
        """Whether a prompt is stored layer by layer as it is computed, or behind its first token, for which somebody
        waits. awaited: whether another instance waits for what is stored.
        """
        pin = self.pins.layerwise
        yes = pin == "always" or (pin == "auto" and awaited)
        why = Why.PINNED if pin != "auto" else Why.AWAITED if awaited else Why.TOKEN_FIRST
        if not self.stores:
            yes, why = False, Why.PINNED
        choice = "never" if not self.stores else "while_computing" if yes else "behind"
        self._told(Decision(Kind.STORE, choice, why, tokens))
        return yes

    def write(self, tier: str, first: int, tokens: int) -> bool:
        """Whether a tier below DRAM is given `tokens` tokens behind `first` others; see `worth_writing`."""
        pin = self._pin(self.pins.disk if tier == "disk" else self.pins.remote)
        yes, why = pin != "never", Why.PINNED
        expected = instead = math.nan
        if pin == "auto" and tier != "disk":
            why = Why.SHARED
        elif pin == "auto":
            yes = worth_writing(tier, first, tokens, self._token_bytes, self._cost)
            why = Why.UNMEASURED
            if self._cost.recompute.knows(tokens, first):
                why = Why.FASTER if yes else Why.SLOWER
                expected = self._cost.load_seconds(tier, tokens * self._token_bytes)
                instead = self._cost.recompute.seconds(tokens, first)
        self._told(Decision(Kind.WRITE, tier if yes else "no", why, tokens, expected, instead))
        return yes

    def _pin(self, pin: Pin) -> Pin:
        """A pin of what costs decide."""
        return self._unpinned if pin == "auto" else pin
