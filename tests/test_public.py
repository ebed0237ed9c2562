import subprocess
import sys

import pytest

import cairn


@pytest.mark.parametrize("name", cairn.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(cairn, name).__name__ == name


def test_importing_cairn_imports_nothing_heavy() -> None:
    code = "import sys, cairn; print([m for m in ('numpy', 'numba', 'torch', 'pydantic') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'CacheEngin'"):
        cairn.CacheEngin  # noqa: B018
