"""Configuration: one schema for everything, and the one function that fills it."""

from cairn.config.load import load_config, parse_assignment
from cairn.config.schema import Config

__all__ = ["Config", "load_config", "parse_assignment"]
