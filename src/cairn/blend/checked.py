"""What `cairn blend check` found of a model, in a file beside its weights: where to check, and whether to blend."""

import logging
import math
from pathlib import Path
from typing import Final, Self

import msgspec

from cairn.blend.forward import Recipe
from cairn.config.schema import Blending
from cairn.errors import GeometryError
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

FILE: Final = "cairn-blend.json"
#: For models that have not been checked.
DEFAULT: Final = Recipe()


class Checked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """kl: nats a token, by the layer (or layers) at which tokens were chosen: the upper end of its interval of 95 %.
    most_kl: what was allowed. The others: the settings it was measured with.
    """

    special_str: str | None
    recompute_ratios: tuple[float, ...]
    head_tokens: int
    most_kl: float
    kl: tuple[tuple[tuple[int, ...], float], ...]

    @classmethod
    def of(cls, settings: Blending, most_kl: float, kl: dict[tuple[int, ...], float]) -> Self:
        ratios, head_tokens = settings.recompute_ratios, settings.head_tokens
        return cls(settings.special_str, ratios, head_tokens, most_kl, tuple(sorted(kl.items())))

    def fits(self, settings: Blending) -> bool:
        """Whether it was measured with them, wherever they check."""
        measured = self.special_str, self.recompute_ratios, self.head_tokens
        return measured == (settings.special_str, settings.recompute_ratios, settings.head_tokens)

    @property
    def check_layers(self) -> tuple[int, ...] | None:
        """The cheapest that were close enough: those that begin first; None if none were."""
        return next((layers for layers, kl in self.kl if kl <= self.most_kl), None)

    def save(self, model: Path) -> Path:
        """Where it is from now on. Raises OSError where the model's directory cannot be written to."""
        (model / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
        return model / FILE


def recipe_of(settings: Blending, model: str, layers: int) -> Recipe:
    """What to compute anew of a model of so many layers: as configured, and where that says nothing, as checked.

    model: its directory, or its name in the local cache of the Hugging Face hub. Raises GeometryError for one whose
    check has failed with these settings, InputError for settings that do not fit it.
    """
    path, wanted = _file(model), settings.check_layers
    checked = _load(path) if path else None
    if checked and checked.fits(settings):
        wanted = wanted or checked.check_layers
        kl = dict(checked.kl).get(wanted, 0.0) if wanted else min((kl for _, kl in checked.kl), default=math.inf)
        if kl > checked.most_kl:
            raise GeometryError(
                f"blending is not possible: by {path} it costs up to {kl:.3g} nats a token, more than "
                f"{checked.most_kl:g}; set blending.enabled to false, or check again with other settings"
            )
    recipe = Recipe(
        wanted or (min(DEFAULT.check_layers[0], layers - 1),), settings.recompute_ratios, settings.head_tokens
    )
    recipe.validate(layers)
    if not (checked and checked.fits(settings)):
        log_once(logger, model, f"blending was not checked with {model} and its settings: run `cairn blend check`")
    return recipe


def _file(model: str) -> Path | None:
    path = Path(model) / FILE
    if not model or Path(model).is_dir():
        return path if model and path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, FILE)
    except ValueError:  # no name of the hub's
        return None
    return Path(found) if isinstance(found, str) else None


def _load(path: Path) -> Checked:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Checked)
    except (OSError, msgspec.DecodeError) as error:
        raise GeometryError(f"{path}: not what `cairn blend check` writes ({error}); check again") from error
