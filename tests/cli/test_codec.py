"""`cairn codec calibrate` on a model of two layers: it says how far it is, it ends, and what it writes can be used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.connect.rig import tiny_model
from typer.testing import CliRunner

from cairn.cli.bench import app as bench
from cairn.cli.codec import app
from cairn.cli.quality.texts import Window
from cairn.codec.cachegen import CacheGen
from cairn.codec.calibration import Calibration
from cairn.errors import StorageError
from cairn.kv import KVGeometry


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model and its tokenizer, a word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    home = tmp_path / "tiny"
    made = tiny_model(num_hidden_layers=2, max_position_embeddings=2048)
    made.save_pretrained(home)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(home)
    return home


def test_it_ends_and_makes_a_calibration_of_this_model(model: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "made.json"
    text.write_text(" ".join(f"w{i * i % 89}" for i in range(2 * 1536)))
    ended = CliRunner().invoke(app, ["calibrate", str(model), str(text), "--out", str(out), "--windows", "2"])
    assert ended.exit_code == 0, ended.output
    assert "1 of 8 passes\n" in ended.stderr
    assert "8 of 8 passes, 0 s left" in ended.stderr
    assert ended.stdout == f"{out}: 2 layers; give it to compression.calibration\n"
    made = Calibration.load(out)
    assert made.model == "tiny"
    assert all(value > 0 for row in made.sensitivity for value in row)
    assert made.rotary is not None
    CacheGen(KVGeometry(layers=2, kv_heads=2, head_dim=8), calibration=made)


def test_what_could_not_be_written_is_not_computed(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(" ".join(f"w{i * i % 89}" for i in range(1536)))
    calibrate = [app, "calibrate", str(model), str(text), "--windows", "1", "--out"]
    quality = [bench, "quality", "--model", str(model), "--windows", "2", "--plot"]
    for command, *asked in (calibrate, quality):
        ended = CliRunner().invoke(command, [*asked, str(text / "below a file")])
        assert isinstance(ended.exception, StorageError)
        assert ended.stderr == ""


def test_layers_below_the_changed_one_are_not_computed_anew_and_nothing_else_changes() -> None:
    """The same costs as with every layer computed, whatever was changed."""
    from cairn.cli.quality import calibrate, measure

    made = tiny_model(max_position_embeddings=2048)
    window = Window("w", [i * i % 89 for i in range(1536)])
    with torch.inference_mode():
        kv = measure.context_kv(made, window)
        noisy = kv + 0.1 * np.random.default_rng(0).normal(size=kv.shape).astype(np.float32)
        plain = measure.log_probabilities(made, window, kv)
        for (layer, plane), found in calibrate._planes(made, window, kv, noisy):
            changed = kv.copy()
            changed[layer, plane] = noisy[layer, plane]
            expected = measure.divergence(plain, measure.log_probabilities(made, window, changed))
            assert found == pytest.approx(expected, rel=1e-4)
            assert found > 1e-6


def test_a_text_that_is_too_short_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("w1 " * 1535)
    ended = CliRunner().invoke(app, ["calibrate", str(model), str(tmp_path / "text"), "--windows", "1"])
    assert "must have 1536 or more" in str(ended.exception)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
