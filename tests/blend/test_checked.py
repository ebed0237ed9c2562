"""What a check found decides where blending checks, and whether it is done."""

from pathlib import Path

import pytest

from cairn.blend.checked import DEFAULT, FILE, Checked, recipe_of
from cairn.config.schema import Blending
from cairn.errors import GeometryError, InputError

SETTINGS = Blending()
KL = {(6,): 0.07, (1,): 0.3, (3,): 0.09}


def layers(model: Path, settings: Blending = SETTINGS) -> tuple[int, ...]:
    return recipe_of(settings, str(model), 30).check_layers


def test_the_first_that_was_close_enough(tmp_path: Path) -> None:
    assert layers(tmp_path) == DEFAULT.check_layers
    for most, wanted in ((0.5, (1,)), (0.1, (3,)), (0.08, (6,))):
        assert Checked.of(SETTINGS, most, KL).save(tmp_path) == tmp_path / FILE
        assert layers(tmp_path) == wanted
    assert layers(tmp_path, Blending(check_layers=(2,))) == (2,)


def test_none_was(tmp_path: Path) -> None:
    Checked.of(SETTINGS, 0.05, KL).save(tmp_path)
    with pytest.raises(GeometryError, match=r"costs up to 0\.07 nats a token, more than 0\.05"):
        layers(tmp_path)
    with pytest.raises(GeometryError, match=r"up to 0\.3 nats"):
        layers(tmp_path, Blending(check_layers=(1,)))
    for other in ({"recompute_ratios": (0.3,)}, {"head_tokens": 5}, {"special_str": None}):
        assert layers(tmp_path, Blending.model_validate(other)) == DEFAULT.check_layers


@pytest.mark.parametrize("model", ["", "no/such/model/at-all", "nobody/has-this-model"])
def test_unchecked_models(model: str) -> None:
    assert recipe_of(SETTINGS, model, 30).check_layers == DEFAULT.check_layers
    assert recipe_of(SETTINGS, model, 4).check_layers == (3,)
    with pytest.raises(InputError, match=r"the model has layers 0\.\.3"):
        recipe_of(Blending(check_layers=(4,)), model, 4)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"kl": 3}')
    with pytest.raises(GeometryError, match="check again"):
        layers(tmp_path)
