"""An engine whose DRAM is quantized: what comes back is near, and nobody takes its blocks for others."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cairn.config import load_config
from cairn.engine import CacheEngine
from cairn.errors import ConfigError, GeometryError, StorageError
from cairn.kv import KVGeometry, Namespace

from .pages import at_rest, prompt

GEOMETRY = KVGeometry(layers=3, kv_heads=2, head_dim=32, dtype="float32", block_tokens=16)
#: Largest error over the range of values, of normal ones in groups of 16.
BOUND = {"int8": 0.005, "fp8": 0.04, "int4": 0.08}
TOKENS = 100


def engine(codec: str, disk: Path | None = None, *, dtype: str = "float32", **settings: Any) -> CacheEngine:
    overrides: dict[str, Any] = {"storage.cpu.size": "1MiB", "storage.cpu.codec": codec, "engine.copy_threads": 1}
    if disk:
        overrides |= {"storage.disk.path": str(disk), "storage.disk.size": "4MiB"}
    geometry = KVGeometry(layers=3, kv_heads=2, head_dim=32, dtype=dtype, block_tokens=16)
    config = load_config(environ={}, overrides=overrides | settings)
    return CacheEngine(Namespace(model="m", geometry=geometry), config)


@pytest.fixture
def pages() -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    tensors = [rng.normal(0, 1, (2, 8, 16, 2, 32)).astype(np.float32) for _ in range(3)]
    return tensors, rng.permutation(128)[:TOKENS]


def retrieved(one: CacheEngine, tensors: list[Any], slots: Any, tokens: Any) -> tuple[int, float]:
    """How many tokens came, and how far the worst element is off; all else stays as it was."""
    out = [np.full_like(tensor, 7) for tensor in tensors]
    mask = one.retrieve(tokens, None, out, slots)
    came = slots[mask]
    worst = 0.0
    for tensor, found in zip(tensors, out, strict=True):
        expected, got = tensor.reshape(2, 128, -1), found.reshape(2, 128, -1)
        others = np.setdiff1d(np.arange(128), came)
        assert (got[:, others] == 7).all()
        worst = max(worst, float(abs(expected[:, came] - got[:, came]).max())) if len(came) else worst
    return len(came), worst


@pytest.mark.parametrize("codec", BOUND)
def test_what_was_stored_comes_back_nearly(codec: str, pages: Any, tmp_path: Path) -> None:
    """From DRAM, layer by layer, and from the disk of an engine that is gone."""
    tensors, slots = pages
    tokens = prompt(0, TOKENS)
    reach = max(np.ptp(tensor) for tensor in tensors)
    with engine(codec, tmp_path) as one:
        assert one.store(tokens, None, tensors, slots) == 96
        assert one.store(tokens, None, tensors, slots) == 0
        assert one.lookup(tokens, namespace=Namespace(model="m", geometry=GEOMETRY, salt=b"other")) == 0
        count, worst = retrieved(one, tensors, slots, tokens)
        assert count == 96
        assert 0 < worst < BOUND[codec] * reach
        moved = one.get_stats()["transfer_bytes"]["dram"]
        assert one.row_geometry.vector_bytes == {"int8": 2 * 36, "fp8": 2 * 34, "int4": 2 * 21}[codec]
        assert moved == dict.fromkeys(("store", "load"), 6 * one.row_geometry.block_bytes)

        other = prompt(1, 32)
        filled = one.store_layers(one.chain(other))
        assert filled
        for layer in range(3):
            filled.put(layer, one.register_kv_caches(tensors), slots[:32])
        assert filled.commit() == 2
        assert retrieved(one, tensors, slots[:32], other)[0] == 32
        assert one.flush(30)
        at_rest(one)
    with engine(codec, tmp_path) as two:
        assert retrieved(two, tensors, slots, tokens) == (96, worst)
        assert two.get_stats()["hit_tokens"] == {"disk": 96}


def test_a_directory_of_another_form_is_refused(pages: Any, tmp_path: Path) -> None:
    tensors, slots = pages
    for mine, others in (("none", ["int8", "int4"]), ("int8", ["none", "fp8", "int4"])):
        with engine(mine, tmp_path / mine) as one:
            one.store(prompt(0, 100), None, tensors, slots)
            assert one.flush(30)
        for other in others:
            with pytest.raises(StorageError, match="geometry"):
                engine(other, tmp_path / mine)


def test_rows_of_another_dtype_have_other_keys(tmp_path: Path, pages: Any) -> None:
    """Quantized float16 and bfloat16 have rows of one size, and may lie in one directory."""
    halves = [tensor.astype(np.float16) for tensor in pages[0]]
    with engine("int8", tmp_path, dtype="float16") as one:
        assert one.store(prompt(0, 96), None, halves, np.arange(96)) == 96
        assert one.flush(30)
    with engine("int8", tmp_path, dtype="bfloat16") as two:
        assert two.lookup(prompt(0, 96)) == 0
    with engine("int8", tmp_path, dtype="float16") as one:
        assert one.lookup(prompt(0, 96)) == 96


def test_a_remote_store_keeps_quantized_rows_as_they_are(tmp_path: Path, pages: Any) -> None:
    tensors, slots = pages
    remote = {"storage.remote.url": f"file://{tmp_path}", "storage.remote.lookup_timeout_s": 30}
    with engine("int4", **remote) as one:
        assert one.store(prompt(0, 96), None, tensors, slots[:96]) == 96
        worst = retrieved(one, tensors, slots[:96], prompt(0, 96))[1]
        assert one.flush(30)
    with engine("int4", **remote) as two:
        assert retrieved(two, tensors, slots[:96], prompt(0, 96)) == (96, worst)
        assert two.get_stats()["hit_tokens"] == {"remote": 96}
    for other in ("int8", "none"):
        with engine(other, **remote) as three:
            assert three.lookup(prompt(0, 96)) == 0


@pytest.mark.parametrize(
    "settings",
    [{"compression.algorithm": "cachegen"}, {"storage.vram.size": "1MiB", "storage.vram.device": "stand-in"}],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"storage\.cpu\.codec=int8 with .* set .* to none"):
        engine("int8", **settings)


def test_opaque_pages_are_refused() -> None:
    g = KVGeometry(layers=1, kv_heads=1, head_dim=32, dtype="float32", block_tokens=16)
    config = load_config(environ={}, overrides={"storage.cpu.size": "1MiB", "storage.cpu.codec": "int8"})
    with CacheEngine(Namespace(model="m", geometry=g), config) as one, pytest.raises(GeometryError, match="opaque"):
        one.register_kv_caches([np.zeros((4, 1, 16, 64), np.float32)], "vllm")
