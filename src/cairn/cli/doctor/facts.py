"""What probes found out: values only, so that any state can be judged, a real one or one that a test made up."""

from collections.abc import Mapping
from typing import NamedTuple

from cairn.config import Config


class Host(NamedTuple):
    """This process's limits and this machine's memory. Sizes in bytes.

    memory: of the machine, or of the cgroup if that is less. shm: size of /dev/shm. memlock: None: no limit counts.
    files: descriptors. huge_pages, shared_huge_pages: the kernel's word for private and for shared memory (always,
    advise, never, ...); "": not known. gpu: NVIDIA's driver is there. vllm: it is installed.
    """

    memory: int
    shm: int
    memlock: int | None
    files: int
    huge_pages: str
    shared_huge_pages: str
    gpu: bool
    vllm: bool


class Disk(NamedTuple):
    """What lies under storage.disk.path. kind: of file system; "": not known. direct: O_DIRECT works.

    room: bytes that the cache may take, what it has already included. fault: why nothing can be written there; "": it
    can.
    """

    path: str
    kind: str
    direct: bool
    room: int
    fault: str


class Remote(NamedTuple):
    """The remote store. url: without password. fault: why it does not answer; "": it does. memory: its objects lie in
    this machine's memory (tmpfs, or a server on loopback).
    """

    url: str
    fault: str
    memory: bool


class Model(NamedTuple):
    """What a model's directory says. row_bytes: that a block of `block_tokens` takes in the arena. longest: tokens of a
    prompt; 0: not known.
    """

    block_tokens: int
    row_bytes: int
    longest: int


class Occurrences(NamedTuple):
    """How often the separator of chunks stands in sample text. lines: of the first few, from 1."""

    separator: str
    times: int
    lines: tuple[int, ...]


class Boundary(NamedTuple):
    """The separator under the tokenizer. broken: surroundings in which its own tokens are not found; "": none."""

    separator: str
    broken: str


class Registry(NamedTuple):
    """etcd. fault: why it does not answer; "": it does."""

    addresses: str
    fault: str


class Engine(NamedTuple):
    """An engine that is registered, named in the configuration or in a file of `cairn up`. model: "": not known.

    traits: what must be equal in engines of one model if they are to share blocks, by its name. block_tokens, longest
    (of a prompt): 0: not known. prompts: finished requests, of `prompt_tokens` tokens each on average. fault: why it
    does not answer; "": it does, or was not asked.
    """

    name: str
    model: str
    traits: Mapping[str, str]
    block_tokens: int
    longest: int = 0
    prompts: int = 0
    prompt_tokens: float = 0.0
    fault: str = ""


class Clock(NamedTuple):
    """By how many seconds another machine's clock is ahead of ours at least; below 0: behind."""

    name: str
    ahead_s: float


class Publisher(NamedTuple):
    """Where KV events are to be published. connected: somebody is there. heard: something was published, now or before.

    idle: its engine says that it has computed no prompt yet, so that there is nothing to publish.
    """

    name: str
    endpoint: str
    connected: bool
    heard: bool
    idle: bool


class Facts(NamedTuple):
    """All that is judged. None, or empty: there is none. seeds: PYTHONHASHSEED by process, where it is set.

    sample_tokens: of the sample text.
    """

    config: Config
    host: Host
    seeds: Mapping[str, str]
    disk: Disk | None = None
    remote: Remote | None = None
    model: Model | None = None
    occurrences: Occurrences | None = None
    boundary: Boundary | None = None
    sample_tokens: int | None = None
    registry: Registry | None = None
    engines: tuple[Engine, ...] = ()
    clocks: tuple[Clock, ...] = ()
    publishers: tuple[Publisher, ...] = ()
