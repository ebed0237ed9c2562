"""Trace replay with the real index, policies and planner."""
