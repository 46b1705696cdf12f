"""The leak meter: what a training rule that looks at other tokens is worth to the loss, and is not there in use.

Letters: N tokens.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from frugalmoe.analysis.lab.interventions import Nothing
from frugalmoe.analysis.lab.lab import TOKENS, Lab, domain_parts
from frugalmoe.analysis.measures.uncertainty import Estimate, mean
from frugalmoe.errors import UserError
from frugalmoe.model.causality import leaking
from frugalmoe.train.step import make_eval_step


class Gap(NamedTuple):
    """What looking ahead is worth on one domain, or on "all" tokens."""

    domain: str
    training: float  # nats per token, routed by the training rule
    causal: float  # routed as in evaluation
    gap: Estimate
    tokens: int
    documents: int


def gap(causal_N: np.ndarray, training_N: np.ndarray, unit_N: np.ndarray) -> Estimate:
    """mean_n(causal loss - loss under the training rule), in nats, of the same weights on the same tokens.

    Positive: the training loss is better than what the model can do in use, by a leak or because its experts are used
    to other tokens. 0 where both rules are the same. Negative: noise of exploration, or drops, that only training has.
    """
    return mean(causal_N - training_N, unit_N)


def train_causal_gap(run: str | Path, *, checkpoint: int | None = None, tokens: int = TOKENS) -> list[Gap]:
    """`gap` of a run's checkpoint, the newest by default, on held-out documents of each domain and of all.

    Raises `UserError` where evaluation leaks too, so that there is no causal loss. Cost: two evaluations.
    """
    lab = Lab(Path(run), checkpoint, tokens)
    if parts := leaking(lab.config.model, train=False):
        rule = "the experts of a token depend on later tokens in evaluation too, so there is no causal loss to compare"
        raise UserError(f"{run}: {parts}: {rule}")
    causal = lab.probe(Nothing())
    rule = {"as_in_training": lab.step, "vocabulary": lab.data.tokenizer.size}
    training = lab.probe(Nothing(), jax.jit(make_eval_step(lab.config, trace=True, **rule)))
    return [
        Gap(
            domain,
            float(training.loss_N[of_N].mean()),
            float(causal.loss_N[of_N].mean()),
            gap(causal.loss_N[of_N], training.loss_N[of_N], unit_N),
            int(of_N.sum()),
            int(unit_N.max()) + 1,
        )
        for domain, of_N, unit_N in domain_parts(causal, lab.data.domains)
    ]
