"""The scheduler's side of blending: which chunks of a prompt are held, and what a blended request must not share.

A chunk is kept as the prompt that it would be by itself, behind the prelude: under a prefix's keys, which name the
prelude's tokens and its own, its model, its adapter and its tenant. So chunks of different preludes never mix, and a
document that is sent alone behind the prelude is there from then on.
"""

import logging
import os
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from cairn.blend import FIXED_ROPES, Piece, Recipe, prelude_of, recipe_of, refuse_blending, separator_of, split
from cairn.config import Config
from cairn.connect.vllm.messages import Blend, Learn, Part
from cairn.connect.vllm.model import Served
from cairn.engine.core import EngineCore
from cairn.engine.stage import Stage
from cairn.engine.writing import Writing
from cairn.errors import CairnError, GeometryError, InputError
from cairn.kv import KeyChain, as_tokens
from cairn.kv.keys import Tokens
from cairn.observe.reasons import Reason
from cairn.plan import Blend as BlendFacts
from cairn.plan import BlendPlan

logger = logging.getLogger(__name__)

#: vLLM makes one table of angles for prompts of all lengths, also where others follow the prompt (NTK).
_ROPES: Final = (*FIXED_ROPES, "ntk", "dynamic")


class Settings(NamedTuple):
    """How to blend. separator: the tokens that stand between chunks; none: chunks are cut by their content. prelude:
    what stands before each where it is computed.
    """

    recipe: Recipe
    separator: Tokens
    prelude: Tokens


def settings_of(vllm_config: Any, served: Served, config: Config, *, tell: bool = True) -> Settings | None:
    """None if blending is not wanted, or not possible here, for which `tell` gives the reason."""
    wanted = config.blending
    if not wanted.enabled:
        return None
    try:
        _refuse(vllm_config, served)
        tokenizer = _tokenizer(vllm_config)
        separator = separator_of(wanted.special_str, tokenizer)
        recipe = recipe_of(wanted, vllm_config.model_config.model, served.namespace.geometry.layers)
    except (GeometryError, InputError) as error:
        if tell:
            no_blending(error)
        return None
    return Settings(recipe, separator, prelude_of(separator, tokenizer))


def no_blending(reason: CairnError) -> None:
    """Says that there will be none."""
    logger.warning("no blending, but prefixes are reused all the same: %s", reason)


def _tokenizer(vllm_config: Any) -> Any:
    """The model's; None where vLLM was told to load none."""
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(vllm_config.model_config)


def _refuse(vllm_config: Any, served: Served) -> None:
    geometry, config = served.namespace.geometry, vllm_config.model_config.hf_text_config
    refuse_blending(config, ropes=_ROPES)
    reasons = {
        "its ranks have to agree layer by layer (tensor or pipeline parallelism), which is not built": served.ranks > 1,
        "layers with LoRA are given a step's rows only": vllm_config.lora_config is not None,
        "a draft model needs the prompt's hidden states": getattr(vllm_config, "speculative_config", None) is not None,
        f"KV of dtype {geometry.dtype} has scales that are the engine's own": geometry.element_bytes == 1,
        "its queries are scaled by position (llama_4_scaling)": getattr(config, "llama_4_scaling", None),
        "its attention has chunks of its own (dual_chunk_attention_config)": (
            getattr(config, "dual_chunk_attention_config", None)
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise GeometryError(reason)


class _Held(NamedTuple):
    """piece: the tokens of a prompt that a stage has, whose first one, the prelude's, would stand at `origin`."""

    piece: Piece
    origin: int
    stage: Stage


class Missing(NamedTuple):
    """A chunk that is not held whole, behind the prelude, and its keys."""

    tokens: Tokens
    chain: KeyChain

    def learn(self, number: int, request: str, writing: Writing) -> Learn:
        """What the worker shall do to fill `writing` with it."""
        blocks = writing.first + len(writing.rows)
        tokens = self.tokens[: blocks * self.chain.block_tokens].tobytes()
        return Learn(number, request, tokens, writing.first, [int(row) for row in writing.rows], writing.home)


class Chunks:
    """A prompt's chunks behind `start` tokens that are at hand, looked for and held until `release`.

    pieces: where they stand among `tokens`. chain, whole: of the request. prelude: what each was computed behind. Once
    they are `settled`, held: those that are there, each as far as it is; missing: those that are not there whole; stop:
    up to which token the prompt is blended, as vLLM computes what is behind. plan: whether it is, once that is decided.
    Owned by one request.
    """

    def __init__(
        self,
        engine: EngineCore,
        chain: KeyChain,
        tokens: Tokens,
        pieces: Sequence[Piece],
        start: int,
        prelude: Tokens,
        whole: Stage,
    ) -> None:
        self.start = self.stop = start
        self.pieces = pieces
        self.held: list[_Held] = []
        self.missing: list[Missing] = []
        self.settled = False
        self.plan: BlendPlan | None = None
        self._engine = engine
        self._whole = whole
        self._tokens = tokens
        self._prelude = len(prelude)
        self._alone = [np.concatenate([prelude, tokens[start:stop]]) for start, stop in pieces]
        self._chains = [KeyChain(chain.namespace, chain.block_tokens, alone) for alone in self._alone]
        self._asked = [answer for chain in self._chains if (answer := engine.ask(chain)) is not None]
        self._until = engine.deadline(None)
        self._stages: list[Stage] = []

    def settle(self) -> bool:
        """Goes on as far as it can without waiting; returns whether they are settled."""
        if not self._stages:
            if not all(answer.done() for answer in self._asked) and time.monotonic() < self._until:
                return False
            self._stages = [
                self._engine.stage(chain, first_token=self._prelude + max(0, self.start - piece.start), vram=False)
                for piece, chain in zip(self.pieces, self._chains, strict=True)
            ]
            for stage in self._stages:
                stage.part_of(self._whole)
        if not self.settled and all(stage.settled for stage in self._stages):
            self.settled = True
            for piece, alone, chain, stage in zip(self.pieces, self._alone, self._chains, self._stages, strict=True):
                origin, held = piece.start - self._prelude, stage.wait()
                there = Piece(max(piece.start, self.start), origin + held)
                if there.stop > there.start:
                    self.held.append(_Held(there, origin, stage))
                    self.stop = there.stop
                if held < len(chain) * chain.block_tokens:
                    self.missing.append(Missing(alone, chain))
        return self.settled

    @property
    def prompt(self) -> int:
        """Tokens of the prompt, the last one included."""
        return len(self._tokens) + 1

    def order(self, number: int, request: str, pages: list[int], computed: int) -> Blend:
        """What the worker shall do; counts them as loaded, and the prefix before them. number, request: see `Blend`.
        pages: of the request. computed: tokens that are there.
        """
        parts = [_part(stage, piece, origin) for piece, origin, stage in self.held]
        if self.start > computed:
            parts.insert(0, _part(self._whole, Piece(computed, self.start), 0))
        block = self._engine.geometry.block_tokens
        first, last = computed // block, -(-self.stop // block)
        tokens = self._tokens[: self.stop].tobytes()
        return Blend(number, request, tokens, self.start, parts, pages[:first], pages[first:last])

    def failed(self) -> None:
        """What was ordered could not be loaded."""
        for stage in self._stages:
            stage.failed(Reason.IO_ERROR)

    def release(self) -> None:
        for stage in self._stages:
            stage.release()


def _part(stage: Stage, piece: Piece, origin: int) -> Part:
    """A prompt's tokens out of a stage whose first one would stand at `origin`; counts them as loaded."""
    placed = stage.rows(piece.stop - origin)
    rows = [int(row) for part in placed for row in part.rows]
    return Part(piece.start, piece.stop, origin, rows, placed[0].home if placed else None)


class Blending:
    """Decides which requests are blended. For vLLM's scheduler loop alone.

    ready: set once the worker has the model at hand.
    """

    def __init__(self, engine: EngineCore, settings: Settings) -> None:
        self.ready = False
        self._engine = engine
        self._recipe, self._separator, self._prelude = settings

    def find(self, request: Any, chain: KeyChain, whole: Stage, start: int) -> Chunks | None:
        """Looks for chunks of a request's tokens behind the first `start`, which are at hand; None if there are none
        to look for. chain, whole: of the request. They are to be released before `whole`, which counts what is missed.
        """
        tokens, pieces = self._pieces(request)
        wanted = [piece for piece in pieces if piece.stop > start]
        return Chunks(self._engine, chain, tokens, wanted, start, self._prelude, whole) if wanted else None

    def chunked(self, request: Any) -> bool:
        """Whether there are chunks in a request's prompt, which is then loaded from DRAM alone, as they are."""
        return self.ready and bool(self._pieces(request)[1])

    def _pieces(self, request: Any) -> tuple[Tokens, list[Piece]]:
        """A request's tokens but for the last, left to vLLM, whose logits are needed; and the chunks in them."""
        tokens = as_tokens(request.all_token_ids[:-1])
        if not self._engine.autopilot.blends or request.mm_features or request.lora_request or request.pooling_params:
            return tokens, []
        pieces = split(tokens, self._separator)
        if len(self._separator):
            pieces = pieces[:-1]  # the question
        return tokens, [piece for piece in pieces if piece.start]

    def take(self, chunks: Chunks) -> bool:
        """Decides, once for settled chunks, whether to blend their prompt; counts them."""
        if chunks.plan is None:
            pieces = [held.piece for held in chunks.held]
            hits, lookups = self._engine.metrics.blend_hits, self._engine.metrics.blend_lookups
            for counter, some in ((lookups, chunks.pieces), (hits, pieces)):
                counter.add(len(some), unit="chunks")
                counter.add(sum(piece.stop - max(piece.start, chunks.start) for piece in some), unit="tokens")
            start, layers = chunks.start, self._engine.geometry.layers
            facts = BlendFacts(chunks.prompt, start, chunks.stop, pieces, *self._recipe, layers=layers)
            chunks.plan = self._engine.autopilot.blend(facts)
        return chunks.plan.yes


def make_private(request: Any, first_hash: int) -> None:
    """Nobody will find a request's blocks from one on in vLLM's own prefix cache: they are no function of its tokens.

    Later blocks hash from these, so that they are its own, too. It finds them itself after a preemption, and may.
    """
    hashes = request.block_hashes
    hashes[first_hash:] = [os.urandom(len(found)) for found in hashes[first_hash:]]
