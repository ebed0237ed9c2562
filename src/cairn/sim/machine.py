"""What a simulated instance takes for a step, in seconds: one GPU's costs, from measurements."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """An engine on its GPU, with continuous batching and chunked prefill.

    step = max(floor_s, token_s (n + batch) + attention_s n (context + n / 2) + read_s (tokens that the batch attends))

    n tokens of a prefill behind `context` others, and `batch` requests that decode one token each.
    """

    floor_s: float  # of a step: launching kernels, sampling, the scheduler
    token_s: float
    attention_s: float  # a pair of query and key
    read_s: float  # of one token's KV
    token_bytes: int  # of KV a token
    blocks: int  # of KV that fit
    block_tokens: int = 512  # the trace's
    chunk: int = 2048  # tokens of a step
    running: int = 256  # requests at once
    load_latency_s: float = 1e-3  # from the shared tier
    load_bytes_s: float = 12.5e9

    def step_s(self, computed: int, attended: float, batch: int, read: int) -> float:
        """computed: tokens of prefill; attended: their pairs of query and key; read: tokens that the batch attends."""
        work = self.token_s * (computed + batch) + self.attention_s * attended + self.read_s * read
        return max(self.floor_s, work)

    def load_s(self, size: int) -> float:
        """Of so many bytes from the shared tier."""
        return self.load_latency_s + size / self.load_bytes_s


#: vLLM 0.26 with Llama-3.1-8B in bf16 on one H200. Prefill and floor: the cold and GPU-hit times of
#: benchmarks/results/ttft_vllm.json (a test holds these to them); reads: 128 KiB a token at the 4,220 GB/s
#: that the GPU's memory moved; blocks: 100 GB. Loads from the shared tier: 100 Gb/s, an assumption.
H200_8B = Machine(
    floor_s=0.032,
    token_s=2.238e-5,
    attention_s=9.13e-10,
    read_s=131_072 / 4.22e12,
    token_bytes=131_072,
    blocks=1_500,
)
