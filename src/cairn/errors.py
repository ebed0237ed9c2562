"""Everything Cairn raises. One root, so that `except CairnError` is enough for an embedder.

Only a caller's mistake or an unusable resource raises. A failure inside the cache is a counted miss.
"""


class CairnError(Exception):
    """Root of all of Cairn's exceptions. The message is one line: the value, the rule, the fix."""


class ConfigError(CairnError, ValueError):
    """A configuration value breaks a rule."""


class GeometryError(CairnError, ValueError):
    """A model or a KV cache has a shape that Cairn refuses or that does not match the engine's."""


class InputError(CairnError, ValueError):
    """An argument of a public call breaks the call's contract."""


class StorageError(CairnError, OSError):
    """A directory, file or arena cannot be used: no space, no permission, another format."""


class LockedError(StorageError):
    """Another process owns the cache directory."""


class ClosedError(CairnError, RuntimeError):
    """The engine, tier or handle was closed before the call."""


class ClusterError(CairnError, OSError):
    """The cluster's registry did not answer within the deadline, or refused."""


class UnclearError(ClusterError):
    """The connection broke during a transaction, which may have been applied: read what it would have changed."""


class LeaseLostError(ClusterError):
    """A lease has expired or was revoked; the keys that hung from it are deleted."""
