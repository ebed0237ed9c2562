"""The schema: every setting of Cairn with its default, its rule and what it means.

File, environment, overrides, JSON schema and docs/configuration.md all follow from it: a new setting is one line here.
"""

from typing import Literal, Self

import yaml
from pydantic import (
    Field,
    model_validator,
)

from cairn.config.autopilot import Autopilot
from cairn.config.types import (
    Addresses,
    Algorithm,
    Directory,
    File,
    Level,
    NodeAddress,
    Policy,
    Port,
    Quality,
    RowCodec,
    Scheduling,
    Seconds,
    Secret,
    Section,
    Share,
    Size,
    SizeOrNone,
    StoreUrl,
    TcpAddress,
    Threads,
    Worth,
)


class Cpu(Section):
    """DRAM: one arena, taken and pre-faulted when the engine starts."""

    size: Size = Field(default=1 << 30, description="Bytes of the arena.")
    codec: RowCodec = Field(
        default="none",
        description="int8, fp8, int4: blocks take 9, 8.5 or 5.1 bits an element, with loss, here and below: see "
        "compression.md. "
        "Each engine's own, also where a node keeps the blocks.",
    )
    policy: Policy = Field(default="tenure", description="Eviction policy.")


class Vram(Section):
    """VRAM that engines of one host share through its node: see node.md. Size and device are each engine's own."""

    size: SizeOrNone = Field(default=0, description="Bytes of VRAM that this engine donates; 0: it shares none.")
    device: str = Field(
        default="cuda",
        pattern=r"^(cuda(:\d+)?|stand-in)$",
        description="Where: cuda (torch's current device), cuda:N, or stand-in, host memory for tests without a GPU.",
    )
    policy: Policy = Field(default="tenure", description="Eviction policy; the node's counts.")


class Disk(Section):
    """SSD: one directory, owned by one process, found warm again after a restart or a crash."""

    path: Directory | None = Field(default=None, description="Cache directory, made if missing; null: no disk tier.")
    size: Size = Field(default=16 << 30, description="Bytes that the directory may take, preallocated.")
    policy: Policy = Field(default="tenure", description="Eviction policy.")
    threads: Threads = Field(default=8, description="Threads that read and write.")
    write_budget_per_day: Size | None = Field(
        default=None, description="Bytes that may be written in a day, to spare the SSD; null: no limit."
    )
    sync_interval_s: Seconds = Field(default=1.0, description="Seconds between syncs: what a power cut may lose.")


class Remote(Section):
    """A store that other processes and hosts share: see remote.md."""

    url: StoreUrl | None = Field(
        default=None,
        description="valkey://, s3://, mooncake:// or file:// and where it is; null: no remote tier.",
    )
    object_size: Size | None = Field(
        default=None,
        description="Bytes of an object, equal for all who share the store; null: what the store likes best.",
    )
    timeout_s: Seconds = Field(default=2.0, description="Seconds that one object may take, in either direction.")
    lookup_timeout_s: Seconds = Field(default=0.25, description="Seconds that a request waits for a lookup.")
    threads: Threads = Field(default=8, description="Objects loaded at a time; a quarter of as many are stored.")
    write: Literal["through", "back", "off"] = Field(
        default="through",
        description="Store what is computed: soon; when DRAM fills up; never.",
    )
    linger_s: Seconds = Field(default=1.0, description="Seconds until a prompt is stored, in which it may grow.")
    admission: Literal["all", "second_touch"] = Field(
        default="all", description="Store everything, or only what is offered for the second time."
    )
    write_share: float = Field(
        default=0.25, ge=0, le=1, description="Stores' share of the bytes moved while requests wait for loads."
    )
    ttl_s: Seconds | None = Field(
        default=None, description="Seconds after which unused objects go (valkey, file); null: the store decides."
    )
    capacity: Size | None = Field(
        default=None, description="Bytes that all objects may take (file); null: no limit, or the store's own."
    )


class Compression(Section):
    """How the objects of `storage.remote` are stored; for DRAM and disk see `storage.cpu.codec`, and compression.md."""

    algorithm: Algorithm = Field(
        default="none",
        description="none; lossless; packed: lossless too, larger, faster; int, fp8: fixed rate; cachegen: smallest. "
        "Objects are shared among processes that all have none, all a lossless one, or all one with loss.",
    )
    quantization_bits: Literal[4, 8] = Field(default=8, description="Bits of `int`.")
    quality: Quality = Field(
        default="high", description="What `cachegen` promises: a cost of 0.0002, 0.001, 0.003 or 0.01 nats a token."
    )
    calibration: File | None = Field(
        default=None, description="File of `cairn codec calibrate`, which makes `cachegen` smaller; null: none."
    )
    device: str = Field(
        default="cpu",
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description="Where `cachegen` is encoded and decoded: cpu, cuda (torch's current device) or cuda:N, which "
        "decodes tens of times as fast.",
    )
    deadline_s: Seconds | None = Field(
        default=None,
        description="Where `autopilot.codec` is auto: seconds that an object may take to load if that spares loss; "
        "null: as few as possible.",
    )


class Blending(Section):
    """Reuse of chunks wherever they stand in a prompt, which changes answers a little: see blending.md."""

    enabled: bool = Field(default=False, description="Blend; false: reuse prefixes only.")
    special_str: str | None = Field(
        default=" # # ",
        min_length=1,
        description="What stands between a prompt's chunks; null: nothing does, and chunks are cut by their content.",
    )
    check_layers: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="Layers, ascending, at which the tokens to compute anew are chosen; before the first all are. "
        "null: the first at which `cairn blend check` found the model's answers close enough, or else 3.",
    )
    recompute_ratios: tuple[Share, ...] = Field(
        default=(0.15,),
        min_length=1,
        description="Share of the reused tokens that is computed anew from each of those layers on; not growing.",
    )
    head_tokens: int = Field(default=4, ge=0, description="Tokens at each chunk's head that are always computed anew.")

    @model_validator(mode="after")
    def _one_ratio_a_layer(self) -> Self:
        layers, ratios = self.check_layers or (1,), self.recompute_ratios
        if len(layers) != len(ratios):
            raise ValueError(f"{len(ratios)} recompute_ratios for {len(layers)} check_layers: each layer needs one")
        if layers[0] < 1 or list(layers) != sorted(set(layers)):
            raise ValueError(f"check_layers={list(layers)}: must ascend from 1 on, as layer 0 cannot differ")
        if list(ratios) != sorted(ratios, reverse=True):
            raise ValueError(f"recompute_ratios={list(ratios)}: must not grow, as what was left out is not known later")
        return self


class Storage(Section):
    """The tiers, from the fastest to the largest."""

    vram: Vram = Vram()
    cpu: Cpu = Cpu()
    disk: Disk = Disk()
    remote: Remote = Remote()


class Engine(Section):
    """How a `CacheEngine` works."""

    block_tokens: int = Field(default=16, ge=1, le=4096, description="Tokens of one KV block.")
    model_name: str | None = Field(
        default=None,
        min_length=1,
        description="vLLM: name of the model that blocks are shared under; null: the one it is served under.",
    )
    model_revision: str | None = Field(
        default=None,
        min_length=1,
        description="vLLM: what stands for the weights, for engines that cannot read them alike (see remote.md); "
        "another for every fine-tune; null: a digest of the weights' files.",
    )
    timeout_s: Seconds = Field(
        default=5.0, description="Deadline of every operation in seconds; past it the request recomputes."
    )
    lease_s: Seconds = Field(
        default=30.0,
        description="Seconds until what a silent writer or reader holds is taken back; at least timeout_s.",
    )
    planner: bool = Field(
        default=True,
        description="Recompute what would take longer to load; false: what `autopilot` leaves to costs is "
        "done wherever it can be.",
    )
    enable_cache_upload: bool = Field(default=True, description="Store what is computed; false: only read.")
    enable_service_routing: bool = Field(
        default=False,
        description="vLLM: tell which blocks DRAM and disk hold (KV events), for routers and Cairn's service.",
    )
    enable_disagg_pd: bool = Field(
        default=False,
        description="vLLM: hand KV from prefill to decode instances, through nodes or a remote store; also for a node "
        "that has a remote store or peers: what is computed goes there, and is looked for, at once.",
    )
    copy_threads: Threads = Field(default=2, description="Threads that copy between the paged KV cache and the arena.")
    write_behind: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Largest share of the arena that is pinned at a time while it is written to disk.",
    )
    log_level: Level = Field(default="WARNING", description="Least severe level that is logged.")

    @model_validator(mode="after")
    def _lease_outlives_operation(self) -> Self:
        if self.lease_s < self.timeout_s:
            raise ValueError(f"lease_s={self.lease_s:g} must be at least timeout_s={self.timeout_s:g}; raise lease_s")
        return self


class Worths(Section):
    """What a token that an instance holds in a tier is worth to a router."""

    vram: Worth = Field(default=1.0, description="In VRAM.")
    cpu: Worth = Field(default=0.8, description="In DRAM.")
    disk: Worth = Field(default=0.4, description="On disk.")
    remote: Worth = Field(default=0.3, description="In a remote tier.")


class Index(Section):
    """The service `cairn index`: which instance of a fleet holds how much of a prompt."""

    host: str = Field(default="127.0.0.1", description="Address to listen on; any but loopback needs `token`.")
    http_port: Port = Field(default=8600, description="Port of HTTP; 0: a free one.")
    rpc_port: Port | None = Field(default=8601, description="Port of gRPC; 0: a free one; null: no gRPC.")
    token: Secret | None = Field(default=None, description="Bearer token that requests must carry; null: none.")
    instances: tuple[str, ...] = Field(
        default=(), description="Publishers to follow: `NAME=ENDPOINT[,replay=ENDPOINT][,bind][,rank=N][,model=NAME]`."
    )
    models: dict[str, str] = Field(
        default={}, description="Model name: directory of its tokenizer, or its name on Hugging Face's hub."
    )
    weights: Worths = Worths()
    blocks: int = Field(default=1 << 22, ge=1, lt=1 << 28, description="Distinct blocks known at most.")
    worker_blocks: int = Field(
        default=1 << 27, ge=1, lt=1 << 31, description="Pairs of a block and an instance that holds it, at most."
    )
    sources: int = Field(default=1 << 14, ge=1, le=1 << 20, description="Instances times data-parallel ranks at most.")
    speculation_s: Seconds = Field(
        default=2.0, description="Seconds for which a prompt counts as held where it was sent."
    )
    lost_s: Seconds = Field(
        default=30.0, description="Seconds without a connection until what an instance held is forgotten."
    )
    snapshot: File | None = Field(
        default=None, description="File that the index is written to, and begins from; null: it begins empty."
    )
    snapshot_interval_s: Seconds = Field(default=60.0, description="Seconds between two snapshots.")
    shared: Secret | None = Field(
        default=None,
        description="Valkey that replicas share copies in, as `valkey://user:password@host:port/0`; null: none.",
    )
    shared_interval_s: Seconds = Field(
        default=30.0, description="Seconds between two copies; less than publishers' buffers reach back."
    )
    fleet: str = Field(default="default", pattern=r"^[\w.-]{1,64}$", description="Replicas of one name share copies.")
    max_body: Size = Field(default=16 << 20, description="Bytes of a request's body.")
    max_prompt: Size = Field(default=8 << 20, description="Bytes of a prompt's text, or of a rendered chat's.")
    max_messages: int = Field(default=4096, ge=1, description="Messages of a chat.")
    request_s: Seconds = Field(default=10.0, description="Deadline of a request in seconds.")
    shutdown_s: Seconds = Field(default=10.0, description="Seconds that the end may take, running requests included.")
    event_threads: Threads = Field(
        default=2,
        description="Threads that take events in; with `snapshot` or `shared` it is one.",
    )
    tokenizer_threads: Threads = Field(default=2, description="Threads that tokenize.")
    request_chat_template: bool = Field(
        default=False, description="Take chat templates from requests: code that is run here, in a sandbox."
    )
    log_level: Level = Field(default="WARNING", description="Least severe level that is logged.")


class Slo(Section):
    """What clients may expect."""

    ttft_s: Seconds = Field(default=2.0, description="Seconds until the first token.")
    tbt_s: Seconds = Field(default=0.1, description="Seconds between two tokens.")


class Serve(Section):
    """The service `cairn serve`: OpenAI's API in front of a cluster's engines."""

    host: str = Field(default="127.0.0.1", description="Address to listen on; any but loopback needs `api_keys`.")
    http_server_port: Port = Field(default=9888, description="Port of OpenAI's API; 0: a free one.")
    rpc_server_port: Port | None = Field(
        default=None,
        description="Port of gRPC, which answers what instances hold of a prompt; 0: a free one; null: none.",
    )
    name: str = Field(default="", max_length=200, description="This replica's name in the cluster; empty: host:port.")
    tokenizer_path: str | None = Field(
        default=None,
        description="Directory or hub name of the tokenizer of all models that have none in index.models; null: none.",
    )
    backends: tuple[str, ...] = Field(
        default=(),
        description="Engines, where none register in etcd: `URL` or "
        "`NAME=URL[,role=PREFILL][,model=NAME][,events=ENDPOINT][,replay=ENDPOINT][,ranks=N]`.",
    )
    look_s: Seconds = Field(default=1.0, description="Seconds between two looks at an engine of `backends`.")
    backend_token: Secret | None = Field(default=None, description="API key of the engines; null: none.")
    api_keys: tuple[Secret, ...] = Field(default=(), description="Keys of clients, any of which will do; empty: none.")
    admin_key: Secret | None = Field(
        default=None,
        description="Key of /admin, /metrics and the dashboard; null: clients' keys do, but there is no /admin.",
    )
    show_prompts: bool = Field(
        default=False, description="Show the beginnings of hot prompts as text on the dashboard, instead of digests."
    )
    policy: Scheduling = Field(default="slo_aware", description="Which engine takes a request: see scheduling.md.")
    slo: Slo = Slo()
    resume: Literal["greedy", "all", "never"] = Field(
        default="greedy",
        description="Which streams another engine goes on with when theirs dies: greedy ones; sampled ones too; none.",
    )
    attempts: int = Field(default=3, ge=1, le=16, description="Engines that a request is sent to at most.")
    connect_s: Seconds = Field(default=2.0, description="Seconds until an engine must have taken a connection.")
    first_token_s: Seconds = Field(default=120.0, description="Seconds until a stream's first token.")
    idle_s: Seconds = Field(default=60.0, description="Seconds between two tokens of a stream.")
    answer_s: Seconds = Field(default=600.0, description="Seconds until an answer that is no stream.")
    queue_s: Seconds = Field(default=30.0, description="Seconds that a request may wait for an engine with room.")
    client_s: Seconds = Field(default=60.0, description="Seconds that a client may read nothing of what is sent.")
    body_s: Seconds = Field(default=30.0, description="Seconds that a request's body may take to come.")
    max_body: Size = Field(default=16 << 20, description="Bytes of a request's body.")
    max_requests: int = Field(default=4096, ge=1, description="Requests at a time.")
    shutdown_s: Seconds = Field(default=30.0, description="Seconds that the end may take, running requests included.")
    log_level: Level = Field(default="WARNING", description="Least severe level that is logged.")


class Cluster(Section):
    """The registry that instances, replicas of the service and schedulers share."""

    etcd_addr: Addresses = Field(
        default=(),
        description="Addresses of etcd's members, `host:port` or `https://host:port`, a list or with commas between; "
        "empty: a registry in this process's memory.",
    )
    namespace: str = Field(
        default="cairn",
        pattern=r"^[^/\s]{1,200}$",
        description="First part of every key; clusters with different ones share an etcd.",
    )
    username: str | None = Field(default=None, min_length=1, description="User of etcd; null: none.")
    password: Secret | None = Field(default=None, description="The user's password.")
    ca: File | None = Field(
        default=None,
        description="PEM file of the authorities that etcd's certificates are checked against; null: the system's.",
    )
    cert: File | None = Field(default=None, description="PEM file of our own certificate, where etcd asks for one.")
    key: File | None = Field(default=None, description="PEM file of its key.")
    lease_s: float = Field(
        default=10.0, ge=2, le=3600, description="Seconds from the death of an instance until it is forgotten."
    )
    timeout_s: Seconds = Field(
        default=5.0, description="Deadline of every call of the registry in seconds, attempts on all members included."
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key must be set together, or neither")
        if self.password is not None and self.username is None:
            raise ValueError("password must come with a username; set username")
        return self


class Peers(Section):
    """Nodes of other hosts, which read from each other's DRAM: see node.md."""

    address: TcpAddress | None = Field(
        default=None,
        description="Where this node answers its peers, tcp:// and the address of this host's that they reach and a "
        "port, 0: a free one; null: it neither reads from peers nor do they from it.",
    )
    known: Addresses = Field(
        default=(), description="Peers' addresses. Those registered in cluster.etcd_addr are found without."
    )
    secret: Secret | None = Field(default=None, description="What all of them know, and nobody else.")
    protocol: Literal["tcp", "rdma"] = Field(default="tcp", description="How bytes are read.")
    device: str = Field(default="", description="RDMA devices, comma-separated; empty: all that there are.")
    timeout_s: Seconds = Field(default=2.0, le=60, description="Seconds that reading 16 MiB may take.")
    lookup_timeout_s: Seconds = Field(default=0.1, description="Seconds that a request waits for peers' answers.")

    @model_validator(mode="after")
    def _among_friends(self) -> Self:
        if self.address is not None and (self.secret is None or len(self.secret.get_secret_value()) < 16):
            raise ValueError("address needs a secret of at least 16 characters, the same on all hosts; set secret")
        if self.address is not None and self.address.startswith(("tcp://0.0.0.0:", "tcp://[")):
            raise ValueError(f"address={self.address}: must be the IPv4 address by which peers reach this host")
        return self


class Node(Section):
    """The host's node: see node.md."""

    address: NodeAddress | None = Field(
        default=None,
        description="Where the node listens, ipc:// and a socket's path; null: engines keep their blocks themselves.",
    )
    pools: int = Field(
        default=1, ge=1, le=64, description="Geometries (models) that share DRAM and disk, in equal parts."
    )
    timeout_s: Seconds = Field(
        default=0.5, le=2, description="Seconds that a client waits for an answer; then it runs without the node."
    )
    lease_s: Seconds = Field(
        default=10.0, ge=0.2, description="Seconds until what a silent client holds is taken back."
    )
    stop_timeout_s: Seconds = Field(default=30.0, description="Seconds that the node may flush when it is stopped.")
    peers: Peers = Peers()


class Observe(Section):
    """What is shown of a process: figures, traces, logs. See observability.md."""

    http_host: str = Field(
        default="127.0.0.1", description="Where an engine or a node is shown; any but loopback needs `http_token`."
    )
    http_port: Port | None = Field(
        default=None,
        description="Port of `/metrics`, `/health`, an engine's `/api/v1/layerwise/stats` and a node's `/dashboard/`, "
        "for each process its own; 0: a free one, which the log tells; null: none.",
    )
    http_token: Secret | None = Field(default=None, description="Bearer token for it, `/health` aside; null: none.")
    otlp_endpoint: str | None = Field(
        default=None,
        pattern="^https?://.+",
        description="Where spans go by OTLP over HTTP, as http://localhost:4318/v1/traces; null: there are none.",
    )
    trace_share: float = Field(default=1.0, ge=0, le=1, description="Share of requests traced where nobody else says.")
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines for people, or JSON objects with the request's id."
    )


class Config(Section):
    """All of Cairn's settings; every one has a default. Made by `load_config`; immutable."""

    storage: Storage = Storage()
    compression: Compression = Compression()
    blending: Blending = Blending()
    autopilot: Autopilot = Autopilot()
    engine: Engine = Engine()
    index: Index = Index()
    serve: Serve = Serve()
    cluster: Cluster = Cluster()
    node: Node = Node()
    observe: Observe = Observe()

    @model_validator(mode="after")
    def _quantized_once(self) -> Self:
        codec = self.storage.cpu.codec
        if codec != "none" and self.compression.algorithm != "none":
            raise ValueError(
                f"storage.cpu.codec={codec} with compression.algorithm={self.compression.algorithm}: what is quantized "
                "in DRAM goes to lower tiers as it is; set one of them to none"
            )
        if codec != "none" and self.storage.vram.size:
            raise ValueError(
                f"storage.cpu.codec={codec} with storage.vram.size={self.storage.vram.size}: rows in VRAM are not "
                "quantized; set codec to none, or size to 0"
            )
        return self

    def to_yaml(self) -> str:
        """The file that would make this configuration."""
        return str(yaml.safe_dump(self.model_dump(mode="json", context="text"), sort_keys=False))
