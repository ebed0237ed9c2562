"""A chat as OpenAI's API has it, brought into the shape that vLLM hands to chat templates.

Templates print what they are given (`tool | tojson`), so order and presence of fields are in the tokens, and thereby in
the blocks. The rules are those of vLLM 0.32's OpenAI server (renderers/chat_utils.py and openai/chat_completion).
Only text can be tokenized here: a picture becomes tokens in the engine.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cairn.serve.base import RequestError
from cairn.serve.templates import ContentFormat, knows_developers

Message = dict[str, Any]

_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}

#: Fields of OpenAI's and vLLM's parts; others are handed on to templates that take parts.
_MEDIA = ("image_embeds", "image_pil", "image_url", "input_audio", "audio_embeds", "audio_url", "video_embeds")
_OTHERS = ("closed", "data", "file", "name", "prompt_cache_breakpoint", "refusal", "text", "thinking", "type", "uuid")
_KNOWN = frozenset((*_MEDIA, "video_url", *_OTHERS))

#: A line of a client that changes with each request; vLLM leaves it out of system messages.
_BILLING = "x-anthropic-billing-header"


def conversation(messages: Sequence[Mapping[str, Any]], style: ContentFormat, template: str) -> list[Message]:
    """The messages as a template takes them. Raises RequestError for what is not a message, or not of text."""
    made = [_message(message, i, style) for i, message in enumerate(messages)]
    if any(message["role"] == "developer" for message in made) and not knows_developers(template):
        return _system_first([_as_system(message) for message in made])
    return made


def tool_schemas(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools with the fields that vLLM knows, in its order. Raises RequestError for what is no function."""
    return [_tool(tool, i) for i, tool in enumerate(tools)]


def _tool(tool: Mapping[str, Any], at: int) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"tools[{at}]: must be {{type: function, function: {{name, description, parameters}}}}")
    made: dict[str, Any] = {name: function.get(name) for name in ("name", "description", "parameters")}
    deferred = tool.get("defer_loading")
    given = {"strict": function.get("strict"), "defer_loading": function.get("defer_loading", deferred)}
    made |= {name: value for name, value in given.items() if value is not None}
    outer = {"type": "function", "function": made}
    return outer if deferred is None else outer | {"defer_loading": deferred}


def _message(message: Mapping[str, Any], at: int, style: ContentFormat) -> Message:
    role = message.get("role")
    if not isinstance(role, str):
        raise RequestError(f"messages[{at}].role: must be text, as user or assistant")
    parts = _parts(message.get("content"), at)
    if role == "system":
        parts = _without_billing(parts)
    content: Any = parts if style == "openai" else "\n".join(part["text"] for part in parts)
    made: Message = {"role": role, "content": content}
    if role == "assistant":
        made |= _of_assistant(message, at)
    elif role == "tool":
        if "tool_call_id" in message:
            made["tool_call_id"] = message["tool_call_id"]
        if isinstance(content, list):
            made["content"] = "\n".join(part["text"] for part in content)
    for field in ("name", "task"):
        if isinstance(message.get(field), str):
            made[field] = message[field]
    if role == "developer":
        made["tools"] = message.get("tools")
    return made


def _parts(content: object, at: int) -> list[dict[str, Any]]:
    """The content as parts of text: {type: text, text: ...} and what vLLM hands on beside it."""
    if content is None:
        return []
    if not isinstance(content, list):
        content = [content]
    made = []
    for part in content:
        if isinstance(part, str):
            made.append({"type": "text", "text": part})
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind not in _TEXTS:
            what = f"parts of type {kind}" if isinstance(kind, str) else "this content"
            raise RequestError(f"messages[{at}]: {what} cannot be tokenized here; text can, and /score takes token_ids")
        text = part.get(_TEXTS[kind])
        if text is None and kind in ("text", "refusal"):
            continue
        if not isinstance(text, str):
            raise RequestError(f"messages[{at}]: the {_TEXTS[kind]} of a part must be text")
        made.append({"type": "text", "text": text, **{k: v for k, v in part.items() if k not in _KNOWN}})
    return made


def _without_billing(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for part in parts:
        if part["text"].startswith(_BILLING):
            rest = part["text"].partition("\n")[2]
            if not rest:
                continue
            part = {**part, "text": rest}
        made.append(part)
    return made


def _of_assistant(message: Mapping[str, Any], at: int) -> Message:
    made: Message = {}
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise RequestError(f"messages[{at}].tool_calls: must be a list")
    if calls:
        made["tool_calls"] = [_call(call, at) for call in calls]
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        made["reasoning"] = made["reasoning_content"] = reasoning
    return made


def _call(call: object, at: int) -> dict[str, Any]:
    """A call in the order of OpenAI's types, its arguments as an object; what is none becomes an empty one."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise RequestError(f"messages[{at}].tool_calls: must be of type function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    made = {"arguments": arguments if isinstance(arguments, dict) else {}, "name": function.get("name")}
    return {"id": call.get("id"), "function": made, "type": "function"}


def _as_system(message: Message) -> Message:
    if message["role"] != "developer":
        return message
    return {**{key: value for key, value in message.items() if key != "tools"}, "role": "system"}


def _system_first(messages: list[Message]) -> list[Message]:
    """One system message at the head, if there are several or it stands elsewhere."""
    places = [i for i, message in enumerate(messages) if message["role"] == "system"]
    if places in ([], [0]):
        return messages
    texts = []
    for place in places:
        content = messages[place]["content"]
        if isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
        if content:
            texts.append(content)
    return [{"role": "system", "content": "\n\n".join(texts)}, *(m for m in messages if m["role"] != "system")]
