"""Decides, from measured costs, what to load and what to recompute. Pure: no I/O, no torch, no clock."""

from cairn.plan.cost import CostModel, LoadCost, OnlineFit, RecomputeCost, Work
from cairn.plan.planner import Plan, Segment, plan_load

__all__ = ["CostModel", "LoadCost", "OnlineFit", "Plan", "RecomputeCost", "Segment", "Work", "plan_load"]
