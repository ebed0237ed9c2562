"""SmolLM2-135M-Instruct, on which tests of several folders run."""

from pathlib import Path

import pytest

from cairn.cli.demo.model import default_cache_dir, fetch_model
from cairn.cli.demo.show import Screen
from cairn.errors import StorageError


def smollm2() -> Path:
    """In Hugging Face format. Where it is not in the user's cache and cannot be fetched, the test is skipped."""
    try:
        return fetch_model(default_cache_dir(), Screen(quiet=True))
    except StorageError as error:
        pytest.skip(f"no model: {error}")
