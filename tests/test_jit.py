"""Kernels wherever Cairn is installed."""

from typing import Any

from cairn.jit import kernel


def test_a_kernel_needs_no_place_to_keep_its_machine_code() -> None:
    # Code without a file is to numba what a read-only installation without a home is: there is nowhere to cache it.
    scope: dict[str, Any] = {}
    exec(compile("def double(x):\n    return 2 * x", "<nowhere>", "exec"), scope)
    assert kernel(scope["double"])(21) == 42
