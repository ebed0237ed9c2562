"""A layer of a Transformers cache that appends in place."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

Tensors = tuple[torch.Tensor, torch.Tensor]


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """As a `DynamicLayer`, but K and V are the first tokens of buffers with room for more.

    A DynamicLayer copies the whole cache for every new token; here a token is written where it belongs. Everything
    else (crop, beams) works on the views `keys` and `values`, as in the base class; a layer whose views were replaced
    gets new buffers when it next grows.

    buffers: for K and V, [1, heads, room, dim] each.
    """

    def __init__(self, buffers: Tensors) -> None:
        super().__init__()
        self.adopt(buffers, 0)

    def adopt(self, buffers: Tensors, tokens: int) -> None:
        """Takes [batch, heads, room, dim] buffers for K and V; their first `tokens` are in use, or soon will be."""
        self.dtype, self.device = buffers[0].dtype, buffers[0].device
        self.is_initialized = True
        self.buffers = buffers
        self.keys, self.values = buffers[0][:, :, :tokens], buffers[1][:, :, :tokens]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Tensors:
        """Appends [batch, heads, new, dim]; returns all of K and V, as views."""
        past = self.get_seq_length()
        total = past + key_states.shape[-2]
        if not self._fits(key_states, value_states, total):
            self._grow(key_states, value_states, past, total)
        keys, values = self.buffers
        # Inference only: what is written into the buffers carries no gradient.
        keys[:, :, past:total].copy_(key_states.detach())
        values[:, :, past:total].copy_(value_states.detach())
        self.keys, self.values = keys[:, :, :total], values[:, :, :total]
        return self.keys, self.values

    def reset(self) -> None:
        """Forgets all tokens; the buffers stay."""
        self.adopt(self.buffers, 0)

    def _fits(self, key_states: torch.Tensor, value_states: torch.Tensor, total: int) -> bool:
        keys, values = self.buffers
        in_place = self.get_seq_length() == 0 or self.keys.data_ptr() == keys.data_ptr()
        # Other heads than the geometry's would be broadcast into the buffers, or not fit at all.
        same_shape = keys.shape[:2] == key_states.shape[:2] == value_states.shape[:2] and (
            (keys.shape[3], values.shape[3]) == (key_states.shape[3], value_states.shape[3])
        )
        same_dtypes = (keys.dtype, values.dtype) == (key_states.dtype, value_states.dtype)
        return bool(in_place and same_shape and same_dtypes and total <= keys.shape[2])

    def _grow(self, key_states: torch.Tensor, value_states: torch.Tensor, past: int, total: int) -> None:
        room = max(self.buffers[0].shape[2], total + total // 4)
        keys, values = (
            states.new_empty((*states.shape[:2], room, states.shape[3])) for states in (key_states, value_states)
        )
        if past:
            # One sequence so far and several from now on (beams, samples of one prompt) broadcasts.
            keys[:, :, :past].copy_(self.keys)
            values[:, :, :past].copy_(self.values)
        self.adopt((keys, values), past)
