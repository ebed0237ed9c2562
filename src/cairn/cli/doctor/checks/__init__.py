"""The checks, one file a subject. Importing this registers all; what they are told is in `facts`."""

from cairn.cli.doctor.checks import fleet, host, storage, text

__all__ = ["fleet", "host", "storage", "text"]
