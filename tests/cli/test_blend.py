"""`cairn bench blend` and `cairn blend check` on a tiny model with a tokenizer of bytes."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.connect.rig import tiny_model

from cairn.blend.checked import recipe_of
from cairn.cli.blend.measure import f1
from cairn.cli.blend.prompts import Shape, rag_prompts
from cairn.cli.blend.run import run_check
from cairn.config.schema import Blending
from cairn.errors import CairnError, GeometryError

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    home = tmp_path_factory.mktemp("model") / "tiny"
    made = tiny_model(vocab_size=256, num_hidden_layers=8, max_position_embeddings=4096, initializer_range=0.1)
    made.save_pretrained(home)
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(home)
    return home


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_bench_holds_every_ratio_to_full_prefill(run: Run, model: Path) -> None:
    ended = run("bench", "blend", "--model", model, "--prompts", "2", "--long", "0", "--json")
    result = json.loads(ended.stdout)
    assert ended.stderr.splitlines()[-1] == "prompt 2 of 2"
    quality = result["quality"]
    assert list(quality) == [
        "full reuse",
        "full reuse, prelude",
        *(f"ratio {ratio}" for ratio in ("0", "0.05", "0.15", "0.3", "1")),
        *(f"ratio 0.15, check layer {layer}" for layer in (1, 6)),
        "prefix only",
    ]
    for name in ("ratio 1", "prefix only"):
        assert quality[name]["kl_most"] < 1e-9
        assert quality[name]["exact_match"] == quality[name]["f1"] == 1
        assert quality[name]["prompts"] == 2
    assert quality["ratio 0.15, check layer 1"]["prompts"] == 1
    assert quality["full reuse"]["kl"] > 1e-6
    assert quality["full reuse"]["kl_of"]["full reuse"] == 1
    assert quality["ratio 1"]["kl_of"]["full reuse, prelude"] < 1e-6
    assert quality["prefix only"]["hit_share"] < 0.3
    assert all(quality[name]["hit_share"] > 0.5 for name in quality if name != "prefix only")


def test_check_says_yes_and_no_by_its_exit_code(run: Run, model: Path) -> None:
    command = ["blend", "check", model, "--prompts", "2", "--json"]
    ended = run(*command, "--most-kl", "100")
    assert ended.returncode == 0
    found = json.loads(ended.stdout)
    assert [name for name in found if found[name] and "kl" in found[name]] == [f"check layer {n}" for n in (1, 3, 6)]
    assert found["check layer 6"]["kl"] > 0
    assert found["check_layers"] == [1]
    assert recipe_of(Blending(), str(model), 8).check_layers == (1,)
    refused = run(*command, "--most-kl", "0", "--set", "blending.check_layers=[2]")
    assert refused.returncode == 1
    assert "leave blending.enabled false, or raise recompute_ratios" in refused.stderr.splitlines()[-1]
    with pytest.raises(GeometryError, match="costs up to"):
        recipe_of(Blending(), str(model), 8)
    for layers, why in (([8], "the model has layers 0..7"), ([1, 3], "1 recompute_ratios for 2 check_layers")):
        wrong = run(*command, "--set", f"blending.check_layers={layers}")
        assert wrong.returncode == 2
        assert why in wrong.stderr.splitlines()[-1]
    exact = run(*command, "--set", "blending.recompute_ratios=[1.0]", "--most-kl", "1e-6")
    assert exact.returncode == 0


def test_a_prompt_that_is_not_blended_is_no_good_score(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure inside costs a request nothing, and so would look like blending without a loss."""
    monkeypatch.setattr("cairn.blend.chunks.Found.load", lambda *_: 1 / 0)
    with pytest.raises(CairnError, match="nothing of a prompt was blended"):
        run_check(model, Blending(), 2, 0.1, lambda *_: None)


def test_a_directory_without_a_model(run: Run, tmp_path: Path) -> None:
    ended = run("blend", "check", tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"cairn: {tmp_path}: no model in Hugging Face format (")


def test_a_stopped_bench_goes_on(run: Run, model: Path, tmp_path: Path) -> None:
    """Two prompts, and one more later, are three at once; other prompts' file is left alone."""
    command = ["bench", "blend", "--model", model, "--long", "0", "--tokens", "500", "--json"]
    once, twice = tmp_path / "once.json", tmp_path / "twice.json"
    assert run(*command, "--prompts", "3", "--out", once).returncode == 0
    assert run(*command, "--prompts", "2", "--out", twice).returncode == 0
    assert len(json.loads(twice.read_text())["scores"]["quality"]) == 2
    more = run(*command, "--prompts", "3", "--out", twice)
    assert more.stderr.splitlines()[-1] == "prompt 3 of 3"
    assert "prompt 2 of 3" not in more.stderr
    one, two = (json.loads(path.read_text()) for path in (once, twice))
    kl = [[prompt["ratio 0.15"][0] for prompt in found["scores"]["quality"]] for found in (one, two)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)
    assert json.loads(more.stdout)["quality"]["ratio 0.15"] == two["quality"]["ratio 0.15"]
    lacking = json.loads(twice.read_text())
    taken = lacking["scores"]["quality"][1].pop("ratio 0.3")
    twice.write_text(json.dumps(lacking))
    filled = run(*command, "--prompts", "3", "--out", twice)
    assert [line for line in filled.stderr.splitlines() if line.startswith("prompt")] == ["prompt 2 of 3"]
    two = json.loads(twice.read_text())
    assert two["scores"]["quality"][1]["ratio 0.3"][0] == pytest.approx(taken[0], rel=1e-3)
    refused = run(*command, "--tokens", "400", "--out", twice)
    assert refused.returncode == 2
    assert "name another file" in refused.stderr.splitlines()[-1]
    assert json.loads(twice.read_text()) == two


def test_prompts_are_the_same_for_the_same_seed(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    one, two = (list(rag_prompts(tokenizer, 2, Shape.about(500), seed=5)) for _ in range(2))
    assert all((a.ids(a.system) == b.ids(b.system)).all() for a, b in zip(one, two, strict=True))
    assert all(4 <= len(rag.chunks) <= 8 for rag in one)


def test_f1() -> None:
    assert f1("a b c", "a b c") == f1("", "") == 1
    assert f1("a b", "c") == f1("", "c") == 0
    assert f1("a b b c", "b b d d") == 0.5
