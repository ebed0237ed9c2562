"""The service's tokens are vLLM's: its own request types and renderer, beside ours, on chats of every shape."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cairn.serve.base import RequestError
from cairn.serve.templates import content_format
from cairn.serve.tokenizer import Chat
from cairn.serve.tokenizers import Tokenizers

#: Prints all it is given, so that order and presence show; as text, and as parts.
PRINTS = "{% for m in messages %}<{{ m['role'] }}>{{ m | tojson }}{% endfor %}{{ tools | tojson }}{{ x }}"
PARTS = "{% for m in messages %}{% for c in m['content'] %}[{{ c | tojson }}]{% endfor %}{{ m | tojson }}{% endfor %}"
DEVELOPS = PRINTS + "{# 'developer' #}"

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": [2]}'}}
ODD = {"function": {"arguments": "not json", "name": "g"}, "type": "function", "id": "2"}
USER = {"role": "user", "content": "hello  there"}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "be brief"}, USER, {"role": "assistant", "content": "ok"}, USER],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    [{"role": "user", "content": []}, {"role": "assistant", "content": None, "tool_calls": [CALL, ODD]}],
    [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "42", "tool_call_id": "1"}],
    [USER, {"role": "tool", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]}],
    [USER, {"role": "assistant", "content": "", "tool_calls": []}],
    [USER, {"role": "assistant", "content": "x", "reasoning_content": "because"}],
    [USER, {"role": "assistant", "content": "x", "reasoning": "because"}],
    [USER, {"role": "developer", "content": "quick"}, {"role": "system", "content": "slow"}, USER],
    [{"role": "developer", "content": "quick"}, USER],
    [{"role": "system", "content": "x-anthropic-billing-header: 1\nrest"}, USER],
    [{"role": "user", "content": "hi", "name": "ann"}],
    [{"role": "user", "content": "ünï\u2028 <|im_end|> 🙂"}],
]
TOOL = {"type": "function", "function": {"parameters": {"type": "object", "b": 1, "a": 2}, "name": "f"}}
STRICT = {"function": {"strict": True, "description": "d", "name": "g"}, "type": "function"}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"tools": [TOOL, STRICT]},
    {"add_generation_prompt": False},
    {"chat_template_kwargs": {"x": "yes", "y": 3}},
    {"reasoning_effort": "low"},
]


class Theirs:
    """vLLM's way from a request's JSON to tokens, without an engine."""

    def __init__(self, home: Path) -> None:
        from vllm.config import ModelConfig, VllmConfig
        from vllm.renderers import renderer_from_config

        self.config = ModelConfig(str(home), max_model_len=8192)
        self.renderer = renderer_from_config(VllmConfig(model_config=self.config))

    def chat(self, fields: dict[str, Any], template: str | None) -> list[int]:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest.model_validate(json.loads(json.dumps({"model": "m", **fields})))
        tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
        params = request.build_chat_params(template, "auto").with_defaults({"tools": tools, "tokenize": False})
        _, prompts = asyncio.run(
            self.renderer.render_chat_async([request.messages], params, request.build_tok_params(self.config))
        )
        return list(prompts[0]["prompt_token_ids"])


@pytest.fixture(scope="module")
def theirs(model: Path) -> Theirs:
    return Theirs(model)


@pytest.mark.parametrize("template", [None, PRINTS, PARTS, DEVELOPS], ids=["own", "prints", "parts", "develops"])
def test_chats(theirs: Theirs, model: Path, template: str | None) -> None:
    pool = Tokenizers({"m": str(model)}, own_templates=True)
    for messages in CHATS:
        for options in OPTIONS:
            expected = theirs.chat({"messages": messages, **options}, template)
            kwargs = dict(options.get("chat_template_kwargs", {}))
            if "reasoning_effort" in options:
                kwargs |= {"reasoning_effort": "low", "enable_thinking": True}
            generate = options.get("add_generation_prompt", True)
            chat = Chat(messages, options.get("tools"), generate, False, template, kwargs)
            found = pool.chat("m", chat).tolist()
            if found != expected:
                told = [theirs.renderer.get_tokenizer().decode(ids) for ids in (found, expected)]
                pytest.fail(f"{messages} {options}:\nours   {told[0]}\ntheirs {told[1]}")


def test_how_templates_want_content() -> None:
    """On vLLM's own examples and templates that were made to be hard."""
    from vllm.renderers.hf import _detect_content_format

    loop = "{%% for m in messages %%}%s{%% endfor %%}"
    hard = [
        loop % "{% for c in m.content %}{{ c }}{% endfor %}",
        loop % "{% set content = m.content %}{% for c in content %}{{ c }}{% endfor %}",
        loop % "{% set text = m['content'] %}{% for c in text %}{{ c }}{% endfor %}",
        loop % "{% for c in m.content | list %}{{ c }}{% endfor %}",
        loop % "{% for c in m.tool_calls %}{{ c }}{% endfor %}",
        "{% set rest = messages[1:] %}{% for m in rest %}{% for c in m['content'] %}{{ c }}{% endfor %}{% endfor %}",
        "{% macro show(x) %}{% for c in x %}{{ c }}{% endfor %}{% endmacro %}" + loop % "{{ show(m.content) }}",
        "{% macro show(x) %}{% for c in x %}{{ c }}{% endfor %}{% endmacro %}" + loop % "{{ show(x=m.content) }}",
        "{% macro show(content) %}{% for c in content %}{{ c }}{% endfor %}{% endmacro %}"
        + loop % "{{ show(m.role) }}",
        loop % "{{ m.content }}",
        "{% for content in messages %}{% for c in content %}{{ c }}{% endfor %}{% endfor %}",
        "{% generation %}{{ messages }}{% endgeneration %}",
    ]
    for template in [*hard, PRINTS, PARTS]:
        assert content_format(template) == _detect_content_format(template, default="string"), template
    assert {content_format(template) for template in hard} == {"string", "openai"}


def test_what_vllm_refuses_is_refused(theirs: Theirs, model: Path) -> None:
    pool = Tokenizers({"m": str(model)}, own_templates=True)
    raises = "{{ raise_exception('no ' + messages[0].role) }}"
    with pytest.raises(RequestError, match="refuses these messages: no user"):
        pool.chat("m", Chat([USER], template=raises))
    with pytest.raises(Exception, match="no user"):
        theirs.chat({"messages": [USER]}, raises)
