"""What callers pass in, checked and brought into one form."""

from typing import Any

import numpy as np
import numpy.typing as npt

from cairn.copy import TokenSlots
from cairn.errors import InputError


def mask_start(mask: Any, tokens: int) -> int:
    """The first True of a mask [tokens] that is False up to some token and True from there on; 0 for None."""
    if mask is None:
        return 0
    array = np.asarray(mask)
    if array.shape != (tokens,) or array.dtype != np.bool_:
        raise InputError(f"mask of shape {array.shape} and dtype {array.dtype}: must be bool of shape ({tokens},)")
    start = tokens - int(np.count_nonzero(array))
    if not array[start:].all():
        raise InputError("mask: must be False for leading tokens only and True from there on")
    return start


def slot_array(slot_mapping: Any, tokens: int, offset: int) -> TokenSlots:
    """Slots of tokens offset..tokens as int64."""
    if not 0 <= offset <= tokens:
        raise InputError(f"offset={offset}: must be in 0..{tokens}, the number of tokens")
    if slot_mapping is None:
        raise InputError("slot_mapping is missing: name the slot of each token from `offset` on")
    array = np.asarray(slot_mapping)
    if array.shape != (tokens - offset,) or array.dtype.kind not in "iu":
        raise InputError(
            f"slot_mapping of shape {array.shape} and dtype {array.dtype}: "
            f"must be integers of shape ({tokens - offset},)"
        )
    return array.astype(np.int64, copy=False)


def check_whole(slots: TokenSlots) -> None:
    """Raises InputError where a token of blocks to store has no slot: what its row held before would pass for it."""
    if len(slots) and int(slots.min()) < 0:
        raise InputError(f"slot {int(slots.min())}: a block is stored whole, so each of its tokens needs a slot")


def like(tokens: Any, result: npt.NDArray[np.bool_]) -> Any:
    """`result` as a torch.BoolTensor if the caller speaks torch, else as it is."""
    if type(tokens).__module__.startswith("torch"):
        import torch

        return torch.from_numpy(result)
    return result
