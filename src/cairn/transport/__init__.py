"""How bytes move between hosts: one contract, by an existing engine."""

from cairn.transport.base import Read, Transport

__all__ = ["Read", "Transport"]
