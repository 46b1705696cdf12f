"""Published models are what they are in `transformers`: logits, routing, gradients, and the way back.

GLM-4-MoE is Ling 2.0 after renaming; Granite-MoE-shared with unit multipliers is Ling 1 without NormHead.
"""

import numpy as np
import parity
import pytest
from published import CASES

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
FIGURES = ("logits", "KL", "gradients", "weights")  # columns that depend on the machine


def stable(line: str) -> list[str]:
    """The cells of a row of the page that are the same on all machines."""
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return [cell for name, cell in zip(parity.COLUMNS, cells, strict=True) if name not in FIGURES]


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "mixtral" else pytest.mark.slow) for c in CASES])
def test_the_same_model_and_the_same_comes_back(case, tmp_path):
    row = parity.measure(case, tmp_path)
    assert not parity.faults(row), row
    assert stable(parity.line(row)) in map(stable, parity.rows_of_models()), "`make parity` writes docs/parity.md"


def test_the_page_has_every_model_and_says_how_it_is_made():
    said = parity.PAGE.read_text(encoding="utf-8")
    assert said.startswith(parity.head()), "`make parity` writes docs/parity.md"
    models = [tuple(cell.strip(" `") for cell in line.split("|")[1:3]) for line in parity.rows_of_models()]
    assert models == [parity.names(case) for case in CASES], "`make parity` writes docs/parity.md"
    assert all(line.endswith("| pass |") for line in parity.rows_of_models())


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"logits": 1e-5}, "logits 1.0e-05"),
        ({"kl": 1e-8}, "kl 1.0e-08"),
        ({"kl": float("nan")}, "kl nan"),
        ({"gradients": float("inf")}, "gradients inf"),
        ({"weights": 1e-4}, "weights 1.0e-04"),
        ({"misrouted": 1}, "1 tokens of 24 misrouted"),
        ({"again": 1e-6}, "again 1.0e-06"),
        ({"exported": 1e-30}, "exported 1.0e-30"),
    ],
)
def test_a_figure_at_its_bound_does_not_pass(change, fault):
    row = parity.Row("mixtral", 0.0, 0.0, 0.0, 24, 0, 0.0, 0.0, 0.0)
    assert parity.line(row).endswith("| 24 of 24 | 0 | 0 | pass |") and not parity.faults(row)
    assert parity.faults(row._replace(**change)) == [fault] and parity.line(row._replace(**change)).endswith(
        f"| {fault} |"
    )


def test_the_divergence_is_that_of_a_hand_computed_pair():
    """KL((1/2, 1/2), (1/4, 3/4)) = log(2) / 2 + log(2/3) / 2 = log(4/3) / 2."""
    theirs, ours = np.log([[[0.5, 0.5]]]), np.log([[[0.25, 0.75]]])
    assert abs(parity.kl(theirs, ours) - np.log(4 / 3) / 2) < 1e-12
