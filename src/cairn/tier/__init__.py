"""Tiers: where blocks live between uses. Knows keys as opaque bytes."""
