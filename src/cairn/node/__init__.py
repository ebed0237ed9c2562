"""The host's node: one process that owns the arenas, indexes and lower tiers that all engines of a host share."""
