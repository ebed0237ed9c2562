"""An engine whose remote objects are compressed: the same answers without loss, near ones with it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import cairn.codec.calibration
from cairn.connect.transformers import CairnConnector
from cairn.engine import CacheEngine
from cairn.errors import GeometryError, StorageError
from cairn.observe.prometheus import exposition
from tests.connect.rig import check, figures, generate, open_engine, prompt, tiny_model
from tests.connect.test_smollm2 import Real, real  # noqa: F401 (a fixture)

MODEL = tiny_model()
CALIBRATION = Path(cairn.codec.calibration.__file__).parent / "calibrations" / "SmolLM2-135M-Instruct.json"


def shared(model: Any, path: Path, *, disk: bool = False, **settings: Any) -> CacheEngine:
    """An engine on one remote store, and on a disk of its own where that is wanted."""
    compression = {f"compression.{name}": value for name, value in settings.items()}
    remote = {"storage.remote.url": f"file://{path}/store", "storage.remote.lookup_timeout_s": 30}
    compression |= {"autopilot.codec": "always", "engine.timeout_s": 30}
    return open_engine(model, disk=path / "kv" if disk else None, **remote, **compression)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """KL in nats, the mean over tokens; logits [tokens, ..., vocabulary]."""
    p, q = torch.log_softmax(expected, -1), torch.log_softmax(found, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("algorithm", ["lossless", "packed"])
def test_without_loss_answers_are_the_same(tmp_path: Path, algorithm: str) -> None:
    ids = prompt(1, 200)
    with shared(MODEL, tmp_path, disk=True, algorithm=algorithm) as engine, CairnConnector(MODEL, engine) as connector:
        check(MODEL, connector, ids)
        assert engine.flush(30)
        assert figures(engine)["compression_ratio"]["remote"] > 1.05
        assert figures(engine)["tiers"]["remote"]["written_bytes"] < 200 * engine.geometry.token_bytes + 4096
    with shared(MODEL, tmp_path, algorithm=algorithm) as engine, CairnConnector(MODEL, engine) as connector:
        assert check(MODEL, connector, ids).reused_by_tier["remote"] == 192
        counted = figures(engine)
        assert counted["hit_tokens"] == {"remote": 192}
        assert counted["decompression_duration_seconds"]["remote"]["count"] >= 1
        assert check(MODEL, connector, ids).reused_by_tier == {"dram": 192}
    with shared(MODEL, tmp_path, disk=True, algorithm=algorithm) as engine, CairnConnector(MODEL, engine) as connector:
        assert check(MODEL, connector, ids).reused_by_tier["disk"] == 192


def test_with_loss_answers_are_near_and_prometheus_sees_it(tmp_path: Path) -> None:
    ids = prompt(2, 200)
    expected = generate(MODEL, ids)[1]
    with shared(MODEL, tmp_path, algorithm="cachegen") as engine, CairnConnector(MODEL, engine) as connector:
        check(MODEL, connector, ids)
        assert engine.flush(30)
        assert b'cairn_compression_ratio{tier="remote"} ' in exposition(engine.metrics)
    with shared(MODEL, tmp_path, algorithm="int") as engine, CairnConnector(MODEL, engine) as connector:
        with connector.cache(ids) as cache:
            found = generate(MODEL, ids, cache)[1]
        assert cache.reused_by_tier["remote"] == 192
        assert 0 < divergence(expected[:1], found[:1]) < 0.05
        assert b'cairn_decompression_duration_seconds_count{tier="remote"} ' in exposition(engine.metrics)


def test_loss_stays_among_those_who_asked_for_it(tmp_path: Path) -> None:
    ids = prompt(3, 64)
    with shared(MODEL, tmp_path, disk=True, algorithm="fp8") as engine, CairnConnector(MODEL, engine) as connector:
        check(MODEL, connector, ids)
        assert engine.flush(30)
    with pytest.raises(StorageError, match="lossy True, not False; give another directory"):
        shared(MODEL, tmp_path, disk=True)
    for algorithm in ("none", "lossless"):
        with shared(MODEL, tmp_path, algorithm=algorithm) as engine, CairnConnector(MODEL, engine) as connector:
            assert check(MODEL, connector, ids).reused_tokens == 0


def test_what_cannot_be_compressed_is_refused_at_the_start(tmp_path: Path) -> None:
    from cairn.config import load_config
    from cairn.kv import KVGeometry, Namespace

    geometry = KVGeometry(layers=1, kv_heads=1, head_dim=8)
    config = load_config(environ={}, overrides={"compression.algorithm": "cachegen", "storage.cpu.size": "1MiB"})
    with pytest.raises(GeometryError, match="opaque pages"):
        CacheEngine(Namespace(model="m", geometry=geometry, layout="vllm:cpu:default:tp1:pp32"), config)


@pytest.mark.slow
@pytest.mark.parametrize(("level", "most_kl"), [("high", 0.01), ("small", 0.1)])
def test_a_real_model_answers_alike(real: Real, tmp_path: Path, level: str, most_kl: float) -> None:  # noqa: F811
    """The promise is a mean over many texts and tokens; a few of them may cost ten times as much."""
    prompts = [torch.tensor([real.text[at : at + 384]]) for at in (0, 400, 800)]
    with (
        shared(real.model, tmp_path, algorithm="cachegen", quality=level, calibration=str(CALIBRATION)) as engine,
        CairnConnector(real.model, engine) as connector,
    ):
        expected = []
        for ids in prompts:
            with connector.cache(ids) as cache:
                expected.append(generate(real.model, ids, cache, new_tokens=8, eos_token_id=None, pad_token_id=0))
        assert engine.flush(60)
        assert figures(engine)["compression_ratio"]["remote"] > 4  # of 32 bits
    with shared(real.model, tmp_path, algorithm="lossless"):
        pass  # another family's processes do it no harm
    with shared(real.model, tmp_path, algorithm="fp8") as engine, CairnConnector(real.model, engine) as connector:
        costs, same = [], 0
        for ids, (tokens, logits) in zip(prompts, expected, strict=True):
            with connector.cache(ids) as cache:
                found = generate(real.model, ids, cache, new_tokens=8, eos_token_id=None, pad_token_id=0)
            assert cache.reused_by_tier["remote"] == 383
            alike = (found[0][0, 384:] == tokens[0, 384:]).tolist()
            upto = alike.index(False) + 1 if False in alike else len(alike)  # after another token all is another text
            same += upto == len(alike)
            costs.append(divergence(logits[:upto], found[1][:upto]))
        assert 0 < sum(costs) / len(costs) <= most_kl
        assert same >= (3 if level == "high" else 1)
