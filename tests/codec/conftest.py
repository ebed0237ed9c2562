"""The Triton kernels, interpreted."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def kernels() -> Iterator[Any]:
    """`cairn.codec.triton_kernels`, with all that uses it."""
    pytest.importorskip("torch")
    language = pytest.importorskip("triton.language")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where the kernel is decorated
        importlib.import_module("cairn.codec.cachegen_cuda")
        modules = [importlib.import_module(f"cairn.codec.triton_{name}") for name in ("kernels", "planes")]
        patch.delenv("TRITON_INTERPRET")
        for module in modules:  # the sum that the interpreter leaves to numpy: else it adds one by one
            patch.setattr(module, "add", language.standard._sum_combine)
        yield modules[0]
