"""What the service is asked and answers over HTTP, as its OpenAPI shows it."""

from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from cairn.fleet import Score, Tier
from cairn.fleet.separation import namespace_digest
from cairn.kv import as_tokens
from cairn.serve.base import Tokens
from cairn.serve.tokenizer import Chat

_NULL = {"type": "null"}
#: An enum works out a member's name at every call.
_TIER_NAMES = {tier: tier.name.lower() for tier in Tier}
_TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": (1 << 32) - 1}}


def _token_array(value: object) -> Tokens:
    """What a body's decoder made, or a list of ints."""
    if not isinstance(value, np.ndarray | list):
        raise ValueError("must be a list of integers in [0, 2**32)")
    if isinstance(value, list) and not all(type(one) is int for one in value):
        raise ValueError("must be a list of integers in [0, 2**32)")
    return as_tokens(value)


TokenIds = Annotated[Any, PlainValidator(_token_array), WithJsonSchema(_TOKENS_SCHEMA)]
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Rank = Annotated[int, Field(ge=0, lt=1 << 31)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Weights(_Strict):
    """What a token that is held in a tier is worth."""

    vram: Weight = 1.0
    cpu: Weight = 0.8
    disk: Weight = 0.4
    remote: Weight = 0.3

    def by_tier(self) -> dict[Tier, float]:
        return {Tier[name.upper()]: value for name, value in self.model_dump().items()}


class Asked(BaseModel):
    """What requests have in common: who is asked for, and what separates the prompt from others of equal tokens."""

    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)

    model: Name | None = Field(None, description="Chooses the tokenizer, and leaves out instances of other models.")
    instances: list[Name] | None = Field(None, max_length=100_000, description="Instances to score; all if left out.")
    lora: Name | Annotated[int, Field(ge=0, lt=1 << 63)] | None = Field(None, description="The adapter's name.")
    cache_salt: str | None = Field(None, min_length=1, max_length=4096, description="The request's `cache_salt`.")
    weights: Weights | None = Field(None, description="In place of the service's own.")

    def namespace(self) -> bytes:
        return namespace_digest(self.lora, self.cache_salt)


def _exactly_one(schema: dict[str, Any]) -> None:
    """Of prompt and token_ids; with examples."""
    schema["oneOf"] = [
        {"required": [given], "properties": {given: {"not": _NULL}, other: _NULL}}
        for given, other in (("prompt", "token_ids"), ("token_ids", "prompt"))
    ]
    sent = {"instance": "a"} if "instance" in schema["properties"] else {"instances": ["a", "b"]}
    schema["examples"] = [
        {"token_ids": [1, 2, 3, 4], **sent},
        {"model": "llama-3.1-8b", "prompt": "You are a helpful assistant.", **sent},
    ]


class TokensQuery(BaseModel):
    """What stands beside bare token ids, in the query string. A salt is a secret, and has no place in it."""

    model_config = ConfigDict(extra="forbid")

    model: Name | None = Field(None, description="Leaves out instances of other models.")
    instances: list[Name] | None = Field(None, max_length=1000, description="Instances to score; all if left out.")
    lora: Name | None = Field(None, description="The adapter's name.")

    def asked(self) -> Asked:
        return Asked.model_validate({"model": self.model, "instances": self.instances, "lora": self.lora})


class RoutedQuery(BaseModel):
    """As `TokensQuery`, for a decision."""

    model_config = ConfigDict(extra="forbid")

    instance: Name = Field(description="Where the prompt was sent.")
    rank: Rank | None = Field(None, description="Its data-parallel rank; left out: any.")
    lora: Name | None = Field(None, description="The adapter's name.")

    def asked(self) -> Asked:
        return Asked.model_validate({"lora": self.lora})


class ScoreRequest(Asked):
    """A prompt, as text or as token ids."""

    model_config = ConfigDict(json_schema_extra=_exactly_one)

    prompt: str | None = Field(None, description="Text of a completion; needs a tokenizer for `model`.")
    token_ids: TokenIds | None = Field(None, description="Token ids, in place of `prompt`.")
    add_special_tokens: bool = Field(True, description="As vLLM's: begin the prompt as the model's tokenizer does.")

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.token_ids is None):
            raise ValueError("exactly one of prompt and token_ids must be given")
        return self


class RoutedRequest(ScoreRequest):
    """A prompt, and the instance it was sent to."""

    instance: Name = Field(description="Where the prompt was sent.")
    rank: Rank | None = Field(None, description="Its data-parallel rank; left out: any, by the instance's own choice.")


class ChatRequest(Asked):
    """A chat completion as OpenAI's API has it. Fields that do not change the prompt are ignored."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "examples": [
                {
                    "model": "llama-3.1-8b",
                    "messages": [{"role": "user", "content": "Hello!"}],
                    "instances": ["a", "b"],
                }
            ]
        },
    )

    messages: list[dict[str, Any]] = Field(min_length=1, description="OpenAI's messages; text only.")
    tools: list[dict[str, Any]] | None = Field(None, description="OpenAI's tools, of type function.")
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: Name | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = Field(None, description="Only where the service is set to take it from requests.")
    chat_template_kwargs: dict[str, Any] | None = None

    def chat(self) -> Chat:
        """With the template's arguments as vLLM makes them: a request's own fields win."""
        kwargs = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            kwargs.setdefault("enable_thinking", self.reasoning_effort != "none")
            kwargs["reasoning_effort"] = self.reasoning_effort
        if self.documents is not None:
            kwargs["documents"] = self.documents
        return Chat(
            self.messages,
            self.tools,
            self.add_generation_prompt,
            self.continue_final_message,
            self.chat_template,
            kwargs,
        )


class TierTokens(BaseModel):
    """Tokens of the prompt by the tier that the instance would take them from, in prompt order."""

    vram: int
    cpu: int
    disk: int
    remote: int


class RankScore(BaseModel):
    """tokens held, and what they are worth together: the higher, the better."""

    score: float
    tokens: TierTokens


class InstanceScore(RankScore):
    """The best rank's score. ranks: each rank's, where the instance has several."""

    rank: int
    ranks: dict[str, RankScore] | None = None


class ScoreResponse(BaseModel):
    """scores: of each instance asked for, also where it holds nothing. unknown: asked for, but not followed, or of
    another model.
    """

    prompt_tokens: int
    scores: dict[str, InstanceScore]
    unknown: list[str]


class RoutedResponse(BaseModel):
    """prompt_tokens: of which the whole blocks count as held for `seconds`."""

    prompt_tokens: int
    seconds: float


class InstanceState(BaseModel):
    """Where one publisher's stream stands. sequence: the next one expected; null: nothing taken in yet. blocks: held
    now. age_s: since the last message; null: none yet.
    """

    name: str
    rank: int
    model: str | None
    endpoint: str
    replay: str | None
    connected: bool
    sequence: int | None
    blocks: int
    age_s: float | None


class InstancesResponse(BaseModel):
    instances: list[InstanceState]


class HealthResponse(BaseModel):
    """ready: every publisher has been connected to, or has had its time."""

    status: Literal["ok"]
    ready: bool
    instances: int
    connected: int
    version: str


def tier_tokens(one: Score) -> dict[str, int]:
    return {_TIER_NAMES[tier]: count for tier, count in one.tokens.items()}
