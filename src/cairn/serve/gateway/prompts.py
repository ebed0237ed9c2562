"""Who holds how much of a request's prompt: by the index over the engines' KV events, or else by a guess."""

import asyncio
import contextlib
from typing import Final

from cairn.fleet import Tier
from cairn.fleet.separation import namespace_digest
from cairn.plan.schedule.base import TIERS
from cairn.serve.base import RequestError, Tokens
from cairn.serve.gateway.asked import Asked
from cairn.serve.gateway.base import Prompt
from cairn.serve.gateway.guesses import Guesses, Pieces
from cairn.serve.indexer.lookup import Query
from cairn.serve.indexer.models import ChatRequest
from cairn.serve.indexer.parts import Parts
from cairn.serve.token_text import cut_tokens

#: For a prompt to be tokenized, seconds; then it is guessed.
_TOKENIZE_S: Final = 1.0
#: Where a guess is that a prompt is.
_GUESSED: Final = TIERS[Tier.VRAM]


class FleetPrompts:
    """A `Prompts`. It guesses where no engine publishes events, or where nobody can tell a request's tokens."""

    def __init__(self, parts: Parts) -> None:
        """parts: the index, whoever follows events for it, and tokenizers."""
        self._parts = parts
        self._guesses = Guesses()

    async def look(self, asked: Asked) -> Prompt:
        if self._parts.following.sources():
            try:
                async with asyncio.timeout(_TOKENIZE_S):
                    tokens = await self._tokens(asked)
            except (ValueError, TimeoutError):  # a RequestError, or pydantic's or msgspec's
                tokens = None  # the engine will say what is wrong with it
            if tokens is not None:
                return self._known(asked, tokens)
        prompt = asked.prompt
        count, size = asked.tokens(prompt), max(1, len(prompt))
        pieces, reached = self._guesses.look(prompt)
        return Prompt(count, {name: {_GUESSED: count * end // size} for name, end in reached}, pieces)

    def sent(self, prompt: Prompt, instance: str) -> None:
        if isinstance(prompt.key, Query):
            with contextlib.suppress(RequestError):  # it publishes no events, or has left just now
                self._parts.lookup.routed(prompt.key, instance, None)
        else:
            found: Pieces = prompt.key
            self._guesses.sent(found, instance)

    def forget(self, instance: str) -> None:
        """What the index holds of it goes with its events, see `Discovery`."""
        self._guesses.forget(instance)

    def _known(self, asked: Asked, tokens: Tokens) -> Prompt:
        salt = asked.salt
        query = Query(tokens, asked.model or None, namespace=namespace_digest(None, salt) if salt else b"")
        best = self._parts.lookup.score(query).best()
        held = {
            name: {TIERS[tier]: count for tier, count in one.tokens.items() if count}
            for name, (_, one) in best.items()
            if one.score > 0
        }
        return Prompt(len(tokens), held, query)

    async def _tokens(self, asked: Asked) -> Tokens | None:
        """None: no tokenizer, or several prompts."""
        tokenizers, model = self._parts.tokenizers, asked.model or None
        text = None if asked.chat else asked.text
        if not asked.chat and text is None:
            return cut_tokens(b'{"token_ids":' + asked.prompt + b"}")[1]
        if not tokenizers.knows(model):
            return None
        if text is not None:
            return await tokenizers.text_async(model, text)
        request = ChatRequest.model_validate(asked.everything())
        return await tokenizers.chat_async(model, request.chat(), special=request.add_special_tokens)
