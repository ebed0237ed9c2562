"""Which tokens the KV in a Transformers cache belongs to: learnt from what the model is given."""

from collections.abc import Mapping
from typing import Any, Final

import torch

#: Tensors that a pass may be given and that are looked at here. What others do to KV (token types) nobody knows.
_KNOWN: Final = frozenset({"input_ids", "attention_mask", "position_ids", "cache_position"})


class History:
    """The tokens of one cache, followed pass by pass.

    prompt: int64 [n] on the CPU, the tokens that the first passes must be given. held: leading tokens of it that the
    cache begins with. Owned by one cache.
    """

    def __init__(self, prompt: torch.Tensor, held: int) -> None:
        self.prompt = prompt
        self.began_with = held
        self.length = held
        self.trusted = True
        self.single = True
        self._parts: list[torch.Tensor] = [prompt[:held]]
        self._plain = torch.ones((), dtype=torch.bool)

    def is_given_whole(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the first pass, with these arguments, begins with the prompt itself and not behind what is held."""
        ids = arguments.get("input_ids")
        first = self.began_with > 0 and self.length == self.began_with and len(self._parts) == 1
        if not first or ids is None or ids.shape[1] < len(self.prompt):
            return False
        return bool((ids[:, : len(self.prompt)] == self.prompt.to(ids.device)).all())

    def begins(self, ids: torch.Tensor) -> bool:
        """Whether these tokens [batch, all], of which a pass is to be given what is not cached, begin with what is.

        Looks at a pass of several tokens or at the first one; where one token follows another, nothing is new.
        """
        known = self.length if self.single else min(self.length, self.began_with)
        if (len(self._parts) > 1 and ids.shape[1] <= self.length + 1) or ids.shape[1] <= self.length:
            return True
        held = torch.cat(self._parts)[:known].to(ids.device)
        return bool((ids[:, :known] == held).all())

    def add(self, arguments: Mapping[str, Any], past: int) -> str | None:
        """A forward pass with these arguments begins, behind `past` cached tokens; what is wrong with it, or None."""
        ids = arguments.get("input_ids")
        if ids is None:
            return "embeddings instead of token ids"
        if past != self.length:
            return "tokens that its connector did not see"
        self.single &= ids.shape[0] == 1
        self.length = past + ids.shape[1]
        expected = self.prompt[past : self.length].to(ids.device)
        plain = _is_plain(arguments, past, self.length) & (ids[:, : len(expected)] == expected).all()
        self._plain = self._plain & plain
        self._parts.append(ids[0].detach().clone())
        # Behind the prompt nobody looks before something is stored: on an accelerator a look is a wait.
        if len(expected) and not plain:
            return "another prompt than it was made for, or with padding, positions or other inputs of its own"
        return None

    def crop(self, length: int) -> None:
        """Keeps the first `length` tokens. Whatever follows them, more of the prompt or not, is taken as it comes."""
        self.length = length
        self.prompt = self.prompt[:length]
        self._parts = [torch.cat(self._parts)[:length]]

    def tokens(self) -> torch.Tensor:
        """The tokens, int64 on the CPU, whose KV the first sequence in the cache holds for certain."""
        if not self.trusted or not bool(self._plain):
            return self.prompt[:0]
        return torch.cat(self._parts).cpu() if self.single else self.prompt[: self.length]


def _is_plain(arguments: Mapping[str, Any], past: int, total: int) -> torch.Tensor:
    """Whether tokens past..total stand at positions past..total behind nothing but each other (a bool tensor), and are
    all that the pass is given.
    """
    plain = torch.ones((), dtype=torch.bool)
    if any(isinstance(value, torch.Tensor) and name not in _KNOWN for name, value in arguments.items()):
        return ~plain
    positions, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    if positions is not None:
        expected = torch.arange(past, total, device=positions.device)
        plain = plain & (positions == expected).all() if positions.shape[-1] == total - past else ~plain
    if mask is not None:
        whole = isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] == total
        plain = plain & mask.all() if whole else torch.zeros_like(plain)
    return plain
