"""Decides, from measured costs, what to load and what to recompute. Pure: no I/O, no torch, no clock."""

from cairn.plan.coding import Coded, choose_codec
from cairn.plan.cost import CostModel, LoadCost, OnlineFit, RecomputeCost, Work
from cairn.plan.planner import Plan, Segment, plan_load, worth_writing

__all__ = [
    "Coded",
    "CostModel",
    "LoadCost",
    "OnlineFit",
    "Plan",
    "RecomputeCost",
    "Segment",
    "Work",
    "choose_codec",
    "plan_load",
    "worth_writing",
]
