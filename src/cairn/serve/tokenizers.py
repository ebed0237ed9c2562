"""A pool of tokenizers: loaded when first asked for, used by a few threads, bounded in every respect."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import numpy as np

from cairn.errors import InputError
from cairn.serve.base import Bounds, RequestError, T, Tokens, within
from cairn.serve.recent import Recent
from cairn.serve.tokenizer import Chat, Tokenizer

#: Name of the tokenizer that all models have which have none of their own.
ANY_MODEL: Final = "*"


class Tokenizers:
    """Tokenizers by model name. Thread-safe; the asynchronous face is for event loops.

    models: name, or ANY_MODEL -> directory or name on Hugging Face's hub; nothing else is ever loaded. most:
    so many stay loaded. memory: bytes for texts that were tokenized lately. own_templates: a request may bring its own
    chat template, which is code that it lets run here, in a sandbox but without a bound on its time.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        bounds: Bounds | None = None,
        *,
        threads: int = 2,
        most: int = 8,
        memory: int = 64 << 20,
        own_templates: bool = False,
    ) -> None:
        self.models = dict(models)
        self._bounds = bounds or Bounds()
        self._most = most
        self._own_templates = own_templates
        self._recent = Recent(memory)
        self._loaded: OrderedDict[str, Future[Tokenizer]] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="cairn-tokenizer")
        self._waiting = 0

    def text(self, model: str | None, prompt: str, *, special: bool = True) -> Tokens:
        """The token ids [n] of a completion's prompt. Not to be changed. special: as for vLLM's `add_special_tokens`.

        model: may be None where there is only one. Raises RequestError.
        """
        name = self._name(model)
        self._check_text(prompt, "prompt")
        return self._tokens(name, prompt, special)

    def chat(self, model: str | None, chat: Chat, *, special: bool = False) -> Tokens:
        """The token ids [n] of a chat. Not to be changed. Raises RequestError."""
        name = self._name(model)
        self._check_chat(chat)
        rendered = self._tokenizer(name).render(chat)
        self._check_text(rendered, "the rendered chat")
        return self._tokens(name, rendered, special)

    async def text_async(self, model: str | None, prompt: str, *, special: bool = True) -> Tokens:
        """`text` in a thread of the pool, or at once where the text is remembered."""
        found = self._recent.get(self._name(model), special, prompt)
        return found if found is not None else await self._run(lambda: self.text(model, prompt, special=special))

    async def chat_async(self, model: str | None, chat: Chat, *, special: bool = False) -> Tokens:
        """`chat` in a thread of the pool."""
        return await self._run(lambda: self.chat(model, chat, special=special))

    def knows(self, model: str | None) -> bool:
        """Whether there is a tokenizer for it."""
        return model in self.models or ANY_MODEL in self.models or (model is None and len(self.models) == 1)

    def close(self) -> None:
        """Takes no more; what is being tokenized is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        with self._lock:
            if self._waiting >= self._bounds.waiting:
                raise RequestError(f"{self._waiting} requests wait for a tokenizer already; try again later", 503)
            self._waiting += 1
        running = self._threads.submit(work)
        running.add_done_callback(self._done)  # by its thread, even where whoever waited has left
        return await within(self._bounds.request, asyncio.wrap_future(running))

    def _done(self, _: "Future[T]") -> None:
        with self._lock:
            self._waiting -= 1

    def _name(self, model: str | None) -> str:
        if model is None and len(self.models) == 1:
            return next(iter(self.models))
        if model not in self.models and ANY_MODEL in self.models:
            return ANY_MODEL
        if model is None or model not in self.models:
            known = ", ".join(sorted(self.models)[:8]) or "none"
            told = "model: must be given" if model is None else f"model {model[:100]!r}: has no tokenizer here"
            raise RequestError(f"{told}; those that have: {known}; send token_ids, or start with --model", 404)
        return model

    def _check_text(self, text: str, what: str) -> None:
        try:
            size = len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError:
            raise RequestError(f"{what}: must be Unicode text, without surrogates") from None
        if size > self._bounds.prompt:
            raise RequestError(f"{what}: {size} bytes; at most {self._bounds.prompt} are taken", 413)

    def _check_chat(self, chat: Chat) -> None:
        if len(chat.messages) > self._bounds.messages:
            raise RequestError(f"messages: {len(chat.messages)}; at most {self._bounds.messages} are taken", 413)
        if not chat.messages:
            raise RequestError("messages: must not be empty")
        if chat.template is not None and not self._own_templates:
            raise RequestError("chat_template: none is taken from requests (index.request_chat_template)", 403)
        if chat.add_generation_prompt and chat.continue_final_message:
            raise RequestError("add_generation_prompt and continue_final_message: must not both be true")

    def _tokens(self, name: str, text: str, special: bool) -> Tokens:
        tokenizer = self._tokenizer(name)
        pieces = [text] if special else tokenizer.pieces(text)
        found = [self._piece(name, tokenizer, piece, special) for piece in pieces]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _piece(self, name: str, tokenizer: Tokenizer, text: str, special: bool) -> Tokens:
        found = self._recent.get(name, special, text)
        if found is None:
            found = tokenizer.text(text, special=special)
            self._recent.put(name, special, text, found)
        return found

    def _tokenizer(self, name: str) -> Tokenizer:
        """Loads it once, however many ask; who comes meanwhile waits. A failure is not remembered."""
        with self._lock:
            found = self._loaded.get(name)
            mine = found is None
            if found is None:
                found = self._loaded[name] = Future()
                while len(self._loaded) > self._most:
                    self._loaded.popitem(last=False)
            else:
                self._loaded.move_to_end(name)
        if mine:
            self._load(name, found)
        try:
            return found.result(timeout=None if mine else self._bounds.request)
        except InputError as error:
            raise RequestError(str(error), 503) from None

    def _load(self, name: str, into: "Future[Tokenizer]") -> None:
        try:
            into.set_result(Tokenizer.load(self.models[name]))
        except InputError as error:
            with self._lock:
                if self._loaded.get(name) is into:
                    del self._loaded[name]
            into.set_exception(error)
