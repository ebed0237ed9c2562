"""One model's tokenizer: text and chats to token ids, as vLLM's OpenAI server makes them."""

import array
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from cairn.errors import InputError
from cairn.serve.base import RequestError, Tokens
from cairn.serve.chat import conversation, tool_schemas
from cairn.serve.cuts import Cuts
from cairn.serve.templates import content_format, variables

logger = logging.getLogger(__name__)

#: Arguments of a template that have fields of their own in a request, or that would change what it is used for.
_RESERVED = frozenset({"chat_template", "tokenize"})


class Chat(NamedTuple):
    """A chat as OpenAI's API has it. template: Jinja in place of the tokenizer's own. kwargs: what the template is
    given beside the messages.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template: str | None = None
    kwargs: Mapping[str, Any] = {}


class Tokenizer:
    """Thread-safe; fast tokenizers are free of the GIL while they work."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: of Transformers. It must not be used by others, who might set its truncation."""
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
        self._cuts = None if self._fast is None else Cuts(self._fast)

    @classmethod
    def load(cls, name: str) -> Self:
        """From a directory, or by its name from Hugging Face's hub. Runs no code of the model's. Raises InputError."""
        try:
            from transformers import AutoTokenizer

            return cls(AutoTokenizer.from_pretrained(name))
        except Exception as error:  # whatever the files make Transformers raise, or that it is not installed
            logger.debug("%s", name, exc_info=True)
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise InputError(f"{name}: no tokenizer can be loaded from it: {reason}") from error

    def text(self, text: str, *, special: bool = True) -> Tokens:
        """The ids of a text; special: with the tokens that the model begins its prompts with, if it has any."""
        if self._fast is not None:
            ids = self._fast.encode(text, add_special_tokens=special).ids
        else:
            with self._lock:
                ids = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        tokens: Tokens = np.frombuffer(array.array("I", ids), np.uint32)
        return tokens

    def pieces(self, text: str) -> list[str]:
        """The text in pieces whose ids without special tokens are together its own; see `Cuts`."""
        return [text] if self._cuts is None else self._cuts.pieces(text)

    def render(self, chat: Chat) -> str:
        """The text of a chat, to be tokenized without special tokens: the template has written them.

        Raises RequestError for a chat that the template refuses. Templates run in Jinja's immutable sandbox.
        """
        from jinja2 import TemplateError

        tools = None if chat.tools is None else tool_schemas(chat.tools)
        try:
            template = self._template(chat.template, tools)
            messages = conversation(chat.messages, content_format(template), template)
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                tokenize=False,
                **self._arguments(template, chat.kwargs),
            )
        except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"the chat template refuses these messages: {_reason(error)}") from None
        return str(rendered)

    def _template(self, given: str | None, tools: list[dict[str, Any]] | None) -> str:
        if given is not None:
            return given
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise RequestError("this model has no chat template; send a prompt or token_ids to /score")
        return str(self._tokenizer.get_chat_template(None, tools=tools))

    def _arguments(self, template: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the template knows of what it was given."""
        if reserved := sorted(_RESERVED & given.keys()):
            raise RequestError(f"chat_template_kwargs: must not have {reserved[0]}")
        known = variables(template) | {"documents"}
        taken = {"messages", "tools", "add_generation_prompt", "continue_final_message"}
        return {name: value for name, value in given.items() if name in known - taken}


def _reason(error: BaseException) -> str:
    """What a template itself says, which Transformers may have wrapped."""
    from jinja2 import TemplateError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, TemplateError):
        cause = cause.__cause__ or cause.__context__
    return str(cause or error)
