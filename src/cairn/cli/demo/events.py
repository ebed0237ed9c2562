"""What a child process is asked to do, and what it reports: JSON lines over a pipe, one message a line."""

import msgspec


class Storage(msgspec.Struct, frozen=True):
    """Where the child's CacheEngine keeps blocks. disk_path: the cache directory; sizes in bytes."""

    disk_path: str
    dram_bytes: int
    disk_bytes: int


class Job(msgspec.Struct, frozen=True):
    """What one child does: load the model, then answer `ask` (indices into `questions`) one after the other.

    tokens: length of the prompts to build from `text`. storage: None runs plain Transformers.
    """

    model_dir: str
    text: str
    questions: list[str]
    ask: list[int]
    tokens: int
    answer_tokens: int
    dtype: str
    storage: Storage | None = None


class Ready(msgspec.Struct, tag="ready"):
    """The model is loaded. prompt_tokens: of each question; text_tokens: how much of the text they hold."""

    prompt_tokens: list[int]
    text_tokens: int
    kv_token_bytes: int
    versions: dict[str, str]


class Asking(msgspec.Struct, tag="asking"):
    """A request starts."""

    question: int


class Token(msgspec.Struct, tag="token"):
    """The answer so far, and the seconds since the request started."""

    text: str
    seconds: float


class Answer(msgspec.Struct, tag="answer"):
    """A request is done. ttft_s: from the prompt's token ids to the first new token, in seconds.

    dram_tokens, disk_tokens: prompt tokens reused, by the tier that held them; loaded_bytes, stored_bytes: KV moved.
    """

    question: int
    ttft_s: float
    total_s: float
    prompt_tokens: int
    token_ids: list[int]
    text: str
    dram_tokens: int = 0
    disk_tokens: int = 0
    loaded_bytes: int = 0
    stored_bytes: int = 0


class Done(msgspec.Struct, tag="done"):
    """The child has closed its engine and ends. flush_s: seconds until all was on disk."""

    flush_s: float = 0.0


class Failed(msgspec.Struct, tag="failed"):
    """The child gives up. kind: the name of a class of `cairn.errors`, or of any other exception."""

    kind: str
    message: str


Event = Ready | Asking | Token | Answer | Done | Failed

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode(event: Event) -> bytes:
    """One line, its newline included."""
    return _encoder.encode(event) + b"\n"


def decode(line: bytes) -> Event:
    """Raises msgspec.DecodeError (or its subclass ValidationError) for a line that is no event."""
    return _decoder.decode(line)
