"""The pool: what it makes of text and chats, what it loads, what it refuses."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from cairn.serve.base import Bounds, RequestError, Tokens
from cairn.serve.recent import Recent
from cairn.serve.tokenizer import Chat, Tokenizer
from cairn.serve.tokenizers import Tokenizers
from tests.smollm2 import smollm2

LICENSE = Path(__file__).parents[2] / "LICENSE"
USER = {"role": "user", "content": "hello"}
SMOL = "SmolLM2-135M-Instruct"


def test_a_real_model(tmp_path: Path) -> None:
    """SmolLM2, against Transformers; where its tokenizer begins prompts, completions do and chats do not."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    home = smollm2()
    text = LICENSE.read_text()
    plain = AutoTokenizer.from_pretrained(home)
    begun = AutoTokenizer.from_pretrained(home)
    start = begun.convert_tokens_to_ids("<|im_start|>")
    begun.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    begun.save_pretrained(tmp_path)
    with_start = {"own": str(home), "begun": str(tmp_path)}
    pool = Tokenizers(with_start)
    messages = [{"role": "system", "content": "You count."}, {"role": "user", "content": "1, 2, 3"}]
    for name, tokenizer in (("own", plain), ("begun", begun)):
        assert pool.text(name, text).tolist() == tokenizer(text)["input_ids"]
        rendered = plain.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert pool.chat(name, Chat(messages)).tolist() == rendered
    assert pool.text("begun", "x")[0] == start
    assert pool.text("begun", "x", special=False).tolist() == pool.text("own", "x").tolist()
    assert pool.text("own", "x").dtype == np.uint32


def test_turns_that_were_said_before_are_not_tokenized_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    from tests.serve.test_cuts import CHAT, byte_level

    made = PreTrainedTokenizerFast(tokenizer_object=byte_level(*CHAT))
    made.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    made.save_pretrained(tmp_path)
    pool, whole = Tokenizers({"a": str(tmp_path)}), Tokenizer.load(str(tmp_path))
    asked: list[str] = []
    tokenize = Tokenizer.text

    def text(self: Tokenizer, text: str, *, special: bool = True) -> Tokens:
        asked.append(text)
        return tokenize(self, text, special=special)

    monkeypatch.setattr(Tokenizer, "text", text)
    first = [{"role": "system", "content": "You count."}, {"role": "user", "content": "hello"}]
    pool.chat("a", Chat(first))
    asked.clear()
    chat = Chat([*first, {"role": "user", "content": "hello world"}], add_generation_prompt=False)
    found = pool.chat("a", chat)
    assert asked == ["<|im_start|>user\nhello world"]
    assert found.tolist() == tokenize(whole, whole.render(chat), special=False).tolist()


def test_loaded_once_and_no_more_than_may_be(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    real, gate = Tokenizer.load, threading.Event()

    def load(name: str) -> Tokenizer:
        loads.append(name)
        assert gate.wait(30)
        return real(name)

    monkeypatch.setattr(Tokenizer, "load", load)
    pool = Tokenizers({"a": str(tiny), "b": str(tiny)}, threads=4, most=1)

    async def many() -> None:
        asked = [asyncio.create_task(pool.text_async("a", f"text {i}")) for i in range(4)]
        await asyncio.sleep(0)
        gate.set()
        found = await asyncio.gather(*asked)
        assert [len(tokens) for tokens in found] == [6] * 4

    asyncio.run(many())
    assert len(loads) == 1
    pool.text("b", "x")
    pool.text("a", "y")
    assert len(loads) == 3
    pool.close()


def test_what_waits_is_bounded_in_number_and_in_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def load(name: str) -> Tokenizer:
        assert gate.wait(30)
        raise AssertionError(name)

    monkeypatch.setattr(Tokenizer, "load", load)
    pool = Tokenizers({"a": str(tiny)}, Bounds(waiting=2, request=0.2), threads=1)

    async def ask() -> list[int]:
        asked = await asyncio.gather(*(pool.text_async("a", f"{i}") for i in range(3)), return_exceptions=True)
        return [one.status for one in asked if isinstance(one, RequestError)]

    assert asyncio.run(ask()) == [504, 504, 503]
    # The one that is being worked at still counts; the one that had not begun was taken back.
    assert asyncio.run(ask()) == [504, 503, 503]
    gate.set()
    pool.close()


def test_what_cannot_be_loaded_is_tried_again(tmp_path: Path, tiny: Path) -> None:
    home = tmp_path / "later"
    pool = Tokenizers({"a": str(home)})
    with pytest.raises(RequestError, match="no tokenizer can be loaded from it") as caught:
        pool.text("a", "x")
    assert caught.value.status == 503
    assert "\n" not in str(caught.value)
    home.symlink_to(tiny)
    assert len(pool.text("a", "x")) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ unfinished",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('only lines\nof its own') }}",
    ],
)
def test_templates_of_requests_stay_in_their_sandbox(tiny: Path, template: str) -> None:
    pool = Tokenizers({"a": str(tiny)}, own_templates=True)
    with pytest.raises(RequestError, match="the chat template refuses these messages") as caught:
        pool.chat("a", Chat([USER], template=template))
    assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="none is taken from requests"):
        Tokenizers({"a": str(tiny)}).chat("a", Chat([USER], template="{{ 1 }}"))


def test_what_is_nested_too_deeply_for_a_template_is_refused(tiny: Path) -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    pool = Tokenizers({"a": str(tiny)}, own_templates=True)
    with pytest.raises(RequestError, match="the chat template refuses these messages"):
        pool.chat("a", Chat([USER], [tool], template="{{ tools | tojson }}"))


def test_a_rendered_chat_is_bounded_too(tiny: Path) -> None:
    pool = Tokenizers({"a": str(tiny)}, Bounds(prompt=1000), own_templates=True)
    with pytest.raises(RequestError, match="the rendered chat: 90000 bytes; at most 1000"):
        pool.chat("a", Chat([USER], template="{% for i in range(90000) %}x{% endfor %}"))


def test_surrogates_are_no_text(tiny: Path) -> None:
    with pytest.raises(RequestError, match="prompt: must be Unicode text"):
        Tokenizers({"a": str(tiny)}).text("a", "x\ud800")


def test_texts_that_came_lately_are_remembered_within_their_room() -> None:
    recent, tokens = Recent(4000), np.arange(10, dtype=np.uint32)
    recent.put("m", True, "a" * 50, tokens)
    assert recent.get("m", True, "a" * 50) is tokens
    assert recent.get("m", False, "a" * 50) is None
    assert recent.get("n", True, "a" * 50) is None
    recent.put("m", True, "b" * 1000, tokens)  # would take more than a quarter
    assert recent.get("m", True, "b" * 1000) is None
    for i in range(9):
        recent.put("m", True, f"{i}" * 50, tokens)
        assert recent.get("m", True, "a" * 50) is tokens  # used again and again
    assert recent.get("m", True, "0" * 50) is None
    assert recent.get("m", True, "8" * 50) is tokens
