"""What the Python blocks of a page take for granted: a model, a paged cache, a server."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from cairn.fleet.instances import Instance
from tests.connect.rig import tiny_model
from tests.demo.tiny import tiny_tokenizer
from tests.tier.remote import servers

#: The name of what is to be replaced in a page's text, with what.
REPLACED = "__replaced__"


def _model(home: Path, stack: ExitStack) -> dict[str, Any]:
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)  # two would wait for each other on a busy machine
    path = home / "model"
    tiny_model(vocab_size=256).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    return {"path": path, "model": model, "prompt": "A cairn is a stack of stones that guides travellers. "}


def _rag(home: Path, stack: ExitStack) -> dict[str, Any]:
    given = _model(home, stack)
    tiny_model(vocab_size=256, num_hidden_layers=8).save_pretrained(given["path"])
    documents = [f"Document {i}: {given['prompt'] * 4}" for i in range(3)]
    return {**given, "documents": documents, "retrieved": documents[::-1], "system": "Answer.", "question": "What?"}


def _paged_cache(_: Path, __: ExitStack) -> dict[str, Any]:
    pages, tokens = 4, np.arange(40)
    kvcaches = [torch.zeros((2, pages, 16, 8, 128), dtype=torch.bfloat16) for _ in range(32)]
    return {"tokens": tokens, "slots": tokens.copy(), "kvcaches": kvcaches}


def _valkey(home: Path, stack: ExitStack) -> dict[str, Any]:
    server = stack.enter_context(servers.running(servers.valkey(home)))
    there = {"user:password@host:6379": f"127.0.0.1:{server.ports[0]}"}
    return {"path": home / "index", "instances": [Instance("a", "tcp://127.0.0.1:1")], REPLACED: there}


#: By page.
GIVEN: dict[str, Callable[[Path, ExitStack], dict[str, Any]]] = {
    "README.md": _model,
    "blending.md": _rag,
    "embedding.md": _paged_cache,
    "fleet-replicas.md": _valkey,
    "remote.md": _model,
    "transformers.md": _model,
}
