"""A real vLLM on the CPU with a real small model, in this process."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

os.environ |= {
    # Two processes test at once, each with engines on whichever core is free: threads that are bound to a core, or spin
    # while they wait for each other, would keep it from others. After vLLM's n-gram proposer torch has numba's number.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "NUMBA_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2-135M-Instruct in Hugging Face format."""
    from cairn.cli.demo.model import default_cache_dir, fetch_model
    from cairn.cli.demo.show import Screen

    return fetch_model(default_cache_dir(), Screen(quiet=True))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, wide enough that every prompt has its own answer: for tests that need many engines,
    or ranks, rather than sense.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=40960,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.25,
        tie_word_embeddings=False,
    )
    home = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).float().save_pretrained(home)
    return home


@pytest.fixture(scope="session")
def tiny_texts(tiny: Path, model: Path) -> Path:
    """It, with SmolLM2's tokenizer, for servers, which answer in text."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model).save_pretrained(tiny)
    return tiny


@pytest.fixture(scope="session")
def all_tiny(tiny: Path) -> list[list[int]]:
    """What vLLM alone answers with the tiny model, to 16 PROMPTS, then to 8 LONGER, then to OTHER."""
    from tests.vllm.engine import LONGER, OTHER, PROMPTS, answers, serving

    with serving(tiny, None, enable_prefix_caching=False, skip_tokenizer_init=True) as llm:
        found = answers(llm, PROMPTS[:16] + LONGER[:8] + [OTHER])
    assert len({tuple(answer) for answer in found}) > 16
    return found


@pytest.fixture(scope="session")
def tiny_plain(all_tiny: list[list[int]]) -> list[list[int]]:
    return all_tiny[:16]


@pytest.fixture(scope="session")
def tiny_longer(all_tiny: list[list[int]]) -> list[list[int]]:
    return all_tiny[16:24]


@pytest.fixture(scope="session")
def tiny_other(all_tiny: list[list[int]]) -> list[int]:
    return all_tiny[24]


@pytest.fixture(scope="session", autouse=True)
def _survive_another_engine() -> Iterator[None]:
    """vllm-cpu 0.32 puts its kernels in place by a scan of all modules, anew with each engine of a process, where once
    is enough. It trips over an object of llvmlite's that answers to every attribute. One engine a process, as users
    have it, is not affected.
    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.triton_utils import dispatcher

    def plain_vars(value: object) -> dict[str, object]:
        found = vars(value)
        return found if isinstance(found, dict) else {}

    once = staticmethod(cache(CpuPlatform.register_triton_kernel_overrides))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher, "vars", plain_vars, raising=False)
        patch.setattr(CpuPlatform, "register_triton_kernel_overrides", once)
        yield
