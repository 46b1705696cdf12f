"""What a merge rule is: from small arrays that describe contributions to the coefficients with which they are added.

Only the island that commits a round asks the rule; the others read the coefficients in its record. A rule is a pure
function: no clock, no randomness, nothing that it remembers but the history that it returned before.

Letters: M contributions, Q tensors.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from frugalmoe import fields
from frugalmoe.errors import UserError
from frugalmoe.islands.tensors import Tensor
from frugalmoe.schema import Islands

OPTIONS = "islands.merge_options"  # for messages


class Offered(NamedTuple):
    """The contributions of a round, known to be finite and of the right shapes: outer parameters minus an island's."""

    islands: tuple[str, ...]  # M names, all different
    gram_QMM: np.ndarray  # float64: for each tensor the inner products of the contributions, `outer.gram`
    tensors: tuple[Tensor, ...]  # Q
    tokens_M: np.ndarray  # int64: trained on since the outer parameters that the contribution started from
    steps_M: np.ndarray  # int64: updates since then
    staleness_M: np.ndarray  # int64: rounds that the contribution comes late


class Merged(NamedTuple):
    """With which coefficients the contributions are added."""

    coefficients_MQ: np.ndarray  # float32, finite; rows of 0 for what is left out
    left_out: Mapping[str, str] = {}  # island -> why, in one line: none of it is merged
    history: Mapping[str, Any] = {}  # ready for JSON: what the rule is given in the next round
    notes: Mapping[str, str] = {}  # island -> what else it should be told: parts of it are not merged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every rule can be told; a rule with more of its own has a dataclass that inherits from this one."""

    staleness: float = 1.0  # a contribution that is s rounds late weighs 1 / (1 + staleness * s)


Rule = Callable[[Offered, Mapping[str, Any], Any], Merged]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """A merge rule. A file of `merges/` ends with `MERGE = Merge(...)`."""

    about: str  # one line, with its source
    rule: Rule  # (offered, history, options) -> merged; it may leave coefficients in float64
    options: type = Options  # frozen dataclass of defaults
    check: Callable[[Any], str | None] = lambda options: None  # what is wrong with options, as "field=value: rule"
    # What to tell who starts an island with (options, the section of the config); empty: nothing.
    advice: Callable[[Any, Islands], str] = lambda options, section: ""
    scales: bool = True  # deltas that are c times as large are merged into c times as much
    name: str = ""  # the file's

    def options_of(self, given: Mapping[str, Any] | Any = None) -> Any:
        """Returns the rule's options with the defaults of what is not given.

        Raises `UserError` for an option that the rule does not have, of another type, or out of its range.
        """
        made = fields.build(self.options, {} if given is None else given, OPTIONS)
        wrong = f"staleness={made.staleness!r}: must not be negative" if made.staleness < 0 else self.check(made)
        if wrong:
            raise UserError(f"{OPTIONS}.{wrong}")
        return made

    def merge(self, offered: Offered, history: Mapping[str, Any] | None = None, options: Any = None) -> Merged:
        """Returns how contributions are merged; `history` is that of the round before, `options` a mapping or built.

        Raises `UserError` where a rule returns what is none: coefficients that are not finite or of another shape.
        """
        shape = len(offered.islands), len(offered.tensors)
        if not offered.islands or not offered.tensors:
            return Merged(np.zeros(shape, np.float32), history=dict(history or {}))
        found = self.rule(offered, history or {}, self.options_of(options))
        with np.errstate(over="ignore"):
            coefficients = np.asarray(found.coefficients_MQ, np.float64).astype(np.float32)
        if coefficients.shape != shape or not np.isfinite(coefficients).all():
            raise UserError(
                f"islands.merge={self.name!r}: the rule gives coefficients that are not {shape} or not finite"
            )
        if unknown := sorted((found.left_out.keys() | found.notes.keys()) - set(offered.islands)):
            raise UserError(f"islands.merge={self.name!r}: the rule speaks of {unknown[0]!r}, which offered nothing")
        coefficients[[name in found.left_out for name in offered.islands]] = 0
        return found._replace(coefficients_MQ=coefficients)


def weights(offered: Offered, options: Options, of_fresh_M: np.ndarray) -> np.ndarray:
    """Returns float64 weights [M] that sum to 1: those of fresh contributions, which the late ones' are reduced from.

    The one place where staleness counts. Where all weights are 0, all are alike.
    """
    weight_M = np.asarray(of_fresh_M, np.float64) / (
        1 + options.staleness * np.asarray(offered.staleness_M, np.float64)
    )
    total = math.fsum(weight_M)
    return weight_M / total if total > 0 else np.full(len(weight_M), 1 / len(weight_M))


def by_tokens(offered: Offered, per_step: bool) -> np.ndarray:
    """Returns tokens [M], or tokens * tokens / steps, as Decoupled DiLoCo (arXiv 2604.21428) weighs learners: those
    with larger batches have better gradients.
    """
    tokens_M = np.asarray(offered.tokens_M, np.float64)
    return tokens_M * tokens_M / np.maximum(offered.steps_M, 1) if per_step else tokens_M


def norms(gram_MM: np.ndarray) -> np.ndarray:
    """Returns the lengths [..., M] of vectors with these inner products [..., M, M]."""
    return np.sqrt(np.maximum(np.diagonal(gram_MM, axis1=-2, axis2=-1), 0))
