"""Which token comes next.

The rules are those of `transformers`, in its order: temperature, the `top_k` most likely, the nucleus of probability
`top_p` of these, and of what is left no token less likely than `min_p` times the most likely one. Tokens that are
equally likely are kept or left out together.

Letters: B sequences, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from frugalmoe.errors import UserError
from frugalmoe.fields import check_float, check_integer, check_seed

_COLDEST = 1e-6  # of temperatures that are not 0: logits divided by less would be infinite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: float = 0.8  # 0: the most likely token
    top_k: int = 0  # sample from so many tokens, the most likely ones (arXiv 1805.04833); 0: from all
    top_p: float = 0.95  # sample from the smallest set of tokens that holds this probability (arXiv 1904.09751)
    min_p: float = 0.0  # sample no token less likely than this times the most likely one (arXiv 2407.01082)
    max_tokens: int = 200
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        for name, ok, rule in (
            ("temperature", not self.temperature < 0, "must not be negative"),
            ("top_k", self.top_k >= 0, "must not be negative"),
            ("top_p", 0 < self.top_p <= 1, "must be in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "must be in [0, 1]"),
            ("max_tokens", self.max_tokens > 0, "must be positive"),
            ("stop", all(self.stop), "must hold no empty text, at which nothing would begin"),
        ):
            if not ok:
                raise UserError(f"--{name.replace('_', '-')}={getattr(self, name)}: {rule}")
        for name in ("temperature", "top_p", "min_p"):
            check_float(f"--{name.replace('_', '-')}", getattr(self, name))
        check_integer("--top-k", self.top_k, least=0)
        check_integer("--max-tokens", self.max_tokens, least=1)
        check_seed("--seed", self.seed)


class Chooser:
    """Chooses the next tokens of texts. The noise of a token is a function of seed, number of the text and position:
    what other texts there are, and where in a batch a text stands, changes nothing.
    """

    def __init__(self, sampling: Sampling, allowed_V: np.ndarray):
        """allowed_V: bool, the ids that may be sampled."""
        self._key, self._allowed_V = jax.random.key(sampling.seed), jnp.asarray(allowed_V)
        top_k = min(sampling.top_k, allowed_V.size)
        settings = (sampling.temperature, sampling.top_p, sampling.min_p)
        self._settings = (*map(np.float32, settings), np.int32(top_k))
        self._greedy, self._sorts = sampling.temperature == 0, top_k > 0 or sampling.top_p < 1

    def __call__(self, logits_BV: Array, number_B: np.ndarray, position_B: np.ndarray) -> Array:
        """-> int32 [B], before it is computed. number_B: of the texts; position_B: of the tokens in them."""
        if self._greedy:
            return _most_likely(logits_BV, self._allowed_V)
        places = (number_B.astype(np.int32), position_B.astype(np.int32))
        return _drawn(logits_BV, self._allowed_V, self._key, places, self._settings, sorts=self._sorts)


@jax.jit
def _most_likely(logits_BV: Array, allowed_V: Array) -> Array:
    return jnp.argmax(jnp.where(allowed_V, logits_BV, -jnp.inf), axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="sorts")
def _drawn(
    logits_BV: Array,
    allowed_V: Array,
    key: Array,
    places: tuple[Array, Array],
    settings: tuple[Array, Array, Array, Array],
    *,
    sorts: bool,
) -> Array:
    """The largest of logits with Gumbel noise is a draw from their softmax."""
    kept_BV = kept(jnp.where(allowed_V, logits_BV, -jnp.inf), settings, sorts=sorts)
    of_text = lambda number, position: jax.random.fold_in(jax.random.fold_in(key, number), position)
    noise_BV = jax.vmap(lambda *place: jax.random.gumbel(of_text(*place), allowed_V.shape))(*places)
    return jnp.argmax(kept_BV + noise_BV, axis=-1).astype(jnp.int32)


def kept(logits_BV: Array, settings: tuple[Array, Array, Array, Array], *, sorts: bool) -> Array:
    """The logits over the temperature, -inf for what is left out.

    settings: temperature, top_p, min_p, top_k. `sorts` is needed where top_k or top_p leave something out.
    """
    temperature, top_p, min_p, top_k = settings
    scaled_BV = logits_BV / jnp.maximum(temperature, _COLDEST)
    least_B1 = jnp.max(scaled_BV, axis=-1, keepdims=True) + jnp.log(min_p)
    if sorts:
        sorted_BV = -jnp.sort(-scaled_BV, axis=-1)
        last_B1 = sorted_BV[:, jnp.where(top_k > 0, top_k, sorted_BV.shape[1]) - 1][:, None]
        p_BV = jax.nn.softmax(jnp.where(sorted_BV >= last_B1, sorted_BV, -jnp.inf), axis=-1)
        inside_BV = (jnp.cumsum(p_BV, axis=-1) - p_BV < top_p) | (top_p >= 1)  # the first is always inside
        count_B1 = jnp.sum(inside_BV & (sorted_BV >= last_B1), axis=-1, keepdims=True)
        least_B1 = jnp.maximum(least_B1, jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1))
    return jnp.where(scaled_BV >= least_B1, scaled_BV, -jnp.inf)
