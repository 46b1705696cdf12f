"""`frugalmoe plan --hf`: every family that `convert` knows is read from config.json as transformers writes it."""

import json

import published
import pytest

from frugalmoe.convert import families
from frugalmoe.convert.from_hf import config_alone
from frugalmoe.cost import formulas


@pytest.mark.parametrize("case", published.FIRST)
def test_parameters_of_every_family(case, tmp_path):
    """Those of transformers' model, which leaves modules of multi-token prediction out."""
    model = published.randomized(case)
    saved = model.config.to_dict()
    saved |= dict.fromkeys({"num_nextn_predict_layers"} & saved.keys(), 0)
    (tmp_path / "config.json").write_text(json.dumps(saved, default=str), encoding="utf-8")
    own = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert formulas.parameters(config_alone(tmp_path).model).total == pytest.approx(own, rel=0.02)


def test_modules_that_predict_further_ahead_are_counted(tmp_path):
    saved = published.randomized("deepseek_v3").config.to_dict()
    total = []
    for modules in (0, 1):
        (tmp_path / "config.json").write_text(
            json.dumps(saved | {"num_nextn_predict_layers": modules}), encoding="utf-8"
        )
        total.append(formulas.parameters(config_alone(tmp_path).model).total)
    assert total[1] > total[0] + 2 * published.D**2


def test_there_is_a_case_of_every_family():
    kinds = {published.randomized(case).config.model_type for case in published.FIRST}
    ours = {name for name in families.names() if not name.startswith("bailing")}  # not in transformers
    assert ours <= kinds | {"llama4_text"}, ours - kinds
