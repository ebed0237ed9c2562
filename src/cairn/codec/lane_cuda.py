"""What decoding and encoding on a device have in common."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch

from cairn.codec import triton_kernels
from cairn.codec.rotary import sines

DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Lane:
    """A device with a stream of commands, for one thread at a time."""

    def __init__(self, device: str) -> None:
        """Raises RuntimeError where there is no such device."""
        self.device = torch.device(device)
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.turns = lru_cache(8)(self._turns_of)

    @contextmanager
    def enqueueing(self) -> Iterator[None]:
        """What is enqueued goes into the stream."""
        with self._lock, torch.cuda.stream(self._stream) if self._stream else nullcontext():
            yield

    def put(self, numbers: Any) -> Any:
        """An array's copy on the device. Pinned, it must stay as it is until the stream has come so far."""
        return torch.from_numpy(numbers).to(self.device, non_blocking=True)

    def _turns_of(self, turns: bytes, tokens: int) -> Any:
        """int32 [tokens, pairs] of `triton_kernels.turns_of`, on the device."""
        return self.put(triton_kernels.turns_of(sines(np.frombuffer(turns, np.uint32), tokens)))
