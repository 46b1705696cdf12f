"""How many runs of a study one process trains at once, under one `jax.vmap`.

On CPUs one. Milliseconds for one step of all runs on two cores that other programs used too, and how many times as fast
as one after the other (`benchmarks/seeds.py`). CPU: of all threads, which the other programs disturb less.

| size | | one after the other | `lax.map` | `vmap` | a process per core |
|---|---|---|---|---|---|
| configs/study.py, 4 runs | clock | 2152 | 1845 (1.27x) | 3309 (0.69x) | 2234 (0.94x) |
| | CPU | 1179 | 1078 | 1652 | 1110 |
| quickstart:laptop, 4 runs | clock | 629 | 673 (1.04x) | 748 (0.86x) | 617 (1.02x) |
| | CPU | 374 | 306 | 409 | 344 |
| dim 32, 8 sequences of 32, 4 runs | clock | 17.2 | 21.1 (0.84x) | 18.7 (0.93x) | 19.2 (0.92x) |
| | CPU | 17.7 | 20.6 | 17.9 | 18.8 |

Under `vmap` the loop over blocks of `experts/blocks.py` goes on for every run until the longest is done: it loses at
every size. `lax.map` has the bits of one after the other and saves up to a fifth of the work, but not at every size; it
is no way of its own here, because `--jobs` saves nearly as much and no core waits for another there: on two idle cores
two processes should take half of their CPU time.

On an accelerator a small model leaves most of the chip idle, and one program of S runs is expected to cost little more
than one run: there as many as memory holds. This has not been measured.
"""

import jax

from frugalmoe.ablate.plan import Pair, Plan
from frugalmoe.aot.program import as_expected
from frugalmoe.config import Config
from frugalmoe.train.objective import without_knobs
from frugalmoe.train.optim import bytes_of

SHARE_OF_MEMORY = 0.6  # the estimate is rough, and XLA needs room to work
LARGEST = 16  # beyond it a program gains little and takes long to compile


def groups(plan: Plan, at_once: int | None = None) -> list[list[Pair]]:
    """Returns the plan's runs in groups that share a program: equal configs up to name, seed, loss coefficients,
    learning rates, weight decay and what clips.

    A run that accumulates gradients is alone: it adds to them in place, which `jax.vmap` does not support; and so is
    one of virtual islands, which are several already.
    """
    by_program: dict[Config, list[Pair]] = {}
    for pair in plan.pairs:
        by_program.setdefault(without_knobs(plan.config(pair)), []).append(pair)
    found = []
    for config, pairs in by_program.items():
        size = 1 if config.train.accumulate_steps > 1 or config.islands.virtual else at_once or fit(config)
        found += [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return sorted(found, key=lambda group: plan.pairs.index(group[0]))


def fit(config: Config) -> int:
    """Returns how many runs of a config to train at once on this machine's first device."""
    if jax.default_backend() == "cpu":
        return 1
    free = jax.devices()[0].memory_stats()["bytes_limit"] * SHARE_OF_MEMORY
    return max(1, min(LARGEST, int(free // bytes_of_run(config))))


def bytes_of_run(config: Config) -> int:
    """Returns an estimate from shapes: parameters, gradients, the optimizer's state, what the backward pass keeps.

    Per token and layer about 16 rows of the model's width (residuals, norms, queries, keys, values) and, for each
    active expert, 6 of the expert's (gate, up, their product, and gradients); logits of `loss_chunk` tokens twice.
    """
    config = as_expected(config, None)
    m, t, of_run = config.model, config.train, bytes_of(config)
    tokens = t.batch_size // t.accumulate_steps * config.data.sequence_length
    active = (m.moe.num_experts_per_token + m.moe.num_shared_experts) * m.moe.expert_dim
    per_token = m.num_layers * (16 * m.dim + 6 * max(active, m.dense_dim))
    activations = 4 * (tokens * per_token + 2 * t.loss_chunk * m.vocab_size)
    return sum(of_run) + activations
