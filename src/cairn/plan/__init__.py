"""Decides, from measured costs, what to load and what to recompute. Pure: no I/O, no torch, no clock."""

from cairn.plan.autopilot import Autopilot, BlendPlan
from cairn.plan.blending import Blend
from cairn.plan.coding import Coded, choose_codec
from cairn.plan.cost import BlendCost, CostModel, LoadCost, OnlineFit, RecomputeCost, Work
from cairn.plan.decision import Decision, Kind, Why
from cairn.plan.planner import Plan, Segment, plan_load, worth_writing

__all__ = [
    "Autopilot",
    "Blend",
    "BlendCost",
    "BlendPlan",
    "Coded",
    "CostModel",
    "Decision",
    "Kind",
    "LoadCost",
    "OnlineFit",
    "Plan",
    "RecomputeCost",
    "Segment",
    "Why",
    "Work",
    "choose_codec",
    "plan_load",
    "worth_writing",
]
